"""Find where a model keeps a fact: one file a localizer, one table of them all."""
