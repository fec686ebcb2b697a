"""Casts against `numerics`: codes and scales are compared exactly, over formats, dtypes and hard numbers.

Every kernel of the table runs: on a GPU for real, on a CPU in Triton's interpreter, which plays an sm90.
"""

import dataclasses
import functools

import pytest
import torch

from lowp.errors import KernelError
from lowp.kernels.triton_ import interpreted
from lowp.numerics import Format, Scheme, dequantize, known_formats
from lowp.ops import cast, cast_codes_as, cast_interleaved, fake_cast, kernels_of, strict
from lowp.ops.cast import case_of_cast, codes_reference, fake_reference, reference
from lowp.ops.linear import act_values
from lowp.tensor import QTensor

K = 384  # of no power of two, and a multiple of every block below
ACTS = {str(Scheme.parse(known.spelling).act) for known in known_formats() if "@" in known.spelling}
MORE = {
    "int8/tensor", "e4m3/tensor", "e5m2/row", "e5m2/tensor", "e5m2/1x32*e8m0", "e2m1/1x16*e4m3", "e3m2/1x32*e8m0", "e2m3/row",
    "int8/1x32*e8m0", "int8/1x32*e8m0~even", "int4/row", "int8/row*bf16", "int8/row*fp16", "int8/row~symmetric",
    "uint8/row+uint8",
    "int8/1x128+int8", "int8/1x16*e4m3/tensor", *(f"e4m3/1x32*e8m0~{rule}" for rule in ("floor", "ceil", "even")),
}  # fmt: skip
FORMATS = sorted(ACTS | MORE)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def runnable(request):
    if "device" in request.fixturenames and request.getfixturevalue("device").type == "cpu" and not interpreted():
        pytest.skip("Triton's interpreter is off: a GPU is here")


def numbers(dtype, device):
    """Rows of all kinds: ordinary, zero, negative zero, subnormal, huge, ties, one-sided."""
    x = torch.randn(12, K)
    x[1], x[2] = 0, -0.0
    x[3] *= 1e-40
    x[4] *= 1e37
    x[5] = x[5].round() / 2
    x[6], x[7] = x[6].abs(), -x[7].abs()
    x[8] = 2.0 ** torch.randint(-12, 4, (K,))
    x[9] *= 1e-20
    x[10, ::7] = 100
    return x.to(device=device, dtype=dtype)


def lost(dtype, device):
    """Rows that hold a NaN or an infinity."""
    x = torch.randn(5, K)
    x[0, 5], x[1, 7], x[2, 0], x[3, 1], x[3, 2] = torch.inf, -torch.inf, torch.nan, torch.inf, torch.nan
    return x.to(device=device, dtype=dtype)


def fast(op, fmt, x, act_scale=None, pre_scale=None):
    """The kernels that can run a case, Triton's in the interpreter too."""
    case = case_of_cast(op, x, fmt, act_scale, pre_scale)
    if x.device.type == "cpu":
        case = dataclasses.replace(case, device="cuda", sm=90)
    answers = [(kernel, kernel.why_not(case)) for kernel in kernels_of(op) if not kernel.fallback]
    assert all(why.startswith("wants") for _, why in answers if why)
    return [kernel for kernel, why in answers if not why]


def equal(a, b):
    """The same numbers, zero's sign included; one NaN is as good as another, and so is one infinity: infinity over its own
    infinite scale has no sign."""
    a, b = (torch.where(t.isinf(), torch.inf, t) for t in (a.double(), b.double()))
    return bool((a.isnan() & b.isnan() | (a == b) & (a.signbit() == b.signbit())).all())


def assert_same_parts(got, wanted, fmt):
    assert list(got.tensors()) == list(wanted.tensors())
    for name, tensor in wanted.tensors().items():
        mine = getattr(got, name)
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), name
        if name != "qdata":
            assert equal(mine.to(torch.float32), tensor.to(torch.float32)), name
    keep = dequantize(wanted, fmt).isfinite()  # the code beside a scale that is lost says nothing
    assert torch.equal(fmt.element.to_codes(got.qdata)[keep], fmt.element.to_codes(wanted.qdata)[keep])
    assert equal(dequantize(got, fmt), dequantize(wanted, fmt))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", FORMATS)
