"""Every element is its table, and encode finds the nearest value: proven against torch's dtypes, ml_dtypes and brute force.

Three oracles that share no code with us: torch's float8 casts, ml_dtypes' casts (which also know float4 and float6), and the
nearest value by argmin in float64. Inputs are all 65,536 bf16 numbers: every sign, exponent, subnormal, infinity and NaN, with
every boundary between two values, because a boundary of an 8-bit float is a bf16 number.

One place differs on purpose: below 2**-126 torch's and ml_dtypes' e8m0 cast rounds every number above 2**-127 up to the next
code, where the table rounds to nearest.
"""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch

from lowp.numerics import ELEMENTS, Element

CODED = [element for element in ELEMENTS.values() if element.kind != "identity"]
FLOATS = [element for element in CODED if element.kind == "float"]
INTS = [element for element in CODED if element.kind == "int"]
CODEBOOKS = [element for element in CODED if element.kind == "codebook"]
ALL_BF16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    **{f"{u}int{bits}": getattr(ml_dtypes, f"{u}int{bits}") for u in ("", "u") for bits in (1, 2, 4)},
    "int8": np.int8,
    "uint8": np.uint8,
}

each = pytest.mark.parametrize("element", CODED, ids=lambda element: element.name)
each_float = pytest.mark.parametrize("element", FLOATS, ids=lambda element: element.name)
each_int = pytest.mark.parametrize("element", INTS, ids=lambda element: element.name)
each_codebook = pytest.mark.parametrize("element", CODEBOOKS, ids=lambda element: element.name)
by_both_ways = pytest.mark.parametrize("way", ["encode", "encode_by_table"])


def codes_of(element: Element) -> torch.Tensor:
    return torch.arange(2**element.bits).to(torch.uint8)


def encoded(element: Element, x: torch.Tensor, way: str, *, saturate: bool = True) -> torch.Tensor:
    """Raw codes by the fast way or by the table."""
    qdata = getattr(element, way)(x, saturate=saturate)
    return element.to_codes(qdata) if way == "encode" else qdata


def values_of(element: Element, codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(element.values, dtype=torch.float64)[codes.long()]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, inputs: torch.Tensor) -> None:
    differ = (ours != theirs).nonzero().flatten()
    cases = [(inputs[i].item(), ours[i].item(), theirs[i].item()) for i in differ[:5]]
    assert not cases, f"{len(differ)} differ; (input, ours, theirs): {cases}"


# -- tables -----------------------------------------------------------------------------------------------------------


@each
def test_decode_is_the_table(element):
    decoded = element.decode(element.from_codes(codes_of(element)))
    expected = values_of(element, codes_of(element)).float()
    there = ~expected.isnan()
    assert torch.equal(decoded[there], expected[there])
    assert torch.equal(torch.signbit(decoded[there]), torch.signbit(expected[there])), "the sign of zero"
    if element.kind == "float":  # ternary has a code without a value, which is never made
        assert decoded[~there].isnan().all()


@pytest.mark.parametrize("name", ML_DTYPES)
def test_table_equals_ml_dtypes(name):
    element = ELEMENTS[name]
    codes = np.arange(2**element.bits)
    if element.kind == "int" and element.signed:  # ml_dtypes holds small integers sign-extended
        codes = np.where(codes >= 2 ** (element.bits - 1), codes - 2**element.bits, codes)
    codes = codes.astype(np.uint8)
    theirs = codes.view(ML_DTYPES[name]).astype(np.float64)
    np.testing.assert_array_equal(np.array(element.values), theirs)


@pytest.mark.parametrize("element", [e for e in FLOATS if e.native], ids=lambda element: element.name)
def test_table_equals_torch(element):
    theirs = codes_of(element).view(element.native).float()
    ours = torch.tensor(element.values, dtype=torch.float64).float()
    assert torch.equal(ours.nan_to_num(12345.0), theirs.nan_to_num(12345.0))


def test_the_float_oracle_knows_every_float():
    assert {element.name for element in FLOATS} <= set(ML_DTYPES)


@each
def test_storage_round_trip(element):
    codes = codes_of(element).repeat(3).reshape(3, -1)
    qdata = element.from_codes(codes)
    assert qdata.dtype == element.dtype and qdata.shape == codes.shape
    assert torch.equal(element.to_codes(qdata), codes)


