"""Fact files: raw records out of a file, and the public formats that they come in."""
