"""GPTQ over the formats: a smaller output error than rounding, the format's own bytes, and no failure on degenerate inputs."""

import pytest
import torch
from torch import nn

import lowp
from lowp.layouts import LAYOUTS, Spec
from lowp.methods.gptq import gptq, inverse_factor
from lowp.numerics import Format, dequantize, quantize
from lowp.numerics.math import grid_of_parts
from lowp.quantize import METHODS
from lowp.quantize.statistics import Statistics

FORMATS = (
    "int4/1x64*bf16",
    "int4/1x32*bf16+bf16",
    "uint4/1x64+uint8",
    "int3/1x64*bf16+bf16",
    "int2/1x32",
    "int8/row",
    "int4/tensor",
    "int4/1x64*bf16~symmetric",
    "ternary/row",
    "e4m3/row",
    "e4m3/32x32",
    "e3m2/1x32*e8m0",
    "e2m1/1x32*e8m0",
    "e2m1/1x16*e4m3/tensor",
    "nf4/1x64",
)
N, K = 64, 128


def inputs(tokens: int = 512, columns: int = K) -> torch.Tensor:
    """Correlated inputs, some columns much larger than others: what GPTQ is for."""
    return torch.randn(tokens, columns) @ (torch.randn(columns, columns) * torch.linspace(0.1, 2, columns))


def seen(x: torch.Tensor) -> Statistics:
    statistics = Statistics.empty(x.shape[-1], device=x.device)
    for part in x.split(100):
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("spelling", FORMATS)
def test_the_output_error_falls_against_rounding(spelling, device):
    fmt, x, weight = Format.parse(spelling), inputs().to(device), torch.randn(N, K, device=device) * 0.02
    parts = gptq(weight, seen(x), fmt)
    plain, ours = (dequantize(p, fmt) for p in (quantize(weight, fmt), parts))

    def error(values):
        return ((x @ (weight - values).T).norm() / (x @ weight.T).norm()).item()

    assert error(ours) < 0.75 * error(plain)
    codes = fmt.element.decode(parts.qdata)
    assert codes.min() >= fmt.element.min and codes.max() <= fmt.element.max
    assert seen(x).output_error(weight, ours) == pytest.approx(error(ours), rel=1e-3)


@pytest.mark.parametrize("spelling", FORMATS)
def test_the_parts_pack_in_every_layout(spelling):
    fmt, weight = Format.parse(spelling), torch.randn(N, K)
    parts, rounded = gptq(weight, seen(inputs()), fmt), quantize(weight, fmt)
    same = {n: (t.shape, t.dtype) for n, t in rounded.tensors().items()}
    assert {n: (t.shape, t.dtype) for n, t in parts.tensors().items()} == same
    for layout in LAYOUTS.values():
        if not layout.why_not(fmt, (N, K), "cpu") and layout.device in ("", "cpu"):
            spec = Spec(scheme=spelling, layout=layout.name, shape=(N, K))
            back = layout.unpack(layout.pack(parts, spec), spec)
            assert torch.equal(dequantize(back, fmt), dequantize(parts, fmt)), layout.name


@pytest.mark.parametrize("spelling", FORMATS)
def test_the_grid_of_a_column_is_that_of_the_whole_weight(spelling):
    """Without anything to make up for, GPTQ is rounding to nearest in the chosen scales, byte for byte."""
    fmt, weight = Format.parse(spelling), torch.randn(N, K)
    statistics = seen(torch.randn(256, K))
    statistics.hessian_KK = torch.eye(K)
    expected = quantize(weight, fmt)
    assert torch.equal(gptq(weight, statistics, fmt, search=False).qdata, expected.qdata)
    grid = grid_of_parts(expected, fmt)
    bn, bk = fmt.block_dims((N, K))
    values = grid.decode(expected.qdata.view(N // bn, bn, K // bk, bk)).view(N, K)
    assert torch.equal(values, dequantize(expected, fmt))


def test_factor_is_the_cholesky_factor_of_the_inverse():
    hessian = inputs(1000, 48).T.cov() * 48
    upper = inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(48)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(48, dtype=torch.float64), atol=1e-3)


def test_most_important_first_is_better_and_changes_no_layout():
    fmt, x, weight = Format.parse("int3/1x32*bf16"), inputs(), torch.randn(N, K)
    ordered, plain = (gptq(weight, seen(x), fmt, act_order=order) for order in (True, False))
    assert torch.equal(ordered.scale, plain.scale)
    errors = [seen(x).output_error(weight, dequantize(p, fmt)) for p in (ordered, plain)]
    assert errors[0] < errors[1]


DEGENERATE = {
    "dead columns": lambda: inputs() * (torch.arange(K) % 3 > 0),
    "all zero": lambda: torch.zeros(64, K),
    "one token": lambda: torch.randn(1, K),
    "rank two": lambda: torch.randn(300, 2) @ torch.randn(2, K),
    "tiny": lambda: inputs() * 1e-18,
    "huge": lambda: inputs() * 1e12,
    "equal columns": lambda: torch.randn(300, 1).expand(300, K),
    "no token": lambda: torch.empty(0, K),
}


@pytest.mark.parametrize("spelling", ["int4/1x32*bf16", "e2m1/1x16*e4m3/tensor"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_inputs_are_rounded_no_worse_than_plainly(name, spelling, device):
    fmt, x, weight = Format.parse(spelling), DEGENERATE[name]().to(device), torch.randn(N, K, device=device)
    values = dequantize(gptq(weight, seen(x), fmt), fmt)
    assert values.isfinite().all()
    noise = [(x.double() @ (weight - v).double().T).norm() for v in (values, dequantize(quantize(weight, fmt), fmt))]
    assert noise[0] <= noise[1] * 1.001
    if name == "dead columns":
        dead = torch.arange(K) % 3 == 0
        nearest = dequantize(quantize(weight, fmt), fmt)
        assert (values - weight)[:, dead].norm() <= 2 * (nearest - weight)[:, dead].norm()


def test_damping_grows_until_the_factorisation_succeeds():
    indefinite = torch.eye(16)
    indefinite[0, 1] = indefinite[1, 0] = 3.0
    upper = inverse_factor(indefinite, 1e-6)
    assert upper.isfinite().all() and upper.diagonal().min() > 0


def test_inputs_that_are_not_finite_are_an_error_that_says_so():
    x = torch.randn(32, 64)
    x[3, 5] = float("nan")
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.raises(lowp.LowpError, match="finite"):
        lowp.quantize_(model, "int4/1x32", method="gptq", data=[x])


def test_outliers_beyond_the_first_columns_are_not_clipped_at_a_scale_by_row():
    """A row's scale is that of the whole row, not of the first 256 columns, as torchao's int8 GPTQ has it."""
    weight = torch.randn(64, 512) * 0.02
    weight[:, 300] *= 10
    x, fmt = inputs(1024, 512), Format.parse("int8/row")
    errors = [
        seen(x).output_error(weight, dequantize(p, fmt)) for p in (quantize(weight, fmt), gptq(weight, seen(x), fmt))
    ]
    assert errors[1] < 0.75 * errors[0]


def test_without_data_it_is_an_error_that_says_what_to_pass():
    assert METHODS["gptq"].wants_data
    with pytest.raises(lowp.LowpError, match="data="):
        lowp.quantize_(nn.Sequential(nn.Linear(64, 8)), "int4/1x32", method="gptq")
