"""The replay engine: patched forwards, computed only where a patch can change them."""
