"""Triton kernels that begin early, compiled for a Hopper that need not be there: nothing touches memory before they wait."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton")

PROGRAM = """
import dataclasses, re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowp.kernels.triton_ import cast, cast_both, decode, fake_quantize, fake_quantize_given, launch, update, w16, w8a8
from lowp.kernels.triton_.packed import parts_of
from lowp.numerics import Format
from lowp.ops.update import Settings, Slot, Step, coefficients
from lowp.tensor import QTensor

NAMES = {
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64", torch.bfloat16: "*bf16",
    torch.float16: "*fp16", torch.float32: "*fp32", torch.float8_e4m3fn: "*fp8e4nv",
}
MEMORY = re.compile(r"\\b(ld\\.global|st\\.global|cp\\.async|atom\\.|red\\.)")


def compiled(kernel, key, grid, args, constants, device, warps, stages, fusion, registers):
    constants = (*constants, True)
    assert kernel.arg_names[-1] == "EARLY" and len(kernel.arg_names) == len(args) + len(constants)
    signature, values, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, (*args, *constants))):
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = NAMES[value.dtype], [["tt.divisibility", 16]]
        elif value is None or i >= len(args):
            signature[name], values[(i,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and not kernel.params[i].do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=fusion, launch_pdl=True)
    options |= {"maxnreg": registers} if registers else {}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    print(kernel.__name__, ptx.count("griddepcontrol.wait"), ptx.count("griddepcontrol.launch_dependents"),
          len(MEMORY.findall(ptx.partition("griddepcontrol.wait")[0])), len(MEMORY.findall(ptx)) > 0)
    if kernel.__name__ in ("_both_kernel", "_amaxes_kernel", "_amax_kernel", "_fake_kernel", "_given_kernel"):
        found = re.findall(r"(ld|st)\\.global(?:\\.\\w+)*?(\\.v[248])?\\.b(\\d+)", ptx)
        widest = [max([int(width[2:] or 1) * int(bits) for op, width, bits in found if op == which], default=0)
                  for which in ("ld", "st")]
        print("bits", kernel.__name__, *widest)


launch._first = compiled
for module in (cast, cast_both, fake_quantize, fake_quantize_given):
    module.device_capability = lambda *device: 90
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
"""


def test_no_kernel_touches_memory_before_it_waits(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line for line in run.stdout.splitlines() if not line.startswith("bits")]
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
    assert {line.split()[0] for line in lines} == kernels
    assert all(line.split()[1:] == ["1", "1", "0", "True"] for line in lines), lines
    widths = {line for line in run.stdout.splitlines() if line.startswith("bits")}
    wide = {f"bits {name} 128 128" for name in ("_both_kernel", "_fake_kernel", "_given_kernel")}
    narrow = {"bits _amaxes_kernel 128 0", "bits _amax_kernel 128 32"}
    assert widths == wide | narrow, "matrices in words of 16 bytes"
