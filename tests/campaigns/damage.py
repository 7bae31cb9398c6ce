"""Ways in which disks, copies and downloads damage files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

Damage = Callable[[bytes, np.random.Generator], bytes]

_PAGE = b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head><body></body></html>\n"


def flip(content: bytes, rng: np.random.Generator) -> bytes:
    """One bit is the other."""
    damaged = bytearray(content)
    damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    """The end is missing, at least one byte of it and not all."""
    return content[: int(rng.integers(1, max(2, len(content))))]


def blank(content: bytes, rng: np.random.Generator) -> bytes:
    """A stretch is zero, as where a file was given its room and not its content."""
    damaged = bytearray(content)
    first, last = sorted(rng.integers(len(content), size=2).tolist())
    damaged[first : last + 1] = bytes(last + 1 - first)
    return bytes(damaged)


def append(content: bytes, rng: np.random.Generator) -> bytes:
    """There is something after the end."""
    return content + rng.bytes(int(rng.integers(1, 64)))


def swap(content: bytes, rng: np.random.Generator) -> bytes:
    """Two stretches of equal length have changed places."""
    quarter = max(1, len(content) // 4)
    first = int(rng.integers(quarter))
    second = int(rng.integers(2 * quarter, max(2 * quarter + 1, len(content) - quarter)))
    damaged = bytearray(content)
    length = min(quarter, len(content) - second)
    damaged[first : first + length] = content[second : second + length]
    damaged[second : second + length] = content[first : first + length]
    return bytes(damaged)


def empty(content: bytes, rng: np.random.Generator) -> bytes:
    """There is nothing in it."""
    del content, rng
    return b""


def page(content: bytes, rng: np.random.Generator) -> bytes:
    """It is the page with which a server refused the download."""
    del content, rng
    return _PAGE


DAMAGES: dict[str, Damage] = {
    "flip": flip,
    "cut": cut,
    "blank": blank,
    "append": append,
    "swap": swap,
    "empty": empty,
    "page": page,
}


def damage_file(path: Path, damage: Damage, rng: np.random.Generator) -> bool:
    """Damages a file in its place; whether that changed it, which zeros over zeros do not."""
    content = path.read_bytes()
    damaged = damage(content, rng)
    path.write_bytes(damaged)
    return damaged != content
