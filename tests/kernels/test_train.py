"""The kernels of training, compiled for a Hopper that need not be there, with the Triton that is installed.

Every cast that a recipe asks for, forward and backward, and its products in Triton. Matrices are read and written in words of 16
bytes, nothing spills.

Memory allows 27 instructions a number: 132 SMs of 128 lanes at 1.7 GHz, and 4 bytes a number at 4.2 TB/s.
"""

import json
import os
import subprocess
import sys

import pytest

from lowp.train import RECIPES

pytest.importorskip("triton", reason="needs Triton")

PROGRAM = """
import dataclasses, json, os, re, subprocess, sys, torch, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowp.kernels.triton_ import cast, cast_both, launch, w8a8
from lowp.numerics import Parts
from lowp.ops.cast import _case_of_both
from lowp.train import RECIPES

NAMES = {
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
}
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
seen, made = set(), []


def compiled(kernel, key, grid, args, constants, device, warps, stages, fusion, registers):
    constants = (*constants, True)
    if (kernel.__name__, constants) in seen:
        return
    seen.add((kernel.__name__, constants))
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
    made.append((kernel.__name__, triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options), warps))


def told(what, name, kernel, warps):
    found = re.findall(r"(ld|st)[.]global(?:[.][a-z0-9_:]+)*?([.]v[248])?[.]b([0-9]+)", kernel.asm["ptx"])
    wide = {way: max([int(v[2:] or 1) * int(b) for op, v, b in found if op == way], default=0) for way in ("ld", "st")}
    row = {"what": what, "kernel": name, **wide}
    if (tools / "nvdisasm").exists():
        Path("made.cubin").write_bytes(kernel.asm["cubin"])
        text = subprocess.run([tools / "nvdisasm", "-c", "made.cubin"], capture_output=True, text=True).stdout
        lines = [line for line in text.splitlines() if re.search(r"/[*][0-9a-f]{4,5}[*]/", line)]
        row |= {"instructions": len(lines), "spills": sum("LDL" in line or "STL" in line for line in lines)}
    print(json.dumps(row))


launch._first = compiled
cast.device_capability = cast_both.device_capability = lambda *device: 90
x, scale = torch.empty(1024, 2048, dtype=torch.bfloat16), torch.ones(())
for recipe in map(RECIPES.__getitem__, sys.argv[1:]):
    of = recipe.operands
    casts = (
        ("x", of.x_row, of.x_column, None, False), ("x to evaluate", of.x_row, None, None, False),
        ("w", of.w_row, None, None, False), ("w to keep", of.w_row, of.w_column, None, False),
        ("w backward", None, of.w_column, scale if of.reuses_scale else None, False),
        ("g", of.g_row, of.g_column, None, recipe.stochastic), ("g of w alone", None, of.g_column, None, recipe.stochastic),
    )
    for what, rows, columns, given, random in casts:
        if rows or columns:
            extras = ["rows"] * bool(rows) + ["columns"] * bool(columns) + ["act_scale"] * (given is not None)
            case = _case_of_both(
                rows or "", columns or "", "cuda", 0, x.dtype, 2048, (*extras, *["stochastic"] * random)
            )
            if not cast_both.KERNELS[0].why_not(dataclasses.replace(case, sm=90)):
                cast_both._run(x, rows or "", columns or "", given, of.multiple, random)
    for scheme in {recipe.output, recipe.grad_input, recipe.grad_weight}:
        if scheme == "int8/row@int8/row":
            codes = Parts(qdata=x.to(torch.int8), scale=torch.ones(1024, 1))
            w8a8._run_product(codes, codes, scheme, torch.bfloat16, False)
    for name, kernel, warps in made:
        told(recipe.name, name, kernel, warps)
    made.clear()
"""
NAMES = [name for name in RECIPES if name not in ("nvfp4", "bitnet")]  # their casts have no kernel of this kind
FAST = ("float8_tensorwise", "float8_rowwise", "float8_rowwise_gw_hp")


def test_every_recipe_compiles_for_hopper(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *NAMES],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["what"] for row in rows} == set(NAMES)
    assert {row["kernel"] for row in rows} == {"_amaxes_kernel", "_both_kernel", "_cast_kernel", "_product_kernel"}
    for row in rows:
        if row["kernel"] in ("_amaxes_kernel", "_both_kernel"):
            assert row["ld"] == 128 and row["st"] in (0, 128) and row.get("spills", 0) == 0, row
            if row["what"] in FAST:
                assert row.get("instructions", 0) <= 27 * 64, row  # 64 numbers a thread
