"""Changes to a file, drawn at random: of its bytes, of values of its JSON, of the header of its tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any


def mutated(name: str, data: bytes, chance: Random) -> bytes:
    """The file with a few changes.  name: what it is called, of which the ending says what is in it."""
    kinds: list[Callable[[bytes, Random], bytes]] = [_bytes]
    if name.endswith(".safetensors"):
        kinds += [_header, _header, _length, _values]
    else:
        kinds += [_json, _json, _json]
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        try:
            data = chance.choice(kinds)(data, chance)
        except (ValueError, struct.error, IndexError, RecursionError):  # no such file any more: as bytes then
            data = _bytes(data, chance)
    return data


def flipped(data: bytes, chance: Random) -> bytes:
    """One bit of a safetensors file's tensors is another; the header stays."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    at = chance.randrange(start, len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _bytes(data: bytes, chance: Random) -> bytes:
    """Bytes replaced, cut out, put in, or repeated."""
    first, last = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    short = min(last, first + chance.choice((0, 1, 1, 8, 64)))
    how = chance.randrange(4)
    if how == 0:
        return data[:first] + chance.randbytes(short - first) + data[short:]
    if how == 1:
        return data[:first] + data[chance.choice((short, short, last, len(data))) :]
    if how == 2:
        return data[:first] + chance.randbytes(chance.choice((1, 8, 4096))) + data[first:]
    return data[:last] + data[first:last] + data[last:]


def _json(data: bytes, chance: Random) -> bytes:
    return json.dumps(_changed(json.loads(data), chance)).encode()


def _header(data: bytes, chance: Random) -> bytes:
    """A header with another value in it, its length as it then is."""
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(_changed(json.loads(data[8 : 8 + length]), chance)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _length(data: bytes, chance: Random) -> bytes:
    """A header that would be longer or shorter."""
    length = struct.unpack("<Q", data[:8])[0]
    return struct.pack("<Q", chance.choice((0, length - 1, length + 1, 1 << 24, 1 << 31, 1 << 62))) + data[8:]


def _values(data: bytes, chance: Random) -> bytes:
    """Tensors of infinities, NaN and numbers at the ends of their ranges."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    worst = chance.choice((b"\xff", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"))
    return data[:start] + (worst * len(data))[: len(data) - start]


WORST: tuple[Callable[[Random], Any], ...] = (
    *(lambda chance, value=value: value for value in (
        None, True, False, 0, 1, -1, 1 << 31, 1 << 62, 1 << 64, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"),
        float("inf"), "", "x" * 100_000, "\x1b[2J\n", "\u202e", "../../etc/passwd", "hf-internal/none", "1", [], {},
    )),
    lambda chance: [0] * 10_000,
    lambda chance: {str(number): number for number in range(1000)},
    lambda chance: _nested(chance.choice((10, 40, 900))),
    lambda chance: chance.randrange(-(1 << 20), 1 << 20),
    lambda chance: [chance.random() for _ in range(chance.randrange(20))],
)  # fmt: skip
"""Values that may stand where another was."""


def _nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


def _changed(content: Any, chance: Random) -> Any:
    """One value replaced, taken out, renamed or put twice, or all of it."""
    places = list(_places(content))
    if not places or chance.random() < 0.02:
        return chance.choice(WORST)(chance)
    holder, key = chance.choice(places)
    how = chance.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[chance.choice(("extra", "__class__", "", "x" * 1000, f"{key}_"))] = holder.pop(key)
    elif how == 2:
        _, other = chance.choice(places)
        if isinstance(holder, dict):
            holder[str(other)] = holder[key]
        else:
            holder += holder
    else:
        holder[key] = chance.choice(WORST)(chance)
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """(object or list, key or index) of every value inside."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield content, key
        yield from _places(value)
