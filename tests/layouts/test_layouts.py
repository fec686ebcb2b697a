"""Layouts move numbers and never change them: unpack(pack(parts)) == parts, byte for byte, for every layout and format."""

import pytest
import torch

from lowp.errors import MisfitError, SpellingError
from lowp.layouts import LAYOUTS, Spec, layout_of
from lowp.layouts.plain import cut, tensor_shapes
from lowp.numerics import Format, Parts, Scheme, known_formats, quantize
from lowp.tensor import QTensor

# What the table of known formats does not have, but torch's int4 layouts take.
MORE = ("int4/1x32*bf16+int8", "int4/1x64*bf16", "int4/1x256*bf16+bf16", "int5/1x32*bf16+int8")
SPELLINGS = tuple(dict.fromkeys([str(Scheme.parse(known.spelling).weight) for known in known_formats()] + list(MORE)))
SHAPES = ((64, 256), (128, 512))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def same(a: Parts, b: Parts) -> bool:
    a, b = a.tensors(), b.tensors()
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(raw(a[n]), raw(b[n])) for n in a
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_unpack_is_the_inverse_of_pack(name, spelling, device):
    layout, fmt = LAYOUTS[name], Format.parse(spelling)
    if layout.device and layout.device != device.type:
        pytest.skip(f"{name} is bound to {layout.device}")
    held = 0
    for shape in SHAPES:
        if layout.why_not(fmt, shape, device.type):
            continue
        parts = quantize(torch.randn(shape, device=device), fmt)
        spec = Spec(scheme=spelling, layout=name, shape=shape)
        assert same(layout.unpack(layout.pack(parts, spec), spec), parts)
        held += 1
    assert held or name != "plain" or "128x128" in spelling, "the plain layout holds every format"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_holds_some_known_format_or_says_why_not(name):
    answers = [
        LAYOUTS[name].why_not(Format.parse(spelling), (128, 512), LAYOUTS[name].device or "cpu")
        for spelling in SPELLINGS
    ]
    assert "" in answers
    assert all(answer == "" or answer.startswith(("wants", *SPELLINGS)) for answer in answers)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_tensor_shapes_tells_what_plain_packs(spelling):
    shape = (256, 512)
    q = QTensor.quantize(torch.randn(shape), spelling)
    told = tensor_shapes(q.format, shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in q.packed.items()} == told
    assert q.packed_nbytes == pytest.approx(q.format.bits(shape) * 256 * 512 / 8, abs=8)


def test_odd_widths_and_odd_columns():
    for bits in range(1, 8):
        for columns in (1, 3, 8, 13):
            q = QTensor.quantize(torch.randn(4, columns), f"int{bits}/row~symmetric")
            assert q.qdata.shape == (4, -(-columns * bits // 8))
            assert torch.equal(q.dequantize(), QTensor.from_parts(q.parts(), q.scheme, dtype=q.dtype).dequantize())


def test_a_cut_is_a_view_and_a_cut_through_a_block_is_an_error():
    q = QTensor.quantize(torch.randn(64, 256), "int4/1x64*bf16")
    half = cut(q.packed, q.spec, 0, 32, 64)
    assert half["qdata"].data_ptr() == q.qdata[32:].data_ptr()
    assert half["scale"].data_ptr() == q.scale[32:].data_ptr()
    with pytest.raises(MisfitError, match="multiples of 64"):
        cut(q.packed, q.spec, 1, 0, 96)
    with pytest.raises(MisfitError, match="splits a byte"):
        cut(
            QTensor.quantize(torch.randn(4, 32), "int3/row").packed,
            Spec(scheme="int3/row", layout="plain", shape=(4, 32)),
            1,
            0,
            3,
        )


def test_unknown_layout_and_misfit():
    with pytest.raises(SpellingError, match="plain"):
        layout_of("plane")
    with pytest.raises(MisfitError, match="int4pack_cpu cannot hold int8/row"):
        QTensor.quantize(torch.randn(64, 64), "int8/row", layout="int4pack_cpu")
    with pytest.raises(MisfitError, match="wants a cuda device"):
        QTensor.quantize(torch.randn(64, 128), "int4/1x128*bf16", layout="tinygemm")


@pytest.mark.parametrize("spelling", ["int3/1x32*bf16", "int8/row", "nf4/1x64"])
@pytest.mark.parametrize("shape", [(50, 64), (3, 40, 128)])
def test_planes_are_packed_in_pieces_of_rows(spelling, shape, monkeypatch):
    from lowp.layouts import planes

    fmt, spec = Format.parse(spelling), Spec(scheme=spelling, layout="planes", shape=shape)
    parts = quantize(torch.randn(shape), fmt)
    whole = LAYOUTS["planes"].pack(parts, spec)
    for at_once in (1, 3 * 16 * 2 * shape[-1]):
        monkeypatch.setattr(planes, "_AT_ONCE", at_once)
        pieces = LAYOUTS["planes"].pack(parts, spec)
        assert all(torch.equal(raw(pieces[name]), raw(whole[name])) for name in whole)
        assert same(LAYOUTS["planes"].unpack(pieces, spec), parts)
