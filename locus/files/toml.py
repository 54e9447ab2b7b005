"""Reading the TOML files that a person writes: configurations and gates."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from locus.errors import InputError


def read_toml(path: Path, example: str) -> dict[str, Any]:
    """What a TOML file holds.

    Args:
        path: The file.
        example: Where to see a good one; said when there is no such file.

    Raises:
        InputError: no such file, one that cannot be read as text, or not TOML (also numbers or nesting beyond
            what Python takes).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; {example}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not text in UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not TOML: {' '.join(str(error).split())[:200]}") from error
