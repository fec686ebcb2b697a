"""Products by expert of two operands in low precision: every kernel against the reference, in both of their forms."""

import pytest
import torch

from lowp.kernels.triton_ import interpreted
from lowp.numerics import Format
from lowp.numerics.compare import relative_error
from lowp.ops import kernels_of
from lowp.ops.cast import parts_of
from lowp.ops.cast_groups import cast_groups, stack_form
from lowp.ops.grouped_product import grouped_product, reference
from lowp.ops.product import case_of_product

from .test_cast_groups import GROUPS, offsets
from .test_kernels import asked

SCHEMES = ["e4m3/row@e4m3/row", "e4m3/row*e8m0@e4m3/row*e8m0", "e4m3/1x32*e8m0@e4m3/1x32*e8m0"]
# more rows than a tile has, an end inside a tile, experts of no and of one token
LARGE = {"tiles": [300, 0, 128, 1, 150]}


def operands(sizes, n, k, scheme, device):
    """a, b and offs of the three products of training."""
    offs, fmt = offsets(sizes, device), scheme.split("@")[0]
    tokens = max(int(offs[-1]), 1)
    x, g = (torch.randn(tokens, width, device=device, dtype=torch.bfloat16) for width in (k, n))
    w = torch.randn(len(sizes), n, k, device=device, dtype=torch.bfloat16) * 0.1
    (*x_row, x_column, x_scale, ends), (*g_row, g_column, g_scale, _) = (cast_groups(t, offs, fmt, fmt) for t in (x, g))
    yield x_row, stack_form(w, fmt), offs
    yield g_row, stack_form(w.mT, fmt), offs
    yield [g_column, g_scale], [x_column, x_scale], ends


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("groups", [*GROUPS, *LARGE])
def test_kernels_match_the_reference(groups, scheme, dtype, device, poison):
    fmt, sizes = Format.parse(scheme.split("@")[0]), (GROUPS | LARGE)[groups]
    slow = interpreted() and (groups, dtype) not in (("ragged", torch.bfloat16), ("tiles", torch.float32))
    for a, b, offs in operands(sizes, *((160, 96) if "1x32" in scheme else (144, 80)), scheme, device):
        case = case_of_product(scheme, device, dtype, *b[0].shape[-2:], op="grouped_product")
        left, right = parts_of(a, fmt), parts_of(b, fmt)
        expected, ran = reference(left, right, offs, scheme, torch.float32), []
        end = None if b[0].dim() == 2 else int(offs[-1])
        for kernel in kernels_of("grouped_product"):
            why = kernel.why_not(asked(kernel, case))
            assert not why or why.startswith("wants")
            if not why and not (slow and kernel.run.__module__.startswith("lowp.kernels.triton_.")):
                y = kernel.run(left, right, offs, scheme, dtype)
                assert (y.dtype, y.shape) == (dtype, expected.shape)
                off = relative_error(expected[:end], y[:end]) if expected[:end].numel() else 0
                assert off <= fmt.tolerance(torch.bfloat16), kernel.name
                ran.append(kernel.name)
        assert ran and grouped_product(a, b, offs, scheme, dtype).shape == expected.shape
