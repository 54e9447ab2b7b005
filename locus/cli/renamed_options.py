"""Option names of the release before: still read, with a note on stderr that names the new one.

A new entry goes into `RENAMED_OPTIONS`; it is dropped one release later. It holds for every command, for the options of
every method and for the same names in the TOML files of `locus run`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from locus.atlas import OLD_SITES

RENAMED_OPTIONS: dict[str, str] = {
    "--account": "--estimate-memory",
    "--aim-to": "--target-to",
    "--aim-refusal": "--target-refusal",
    "--aim-answer": "--target-answer",
    "--aim-prefixes": "--target-prefixes",
    "--aim-steps": "--target-steps",
    "--aim-lr": "--target-lr",
    "--aim-enough": "--target-loss-stop",
    "--aim-gone": "--target-prob-stop",
    "--aim-kl": "--target-kl",
    "--aim-decay": "--target-decay",
    "--aim-clamp": "--target-clamp",
    "--aim-seed": "--seed",
    "--dose": "--strengths",
    "--dose-goal": "--strength-goal",
    "--dose-curve": "--strength-curve",
    "--enough": "--prob-stop",
    "--max-tokens": "--batch-tokens",
    "--washed": "--forgotten",
}
"""Old option -> the option that does the same now."""

RENAMED_VALUES: Mapping[str, Mapping[str, str]] = {"--sites": OLD_SITES}
"""Option -> old value -> the value that means the same now."""


def current_options(argv: Sequence[str]) -> list[str]:
    """The command line with every old option name and value replaced; one note for each that was old."""
    known = dict(RENAMED_OPTIONS) | {_negated(old): _negated(new) for old, new in RENAMED_OPTIONS.items()}
    current: list[str] = []
    noted: set[str] = set()
    last_option = ""
    for position, word in enumerate(argv):
        if word == "--":
            return [*current, *argv[position:]]
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            current.append(_current_value(last_option, word, noted))
            continue
        last_option = known.get(option, option)
        if equals:
            value = _current_value(last_option, value, noted)
        if option not in known:
            current.append(f"{option}{equals}{value}")
            continue
        if option not in noted:
            warnings.warn(
                f"{option} is now called {known[option]}; the old name goes with the next release",
                stacklevel=2,
            )
            noted.add(option)
        current.append(f"{known[option]}{equals}{value}")
    return current


def _current_value(option: str, value: str, noted: set[str]) -> str:
    """The value of an option by its name of today; a note where it was old."""
    new = RENAMED_VALUES.get(option, {}).get(value, value)
    if new != value and value not in noted:
        warnings.warn(
            f"{option} {value} is now called {new}; the old name goes with the next release", stacklevel=3
        )
        noted.add(value)
    return new


def _negated(option: str) -> str:
    return f"--no-{option[2:]}"
