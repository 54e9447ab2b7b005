"""Edits of single FFN neurons."""
