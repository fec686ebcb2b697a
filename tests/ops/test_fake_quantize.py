"""fake_quantize over the table of formats: forward bytes, the straight-through rule against a float64 oracle, learned scales."""

import dataclasses
import math

import pytest
import torch

from lowp.errors import MisfitError, SpellingError
from lowp.numerics import Format, Scheme, dequantize, known_formats, quantize
from lowp.numerics.math import quantize_given, read_scale
from lowp.numerics.reach import clamps, inside
from lowp.ops import fake_quantize, fake_quantize_given, kernels_of
from lowp.ops.cast import case_of_cast
from lowp.ops.fake_quantize import given_grad_reference, given_reference, grad_reference, reference

MORE = {
    "int3/1x32", "int2/1x32*bf16", "int4/1x32~symmetric", "int4/1x32~noclip", "int2/1x32~mse", "uint4/1x32+uint8",
    "e4m3/1x32*e8m0~floor",
    "e2m1/1x32*e8m0~even", "int8/1x16*e4m3/tensor", "int4/1x32*fp16", "int8/32x32*bf16+fp32",
}  # fmt: skip
FORMATS = sorted({str(Scheme.parse(known.spelling).weight) for known in known_formats()} | MORE)
SHAPE = (128, 256)


def numbers(dtype, device="cpu"):
    """Rows of all kinds: ordinary, zero, negative zero, subnormal, huge, ties, one-sided, with outliers."""
    x = torch.randn(SHAPE)
    x[1], x[2] = 0, -0.0
    x[3] *= 1e-40
    x[4] *= 1e37
    x[5] = x[5].round() / 2
    x[6], x[7] = x[6].abs(), -x[7].abs()
    x[8, ::7] = 100
    return (x if dtype != torch.float16 else x.clamp(-6e4, 6e4)).to(device=device, dtype=dtype)


def passes(x, scale, zero_point, element):
    """The rule in float64, written from its sentence: within half a step (and a thousandth) of the outermost values."""
    finite = sorted({v for v in element.values if math.isfinite(v)})
    low = finite[0] - 0.501 * (finite[1] - finite[0])
    high = finite[-1] + 0.501 * (finite[-1] - finite[-2])
    v = x.double() / scale.double() + zero_point.double()
    return (v >= low) & (v <= high)


def per_element(per_block, fmt, shape):
    bn, bk = fmt.block_dims(shape)
    return per_block.repeat_interleave(bn, -2).repeat_interleave(bk, -1)


