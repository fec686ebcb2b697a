"""What holds for every format and every rule that can choose its scale: a new row is tested without new code.

The cases are all known formats x all rules that apply to them. Numbers for an unsigned element without a zero point are made
positive, because it holds no others.
"""

import functools
import math

import pytest
import torch

from lowp.errors import MisfitError
from lowp.numerics import ELEMENTS, Format, dequantize, fake_quantize, known_formats, quantize
from lowp.numerics.format import rules_for
from lowp.numerics.math import quantize_given, read_scale

TINY = 2.0**-126  # no scale is smaller, e8m0's lowest code aside
KNOWN = sorted({half for known in known_formats() for half in known.spelling.split("@")})
FORMATS = [Format.parse(spelling) for spelling in KNOWN if not Format.parse(spelling).is_identity]
IDENTITIES = [Format.parse(spelling) for spelling in ("bf16", "fp16", "fp32")]
RULED = sorted({fmt.with_rule(rule) for fmt in FORMATS for rule in rules_for(fmt)}, key=str)
OTHERS = [  # granularities that no known format has, and scales that cannot be known to fit
    Format.parse(spelling)
    for spelling in (
        "int4/4x64*fp16",
        "e2m1/2x32*e4m3/tensor",
        "int8/8x256*uint8/tensor",
        "nf4/1x64*int8/1x4",
        "int1/row",
    )
]
SHAPES = [(8, 256), (256,), (3, 8, 256), (128, 128), (64, 256), (2, 64, 256)]

each_format = pytest.mark.parametrize("fmt", [*FORMATS, *OTHERS], ids=str)
each_rule = pytest.mark.parametrize("fmt", [*RULED, *OTHERS], ids=str)


