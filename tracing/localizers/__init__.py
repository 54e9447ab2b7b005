"""Localizers: one method a file. `tracing/__init__.py` lists them."""
