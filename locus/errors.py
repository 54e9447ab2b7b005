"""The one exception that means: the input was wrong, and here is how to mend it."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line that names the thing, the place and the mend. The command line prints it
    without a traceback and exits with status 2.
    """
