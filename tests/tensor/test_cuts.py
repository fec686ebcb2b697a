"""Layouts that can be cut, for each format: a cut commutes with dequantize, and writing to a view writes to its parent."""

import functools

import pytest
import torch

from lowp.errors import MisfitError, TensorRuleError
from lowp.layouts import LAYOUTS
from lowp.numerics import Format, Scheme, known_formats
from lowp.tensor import QTensor

E, N, K = 3, 512, 512  # cut at multiples of 128, where every format's blocks may be cut
SPELLINGS = tuple(dict.fromkeys(str(Scheme.parse(known.spelling).weight) for known in known_formats()))
CUT = tuple(layout.name for layout in LAYOUTS.values() if layout.cut)
PAIRS = [
    (name, spelling)
    for name in CUT
    for spelling in SPELLINGS
    if not LAYOUTS[name].why_not(Format.parse(spelling), (N, K), "cpu")
]
ROWS = {
    "slice": lambda t: t[..., 128:384, :],
    "slice, negative": lambda t: t[..., -128:, :],
    "slice of nothing": lambda t: t[..., 128:128, :],
    "narrow": lambda t: t.narrow(-2, 128, 128),
    "chunk": lambda t: t.chunk(4, dim=-2)[3],
    "split": lambda t: t.split([128, 384], dim=-2)[1],
    "cat of chunks": lambda t: torch.cat(t.chunk(4, dim=-2), dim=-2),
    "cut of a cut": lambda t: t[..., 128:512, :][..., 128:256, :],
    "slice of the transposed": lambda t: t.mT[..., :, 128:],
}
REGROUPED = {
    "view in three axes": lambda t: t.view(2, N // 2, K),
    "unsqueeze": lambda t: t.unsqueeze(0),
    "squeeze": lambda t: t.unsqueeze(0).squeeze(0),
    "expand": lambda t: t.unsqueeze(0).expand(3, -1, -1),
    "stack": lambda t: torch.stack([t, t]),
    "one of a stack": lambda t: torch.stack([t, t.clone()])[1],
}
STACKED = {
    "experts": lambda t: t[1:],
    "an expert": lambda t: t[2],
    "rows of an expert": lambda t: t[1][128:256],
    "rows of experts": lambda t: t[:2, 128:256],
    "cat of experts": lambda t: torch.cat(t.split([1, 2])),
    "unsqueeze in the middle": lambda t: t.unsqueeze(1),
    "a stack of stacks": lambda t: torch.stack([t, t], dim=1)[:, 1],
}


@functools.cache
def quantized(shape, spelling, layout):
    torch.manual_seed(0)
    return QTensor.quantize(torch.randn(shape) * 0.02, spelling, layout=layout)


def check(q, expected):
    got = q.dequantize()
    assert got.shape == expected.shape and torch.equal(got, expected)


def test_the_table_has_layouts_that_can_be_cut():
    assert {"plain", "fragments", "planes"} <= set(CUT) < set(LAYOUTS)
    assert all(sum(name == one for one, _ in PAIRS) > 20 for name in CUT)


@pytest.mark.parametrize(("layout", "spelling"), PAIRS)
def test_cuts_commute_with_dequantize(layout, spelling):
    matrix, stack = quantized((N, K), spelling, layout), quantized((E, N, K), spelling, layout)
    for views, q in ((ROWS | REGROUPED, matrix), (ROWS | STACKED, stack)):
        for cut in views.values():
            view = cut(q)
            assert view.spec.layout == layout
            check(view, cut(q.dequantize()))


@pytest.mark.parametrize(("layout", "spelling"), PAIRS)
@pytest.mark.parametrize("shape", [(N, K), (E, N, K)], ids=str)
def test_writing_to_a_view_writes_to_its_parent(layout, spelling, shape):
    """How serving engines load a parameter: narrow + copy_ of each shard, whatever the shard's own layout."""
    q, target = quantized(shape, spelling, layout), quantized(shape, spelling, layout).clone()
    for tensor in target.packed.values():
        tensor.view(torch.uint8).zero_()
    for start in range(0, N, 128):
        view = target.narrow(-2, start, 128)
        assert all(view.packed[n].untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
                   for n, t in target.packed.items())  # fmt: skip
        shard = q.narrow(-2, start, 128)
        view.copy_(shard.to_layout("plain") if start % 256 else shard)
    check(target, q.dequantize())


@pytest.mark.parametrize("layout", CUT)
def test_whole_units_of_rows_regroup(layout):
    q, unit = quantized((N, K), "int4/1x128*bf16", layout), LAYOUTS[layout].unit
    view = q.view(N // unit, unit, K)
    assert not view.is_lazy_view and view.qdata.data_ptr() == q.qdata.data_ptr()
    check(view[1], q.dequantize()[unit : 2 * unit])
    check(view.view(N, K)[unit:], q.dequantize()[unit:])
    if unit > 1:
        assert q.view(2 * N // unit, unit // 2, K).is_lazy_view


@pytest.mark.parametrize("layout", CUT)
def test_rows_that_fill_no_unit_are_the_last(layout):
    q = quantized((200, K), "int4/1x128*bf16", layout)
    floats, unit = q.dequantize(), LAYOUTS[layout].unit
    check(q[192:], floats[192:])
    check(torch.cat([q[:128], q[128:]]), floats)
    target = torch.zeros_like(q)
    target[192:].copy_(q[192:])
    check(target, torch.cat([torch.zeros(192, K), floats[192:]]))
    if unit > 1:
        for through in (lambda: q[:100], lambda: q[60:128], lambda: torch.cat([q[192:], q[:64]])):
            with pytest.raises(MisfitError, match=rf"multiples of {unit}, or call \.to_layout\('plain'\)"):
                through()


@pytest.mark.parametrize("layout", ["fragments", "planes"])
def test_tiles_are_whole_along_k(layout):
    q, unit = quantized((N, K), "int8/row", layout), LAYOUTS[layout].unit
    for cut in (lambda: q[:, 64:], lambda: q.t()[:256], lambda: torch.cat([q, q], dim=1)):
        with pytest.raises(
            MisfitError, match=rf"whole along K, .* cut axis -2 at multiples of {unit}, or call \.to_layout"
        ):
            cut()
    check(q.to_layout("plain")[:, 64:], q.dequantize()[:, 64:])


def test_a_layout_without_cuts_refuses_and_says_which_have_them():
    q = quantized((N, K), "int4/1x128*bf16", "int4pack_cpu")
    for cut in (lambda: q[:64], lambda: q.chunk(2), lambda: torch.cat([q, q]), lambda: q.narrow(0, 64, 64)):
        with pytest.raises(TensorRuleError, match=r"the layout fragments or the layout plain.*, .* got int4pack_cpu"):
            cut()
    with pytest.raises(TensorRuleError, match="cat wants one layout"):
        torch.cat([q, q.to_layout("plain")])


def test_what_belongs_to_the_activation_goes_with_the_columns():
    parts = quantized((N, K), "int8/row", "plain").parts().replace(act_pre_scale=torch.rand(K))
    q = QTensor.from_parts(parts, "int8/row", dtype=torch.float32)
    for dim in (0, 1):
        whole = torch.cat(q.chunk(2, dim=dim), dim=dim)
        assert torch.equal(whole.act_pre_scale, parts.act_pre_scale)
        check(whole, q.dequantize())
