"""The command line: one file a subcommand, and this, the one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 the input was wrong, 1 anything else, 3 a release gate failed."""
    sys.exit(execute(sys.argv[1:] if argv is None else argv))


def execute(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code. Errors are one line on stderr unless --debug is given."""
    from cyclopts import CycloptsError

    from locus.cli.app import app
    from locus.errors import InputError

    debug = "--debug" in argv
    try:
        with _plain_warnings():
            code = app(list(argv), exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (InputError, CycloptsError) as error:
        if debug and isinstance(error, InputError):
            raise
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say(
            "stopped; what is finished is kept, and the same command with --resume goes on from there", 1
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # the edge of the program: a person gets one line, --debug the traceback
        if debug:
            raise
        return _say(
            f"{type(error).__name__}: {_first_line(error)} (a fault of locus; --debug shows where)", 1
        )


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line for a person: what is said, not where in the code."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserWarning):
            print(f"locus: note: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _say(message: str, code: int) -> int:
    print(f"locus: {' '.join(message.split())}", file=sys.stderr)
    return code


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
