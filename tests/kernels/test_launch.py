"""Triton kernels that begin early, compiled for a Hopper that need not be there: nothing touches memory before they wait."""

import pytest

from .hopper import lines_of

pytest.importorskip("triton", reason="needs Triton")

# bits of the widest load and store: matrices in words of 16 bytes
WIDEST = dict.fromkeys(("_both_kernel", "_fake_kernel", "_given_kernel"), (128, 128))
WIDEST |= {"_amaxes_kernel": (128, 0), "_amax_kernel": (128, 32)}

PROGRAM = """
import dataclasses, hopper, torch

from lowp.kernels.triton_ import cast, cast_both, decode, fake_quantize, fake_quantize_given, update, w16, w8a8
from lowp.kernels.triton_.packed import parts_of
from lowp.numerics import Format
from lowp.ops.update import Settings, Slot, Step, coefficients
from lowp.tensor import QTensor

made_here = hopper.compiling(cast, cast_both, fake_quantize, fake_quantize_given)
x = torch.randn(4, 512).bfloat16()
for fmt in ("e4m3/row", "int8/tensor", "e2m1/1x32*e8m0"):
    cast.cast_tensors(x, cast.plan_of(Format.parse(fmt), 512, x.device))
for fmt in ("int4/1x128*bf16", "int2/1x32*bf16+bf16", "e2m1/1x16*e4m3/tensor"):
    fake_quantize.launched(None, x, Format.parse(fmt))
    fake_quantize.launched(x, x, Format.parse(fmt))
for fmt in (Format.parse("int4/1x128*bf16"), Format.parse("int3/1x32*bf16+bf16"), Format.parse("e3m2/row")):
    scale = torch.ones(fmt.scale_shape(tuple(x.shape)))
    for one in (x, x.float()):
        for grad in (None, one):
            fake_quantize_given._launched(grad, one, fmt, scale, scale if fmt.zero_point else None, "zero")
for scheme in ("e4m3/row@e4m3/row", "int8/row@int8/row"):
    q = QTensor.quantize(torch.randn(512, 512), scheme)
    made = cast.Cast(q.packed["qdata"][:4], torch.ones(4, 1))
    for tiled in (w8a8.Tiling(split=2), w8a8.Tiling(bm=128, bn=128, bk=128, swap=False)):
        w8a8.product(made, q.packed["qdata"], q.packed["scale"], None, q.spec.scheme, 4, torch.bfloat16, tiled)
for formats in (("e4m3/row", "e4m3/tensor"), ("e4m3/1x32*e8m0", "e4m3/1x32*e8m0")):
    cast_both._run(x, *formats, None, 32, False)
cast_both._run(x, "int8/row", "int8/row", None, 32, True)
sums = torch.zeros(4, 512, dtype=torch.int32)
w8a8.scaled(sums, made, q.packed["qdata"], q.packed["scale"], None, q.spec.scheme, torch.bfloat16)
q = QTensor.quantize(torch.randn(512, 512), "int4/1x128*bf16").to_layout("plain")
parts = parts_of(q.packed)
decode._decode(*parts, None, q.spec.scheme, 512, torch.bfloat16)
tiling = dataclasses.replace(w16.choose(1, 512, 512, 90), split=2)
w16.tiled(x[:1].contiguous(), parts, q.spec.scheme, tiling)
state = {"qdata": torch.zeros(4096).bfloat16()}
slot = Slot(param=torch.zeros(4096).bfloat16(), states=(state,), scheme="bf16", shape=(4096,))
numbers = coefficients("sgd", Settings(), 0.1, 1)
update._run(1, Step(slots=[slot], grads=[slot.param], settings=Settings(), numbers=numbers))
for made in made_here:
    print(made.kernel, hopper.before_it_waits(made.ptx), *hopper.widest(made.ptx).values())
"""


def test_no_kernel_touches_memory_before_it_waits(tmp_path):
    lines = [line.split() for line in lines_of(PROGRAM, tmp_path)]
    kernels = {
        "_amax_kernel",
        "_cast_kernel",
        "_amaxes_kernel",
        "_both_kernel",
        "_fake_kernel",
        "_given_kernel",
        "_product_kernel",
        "_scale_kernel",
        "decode_rows",
        "product",
        "add_splits",
        "_update_kernel",
    }
    assert {line[0] for line in lines} == kernels
    assert all(line[1] == "0" for line in lines), lines
    for kernel, wanted in WIDEST.items():
        widths = [tuple(map(int, line[2:])) for line in lines if line[0] == kernel]
        assert set(widths) == {wanted}, (kernel, widths)
