"""Errors that locus raises for a person to read."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line that names the thing, the place and the mend. The command line prints it
    without a traceback and exits with status 2.
    """


class Stopped(RuntimeError):
    """The work ended for a reason outside of it; the message says which, and how to go on, in one line."""


class AlreadySaid(RuntimeError):
    """Another process of the same job has said what went wrong: this one ends without a word."""
