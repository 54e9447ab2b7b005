"""The masked training loop: data, retain term, optimizers, stopping, delta parameters."""