SOME = [
    "int4/1x128*bf16",
    "int4/1x64*bf16+int8",
    "int2/1x32*bf16",
    "e4m3/row",
    "e2m1/1x32*e8m0",
    "e2m1/1x16*e4m3/tensor",
    "nf4/1x64*bf16",
]


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [(spelling, torch.float32) for spelling in FORMATS]
    + [(spelling, dtype) for spelling in SOME for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_forward_is_bit_for_bit_what_is_kept_and_gradients_follow_the_rule(spelling, dtype, device):
    fmt = Format.parse(spelling)
    x = numbers(dtype, device).requires_grad_()
    y = fake_quantize(x, fmt)
    parts = quantize(x, fmt)
    assert y.dtype == dtype and torch.equal(y, dequantize(parts, fmt, dtype))
    grad = torch.randn_like(y)
    y.backward(grad)
    if fmt.is_identity:
        assert torch.equal(x.grad, grad)
        return
    scale = per_element(read_scale(parts, fmt), fmt, SHAPE)
    zero = per_element(parts.zero_point.float(), fmt, SHAPE) if fmt.zero_point else torch.zeros((), device=device)
    wanted = passes(x.detach(), scale, zero, fmt.element)
    assert torch.equal(x.grad, torch.where(wanted, grad, 0))
    if not clamps(fmt):
        assert wanted.all()  # what let the backward keep nothing
    assert torch.equal(inside(x, parts, fmt), wanted)
    again = x.detach().clone().requires_grad_()
    fake_quantize(again, fmt, clamp="pass").backward(grad)
    assert torch.equal(again.grad, grad)


@pytest.mark.parametrize(
    "spelling",
    ["e4m3/row", "e5m2/row", "e4m3/tensor", "e4m3/1x32*e8m0", "e2m1/1x32*e8m0", "e2m1/1x16*e4m3/tensor", "e2m1/1x16*e4m3"]
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_floats_lose_no_gradient(spelling, dtype):
    """A gradient that is itself cast to float8, as a naive autograd of the cast does it, would be zero nearly everywhere here."""
    x = torch.randn(64, 256, dtype=dtype, requires_grad=True)
    grad = torch.randn(64, 256, dtype=dtype) * 1e-6
    fake_quantize(x, Format.parse(spelling)).backward(grad)
    assert torch.equal(x.grad, grad)


def test_the_bounds_belong_to_the_reach():
    """Half a step beyond the outermost value still gets its gradient, a hair more does not: whatever torch's clamp says there."""
    x = torch.tensor([[7.0, 7.5, 7.51, 8.0, -8.0, -8.5, -8.51, -9.0]], requires_grad=True)
    fake_quantize_given(x, Format.parse("int4/row"), torch.ones(1, 1)).sum().backward()
    assert x.grad.tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    x = torch.tensor([[448.0, 464.0, 465.0, -464.0, -465.0]], requires_grad=True)  # e4m3's last step is 32
    fake_quantize_given(x, Format.parse("e4m3/row"), torch.ones(1, 1)).sum().backward()
    assert x.grad.tolist() == [[1, 1, 0, 1, 0]]


LEARNED = [
    "int4/1x32",
    "int2/1x32*bf16",
    "int3/1x64*bf16+bf16",
    "int4/1x64*bf16+int8",
    "e4m3/row",
    "e2m1/1x32*e8m0",
    "nf4/1x64*bf16",
]


@pytest.mark.parametrize("clamp", ["zero", "pass"])
@pytest.mark.parametrize("spelling", LEARNED)
def test_learned_scales_have_the_published_gradient(spelling, clamp, device):
    """LSQ's equations 3 to 5, in float64 and by themselves; the scale is small enough that some numbers are clamped."""
    fmt, x = Format.parse(spelling), torch.randn(8, 128, device=device)
    start = quantize(x, fmt)
    scale = (read_scale(start, fmt) * 0.6).requires_grad_()
    zero = start.zero_point.float().requires_grad_() if fmt.zero_point else None
    x.requires_grad_()
    y = fake_quantize_given(x, fmt, scale, zero, clamp=clamp)
    parts = quantize_given(x, fmt, scale, zero)
    assert torch.equal(y, dequantize(parts, fmt))
    grad = torch.randn_like(y)
    y.backward(grad)
    shape = tuple(x.shape)
    s = per_element(read_scale(parts, fmt), fmt, shape).double()
    z = per_element(parts.zero_point.float(), fmt, shape).double() if fmt.zero_point else torch.zeros((), device=device)
    kept = passes(x.detach(), s, z.double(), fmt.element)
    assert 0.02 < 1 - kept.double().mean() < 0.9 or not clamps(fmt)
    codes = y.detach().double() / s  # q - z
    slope = torch.where(kept, codes - x.detach().double() / s, codes)
    bn, bk = fmt.block_dims(shape)

    def summed(values):
        return values.reshape(shape[0] // bn, bn, shape[1] // bk, bk).sum(dim=(1, 3))

    torch.testing.assert_close(scale.grad.double(), summed(grad.double() * slope), rtol=1e-4, atol=1e-3)
    assert torch.equal(x.grad, grad if clamp == "pass" else torch.where(kept, grad, 0))
    if zero is not None:
        wanted = summed(torch.where(kept, 0.0, -grad.double() * s))
        torch.testing.assert_close(zero.grad.double(), wanted, rtol=1e-4, atol=1e-3)


def test_a_clamped_number_follows_its_scale_by_finite_differences():
    """Outside, y = qmax * scale exactly, so differences tell the derivative."""
    x, fmt = torch.tensor([[100.0, -100.0]], dtype=torch.float64), Format.parse("int4/row")

    def y(s):
        return fake_quantize_given(x, fmt, torch.full((1, 1), s)).double()

    scale = torch.full((1, 1), 0.5, requires_grad=True)
    for column in range(2):
        (slope,) = torch.autograd.grad(fake_quantize_given(x.float(), fmt, scale)[0, column], scale)
        difference = (y(0.5 + 2**-6) - y(0.5 - 2**-6))[0, column] / 2**-5
        assert slope.item() == difference.item() == (7, -8)[column]


def test_compiled_forward_and_backward_are_those_of_eager():
    """Operators of their own: what is compiled shares the numbers with what is not, a bf16 scale's rounding included."""
    formats = [Format.parse(spelling) for spelling in ("int4/1x32*bf16", "int2/1x32~mse", "e2m1/1x16*e4m3/tensor")]
    learned = formats[0]

    def loss(x, scale):
        y = fake_quantize_given(x, learned, scale)
        for fmt in formats:
            y = y + fake_quantize(x * 2, fmt) * x
        return y.square().sum()

    x = torch.randn(32, 64)
    scale = read_scale(quantize(x, learned), learned) * 0.7
    answers = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
        value = run(*leaves)
        value.backward()
        answers.append((value, *(leaf.grad for leaf in leaves)))
    for eager, compiled in zip(*answers, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spelling", ["int4/1x32*bf16", "int4/1x32+fp32", "bf16"])
def test_operators_are_what_they_say_for_any_strides(spelling):
    fmt = Format.parse(spelling)
    for x in (torch.randn(64, 32), torch.randn(32, 64).t(), torch.randn(64, 64)[:, ::2]):
        for one in (x, x.bfloat16()):
            samples = [
                (
                    torch.ops.lowp.fake_quantize,
                    (one.detach().requires_grad_(), spelling, "zero"),
                ),
                (torch.ops.lowp.fake_quantize_again, (one, spelling)),
                (torch.ops.lowp.fake_quantize_grad, (torch.randn_like(one), one, spelling)),
            ]
            if not fmt.is_identity:
                scale = torch.rand(64, 1) + 0.5
                zero = torch.zeros(64, 1) if fmt.zero_point else None
                samples.append((torch.ops.lowp.fake_quantize_given, (one, spelling, scale, zero, "zero")))
            for operator, arguments in samples:
                torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_nothing_is_saved_where_nothing_can_be_clamped():
    for spelling, wanted in (("int4/1x32*bf16", 0), ("e2m1/1x32*e8m0", 0), ("int2/1x32~mse", 1)):
        saved = []
        x = torch.randn(64, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, into=saved: into.append(t) or t, lambda t: t):
            fake_quantize(x, Format.parse(spelling))
        assert [t.data_ptr() for t in saved] == [x.data_ptr()] * wanted, spelling


def test_nan_stays_visible_and_infinity_does_not_turn_into_a_number():
    x = torch.randn(2, 64)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    y = fake_quantize(x.requires_grad_(), Format.parse("int4/1x32"))
    assert not y[0, 3].isfinite() and not y[1, 5].isfinite() and y[:, 32:].isfinite().all()


def test_errors_are_sentences():
    with pytest.raises(SpellingError, match="clamp"):
        fake_quantize(torch.randn(2, 32), Format.parse("int4/1x32"), clamp="stop")
    with pytest.raises(MisfitError, match="multiples"):
        fake_quantize(torch.randn(2, 30), Format.parse("int4/1x32"))
    with pytest.raises((MisfitError, RuntimeError), match=r"expand|scale"):
        fake_quantize_given(torch.randn(2, 32), Format.parse("int4/1x32"), torch.ones(3, 1))


# -- Triton -----------------------------------------------------------------------------------------------------------


def fast(op, fmt, x):
    """The kernels that can run a case, Triton's in the interpreter too."""
    case = case_of_cast(op, x, fmt, None, None)
    if x.device.type == "cpu":
        case = dataclasses.replace(case, device="cuda", sm=90)
    return [kernel for kernel in kernels_of(op) if not kernel.fallback and not kernel.why_not(case)]


def same(a, b):
    """The same numbers; one NaN is as good as another."""
    return bool((a.isnan() & b.isnan() | (a == b)).all())


IN_TRITON = [
    "int4/1x128*bf16", "int4/1x96", "int8/row", "int8/tensor", "int3/1x32*bf16+bf16", "int2/1x32*bf16", "int4/1x32*fp16",
    "int4/1x64*bf16+int8", "uint4/1x32+uint8", "int4/1x32~symmetric", "int8/32x32*bf16+fp32", "e4m3/row", "e5m2/row",
    "e4m3/128x128", "e4m3/tensor", "e4m3/1x32*e8m0", "e4m3/1x32*e8m0~floor", "e2m1/1x32*e8m0~even", "e3m2/row",
    "e2m1/1x16*e4m3/tensor", "e2m1/1x16*e4m3", "int8/1x32*e8m0", "int8/1x16*e4m3/tensor", "int8/1x32*fp32+fp16",
]  # fmt: skip


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [(spelling, torch.bfloat16) for spelling in IN_TRITON]
    + [(spelling, dtype) for spelling in IN_TRITON[::4] for dtype in (torch.float16, torch.float32)],
    ids=str,
)
def test_triton_writes_the_numbers_and_gradients_of_the_reference(spelling, dtype, device, poison):
    pytest.importorskip("triton", reason="needs Triton")
    from lowp.kernels.triton_ import interpreted

    if device.type == "cpu" and not interpreted():
        pytest.skip("Triton's interpreter is off: a GPU is here")
    fmt = Format.parse(spelling)
    x = numbers(dtype, device)[:, : 192 if "96" in spelling else 256][: None if "128x128" in spelling else 32]
    broken = x.clone()
    broken[0, 5], broken[5, 7], broken[9, 3] = torch.nan, torch.inf, -torch.inf
    for one in (x, broken, x.reshape(1, *x.shape)):
        grad = torch.randn(one.shape, device=device).to(dtype)
        ran = 0
        for kernel in fast("fake_quantize", fmt, one):
            ran += 1
            assert same(kernel.run(one, fmt), reference(one, fmt))
        for kernel in fast("fake_quantize_grad", fmt, one):
            ran += 1
            assert torch.equal(kernel.run(grad, one, fmt), grad_reference(grad, one, fmt))
        assert ran == 2


GIVEN_IN_TRITON = [
    "int4/1x32*bf16", "int4/1x96", "int3/1x32*bf16+bf16", "int2/1x32*bf16+fp32", "int4/1x64*bf16+int8", "uint4/1x32+uint8",
    "int8/row", "int8/32x32*bf16+fp32", "e4m3/row", "e3m2/1x32*fp16",
]  # fmt: skip


@pytest.mark.parametrize("clamp", ["zero", "pass"])
@pytest.mark.parametrize("spelling", GIVEN_IN_TRITON)
def test_triton_writes_the_numbers_and_gradients_of_learned_scales(spelling, clamp, device, poison):
    pytest.importorskip("triton", reason="needs Triton")
    from lowp.kernels.triton_ import interpreted

    if device.type == "cpu" and not interpreted():
        pytest.skip("Triton's interpreter is off: a GPU is here")
    fmt = Format.parse(spelling)
    for dtype in (torch.bfloat16, torch.float32):
        x = numbers(dtype, device)[
            slice(32, 96) if "32x32" in spelling else slice(40), : 192 if "96" in spelling else 256
        ]
        start = quantize(x, fmt)
        scale = read_scale(start, fmt) * 0.7  # some numbers are clamped
        scale[0] = -1.0  # stored as the smallest there is
        zero = start.zero_point.float() + 0.3 if fmt.zero_point else None
        grad = torch.randn(x.shape, device=device).to(dtype)
        wanted = given_grad_reference(grad, x, fmt, scale, zero, clamp)
        (forward,), (backward,) = fast("fake_quantize_given", fmt, x), fast("fake_quantize_given_grad", fmt, x)
        assert same(forward.run(x, fmt, scale, zero), given_reference(x, fmt, scale, zero))
        got = backward.run(grad, x, fmt, scale, zero, clamp)
        assert torch.equal(got[0], wanted[0]) and len(got) == len(wanted)
        for one, other in zip(got[1:], wanted[1:], strict=True):
            torch.testing.assert_close(one[1:], other[1:], rtol=1e-4, atol=1e-3 * float(other[1:].abs().median() + 1))


def test_triton_refuses_in_sentences_and_the_reference_takes_over(device):
    pytest.importorskip("triton", reason="needs Triton")
    x = torch.randn(32, 64, device=device)
    for spelling in ("nf4/1x64*bf16", "int2/1x32~mse", "ternary/tensor*bf16", "nf4/1x64*int8/1x256", "bf16"):
        case = dataclasses.replace(
            case_of_cast("fake_quantize", x, Format.parse(spelling), None, None), device="cuda", sm=90
        )
        assert all(k.why_not(case).startswith("wants") for k in kernels_of("fake_quantize") if not k.fallback)
        assert fake_quantize(x, Format.parse(spelling)).shape == x.shape