def test_kernels_write_the_bytes_of_numerics(spelling, dtype, device, poison):
    fmt = Format.parse(spelling)
    for x in (numbers(dtype, device), lost(dtype, device), numbers(dtype, device)[:1], numbers(dtype, device)[0:11:2]):
        for kernel in fast("cast", fmt, x):
            assert_same_parts(kernel.run(x, fmt), reference(x, fmt), fmt)
        for kernel in fast("fake_cast", fmt, x):
            values = kernel.run(x, fmt)
            assert values.dtype == dtype and equal(values, fake_reference(x, fmt))


def test_the_formats_above_are_those_that_a_kernel_casts_to(device):
    x = numbers(torch.bfloat16, device)
    assert [spelling for spelling in FORMATS if not fast("cast", Format.parse(spelling), x)] == []
    assert not fast("cast", Format.parse("nf4/1x64"), x)
    assert not fast("cast", Format.parse("int8/row"), x[:, :100])
    assert (
        kernels_of("cast")[0].why_not(case_of_cast("cast", x.cpu(), Format.parse("int8/row"), None, None))
        == "wants cuda, got cpu"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", FORMATS)
def test_pre_scale_and_static_scale(spelling, dtype, device):
    fmt, x = Format.parse(spelling), numbers(dtype, device)
    pre = torch.rand(K, device=device) + 0.5
    for act in (None, torch.full((), 0.013, device=device), torch.full((1,), 1e-38, device=device)):
        for kernel in fast("cast", fmt, x, act, pre):
            assert_same_parts(kernel.run(x, fmt, act, pre), reference(x, fmt, act, pre), fmt)
        for kernel in fast("fake_cast", fmt, x, act, pre):
            assert equal(kernel.run(x, fmt, act, pre), fake_reference(x, fmt, act, pre))
            if fmt.block != "tensor":
                bad = lost(dtype, device)
                assert equal(kernel.run(bad, fmt, act, pre), fake_reference(bad, fmt, act, pre))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spelling", FORMATS)
def test_codes_as_floats_are_exact(spelling, dtype, device):
    """codes * scale is the value, for every kernel, the reference included."""
    fmt = Format.parse(spelling)
    for x in (numbers(torch.bfloat16, device), lost(torch.bfloat16, device)):
        found = fast("cast_codes_as", fmt, x)
        for run in [kernel.run for kernel in found] + ([codes_reference] if found else []):
            codes, scale_M = run(x, fmt, dtype)
            assert codes.dtype == dtype and scale_M.shape == (len(x),) and scale_M.is_contiguous()
            assert equal(codes.float() * scale_M[:, None], dequantize(reference(x, fmt), fmt))


@pytest.mark.parametrize("spelling", ["e4m3/row", "e5m2/row", "int8/row"])
def test_interleaved_codes_are_the_codes_in_another_order(spelling, device, poison):
    fmt, pre = Format.parse(spelling), torch.rand(K, device=device) + 0.5
    order = [16 * block + 8 * (i % 2) + i // 2 for block in range(K // 16) for i in range(16)]
    static = torch.full((), 0.013, device=device)
    for x in (numbers(torch.bfloat16, device), numbers(torch.float16, device)[:7:2]):
        for act_scale, pre_scale in ((None, None), (None, pre), (static, None)):
            wanted = reference(x.float(), fmt, act_scale, pre_scale)
            runs = [kernel.run for kernel in fast("cast_interleaved", fmt, x, act_scale, pre_scale)]
            assert runs
            for run in [*runs, cast_interleaved]:
                codes, scale_M = run(x, fmt, act_scale, pre_scale)
                assert codes.dtype == wanted.qdata.dtype and scale_M.dtype == torch.float32 and scale_M.is_contiguous()
                assert equal(scale_M, wanted.scale.expand(len(x), 1)[:, 0])
                keep = scale_M.isfinite()  # a code beside a scale that is lost says nothing
                assert torch.equal(codes.view(torch.uint8)[keep], wanted.qdata.view(torch.uint8)[:, order][keep])


@pytest.mark.parametrize("spelling", ["int8/row+int8", "e4m3/row*bf16", "int4/row", "e4m3/tensor", "e4m3/1x32"])
def test_interleaved_codes_of_other_formats_are_refused(spelling, device):
    with pytest.raises(KernelError, match="wants codes of 8 bits with an fp32 scale for each token"):
        cast_interleaved(torch.randn(2, 64, device=device), Format.parse(spelling))
    with pytest.raises(KernelError, match="wants K in multiples of 16, got 40"):
        cast_interleaved(torch.randn(2, 40, device=device), Format.parse("e4m3/row"))


@pytest.mark.parametrize("scheme", ["int8/row@int8/row+int8", "e4m3/row@e4m3/row", "e4m3/row@e2m1/1x16*e4m3/tensor"])
def test_fake_cast_is_what_the_product_sees(scheme, device):
    """`act_values` in float32 is the definition; the fused form may not differ by a bit."""
    q = QTensor.quantize(torch.randn(64, K, device=device), scheme)
    packed = q.packed | {"act_pre_scale": torch.rand(K, device=device) + 0.5}
    x, act = numbers(torch.bfloat16, device), q.spec.act
    expected = act_values(x, packed, q.spec, torch.float32).to(x.dtype)
    assert equal(fake_cast(x, act, None, packed["act_pre_scale"]), expected)


def test_other_shapes(device):
    fmt = Format.parse("e4m3/row")
    for shape in ((0, K), (2, 3, K), (1, K)):
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        for run in [kernel.run for kernel in fast("cast", fmt, x)] + [cast]:
            assert_same_parts(run(x, fmt), reference(x, fmt), fmt)
        assert fake_cast(x, fmt).shape == shape
    x = torch.randn(K, 40, device=device).t()
    assert not x.is_contiguous()
    for kernel in fast("cast", fmt, x):
        assert_same_parts(kernel.run(x, fmt), reference(x, fmt), fmt)
    codes, scale_M = cast_codes_as(x[::2], fmt, torch.bfloat16)
    assert equal(codes.float() * scale_M[:, None], fake_cast(x[::2], fmt))


@pytest.mark.parametrize("spelling", ["int8/row+int8", "e4m3/tensor", "e2m1/1x16*e4m3/tensor"])
def test_traced_it_answers_the_same_bytes_for_any_number_of_tokens(spelling, device):
    """An operator of its own: what is compiled shares the codes with what is not."""
    torch._dynamo.reset()
    fmt = Format.parse(spelling)
    kernels = fast("cast", fmt, torch.empty(1, K, device=device))
    assert kernels
    compiled = torch.compile(
        functools.partial(kernels[0].run, fmt=fmt), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (3, 7, 12):
        x = numbers(torch.bfloat16, device)[:tokens]
        assert_same_parts(compiled(x), reference(x, fmt), fmt)


def test_a_pre_scale_may_be_strided(device):
    fmt, x = Format.parse("int8/row"), torch.randn(3, 64, device=device)
    pre_scale = (torch.rand(128, device=device) + 0.5)[::2]
    for kernel in fast("cast", fmt, x, None, pre_scale):
        assert_same_parts(kernel.run(x, fmt, None, pre_scale), reference(x, fmt, None, pre_scale), fmt)


def test_strict_mode_holds_for_a_cast_that_ran_before(device):
    """A fallback that was picked outside of strict mode is not kept inside."""
    x, fmt = torch.randn(3, 64, device=device, dtype=torch.float64), Format.parse("nf4/1x64*bf16")
    cast(x, fmt)
    with strict(), pytest.raises(KernelError, match="strict mode wants a fast kernel for cast"):
        cast(x, fmt)
