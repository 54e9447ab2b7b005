"""Change the located weights and nothing else: one file an editor or objective, one table of them all."""
