"""The op round_columns: every kernel against the reference, codes and errors bit for bit, over the formats.

Triton's kernel runs in its interpreter on a CPU, which plays an sm90, and for real on a GPU. There the reference runs on a CPU.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from lowp.kernels.triton_ import interpreted
from lowp.numerics import Format, quantize
from lowp.numerics.grid import Grid
from lowp.ops import Case, kernels_of
from lowp.ops.columns import Columns, reference

FORMATS = (
    "int4/1x32*bf16", "int3/1x32*bf16+bf16", "uint4/1x32+uint8", "int4/1x32*bf16~symmetric", "int2/tensor", "ternary/row",
    "e4m3/32x32", "e5m2/row", "e3m2/1x32*e8m0", "e2m1/1x16*e4m3/tensor", "nf4/1x32*int8/1x2", "dyn8/1x64", "e4m3fnuz/row",
)  # fmt: skip
N, K = 32, 64


def problem(spelling, device="cpu", columns=12, rows=N):
    """Columns of a weight in a shuffled order, a factor as a Cholesky factorisation answers it, and numbers beyond the range."""
    fmt, weight = Format.parse(spelling), torch.randn(rows, K) * 0.02
    weight[:, ::17] = 0.0
    parts = quantize(weight, fmt)
    made = Columns.of(parts, fmt, (rows, K))
    places = torch.randperm(K)[:columns]
    left = (weight.T[places] * torch.linspace(0.5, 3, columns)[:, None]).contiguous()
    left[3, :5] = -0.0
    x = torch.randn(200, columns)
    factor = torch.linalg.cholesky((x.T @ x / 200).inverse(), upper=True).contiguous()
    codes = torch.zeros(K, rows, dtype=fmt.element.dtype)
    grid = made.grid.map(lambda tensor: tensor.to(device))
    tensors = [tensor.to(device) for tensor in (left, factor, places)]
    return tensors, dataclasses.replace(made, grid=grid), codes.to(device)


def bytes_of(tensor):
    return tensor.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("spelling", FORMATS)
def test_kernels_answer_the_bits_of_the_reference(spelling, device, poison):
    tensors, columns, codes = problem(spelling)
    ours = [tensor.to(device, copy=True) for tensor in tensors], codes.to(device, copy=True)
    grid: Grid = columns.grid.map(lambda tensor: tensor.to(device))
    errors = reference(*tensors, columns, codes)
    case = Case(op="round_columns", scheme=spelling, device=device.type, sm=90, dtype="float32", shape=(N, K))
    ran = 0
    for kernel in kernels_of("round_columns"):
        triton = kernel.run.__module__.startswith("lowp.kernels.triton_.")
        asked = dataclasses.replace(case, device="cuda") if triton and interpreted() else case
        if why := kernel.why_not(asked):
            assert why.startswith("wants")
            continue
        if kernel.fallback:
            continue
        got = kernel.run(*ours[0], dataclasses.replace(columns, grid=grid), ours[1])
        assert torch.equal(bytes_of(got), bytes_of(errors))
        assert torch.equal(bytes_of(ours[1]), bytes_of(codes))
        ran += 1
    assert ran or Format.parse(spelling).element.specials == "fnuz" or (device.type == "cpu" and not interpreted())


@pytest.mark.parametrize(("columns", "rows"), [(1, 64), (50, 32), (7, 1)])
def test_any_number_of_rows_and_columns(columns, rows, device, poison):
    if device.type == "cpu" and not interpreted():
        pytest.skip("no interpreter where a GPU is")
    from lowp.kernels.triton_.columns import KERNELS

    tensors, made, codes = problem("int4/1x32*bf16", columns=max(columns, 4), rows=rows)
    tensors = [tensors[0][:columns], tensors[1][:columns, :columns], tensors[2][:columns]]
    ours = [tensor.to(device, copy=True) for tensor in tensors], codes.to(device, copy=True)
    grid = made.grid.map(lambda tensor: tensor.to(device))
    errors = reference(*tensors, made, codes)
    got = KERNELS[0].run(*ours[0], dataclasses.replace(made, grid=grid), ours[1])
    assert torch.equal(got.cpu(), errors) and torch.equal(ours[1].cpu(), codes)


PROGRAM = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import test_columns
from lowp.kernels.triton_ import columns, launch

NAMES = {
    torch.uint8: "*u8", torch.int8: "*i8", torch.int64: "*i64", torch.float32: "*fp32",
}


def compiled(kernel, key, grid, args, constants, device, warps, stages, fusion, registers):
    constants = (*constants, True)
    signature, values, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, (*args, *constants), strict=True)):
        if isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = NAMES[value.dtype], [["tt.divisibility", 16]]
        elif value is None or i >= len(args):
            signature[name], values[(i,)] = "constexpr", value
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=fusion, launch_pdl=True)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print("fma.rn.f32" in made.asm["ptx"], ".local" in made.asm["ptx"])


launch._first = compiled
columns.device_capability = lambda *device: 90
test_columns.K = 128
for spelling in ("int4/1x128*bf16", "e2m1/1x16*e4m3/tensor", "nf4/1x64"):
    tensors, made, codes = test_columns.problem(spelling, columns=128)
    columns._run(*tensors, made, codes)
"""


def test_it_compiles_for_hopper_in_registers(tmp_path):
    """No spills, and where x * (1 / scale) is encoded no fused multiply-add at all: the quotient alone asks for them."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert lines == [["True", "False"], ["False", "False"], ["True", "False"]], lines
