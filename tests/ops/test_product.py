"""What training asks of floor 2: a matrix and its transpose cast together, and products of two quantized operands.

Kernels against the references, over the table: bytes exactly, products by the format's tolerance. A kernel in Triton runs in the
interpreter where there is no GPU.
"""

import dataclasses

import pytest
import torch

from lowp.kernels.triton_ import interpreted
from lowp.numerics import Format, dequantize
from lowp.numerics.compare import relative_error
from lowp.ops import cast_both, kernels_of, product
from lowp.ops.cast import both_reference, case_of_both, cast_turned, parts_of
from lowp.ops.product import case_of_product, formats, reference

BOTH = [(k, case) for k in kernels_of("cast_both") if not k.fallback for case in k.cases]
PRODUCTS = sorted({case for k in kernels_of("product") for case in k.cases})


def numbers(shape, dtype, device):
    """Rows and columns of all kinds."""
    x = torch.randn(shape)
    x[1], x[:, 1], x[2] = 0, 0, -0.0
    x[3] *= 1e-40
    x[4] *= 1e37
    x[:, 4] *= 1e-3
    x[5] = x[5].round() / 2
    return x.to(device=device, dtype=dtype)


def case_of(rows, columns, x, *extras):
    where = ("cuda", 90) if x.device.type == "cpu" and interpreted() else (x.device.type, None)
    case = case_of_both("cast_both", rows, columns, "cpu", None, x.dtype, x.shape[-1], extras)
    return dataclasses.replace(case, device=where[0], sm=90)


