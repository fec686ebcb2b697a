"""HQQ: never worse than where it starts in its own measure, better in squared error on weights with outliers."""

import pytest
import torch
from torch import nn

import lowp
from lowp.methods.hqq import hqq
from lowp.numerics import Format, dequantize, quantize
from lowp.numerics.compare import relative_error
from lowp.quantize import METHODS

FORMATS = (
    "int4/1x64*bf16+bf16",
    "int4/1x64*bf16",
    "int3/1x64*bf16+bf16",
    "int3/1x32",
    "int2/1x32*bf16+bf16",
    "int8/row",
    "int4/1x64*bf16+int8",
    "uint4/1x64+uint8",
)


def weights():
    """Shapes of distributions seen in trained models: normal, heavy tails, a few outlier columns."""
    normal = torch.randn(128, 256) * 0.02
    heavy = torch.distributions.StudentT(4.0).sample((128, 256)) * 0.02
    columns = normal.clone()
    columns[:, ::50] *= 8
    return {"normal": normal, "heavy tails": heavy, "outlier columns": columns}


@pytest.mark.parametrize("spelling", FORMATS)
@pytest.mark.parametrize("name", ["normal", "heavy tails", "outlier columns"])
def test_never_worse_in_its_own_norm_and_better_in_error(spelling, name):
    fmt, weight = Format.parse(spelling), weights()[name]
    plain, ours = dequantize(quantize(weight, fmt), fmt), dequantize(hqq(weight, fmt), fmt)

    def norm(values):
        return (values - weight).abs().pow(0.7).mean().item()

    assert norm(ours) <= norm(plain) * (1 + 1e-6)
    if fmt.element.bits <= 4 and not spelling.endswith("int8"):
        assert relative_error(weight, ours) < relative_error(weight, plain)


def test_zero_blocks_constants_and_odd_ranks():
    fmt = Format.parse("int4/1x32*bf16+bf16")
    zeros = torch.zeros(4, 64)
    assert torch.equal(dequantize(hqq(zeros, fmt), fmt), zeros)
    constant = torch.full((4, 64), 0.5)
    assert relative_error(constant, dequantize(hqq(constant, fmt), fmt)) < 0.01
    assert hqq(torch.randn(2, 4, 64), fmt).scale.shape == (2, 4, 2)


def test_it_is_deterministic():
    weight, fmt = torch.randn(16, 64), Format.parse("int3/1x32*bf16+bf16")
    assert torch.equal(hqq(weight, fmt).qdata, hqq(weight, fmt).qdata)


def test_where_it_does_not_apply_the_report_says_so():
    assert METHODS["hqq"].why_not(Format.parse("nf4/1x64*bf16"))
    model = nn.Sequential(nn.Linear(64, 64))
    report = lowp.quantize_(model, "nf4/1x64*bf16", method="hqq")
    assert "by absmax, because hqq is for integers" in report.rows[0].why
