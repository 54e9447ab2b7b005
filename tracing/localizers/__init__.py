"""Localizers: one method per file. `tracing/__init__.py` lists them."""
