"""Hostile files made of good ones: bytes damaged, JSON and TOML values replaced, safetensors headers rewritten."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVIL = "../evil"
"""A way out of the output folder; nothing of this name may ever appear."""
OUTSIDE = Path(tempfile.gettempdir()) / "evil"
"""An absolute way out; nothing may appear there either."""
MARKUP = "<script>alert('evil')</script><img src=x onerror=evil()>"

_TEXTS = (
    EVIL, str(OUTSIDE), "..\\evil", "a/../../evil", MARKUP, "", "\x00", "\ud800", "é" * 300, "{{7*7}}", "%s%n",
    "nan", "inf", "\u202e", "-", "--resume", "CON", ".", "..", "x" * 100_000, "__class__", "smollm2",
)  # fmt: skip
_NUMBERS = (
    0, -1, 1, 2, 2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, -1e308, float("nan"), float("inf"), 0.5, 1e-320,
    True, False,
)  # fmt: skip


def hostile(draw: random.Random, depth: int = 0) -> Any:
    """A JSON value that nobody asked for."""
    kind = draw.randrange(7)
    if kind <= 1:
        return draw.choice(_TEXTS)
    if kind <= 3:
        return draw.choice(_NUMBERS)
    if kind == 4:
        return None
    if depth > 2:
        return []
    if kind == 5:
        return [hostile(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {str(hostile(draw, 3))[:50]: hostile(draw, depth + 1) for _ in range(draw.randrange(4))}


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, swapped or made up."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        size, at = len(out), draw.randrange(len(out) + 1)
        match draw.randrange(6):
            case 0 if size:
                out[min(at, size - 1)] ^= 1 << draw.randrange(8)
            case 1:
                del out[at:]
            case 2:
                del out[at : at + draw.randrange(1, 40)]
            case 3:
                out[at:at] = draw.randbytes(draw.randrange(1, 20))
            case 4:
                piece = out[at : at + draw.randrange(1, 200)]
                out[at:at] = piece * draw.choice((1, 2, 50))
            case _:
                out[at : at + 1] = draw.choice(
                    (b"\xff\xfe", b"\x00", b'"', b"}", b"[" * 3000, b"9" * 5000, b"\n")
                )
    return bytes(out)


def changed_json(value: Any, draw: random.Random) -> Any:
    """A copy with one to three places replaced, removed, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 2, 3))):
        holders = [holder for holder in _holders(value) if holder]
        if not holders:
            return hostile(draw)
        holder = draw.choice(holders)
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        match draw.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[draw.choice(_TEXTS)[:200]] = holder.pop(key)
            case 2 if isinstance(holder, list):
                holder.append(holder[key])
            case 3:
                holder[key] = draw.choice(_NUMBERS)
            case _:
                holder[key] = hostile(draw)
    return value


def _holders(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [value, *(inner for one in value.values() for inner in _holders(one))]
    if isinstance(value, list):
        return [value, *(inner for one in value for inner in _holders(one))]
    return []


def _dumps(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutated_json(data: bytes, draw: random.Random) -> bytes:
    """A JSON file, its values changed; every fourth time its bytes."""
    return damaged(data, draw) if draw.randrange(4) == 0 else _dumps(changed_json(json.loads(data), draw))


def mutated_lines(data: bytes, draw: random.Random) -> bytes:
    """A JSONL file, one record changed; every fourth time its bytes."""
    if draw.randrange(4) == 0:
        return damaged(data, draw)
    lines = data.splitlines()
    at = draw.randrange(len(lines))
    lines[at] = _dumps(changed_json(json.loads(lines[at]), draw))
    return b"\n".join(lines)


def mutated_text(data: bytes, draw: random.Random) -> bytes:
    """TOML or plain text: damaged bytes, or a value after an equals sign replaced."""
    lines = data.decode().splitlines()
    settings = [i for i, line in enumerate(lines) if "=" in line]
    if not settings or draw.randrange(3) == 0:
        return damaged(data, draw)
    at = draw.choice(settings)
    name = lines[at].split("=")[0].strip()
    value = hostile(draw)
    lines[at] = f"{name} = {json.dumps(value)}"
    if draw.randrange(4) == 0:
        lines[at] = (
            f"{name} = {draw.choice(('[[]]', '{a = 1}', '1979-05-27', '0x' + 'f' * 200, 'nan', '-inf'))}"
        )
    if draw.randrange(6) == 0:
        at = draw.choice([i for i, line in enumerate(lines) if line.startswith("[")] or [0])
        lines[at] = draw.choice(
            ("[model]", "model = 3", "[[audit]]", "trace = []", "[figures]", "edit = 'x'")
        )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutated_tensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file, its header changed (and signed anew where it is one of ours), or its bytes."""
    if draw.randrange(4) == 0:
        return damaged(data, draw)
    n = int.from_bytes(data[:8], "little")
    header, payload = json.loads(data[8 : 8 + n]), data[8 + n :]
    about = json.loads(header.get("__metadata__", {}).get("locus", "null"))
    if about is not None and draw.randrange(3):
        header["__metadata__"]["locus"] = json.dumps(changed_json(about, draw))
    elif draw.randrange(2):
        header = changed_json(header, draw)
    else:
        header, payload = _retyped(header, payload, draw)
    return signed(header, payload)


def _retyped(header: dict[str, Any], payload: bytes, draw: random.Random) -> tuple[dict[str, Any], bytes]:
    """Tensors of another dtype or shape that still fill their bytes; or other bytes in their place."""
    names = [name for name in header if name != "__metadata__"]
    entry = header[draw.choice(names)]
    size = entry["data_offsets"][1] - entry["data_offsets"][0]
    match draw.randrange(3):
        case 0:
            entry["dtype"], entry["shape"] = "U8", [size]
        case 1 if size % 4 == 0:
            entry["dtype"], entry["shape"] = draw.choice(("F32", "I32")), [1, size // 4, 1]
        case _:
            start, stop = entry["data_offsets"]
            payload = payload[:start] + draw.choice((b"\xff", b"\x00", b"\x7f")) * size + payload[stop:]
    return header, payload


def signed(header: Any, payload: bytes) -> bytes:
    """A file with this header; with its own sha256 in it where it carries one, as a forger would."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(metadata, dict) and "sha256" in metadata:
        metadata["sha256"] = "0" * 64
    text = json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(whole + payload).hexdigest().encode()
    return whole.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest) + payload


MUTATORS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": mutated_json,
    ".jsonl": mutated_lines,
    ".toml": mutated_text,
    ".txt": mutated_text,
    ".gz": damaged,
    ".safetensors": mutated_tensors,
}
"""File ending -> how such a file is spoilt."""
