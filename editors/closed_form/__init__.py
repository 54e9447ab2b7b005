"""Edits by closed form: ROME, MEMIT, AlphaEdit, LaW, subspace projection."""
