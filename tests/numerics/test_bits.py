"""Packing codes of 1 to 8 bits: unpack is the inverse of pack, for every shape, and the stream is little-endian."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowp.numerics.bits import codes_per_group, pack_bits, packed_columns, unpack_bits

every_width = pytest.mark.parametrize("bits", range(1, 9))


def codes(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@every_width
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 1), (4, 16), (2, 3, 33), (5, 0), (0, 8), (1, 257)])
def test_unpack_is_the_inverse_of_pack(bits, shape):
    packed = pack_bits(codes(shape, bits), bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert tuple(packed.shape) == (*shape[:-1], packed_columns(shape[-1], bits))
    assert torch.equal(unpack_bits(packed, bits, shape[-1]), codes(shape, bits))


@every_width
def test_every_pair_of_neighbours(bits):
    numbers = torch.arange(2**bits, dtype=torch.uint8)
    pairs = torch.cartesian_prod(numbers, numbers)
    assert torch.equal(unpack_bits(pack_bits(pairs, bits), bits, 2), pairs)


@given(st.integers(1, 8), st.data())
@settings(max_examples=150, deadline=None)
def test_the_stream_is_the_little_endian_number(bits, data):
    """Code i takes the bits [i*b, (i+1)*b): so a row read as one little-endian number is sum(code_i * 2**(i*b))."""
    row = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    packed = pack_bits(torch.tensor([row], dtype=torch.uint8), bits)
    number = sum(code << (i * bits) for i, code in enumerate(row))
    assert bytes(packed[0].tolist()) == number.to_bytes(packed_columns(len(row), bits), "little")
    assert unpack_bits(packed, bits, len(row))[0].tolist() == row


def test_the_even_element_sits_in_the_low_nibble():
    assert pack_bits(torch.tensor([0x1, 0xF], dtype=torch.uint8), 4).tolist() == [0xF1]


@every_width
def test_a_row_is_padded_with_zeros(bits):
    ones = torch.full((1,), 2**bits - 1, dtype=torch.uint8)
    assert pack_bits(ones, bits).tolist() == [2**bits - 1]


@every_width
def test_views_pack_as_copies(bits):
    view = codes((16, 6), bits).t()
    assert torch.equal(pack_bits(view, bits), pack_bits(view.contiguous(), bits))
    packed = pack_bits(codes((6, 16), bits), bits)
    strided = packed.t().contiguous().t()
    assert torch.equal(unpack_bits(strided, bits, 16), codes((6, 16), bits))


def test_codes_of_a_group_fill_whole_bytes():
    assert [codes_per_group(bits) for bits in range(1, 9)] == [8, 4, 8, 2, 8, 4, 8, 1]
