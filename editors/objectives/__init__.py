"""Objectives of the training loop: one published loss a file."""