def sample(fmt: Format, shape: tuple[int, ...], *, std: float = 0.02, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std
    return x if fmt.element.signed or fmt.zero_point else x.abs()


@functools.cache
def fitting(fmt: Format) -> list[tuple[int, ...]]:
    """The shapes that the format, and the format of its scale, take; at least one matrix."""
    fits = []
    for shape in SHAPES:
        try:
            scale_shape = fmt.scale_shape(shape)
            if fmt.nested:
                fmt.nested.scale_shape(scale_shape)
        except MisfitError:
            continue
        fits.append(shape)
    return fits


def one_shape(fmt: Format) -> tuple[int, ...]:
    return next(shape for shape in fitting(fmt) if len(shape) == 2)


def in_blocks(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """A matrix as (blocks, numbers in a block)."""
    bn, bk = fmt.block_dims(tuple(x.shape))
    return x.reshape(x.shape[0] // bn, bn, x.shape[1] // bk, bk).transpose(1, 2).reshape(-1, bn * bk)


def scales(parts, fmt: Format) -> torch.Tensor:
    return read_scale(parts, fmt).reshape(-1, 1)


# -- shapes, dtypes, views --------------------------------------------------------------------------------------------


@each_format
def test_shapes_and_dtypes(fmt):
    for shape in fitting(fmt):
        parts = quantize(sample(fmt, shape), fmt)
        assert parts.qdata.shape == shape and parts.qdata.dtype == fmt.element.dtype
        assert tuple(parts.scale.shape) == fmt.scale_shape(shape) == tuple(read_scale(parts, fmt).shape)
        scale_element = fmt.nested.element if fmt.nested else ELEMENTS[fmt.scale]
        assert parts.scale.dtype == scale_element.dtype
        assert (parts.scale_scale is not None) == (fmt.nested is not None)
        assert (parts.zero_point is not None) == (fmt.zero_point is not None)
        if parts.zero_point is not None:
            assert parts.zero_point.shape == parts.scale.shape
        assert all(tensor.is_contiguous() for tensor in parts.tensors().values())
        bits = sum(
            tensor.numel() * (8 * tensor.element_size() if name not in ("qdata", "scale") else width)
            for (name, tensor), width in zip(
                parts.tensors().items(), (fmt.element.bits, scale_element.bits, 0, 0, 0), strict=False
            )
        )
        assert fmt.bits(shape) * math.prod(shape) == pytest.approx(bits)


@each_format
@pytest.mark.parametrize("shape", [(0, 256), (0, 128, 256), (2, 0, 256)])
def test_empty_tensors_keep_shapes_and_dtypes(fmt, shape):
    full, empty = quantize(sample(fmt, (256, 256)), fmt), quantize(torch.empty(shape), fmt)
    assert {name: tensor.dtype for name, tensor in empty.tensors().items()} == {
        name: tensor.dtype for name, tensor in full.tensors().items()
    }
    assert empty.qdata.shape == shape and tuple(empty.scale.shape) == fmt.scale_shape(shape)
    for dtype in (torch.float32, torch.float16):
        back = dequantize(empty, fmt, dtype)
        assert back.shape == shape and back.dtype == dtype


@each_format
def test_every_float_dtype_is_the_same_numbers(fmt):
    x = sample(fmt, one_shape(fmt)).bfloat16().float() * 8  # numbers that bf16, fp16, fp32 and fp64 all hold
    expected = quantize(x, fmt).tensors()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(x.to(dtype).double(), x.double())
        for name, tensor in quantize(x.to(dtype), fmt).tensors().items():
            assert torch.equal(tensor, expected[name]), (name, dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert fake_quantize(x.to(dtype), fmt).dtype == dtype


@each_format
def test_views_are_the_same_numbers(fmt):
    x = sample(fmt, one_shape(fmt))
    expected = quantize(x, fmt)
    strided = torch.stack((x, x), dim=-1)[..., 0]
    for view in (x.t().contiguous().t(), strided):
        assert not view.is_contiguous()
        parts = quantize(view, fmt)
        assert all(torch.equal(tensor, expected.tensors()[name]) for name, tensor in parts.tensors().items())
        assert parts.qdata.is_contiguous()


@each_format
def test_no_gradient_is_kept(fmt):
    x = sample(fmt, one_shape(fmt)).requires_grad_()
    assert not any(tensor.requires_grad for tensor in quantize(x, fmt).tensors().values())
    assert not fake_quantize(x, fmt).requires_grad
    assert x.requires_grad and x.grad is None


@each_format
def test_pieces_give_the_numbers_of_the_whole(fmt, monkeypatch):
    x = sample(fmt, one_shape(fmt))
    for rule in rules_for(fmt):
        ruled = fmt.with_rule(rule) if str(fmt) in KNOWN else fmt
        whole = quantize(x, ruled).tensors()
        with monkeypatch.context() as small:
            small.setattr("lowp.numerics.math._PIECE", 700)
            pieces = quantize(x, ruled).tensors()
        if ruled.rule != "mse":  # there the order of a sum differs, and with it a tie
            assert all(torch.equal(tensor, pieces[name]) for name, tensor in whole.items()), rule
        else:
            assert (pieces["qdata"].float() - whole["qdata"].float()).count_nonzero() <= x.numel() // 50


# -- values -----------------------------------------------------------------------------------------------------------


@each_rule
def test_all_zero_blocks_are_zeros(fmt):
    x = sample(fmt, one_shape(fmt))
    rows = fmt.block_dims(tuple(x.shape))[0]
    x[:rows] = 0
    for zeros in (torch.zeros_like(x), -torch.zeros_like(x), x):
        parts = quantize(zeros, fmt)
        back = dequantize(parts, fmt)[:rows]
        assert read_scale(parts, fmt).isfinite().all() and (read_scale(parts, fmt) > 0).all()
        if fmt.element.kind == "int" or 0.0 in fmt.element.values:
            assert (back == 0).all()
        else:  # ulin4 holds no zero: the smallest scale there is
            assert (back.abs() <= TINY).all()


@each_rule
def test_values_lie_on_the_grid(fmt):
    """Each value is exactly (code - zero point) * scale, with a code that the element has."""
    x = sample(fmt, one_shape(fmt))
    parts = quantize(x, fmt)
    table = torch.tensor(fmt.element.values, dtype=torch.float64)
    code = table[fmt.element.to_codes(parts.qdata).long()]
    assert code.isfinite().all()
    zero_point = 0.0 if parts.zero_point is None else in_rows(parts.zero_point.double(), x, fmt)
    expected = (code - zero_point) * in_rows(read_scale(parts, fmt).double(), x, fmt)
    back = dequantize(parts, fmt)
    assert torch.allclose(back.double(), expected, rtol=3e-7, atol=1e-9)


def in_rows(per_block: torch.Tensor, x: torch.Tensor, fmt: Format) -> torch.Tensor:
    bn, bk = fmt.block_dims(tuple(x.shape))
    return per_block.repeat_interleave(bn, dim=0).repeat_interleave(bk, dim=1)


@each_rule
def test_every_number_goes_to_the_nearest_value(fmt):
    """No code of the element is nearer, for the scale and zero point stored; but for the last bit of a quotient."""
    x = sample(fmt, one_shape(fmt))
    parts = quantize(x, fmt)
    scale = in_rows(read_scale(parts, fmt).double(), x, fmt)
    zero_point = 0.0 if parts.zero_point is None else in_rows(parts.zero_point.double(), x, fmt)
    table = (
        torch.tensor([value for value in fmt.element.values if math.isfinite(value)], dtype=torch.float64).sort().values
    )
    scaled = x.double() / scale + zero_point
    above = torch.searchsorted(table, scaled).clamp(1, len(table) - 1)
    nearest = torch.minimum((scaled - table[above]).abs(), (scaled - table[above - 1]).abs())
    ours = (scaled - fmt.element.decode(parts.qdata).double()).abs()
    if fmt.zero_point in ("int8", "uint8", "int32"):
        nearest = nearest.clamp(min=1e-6)
    assert (ours - nearest <= 1e-5 * scaled.abs().clamp(min=1)).all()


@each_rule
def test_quantizing_again_changes_nothing(fmt):
    """A reconstruction is a fixed point of the rules that keep the range of a block.

    `symmetric` divides by half a step more than the largest code, `absmean` takes the mean, and a float zero point is rounded:
    their range moves by a part of it. So does what is clipped because an element's extremes differ (dyn8, dyn4, int1), and an
    integer that mse has clipped to its extra negative code, -(qmax + 1).
    """
    x = sample(fmt, one_shape(fmt))
    once = fake_quantize(x, fmt)
    twice = fake_quantize(once, fmt)
    lopsided = fmt.element.kind == "codebook" and -fmt.element.min != fmt.element.max and fmt.element.signed
    extra = fmt.element.bits == 1 or (fmt.element.kind == "int" and fmt.rule == "mse")
    keeps = fmt.rule not in ("symmetric", "absmean") and not fmt.zero_point and not lopsided and not extra
    if keeps and not (fmt.nested and fmt.nested.rule == "centered"):
        # a scale of one float32 is found again up to its last bit
        assert torch.allclose(twice, once, rtol=1e-6, atol=0)
    else:
        step = in_blocks(once, fmt).abs().amax(dim=1).mean()
        assert (in_blocks(twice - once, fmt).abs().mean(dim=1) <= 0.4 * step).all()
        assert (twice - once).norm() <= (once - x).norm() * 1.5


@each_format
def test_absmax_keeps_the_largest_element(fmt):
    """With absmax and a scale that is not rounded, the number of largest magnitude comes back to the last bits of float32."""
    if "absmax" not in rules_for(fmt) or fmt.scale != "fp32":
        return
    fmt = fmt.with_rule("absmax")
    x = sample(fmt, one_shape(fmt))
    blocks = in_blocks(x, fmt)
    top = blocks.abs().argmax(dim=1, keepdim=True)
    sign = -1.0 if fmt.element.max <= 0 else 1.0
    blocks = blocks.scatter(1, top, sign * blocks.gather(1, top).abs())  # the extreme that the element holds exactly
    if fmt.block != "row":
        return
    back = in_blocks(fake_quantize(blocks, fmt), fmt)
    assert torch.allclose(back.gather(1, top), blocks.gather(1, top), rtol=2.5e-7)


@each_format
def test_mse_is_never_worse_than_its_base(fmt):
    x = sample(fmt, one_shape(fmt))
    base = fmt.with_rule("rceil" if fmt.scale == "e8m0" else "asymmetric" if fmt.zero_point else "absmax")

    def errors(rule: Format) -> torch.Tensor:
        return in_blocks((fake_quantize(x, rule) - x).double(), fmt).square().sum(dim=1)

    assert (errors(fmt.with_rule("mse")) <= errors(base) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "spelling", ["int4/1x32", "int3/1x64", "int2/1x32+fp32", "e2m1/1x16*e4m3/tensor", "int1/1x32+fp32"]
)
def test_mse_is_better_in_few_bits(spelling):
    fmt = Format.parse(spelling)
    x = sample(fmt, (64, 256))
    base = fmt.with_rule("asymmetric" if fmt.zero_point else "absmax")
    searched = (fake_quantize(x, fmt.with_rule("mse")) - x).square().sum()
    assert searched < 0.99 * (fake_quantize(x, base) - x).square().sum()


@each_rule
def test_tiny_and_huge_numbers_stay_finite(fmt):
    for size in (1e-45, 1e-38, 1e38):
        x = sample(fmt, one_shape(fmt), std=1.0).clamp(-2, 2) / 2 * size
        back = fake_quantize(x, fmt)
        assert back.isfinite().all(), size
        assert (back.abs() <= 2.1 * size + 3 * TINY * fmt.element.largest).all(), size


@each_rule
def test_what_is_not_finite_stays_visible(fmt):
    for bad in (math.nan, math.inf, -math.inf):
        x = sample(fmt, one_shape(fmt))
        x[3, 5] = bad
        parts = quantize(x, fmt)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            seen = (~in_blocks(dequantize(parts, fmt, dtype), fmt).isfinite()).any(dim=1)
            assert seen[(~in_blocks(x, fmt).isfinite()).any(dim=1)].all(), (bad, dtype)


@each_rule
def test_fp16_never_overflows(fmt):
    x = sample(fmt, one_shape(fmt), std=1.0)
    x = (x / x.abs().max() * 65504).half()
    for out in (fake_quantize(x, fmt), dequantize(quantize(x, fmt), fmt, torch.float16)):
        assert out.dtype == torch.float16 and out.isfinite().all()


def test_fp16_clamps_what_is_finite_and_keeps_what_is_not():
    fmt = Format.parse("int8/row")
    parts = quantize(torch.tensor([[65504.0, 1.0], [1e6, 1.0], [math.inf, 1.0]]), fmt)
    values = dequantize(parts, fmt, torch.float16)
    assert values[:2, 0].tolist() == [65504.0, 65504.0] and not values[2].isfinite().all()


def test_float64_out_is_computed_in_float64():
    fmt = Format.parse("int8/row")
    parts = quantize(torch.tensor([[1.0, 0.3]]), fmt)
    exact = parts.qdata.double() * parts.scale.double()
    assert torch.equal(dequantize(parts, fmt, torch.float64), exact)


@pytest.mark.parametrize("fmt", IDENTITIES, ids=str)
def test_identities_cast(fmt):
    x = sample(fmt, (4, 8))
    parts = quantize(x, fmt)
    assert list(parts.tensors()) == ["qdata"] and torch.equal(parts.qdata, x.to(fmt.element.native))
    assert torch.equal(dequantize(parts, fmt), x.to(fmt.element.native).float())
    with pytest.raises(MisfitError, match="no scale"):
        read_scale(parts, fmt)


@each_format
def test_blocks_that_do_not_divide(fmt):
    if fmt.block in ("row", "tensor"):
        return
    with pytest.raises(MisfitError):
        quantize(torch.zeros(7, 13), fmt)


# -- a scale that is given --------------------------------------------------------------------------------------------


@each_rule
def test_given_its_own_scale_the_codes_are_the_same(fmt):
    x = sample(fmt, one_shape(fmt))
    parts = quantize(x, fmt)
    given = quantize_given(x, fmt, read_scale(parts, fmt), parts.zero_point)
    if fmt.nested is None:
        assert torch.equal(given.qdata, parts.qdata) and torch.equal(given.scale, parts.scale)
    error, given_error = ((dequantize(p, fmt) - x).norm() for p in (parts, given))
    assert given_error <= 1.05 * error + 1e-7


@each_format
def test_a_given_scale_has_the_right_shape(fmt):
    x = sample(fmt, one_shape(fmt))
    shape = fmt.scale_shape(tuple(x.shape))
    with pytest.raises(MisfitError, match="scale of shape"):
        quantize_given(x, fmt, torch.ones(*shape, 1))
    if fmt.zero_point:
        with pytest.raises(MisfitError, match="zero point of shape"):
            quantize_given(x, fmt, torch.ones(shape), torch.ones(1, 1, 1))


def test_a_given_zero_point_is_kept_within_its_dtype():
    fmt = Format.parse("int4/row+int8")
    parts = quantize_given(torch.ones(2, 8), fmt, torch.ones(2, 1), torch.tensor([[1000.0], [-1000.0]]))
    assert parts.zero_point.flatten().tolist() == [127, -128]


# -- stochastic rounding ----------------------------------------------------------------------------------------------


@each_format
def test_stochastic_rounding_is_unbiased(fmt):
    """The mean over 100 draws lies within 6 standard errors of the number, where nothing is clamped."""
    x = sample(fmt, one_shape(fmt))
    plain = quantize(x, fmt)
    generator = torch.Generator().manual_seed(0)
    draws = torch.zeros_like(x, dtype=torch.float64)
    count = 100
    for _ in range(count):
        parts = quantize(x, fmt, stochastic=True, generator=generator)
        assert torch.equal(parts.scale.float(), plain.scale.float())
        draws += dequantize(parts, fmt).double()
    scale = in_rows(read_scale(plain, fmt).double(), x, fmt)
    zero_point = 0.0 if plain.zero_point is None else in_rows(plain.zero_point.double(), x, fmt)
    scaled = x.double() / scale + zero_point
    values = torch.tensor(sorted({value for value in fmt.element.values if math.isfinite(value)}), dtype=torch.float64)
    inside = (scaled > values[0]) & (scaled < values[-1])
    above = torch.searchsorted(values, scaled).clamp(1, len(values) - 1)
    step = (values[above] - values[above - 1]) * scale
    bias = (draws / count - x.double())[inside]
    assert (bias.abs() <= 6 * 0.5 * step[inside] / math.sqrt(count) + 1e-7).all()
    assert (bias / step[inside]).mean().abs() <= 5 * 0.5 / math.sqrt(count * inside.sum())


@each_format
def test_stochastic_rounding_repeats_with_its_generator(fmt):
    x = sample(fmt, one_shape(fmt))

    def draw(seed: int) -> torch.Tensor:
        parts = quantize(x, fmt, stochastic=True, generator=torch.Generator().manual_seed(seed))
        return fmt.element.to_codes(parts.qdata)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("fmt", IDENTITIES[:2], ids=str)
def test_stochastic_rounding_of_a_float(fmt):
    x = torch.full((100_000,), 1.0 + 2.0**-13)
    parts = quantize(x, fmt, stochastic=True, generator=torch.Generator().manual_seed(0))
    assert parts.qdata.dtype == fmt.element.native
    assert parts.qdata.double().mean().item() == pytest.approx(1.0 + 2.0**-13, abs=5e-5)


ACTS = sorted({known.spelling.split("@")[1] for known in known_formats() if "@" in known.spelling})


@pytest.mark.parametrize("spelling", [*ACTS, "nf4/1x64*bf16", "udyn8/1x256"])  # activations, and a look-up of each kind
def test_no_break_in_the_graph(spelling):
    fmt = Format.parse(spelling)
    x = sample(fmt, (16, 256))
    expected = [fake_quantize(x, fmt), fake_quantize(x[:7], fmt)]
    torch._dynamo.reset()
    traced = torch.compile(fake_quantize, fullgraph=True, backend="aot_eager")
    torch._dynamo.mark_dynamic(x, 0)
    assert torch.equal(traced(x, fmt), expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):  # one graph for any number of rows
        assert torch.equal(traced(x[:7], fmt), expected[1])


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.nested and fmt.nested.element.kind == "float"], ids=str)
def test_an_outer_scale_may_be_chosen_elsewhere(fmt):
    x = sample(fmt, (64, 256))
    alone = quantize(x, fmt)
    again = quantize(x, fmt, outer=alone.scale_scale)
    assert all(torch.equal(a, again.tensors()[name]) for name, a in alone.tensors().items() if a.element_size() > 1)
    wider = quantize(x, fmt, outer=alone.scale_scale * 4)
    assert (wider.scale_scale == alone.scale_scale * 4).all()
    assert torch.allclose(dequantize(wider, fmt), dequantize(alone, fmt), rtol=0.3, atol=0.02)


def test_only_float_scales_take_an_outer_scale():
    with pytest.raises(MisfitError, match="only a float scale"):
        quantize(torch.randn(64, 256), Format.parse("nf4/1x64*int8/1x256"), outer=torch.ones(()))