def same_bytes(found, wanted):
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in wanted]
    return all(
        torch.equal(f.contiguous().view(torch.uint8), w.contiguous().view(torch.uint8))
        for f, w in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize(("kernel", "case"), BOTH, ids=[f"{k.name}-{case}" for k, case in BOTH])
def test_kernels_write_the_bytes_of_both_forms(kernel, case, device, poison):
    rows, columns = case.split("@")
    multiple = 128 if "128" in columns else 32
    dtypes = (torch.bfloat16, torch.float32) if "128" not in case else (torch.bfloat16,)
    for dtype, height in zip(dtypes, (128 if "128x" in case else 100, 40), strict=False):
        x = numbers((height, 256), dtype, device)
        for one, other in ((rows, columns), (rows, ""), ("", columns)):
            assert kernel.why_not(case_of(one, other, x)) == "" or "/" not in one + other
            assert same_bytes(
                kernel.run(x, one, other, None, multiple, False), both_reference(x, one, other, None, multiple)
            )


@pytest.mark.parametrize("kernel", [k for k in kernels_of("cast_both") if not k.fallback], ids=lambda k: k.name)
def test_squares_smaller_than_a_block_beside_them_are_refused(kernel):
    case = case_of("e4m3/32x32", "e4m3/1x128", torch.empty(0, 256, dtype=torch.bfloat16))
    assert "squares that hold the blocks" in kernel.why_not(case)
    assert not kernel.why_not(case_of("e4m3/64x64", "e4m3/1x32", torch.empty(0, 256, dtype=torch.bfloat16)))


@pytest.mark.parametrize("height", [1, 17, 33, 64])
def test_magnitudes_begin_where_a_compiled_kernel_expects_them(height, device):
    cast_both_module = pytest.importorskip("lowp.kernels.triton_.cast_both", reason="needs Triton")
    forms = [cast_both_module._form("e4m3/row", 90)] * 2
    x = torch.randn(height, 64, device=device)
    made = cast_both_module._amaxes(x, forms)
    assert [t.data_ptr() % 16 for t in made] == [0, 0]
    for t, axis in zip(made, (1, 0), strict=True):
        assert torch.equal(t.view(torch.float32), x.abs().amax(axis))


@pytest.mark.parametrize("kernel", [k for k in kernels_of("cast_both") if not k.fallback], ids=lambda k: k.name)
def test_a_given_scale_and_views_and_lost_numbers(kernel, device, poison):
    scale = torch.full((), 0.013, device=device)
    x = torch.randn(48, 96, device=device, dtype=torch.bfloat16)[:, 16:80]
    args = ("e4m3/tensor", "e5m2/tensor", scale, 16, False)
    assert same_bytes(kernel.run(x, *args), both_reference(x, *args))
    args = ("e4m3/row", "e4m3/row", None, 16, False)
    x = torch.randn(80, 48, device=device).t()
    assert same_bytes(kernel.run(x, *args), both_reference(x, *args))
    x = torch.randn(32, 64, device=device)
    x[3, 5] = torch.nan
    *_, scales = kernel.run(x, *args)
    assert scales[5].isnan().all() and scales[torch.arange(64) != 5].isfinite().all()
    assert [t.shape for t in kernel.run(x[:0], *args)] == [t.shape for t in both_reference(x[:0], *args)]


@pytest.mark.parametrize("kernel", [k for k in kernels_of("cast_both") if not k.fallback], ids=lambda k: k.name)
def test_rounding_at_random_is_unbiased_in_both_forms(kernel, device):
    x = torch.linspace(-1, 1, 64, device=device).repeat(64, 1)
    total = [torch.zeros_like(x), torch.zeros_like(x)]
    fmt = Format.parse("int8/row")
    for _ in range(12):
        made = kernel.run(x, "int8/row", "int8/row", None, 16, True)
        total[0] += dequantize(parts_of(made[:2], fmt), fmt)
        total[1] += dequantize(parts_of(made[2:], fmt), fmt).t()
    nearest = dequantize(parts_of(both_reference(x, "int8/row", ""), fmt), fmt)
    for (
        form
    ) in total:  # columns of equal numbers: their mean over rows and draws; nearest is off by up to half a step, 1/254
        assert (form.mean(0) / 12 - x[0]).abs().max() < 1 / 254 / 3 < (nearest.mean(0) - x[0]).abs().max()
    assert kernel.why_not(case_of("e4m3/row", "", x, "stochastic")).startswith("wants integers")


def test_a_graph_that_is_captured_draws_its_seed_on_the_device(device, monkeypatch):
    """A number would be the same in every replay. Both ways of giving it round alike."""
    module = pytest.importorskip("lowp.kernels.triton_.cast_both", reason="needs Triton")
    x, args = torch.randn(48, 64, device=device), ("int8/row", "int8/row", None, 16, True)
    given, real = [], module.launch

    def seen(kernel, key, grid, arguments, *rest):
        if kernel is module._both_kernel:
            given.append(arguments[-1])
        real(kernel, key, grid, arguments, *rest)

    monkeypatch.setattr(module, "launch", seen)
    monkeypatch.setattr(module, "capturing", lambda device: True)
    first, second = module._run(x, *args), module._run(x, *args)
    assert [seed.device.type for seed in given] == [device.type] * 2 and not same_bytes(first, second)
    monkeypatch.setattr(module, "_seed", lambda device: int(given[1]))
    assert same_bytes(module._run(x, *args), second) and type(given[-1]) is int


@pytest.mark.gpu
def test_replays_of_a_graph_round_anew():
    x = torch.randn(48, 64, device="cuda")
    cast_both(x, "int8/row", "int8/row", multiple=16, stochastic=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = cast_both(x, "int8/row", "int8/row", multiple=16, stochastic=True)
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([t.clone() for t in made])
    assert not same_bytes(*replays)


def test_a_form_can_be_asked_for_alone(device):
    x = torch.randn(20, 32, device=device)
    both = cast_both(x, "e4m3/row", "e4m3/1x32*e8m0", multiple=32)
    assert same_bytes(cast_both(x, "e4m3/row", None), both[:2])
    assert same_bytes(cast_both(x, None, "e4m3/1x32*e8m0", multiple=32), both[2:])
    assert both[2].shape == (32, 32) and not both[2][:, 20:].float().any()


@pytest.mark.parametrize("fmt", ["e4m3/tensor", "e4m3/128x128", "e4m3/row*e8m0", "ternary/tensor"])
def test_codes_turned(fmt, device):
    x = torch.randn(128, 256, device=device)
    made = cast_both(x, fmt, fmt)
    turned = cast_turned(made[:2], fmt, fmt, torch.float32)
    error = relative_error(
        dequantize(parts_of(made[2:], Format.parse(fmt)), Format.parse(fmt)),
        dequantize(parts_of(turned, Format.parse(fmt)), Format.parse(fmt)),
    )
    limit = {
        "e4m3/row*e8m0": 1e-3,
        "ternary/tensor": 1e-6,
    }  # the smallest numbers rounded twice; a mean summed in another order
    assert error <= limit.get(fmt, 0)
    values = dequantize(parts_of(made[:2], Format.parse(fmt)), Format.parse(fmt))
    assert torch.equal(cast_turned(made[:2], fmt, "", torch.float32)[0], values.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", PRODUCTS)
def test_product_kernels_match_the_reference(scheme, dtype, device, poison):
    fmt_a, fmt_b = formats(scheme)
    a, b = torch.randn(48, 512, device=device), torch.randn(128, 512, device=device)
    left, right = cast_both(a, str(fmt_a), None), cast_both(b, str(fmt_b), None)
    expected = reference(parts_of(left, fmt_a), parts_of(right, fmt_b), scheme, torch.float32)
    case = case_of_product(scheme, device, dtype, 128, 512)
    ran = 0
    for kernel in kernels_of("product"):
        triton = interpreted() and kernel.run.__module__.startswith("lowp.kernels.triton_.")
        why = kernel.why_not(dataclasses.replace(case, device="cuda", sm=90) if triton else case)
        assert not why or why.startswith("wants")
        if not why:
            ran += 1
            y = kernel.run(parts_of(left, fmt_a), parts_of(right, fmt_b), scheme, dtype, False)
            limit = fmt_b.tolerance(torch.bfloat16 if kernel.name == "scaled_mm" else dtype)
            assert y.dtype == dtype and relative_error(expected, y) <= limit, kernel.name
    assert ran and relative_error(expected, product(left, right, scheme, dtype)) <= fmt_b.tolerance(torch.bfloat16)


def test_empty_products(device):
    left, right = (
        cast_both(torch.ones(0, 32, device=device), "e4m3/row", None),
        cast_both(torch.ones(16, 32, device=device), "e4m3/row", None),
    )
    assert product(left, right, "e4m3/row@e4m3/row", torch.bfloat16).shape == (0, 16)
