"""Codes of b bits, packed without gaps along the last axis: a little-endian stream of bits.

Code i of a row takes the bits [i*b, (i+1)*b) of that row, lowest first. So for 4 bits the even element sits in the low
nibble, as in MX and NVFP4 checkpoints, and for 3 bits eight codes make three bytes. A row is padded with zero codes to whole
bytes.

The smallest number of codes that fills whole bytes is g = 8 / gcd(8, b); packing works on such groups in one int64, because
g codes take at most 56 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def codes_per_group(bits: int) -> int:
    """How many codes fill whole bytes: 2 for 4 bits, 8 for 3 bits, 1 for 8 bits."""
    return 8 // math.gcd(8, bits)


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of one row of `columns` codes."""
    return -(-columns * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (uint8, (..., K), each below 2**bits) to bytes (uint8, (..., ceil(K * bits / 8))).

    >>> pack_bits(torch.tensor([1, 2], dtype=torch.uint8), 4)
    tensor([33], dtype=torch.uint8)
    """
    if bits == 8:
        return codes
    columns, group = codes.shape[-1], codes_per_group(bits)
    padded = torch.nn.functional.pad(codes, (0, -columns % group))
    words = padded.unflatten(-1, (-1, group))
    width = torch.uint8 if group * bits == 8 else torch.int64
    word = torch.zeros(words.shape[:-1], dtype=width, device=codes.device)
    for i in range(group):
        word |= words[..., i].to(width) << (bits * i)
    if width == torch.uint8:
        return word
    octets = [(word >> (8 * i)) & 0xFF for i in range(group * bits // 8)]
    stream = torch.stack(octets, dim=-1).flatten(-2).to(torch.uint8)
    return stream[..., : packed_columns(columns, bits)].contiguous()


def unpack_bits(stream: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_bits`: bytes (..., ceil(columns * bits / 8)) to codes (uint8, (..., columns)).

    >>> unpack_bits(torch.tensor([33], dtype=torch.uint8), 4, 2)
    tensor([1, 2], dtype=torch.uint8)
    """
    if bits == 8:
        return stream
    group = codes_per_group(bits)
    octets = group * bits // 8
    if octets == 1:
        words = stream.unsqueeze(-1)
        codes = [(words >> (bits * i)) & (2**bits - 1) for i in range(group)]
        return torch.cat(codes, dim=-1).flatten(-2)[..., :columns]
    padded = (
        torch.nn.functional.pad(stream, (0, -stream.shape[-1] % octets)).unflatten(-1, (-1, octets)).to(torch.int64)
    )
    word = padded[..., 0]
    for i in range(1, octets):
        word = word | padded[..., i] << (8 * i)
    codes = [((word >> (bits * i)) & (2**bits - 1)).to(torch.uint8) for i in range(group)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :columns]
