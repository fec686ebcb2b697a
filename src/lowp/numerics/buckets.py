"""Buckets: the nearest value of a codebook by one look-up instead of a search.

The bits of a float32, sign aside, grow with its magnitude. With the sign folded in they are a key that grows with the number:

    magnitude = clamp(bits & 0x7fffffff, base, top) - base            key = magnitude, or ~magnitude where x is negative

Cut the keys into buckets of 2**shift, so many that no bucket holds more than one of the boundaries between two codes. One word
for each bucket then holds the code at its start and where in it the next code begins, so that the sum below carries into it; the
first key of the bucket is taken off before, so that the whole key can be added:

    word = (code << shift) + (2**shift - where the next begins) - first key          code(x) = (word[key >> shift] + key) >> shift

Seven integer operations and one look-up, exact at every boundary, for a codebook in rising order. A map of 256 values over seven
decades takes some 3,000 buckets: 12 KB, which a core's nearest cache holds, and so does a GPU's shared memory. Where the codebook
holds nothing negative, negative numbers take the lowest code, and there is one half of the buckets.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_LARGEST_SHIFT = 22


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The words and what finds them.

    Args:
        shift: bits of a key that lie inside a bucket. base, top: the bits of the smallest and largest magnitude told apart.
        first: of `words`, the index of the bucket of key 0: half of them where there are negative keys, else 0.
        words: as the page says.
    """

    shift: int
    base: int
    top: int
    first: int
    words: tuple[int, ...]


def bits_of(x: float) -> int:
    """The bits of a float32, as a signed integer.

    >>> hex(bits_of(1.0))
    '0x3f800000'
    """
    return int(torch.tensor([x], dtype=torch.float32, device="cpu").view(torch.int32)[0])


def key_of(bits: int, base: int, top: int, signed: bool) -> int:
    """The key of a float32 by its bits; see the page."""
    if not signed:
        return min(max(bits, base), top) - base
    magnitude = min(max(bits & 0x7FFFFFFF, base), top) - base
    return ~magnitude if bits < 0 else magnitude


def buckets_of(boundaries: Sequence[float], signed: bool, largest: float) -> Buckets | None:
    """The buckets of a rising list of boundaries, where boundary i is the smallest number of code i + 1; `largest` is the largest
    magnitude of all values, and lies in the last bucket or before it.

    None where no bucket would tell them apart: a boundary at zero, or below zero in an unsigned map.
    """
    if 0.0 in boundaries or (not signed and boundaries[0] < 0):
        return None
    bits = [bits_of(boundary) for boundary in boundaries]
    sizes = [b & 0x7FFFFFFF for b in bits]
    for shift in range(_LARGEST_SHIFT, 0, -1):
        base = min(sizes) - 1 >> shift << shift  # below the smallest, so that what is smaller still lies before it
        top = ((max(*sizes, bits_of(largest)) >> shift) + 1 << shift) - 1
        keys = [key_of(b, base, top, signed) for b in bits]
        if all(low >> shift != high >> shift for low, high in itertools.pairwise(keys)):
            return _built(keys, shift, base, top, signed)
    return None


def _built(keys: list[int], shift: int, base: int, top: int, signed: bool) -> Buckets:
    count = (top - base + 1) >> shift
    starts = {key >> shift: key % (1 << shift) for key in keys}
    words, code = [], 0
    for bucket in range(-count if signed else 0, count):
        carry = 0
        if bucket in starts:
            carry = (1 << shift) - starts[bucket]
        words.append((code - bucket << shift) + carry)
        code += bucket in starts
    return Buckets(shift=shift, base=base, top=top, first=count if signed else 0, words=tuple(words))
