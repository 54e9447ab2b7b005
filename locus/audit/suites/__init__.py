"""Benchmarks in their own files, with their published figures. `table.py` lists them."""