@each
@by_both_ways
def test_every_value_encodes_to_its_own_code(element, way):
    codes = codes_of(element)
    values = values_of(element, codes)
    finite = values.isfinite()
    again = encoded(element, values.float(), way)
    assert torch.equal(values_of(element, again)[finite], values[finite])
    twins = len(set(element.values)) < len(element.values) and element.kind == "codebook"
    if not twins:
        assert torch.equal(again[finite], codes[finite])


@each
def test_limits_are_those_of_the_table(element):
    finite = [value for value in element.values if math.isfinite(value)]
    assert (element.min, element.max) == (min(finite), max(finite))
    assert element.largest > 0 and 2.0**element.emax <= element.largest < 2.0 ** (element.emax + 1)
    if element.kind == "int":
        assert (element.qmin, element.qmax) == (element.min, element.max)


@each
def test_a_source_is_named(element):
    assert element.source


def test_an_identity_has_no_table():
    with pytest.raises(TypeError, match="identity"):
        _ = ELEMENTS["bf16"].values


# -- floats -----------------------------------------------------------------------------------------------------------


@by_both_ways
@pytest.mark.parametrize("element", [e for e in FLOATS if e.native and e.signed], ids=lambda element: element.name)
def test_saturating_encode_equals_torchs_cast(element, way):
    theirs = ALL_BF16.clamp(element.min, element.max).to(element.native).view(torch.uint8)
    assert_same(encoded(element, ALL_BF16, way), theirs, ALL_BF16)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # numpy, of NaN
@by_both_ways
@pytest.mark.parametrize(
    "element", [e for e in FLOATS if e.signed and e.specials != "none"], ids=lambda element: element.name
)
def test_overflowing_encode_equals_ml_dtypes_cast(element, way):
    # ml_dtypes, not torch: since 2.13 torch's own cast to e4m3fn saturates.
    theirs = torch.from_numpy(ALL_BF16.numpy().astype(ML_DTYPES[element.name]).view(np.uint8))
    ours = encoded(element, ALL_BF16, way, saturate=False)
    nan = ALL_BF16.isnan()
    assert_same(ours[~nan], theirs[~nan], ALL_BF16[~nan])
    assert values_of(element, ours[nan]).isnan().all()


@by_both_ways
@pytest.mark.parametrize("element", [e for e in FLOATS if e.specials == "none"], ids=lambda element: element.name)
def test_encode_equals_ml_dtypes_cast(element, way):
    numbers = ALL_BF16[~ALL_BF16.isnan()]
    theirs = torch.from_numpy(numbers.numpy().astype(ML_DTYPES[element.name]).view(np.uint8))
    assert_same(encoded(element, numbers, way), theirs, numbers)


@by_both_ways
def test_e8m0_encode_equals_torchs_cast_above_its_lowest_code(way):
    e8m0 = ELEMENTS["e8m0"]
    numbers = ALL_BF16[(ALL_BF16 >= 2.0**-126) | (ALL_BF16 == 2.0**-127)]
    theirs = numbers.clamp(e8m0.min, e8m0.max).to(torch.float8_e8m0fnu).view(torch.uint8)
    assert_same(encoded(e8m0, numbers, way), theirs, numbers)
    assert encoded(e8m0, torch.tensor([0.0, -1.0, 2.0**-130, math.nan, math.inf]), way).tolist() == [0, 0, 0, 255, 254]


@by_both_ways
@each_float
def test_float32_neighbours_of_every_boundary(element, way):
    """One float32 above and below each boundary goes to the value on its side."""
    values = sorted({value for value in element.values if math.isfinite(value) and value >= 2.0**-120})
    middles = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(values)], dtype=torch.float32)
    lows, highs = torch.tensor(values[:-1], dtype=torch.float64), torch.tensor(values[1:], dtype=torch.float64)
    infinity = torch.tensor(math.inf)
    assert torch.equal(values_of(element, encoded(element, torch.nextafter(middles, -infinity), way)), lows)
    assert torch.equal(values_of(element, encoded(element, torch.nextafter(middles, infinity), way)), highs)


@each
@by_both_ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_encode_as_float32(element, way, dtype):
    x = torch.linspace(-3, 3, 1001).to(dtype)
    assert torch.equal(encoded(element, x, way), encoded(element, x.float(), way))


# -- integers and codebooks -------------------------------------------------------------------------------------------


@by_both_ways
@each_int
def test_integers_round_half_to_even_and_clamp(element, way):
    numbers = ALL_BF16[~ALL_BF16.isnan()]
    expected = np.clip(np.rint(numbers.numpy().astype(np.float64)), element.qmin, element.qmax)
    ours = values_of(element, encoded(element, numbers, way)).numpy()
    np.testing.assert_array_equal(ours, expected)


