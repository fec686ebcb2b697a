"""AWQ, SmoothQuant and learned rounding as functions; statistics add up and static scales cover what they should."""

import pytest
import torch

from lowp.errors import MisfitError
from lowp.methods.autoround import autoround
from lowp.methods.awq import awq_factor, clipped
from lowp.methods.smoothquant import smooth_factor
from lowp.numerics import Format, Scheme, dequantize, fake_quantize, quantize
from lowp.quantize.statistics import Statistics, add_squares, static_scale

N, K = 48, 128
FORMATS = ("int4/1x64*bf16", "int3/1x32*bf16+bf16", "int2/1x32", "int8/row", "e2m1/1x32*e8m0", "e2m1/1x16*e4m3/tensor")


def inputs(tokens=512):
    x = torch.randn(tokens, K) @ (torch.randn(K, K) * torch.linspace(0.1, 1, K))
    x[:, ::32] *= 20
    return x


def seen(x, histogram=False):
    statistics = Statistics.empty(x.shape[-1], histogram=histogram)
    for part in x.split(100):
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("spelling", FORMATS)
def test_awq_and_learned_rounding_lower_the_output_error(spelling):
    fmt, x, weight = Format.parse(spelling), inputs(), torch.randn(N, K) * 0.02
    statistics = seen(x)
    factor = awq_factor([weight], statistics, [Scheme.parse(spelling)])
    factor = torch.ones(K) if factor is None else factor
    by_awq = dequantize(clipped(weight / factor, statistics.scaled(factor), fmt), fmt) * factor
    learned = dequantize(autoround(weight, statistics, fmt, iterations=60), fmt)
    plain = statistics.output_error(weight, fake_quantize(weight, fmt))
    assert statistics.output_error(weight, learned) < (0.97 if fmt.scale != "e8m0" else 1.0) * plain
    assert statistics.output_error(weight, by_awq) < (0.9 if fmt.block == "1x64" else 1.0) * plain


@pytest.mark.parametrize("x", [torch.zeros(8, K), torch.randn(1, K), torch.empty(0, K)], ids=["zero", "one", "none"])
def test_degenerate_inputs(x):
    weight, scheme = torch.randn(N, K), Scheme.parse("int8/1x32@int8/row")
    statistics = seen(x)
    for parts in (
        autoround(weight, statistics, scheme.weight, iterations=5),
        clipped(weight, statistics, scheme.weight),
    ):
        assert dequantize(parts, scheme.weight).isfinite().all()
    for factor in (awq_factor([weight], statistics, [scheme]), smooth_factor([weight], statistics, [scheme])):
        assert factor is None or (factor.isfinite().all() and (factor > 0).all())


def test_smoothquant_shares_outliers_evenly():
    x, weight, scheme = inputs(), torch.randn(N, K) * 0.02, Scheme.parse("int8/row@int8/row")
    factor = smooth_factor([weight], seen(x), [scheme])
    smooth_x, smooth_w = x * factor, weight / factor
    assert torch.allclose(smooth_x @ smooth_w.T, x @ weight.T, atol=1e-3)
    assert torch.allclose(smooth_x.abs().amax(0), smooth_w.abs().amax(0), rtol=1e-3)
    expected = x @ weight.T
    errors = [
        (fake_quantize(a, scheme.act) @ fake_quantize(w, scheme.weight).T - expected).norm()
        for a, w in ((smooth_x, smooth_w), (x, weight))
    ]
    assert errors[0] < 0.7 * errors[1]
    assert smooth_factor([weight], seen(x), [Scheme.parse("int4/1x32")]) is None


def test_statistics_are_sums_whatever_the_batches():
    x = inputs()
    whole, parts = Statistics.empty(K, histogram=True), seen(x, histogram=True)
    whole.update(x)
    assert parts.tokens == whole.tokens == len(x)
    assert torch.allclose(parts.hessian_KK, whole.hessian_KK, rtol=1e-4, atol=1e-2)
    assert torch.allclose(whole.hessian_KK, x.T @ x, rtol=1e-4, atol=1e-2)
    assert torch.equal(parts.amax_K, x.abs().amax(0)) and torch.equal(parts.histogram, whole.histogram)
    factor = torch.rand(K) + 0.5
    assert torch.allclose(whole.scaled(factor).hessian_KK, (x * factor).T @ (x * factor), rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_hessian_is_exact_but_for_float32_sums(dtype, device):
    """16-bit tensor cores multiply exactly and sum in float32; float32 inputs are not rounded to TF32."""
    x = torch.randn(3000, 96, device=device).to(dtype)
    x[:, ::32] *= 20
    hessian = torch.zeros(96, 96, device=device)
    for rows in x.split(700):
        add_squares(hessian, rows)
    expected = x.double().T @ x.double()
    size = x.double().norm(dim=0)
    assert ((hessian.double() - expected).abs() / (size * size[:, None])).max() < 2e-6


@pytest.mark.parametrize("element", ["int8", "e4m3", "int4"])
def test_static_scales(element):
    fmt = Format.parse(f"{element}/tensor")
    x = torch.randn(4000, 32)
    x[0, 0] = 400.0  # one number in 128000
    statistics = seen(x, histogram=True)
    top = {
        how: float(static_scale(statistics, fmt, how)) * fmt.element.largest for how in ("minmax", "percentile", "mse")
    }
    assert top["minmax"] == pytest.approx(400.0)
    assert 3 < top["percentile"] < 6
    if fmt.element.kind == "int":
        rows = x.view(1, -1)

        def error(limit):
            scale = limit / fmt.element.largest
            codes = (rows / scale).round().clamp(fmt.element.min, fmt.element.max)
            return (codes * scale - rows).square().sum()

        assert error(top["mse"]) <= 1.02 * min(error(400.0 * share / 50) for share in range(5, 51))
    average = static_scale(statistics, fmt, "average") * fmt.element.largest
    assert 3 < average < 400
    with pytest.raises(MisfitError, match="symmetric"):
        static_scale(statistics, Format.parse("int8/row+int8"), "minmax")


def test_importance_chooses_ranges():
    """A search that weighs one column alone fits that column."""
    fmt, weight = Format.parse("int2/1x32~mse"), torch.randn(N, 32)
    importance = torch.full((32,), 1e-6)
    importance[5] = 1.0
    values = [dequantize(quantize(weight, fmt, importance=i), fmt) for i in (importance, None)]
    column, whole = ([(v - weight)[:, 5].norm() for v in values], [(v - weight).norm() for v in values])
    assert column[0] < 0.7 * column[1] and whole[0] > whole[1]
