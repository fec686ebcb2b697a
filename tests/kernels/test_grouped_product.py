"""What a mixture of experts runs, compiled for a Hopper that need not be there: casts in wide words, products by its tensor cores
and its copy engine, no spills, and nothing touches memory before it waits."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton")

PROGRAM = """
import json, re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from lowp.kernels.triton_ import cast_groups, grouped_product, launch
from lowp.numerics import Parts

NAMES = {torch.uint8: "*u8", torch.int32: "*i32", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
MEMORY = re.compile(r"\\b(ld\\.global|st\\.global|cp\\.async|atom\\.|red\\.)")


def compiled(kernel, key, grid, args, constants, device, warps, stages, fusion, registers):
    constants = (*constants, True)
    signature, values, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, (*args, *constants))):
        if isinstance(value, torch.Tensor):
            signature[name] = NAMES[value.dtype]
            if not kernel.params[i].do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            kind = {torch.float8_e4m3fn: "fp8e4nv", torch.bfloat16: "bf16"}[value.base.dtype]
            signature[name] = f"tensordesc<{kind}{list(value.block_shape)}>"
        elif i >= len(args):
            signature[name], values[(i,)] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not kernel.params[i].do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=fusion, launch_pdl=True)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = made.asm["ptx"]
    found = re.findall(r"(ld|st)\\.global(?:\\.\\w+)*?(\\.v[248])?\\.b(\\d+)", ptx)
    widest = {which: max([int(w[2:] or 1) * int(b) for op, w, b in found if op == which], default=0) for which in ("ld", "st")}
    print(json.dumps({
        "kernel": kernel.__name__, "before": len(MEMORY.findall(ptx.partition("griddepcontrol.wait")[0])), "widest": widest,
        "wgmma": len(re.findall(r"wgmma\\.mma_async\\S*e4m3\\.e4m3", ptx)), "loads": ptx.count("cp.async.bulk.tensor.2d.shared"),
        "stores": ptx.count("cp.async.bulk.tensor.2d.global"), "local": ".local" in ptx, "shared": made.metadata.shared,
    }))


launch._first = compiled
cast_groups.device_capability = lambda *device: 90
grouped_product._processors = lambda device: 132
offs, form = torch.zeros(16, dtype=torch.int32), "e4m3/row*e8m0"
for rows in (form, ""):
    cast_groups._run(torch.zeros(256, 5120).bfloat16(), offs, rows, form)


def parts(*shape, scale):
    return Parts(qdata=torch.zeros(shape, dtype=torch.float8_e4m3fn), scale=torch.ones(scale))


stack, tokens = parts(4, 512, 1024, scale=(4, 512, 1)), parts(256, 1024, scale=(256, 1))
g, x = parts(512, 1024, scale=(512, 4)), parts(1024, 1024, scale=(1024, 4))
for name in grouped_product.TILINGS:
    for a, b in ((tokens, stack), (g, x)):
        grouped_product._run(a, b, offs[:4], "", torch.bfloat16, grouped_product.TILINGS[name])
"""


def test_what_is_compiled_for_hopper(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {"_group_amaxes_kernel", "_group_codes_kernel", "_grouped_kernel"}
    for row in rows:
        assert row["before"] == 0 and not row["local"] and row["shared"] <= 227 << 10, row
        if row["kernel"] == "_grouped_kernel":
            assert row["wgmma"] and row["loads"] >= 2 and row["stores"] == 1, row
        else:
            assert row["widest"]["ld"] == 128, row
            assert row["widest"]["st"] == (128 if row["kernel"] == "_group_codes_kernel" else 32), row
