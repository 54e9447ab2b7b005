"""Checkpoint folders of Hugging Face: read in a stream, written whole or not at all, compared bit by bit."""

from locus.fingerprint import fingerprint_of
from locus.folder import Checkpoint

__all__ = ["Checkpoint", "fingerprint_of"]
