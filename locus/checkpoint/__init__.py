"""Checkpoint folders of Hugging Face: read in a stream, written whole or not at all, compared bit by bit."""

from locus.checkpoint.folder import Checkpoint
from locus.fingerprint import fingerprint_of

__all__ = ["Checkpoint", "fingerprint_of"]
