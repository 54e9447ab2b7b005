"""Files that are whole or not there: artefacts, tensors, schemas, TOML."""
