"""What a mixture of experts runs, compiled for a Hopper that need not be there: casts in wide words, products by its tensor cores
and its copy engine, no spills, and nothing touches memory before it waits."""

import json

import pytest

from .hopper import lines_of

pytest.importorskip("triton", reason="needs Triton")

PROGRAM = """
import hopper, json, re, torch

from lowp.kernels.triton_ import cast_groups, grouped_product
from lowp.numerics import Parts

kernels = hopper.compiling(cast_groups)
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
for made in kernels:
    ptx = made.ptx
    print(json.dumps({
        "kernel": made.kernel, "before": hopper.before_it_waits(ptx), "widest": hopper.widest(ptx),
        "wgmma": len(re.findall(r"wgmma\\.mma_async\\S*e4m3\\.e4m3", ptx)), "loads": ptx.count("cp.async.bulk.tensor.2d.shared"),
        "stores": ptx.count("cp.async.bulk.tensor.2d.global"), "local": ".local" in ptx, "shared": made.compiled.metadata.shared,
    }))
"""


def test_what_is_compiled_for_hopper(tmp_path):
    rows = [json.loads(line) for line in lines_of(PROGRAM, tmp_path)]
    assert {row["kernel"] for row in rows} == {"_group_amaxes_kernel", "_group_codes_kernel", "_grouped_kernel"}
    for row in rows:
        assert row["before"] == 0 and not row["local"] and row["shared"] <= 227 << 10, row
        if row["kernel"] == "_grouped_kernel":
            assert row["wgmma"] and row["loads"] >= 2 and row["stores"] == 1, row
        else:
            assert row["widest"]["ld"] == 128, row
            assert row["widest"]["st"] == (128 if row["kernel"] == "_group_codes_kernel" else 32), row
