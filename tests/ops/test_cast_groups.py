"""Tokens by expert cast by row and by column: every kernel against the reference, and what a stack of weights makes of it."""

import pytest
import torch

from lowp.numerics import Format, quantize
from lowp.ops import kernels_of
from lowp.ops.cast_groups import MULTIPLE, cast_groups, filled, reference, room, stack_form
from lowp.ops.registry import Case

from .test_kernels import asked
from .test_product import numbers, same_bytes

GROUPS = {
    "ragged": [5, 0, 35, 17], "one": [0, 0, 0, 57], "multiples": [16, 128, 1, 0], "none": [0, 0, 0], "alone": [1] * 9,
    "nobody": [150, 3],
}  # fmt: skip
# every division of the tokens, and every format once
KERNELS = [
    (kernel, case, groups)
    for kernel in kernels_of("cast_groups") for i, case in enumerate(kernel.cases)
    for groups in (["ragged"] if i else GROUPS)
]  # fmt: skip


def offsets(sizes, device):
    return torch.tensor(sizes, device=device).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(
    ("kernel", "scheme", "groups"), KERNELS, ids=[f"{k.name}-{case}-{g}" for k, case, g in KERNELS]
)
def test_kernels_write_the_bytes_of_the_reference(kernel, scheme, groups, device, poison):
    offs = offsets(GROUPS[groups], device)
    tokens = int(offs[-1]) + (20 if groups in ("none", "nobody") else 0)  # which belong to nobody
    rows, _, columns = scheme.rpartition("@")
    for dtype, width in ((torch.bfloat16, 96), (torch.float32, 32)):
        x = numbers((tokens, width), dtype, device)
        if "e8m0" in scheme:
            x[-1, -1], x[0, 2] = torch.nan, torch.inf
        case = Case(op="cast_groups", scheme=scheme, device=device.type, sm=90, dtype=str(dtype)[6:], shape=(width,))
        assert kernel.why_not(asked(kernel, case)) == ""
        found, wanted = kernel.run(x, offs, rows, columns), reference(x, offs, rows, columns)
        end = int(wanted[-1][-1])
        for made in (found, wanted):
            made[-3] = made[-3][:, :end]
        assert same_bytes(found, wanted)


@pytest.mark.parametrize("fmt", ["e4m3/row*e8m0", "e4m3/1x32*e8m0"])
@pytest.mark.parametrize("groups", GROUPS)
def test_columns_are_each_experts_own(groups, fmt, device):
    offs = offsets(GROUPS[groups], device)
    x = torch.randn(max(int(offs[-1]), 1), 64, device=device, dtype=torch.bfloat16)
    *rows, codes, scales, ends = cast_groups(x, offs, fmt, fmt)
    assert same_bytes(rows, list(quantize(x, Format.parse(fmt)).tensors().values()))
    assert codes.shape == (64, room(len(x), len(offs))) and (ends % MULTIPLE == 0).all()
    starts = [0, *ends.tolist()[:-1]]
    for e, (start, first, last) in enumerate(zip(starts, [0, *offs.tolist()[:-1]], offs.tolist(), strict=True)):
        assert int(ends[e]) - start == filled(last - first)
        group = torch.nn.functional.pad(x[first:last].t(), (0, filled(last - first) - (last - first)))
        wanted = quantize(group.contiguous(), Format.parse(fmt))
        own = scales[:, e : e + 1] if fmt.startswith("e4m3/row") else scales[:, start // 32 : int(ends[e]) // 32]
        assert same_bytes([codes[:, start : int(ends[e])], own], [wanted.qdata, wanted.scale])


@pytest.mark.parametrize("rows", [128, 96])
@pytest.mark.parametrize("fmt", ["e4m3/row*e8m0", "e4m3/row", "e4m3/1x32*e8m0"])
def test_a_stack_has_one_form_in_whichever_order_it_lies(fmt, rows, device):
    w = torch.randn(3, 64, rows, device=device, dtype=torch.bfloat16)
    wanted = stack_form(w, fmt)
    assert same_bytes(stack_form(w.mT.contiguous().mT, fmt), wanted)
    assert same_bytes([t[1] for t in wanted], list(quantize(w[1], Format.parse(fmt)).tensors().values()))
