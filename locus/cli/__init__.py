"""The command line: one file a subcommand, and this, the one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

_SHARED = ("trace", "locate", "edit", "audit")
"""Commands that share their work among the processes of torchrun."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 the input was wrong, 1 anything else, 3 a release gate failed."""
    sys.exit(execute(sys.argv[1:] if argv is None else argv))


def execute(argv: Sequence[str]) -> int:
    """Run one command; returns its exit code. Errors are one line on stderr unless --debug is given."""
    from cyclopts import CycloptsError

    from locus.cli.app import app, import_commands
    from locus.cli.renamed_options import current_options
    from locus.errors import AlreadySaid, InputError, Stopped

    debug = "--debug" in argv
    try:
        _refuse_ranks(argv)
        if not argv or argv[0] in ("--help", "-h"):
            import_commands()
        with _plain_warnings():
            code = app(
                current_options(argv), exit_on_error=False, print_error=False, result_action="return_value"
            )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (InputError, CycloptsError) as error:
        if debug and isinstance(error, InputError):
            raise
        repeats = isinstance(error, CycloptsError) and os.environ.get("RANK", "0") != "0"
        return 2 if repeats else _say(str(error), 2)
    except Stopped as error:
        return _say(str(error), 1)
    except AlreadySaid:
        return 1
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


def _refuse_ranks(argv: Sequence[str]) -> None:
    """Several processes would write the same output, but for the commands that share their work."""
    from locus.errors import AlreadySaid, InputError

    command = next((word for word in argv if not word.startswith("-")), None)
    if command is None or command in _SHARED or os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return
    if os.environ.get("RANK", "0") != "0":
        raise AlreadySaid
    raise InputError(f"locus {command} runs in one process: start it without torchrun")


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