@by_both_ways
@each_codebook
def test_codebooks_find_the_nearest_value(element, way):
    x = torch.cat([torch.linspace(-1.2, 1.2, 20011), torch.logspace(-9, 0, 4001), -torch.logspace(-9, 0, 4001)])
    table = torch.tensor(element.values, dtype=torch.float64)
    ours = (values_of(element, encoded(element, x, way)) - x.double()).abs()
    nearest = (table - x.double().unsqueeze(1)).abs().amin(dim=1)
    assert (ours - nearest).max() <= 1e-7 * x.abs().max(), "off by more than the rounding of a float32 boundary"


@each_codebook
def test_codebooks_are_sorted(element):
    assert list(element.values) == sorted(set(element.values))
    assert len(element.values) == 2**element.bits


def test_dynamic_maps_are_those_of_the_literature():
    signed, unsigned = ELEMENTS["dyn8"].values, ELEMENTS["udyn8"].values
    assert (round(min(signed), 5), max(signed)) == (-0.99297, 1.0)
    assert min(value for value in signed if value > 0) == pytest.approx(5.5e-7)
    assert (min(unsigned), max(unsigned)) == (0.0, 1.0)
    assert min(value for value in unsigned if value > 0) == pytest.approx(3.25e-7)
    dyn4 = [-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0]
    dyn4 += [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0]
    assert ELEMENTS["dyn4"].values == pytest.approx(dyn4)
    assert ELEMENTS["ulin4"].values == tuple(i / 16 for i in range(1, 17))


def test_nf4_is_qloras_table():
    rounded = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
    rounded += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1]
    assert [round(value, 4) for value in ELEMENTS["nf4"].values] == rounded


# -- stochastic rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "element", [e for e in ELEMENTS.values() if e.name != "e8m0"], ids=lambda element: element.name
)
def test_stochastic_rounding_takes_a_neighbour(element):
    x = torch.linspace(-1.3, 1.3, 999)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    if element.kind == "identity":
        step = x.abs() * 2.0 ** -{"bf16": 7, "fp16": 10, "fp32": 23}[element.name] + 1e-7
        assert ((element.encode_stochastic(x, noise).float() - x).abs() <= step).all()
        return
    values = torch.tensor(sorted({value for value in element.values if math.isfinite(value)}), dtype=torch.float64)
    inside = x.double().clamp(values[0], values[-1])
    below = values[(torch.searchsorted(values, inside, right=True) - 1).clamp(0, len(values) - 1)]
    above = values[torch.searchsorted(values, inside).clamp(0, len(values) - 1)]
    taken = element.decode(element.encode_stochastic(x, noise)).double()
    near = torch.minimum((taken - below).abs(), (taken - above).abs())
    assert (near <= 1e-6 * inside.abs()).all()


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_stochastic_rounding_of_floats(name):
    element = ELEMENTS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([1.001, -1.001, 1e-6, -3e-8, 0.0, 1.0, -2.5]).repeat(20000, 1)
    rounded = element.encode_stochastic(x, torch.rand(x.shape, generator=generator)).double()
    step = torch.maximum(
        x[0].abs() * 2.0 ** -(7 if name == "bf16" else 10), torch.tensor(2.0**-24 if name == "fp16" else 0.0)
    )
    assert ((rounded.mean(dim=0) - x[0].double()).abs() <= 4 * step / math.sqrt(20000)).all()
    assert torch.equal(rounded[:, 4:], x[:, 4:].double()), "a number that the float holds stays"
    edge = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    assert torch.equal(
        element.encode_stochastic(edge, torch.full((5,), 0.999)).float().nan_to_num(7.0), edge.nan_to_num(7.0)
    )


@each_codebook
def test_a_look_up_finds_the_code_of_the_search_on_both_sides_of_every_boundary(element):
    """Buckets against bucketize: each boundary, its neighbours in float32, and numbers of every size beside them."""
    boundaries = element._search(torch.device("cpu"))[1]
    up, down = torch.full_like(boundaries, math.inf), torch.full_like(boundaries, -math.inf)
    near = torch.cat([boundaries, torch.nextafter(boundaries, up), torch.nextafter(boundaries, down)])
    any_bits = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int32).view(torch.float32)
    x = torch.cat(
        [near, -near, any_bits, torch.rand(20000) * 2 - 1, torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf])]
    )
    assert element.buckets is not None and len(element.buckets.words) <= 4096
    assert_same(element.encode(x), element.encode_by_table(x), x)
