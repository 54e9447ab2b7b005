"""Attacks: ways of getting back what an edit removed. `table.py` lists them."""
