"""The kernels of training, compiled for a Hopper that need not be there, with the Triton that is installed.

Every cast that a recipe asks for, forward and backward, and its products in Triton. Matrices are read and written in words of 16
bytes, nothing spills.

Memory allows 27 instructions a number: 132 SMs of 128 lanes at 1.7 GHz, and 4 bytes a number at 4.2 TB/s.
"""

import json

import pytest

from lowp.train import RECIPES

from .hopper import lines_of

pytest.importorskip("triton", reason="needs Triton")

PROGRAM = """
import dataclasses, hopper, json, sys, torch

from lowp.kernels.triton_ import cast, cast_both, w8a8
from lowp.numerics import Parts
from lowp.ops.cast import case_of_both
from lowp.train import RECIPES

made = hopper.compiling(cast, cast_both)
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
            case = case_of_both(
                "cast_both", rows or "", columns or "", "cuda", 0, x.dtype, 2048, (*extras, *["stochastic"] * random)
            )
            if not cast_both.KERNELS[0].why_not(dataclasses.replace(case, sm=90)):
                for cast_both.capturing in (lambda device: False, lambda device: True)[: 1 + random]:
                    cast_both._run(x, rows or "", columns or "", given, of.multiple, random)
    for scheme in {recipe.output, recipe.grad_input, recipe.grad_weight}:
        if scheme == "int8/row@int8/row":
            codes = Parts(qdata=x.to(torch.int8), scale=torch.ones(1024, 1))
            w8a8._run_product(codes, codes, scheme, torch.bfloat16, False)
    for one in made:
        row = {"what": recipe.name, "kernel": one.kernel, "warps": one.warps}
        print(json.dumps(row | hopper.widest(one.ptx) | hopper.machine_code(one.compiled)))
    made.clear()
"""
NAMES = [name for name in RECIPES if name not in ("nvfp4", "bitnet")]  # their casts have no kernel of this kind
FAST = ("float8_tensorwise", "float8_rowwise", "float8_rowwise_gw_hp")


def test_every_recipe_compiles_for_hopper(tmp_path):
    rows = [json.loads(line) for line in lines_of(PROGRAM, tmp_path, *NAMES)]
    assert {row["what"] for row in rows} == set(NAMES)
    assert {row["kernel"] for row in rows} == {"_amaxes_kernel", "_both_kernel", "_cast_kernel", "_product_kernel"}
    for row in rows:
        if row["kernel"] in ("_amaxes_kernel", "_both_kernel"):
            assert row["ld"] == 128 and row["st"] in (0, 128) and row.get("spills", 0) == 0, row
            if row["what"] in FAST:
                assert row.get("instructions", 0) <= 27 * 64, row  # 64 numbers a thread
