"""The spelling of a format: `parse` and `str` are inverse, and a wrong spelling is answered with the nearest known one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowp.errors import MisfitError, SpellingError
from lowp.numerics import ELEMENTS, PRESETS, RULES, Format, Scheme, known_formats
from lowp.numerics.format import SCALE_DTYPES, ZERO_POINTS, rules_for

KNOWN = [known.spelling for known in known_formats()]
FORMATS = sorted({half for spelling in KNOWN for half in spelling.split("@")})
CODED = [spelling for spelling in FORMATS if not Format.parse(spelling).is_identity]


@pytest.mark.parametrize("spelling", KNOWN)
def test_known_spellings_are_the_shortest(spelling):
    assert str(Scheme.parse(spelling)) == spelling
    assert Scheme.parse(str(Scheme.parse(spelling))) == Scheme.parse(spelling)


def test_known_spellings_are_known_once():
    assert len(KNOWN) == len(set(KNOWN))
    presets = [known.preset for known in known_formats() if known.preset]
    assert len(presets) == len(set(presets))


@pytest.mark.parametrize("known", known_formats(), ids=lambda known: known.spelling)
def test_a_known_format_says_what_it_is_for(known):
    assert known.about and Format.parse(known.spelling.split("@")[0]).source


blocks = st.one_of(
    st.sampled_from(["tensor", "row"]),
    st.builds("{}x{}".format, st.integers(1, 4096), st.integers(1, 4096)),
)
nested = st.builds("{}/{}".format, st.sampled_from(["int8", "int6", "uint8", "e4m3", "e5m2", "nf4"]), blocks)


@st.composite
def spellings(draw):
    """A spelling by the grammar; not all of them mean something."""
    element = draw(st.sampled_from(sorted(ELEMENTS)))
    if ELEMENTS[element].kind == "identity":
        return element
    scale = draw(st.one_of(st.none(), st.sampled_from(SCALE_DTYPES), nested))
    zero_point = draw(st.one_of(st.none(), st.sampled_from(ZERO_POINTS)))
    rule = draw(st.one_of(st.none(), st.sampled_from(sorted(RULES))))
    spelling = f"{element}/{draw(blocks)}"
    spelling += f"*{scale}" if scale else ""
    spelling += f"+{zero_point}" if zero_point else ""
    return spelling + (f"~{rule}" if rule else "")


@given(spellings())
@settings(max_examples=500, deadline=None)
def test_parse_and_str_are_inverse(spelling):
    try:
        fmt = Format.parse(spelling)
    except SpellingError:
        return
    assert Format.parse(str(fmt)) == fmt
    assert str(Format.parse(str(fmt))) == str(fmt)
    assert len(str(fmt)) <= len(spelling), "str writes the shortest form"
    if "~" in spelling:
        assert fmt.rule == spelling.split("~")[1]
    assert hash(Format.parse(f" {spelling} ")) == hash(fmt)


@given(spellings(), spellings())
@settings(max_examples=200, deadline=None)
def test_schemes_parse_and_str_are_inverse(weight, act):
    try:
        scheme = Scheme.parse(f"{weight}@{act}")
    except SpellingError:
        return
    assert Scheme.parse(str(scheme)) == scheme and scheme.act == Format.parse(act)


@given(st.text(alphabet="int4e5m2/x16*+~@ 0abc", max_size=24))
@settings(max_examples=500, deadline=None)
def test_any_text_parses_or_is_a_spelling_error(text):
    for parse in (Format.parse, Scheme.parse):
        try:
            parse(text)
        except SpellingError:
            pass


@pytest.mark.parametrize("spelling", CODED)
def test_every_rule_that_applies_can_be_asked_for(spelling):
    fmt = Format.parse(spelling)
    for rule in rules_for(fmt):
        assert fmt.with_rule(rule).rule == rule
        assert fmt.with_rule(rule).with_rule(fmt.rule) == fmt
    for rule in set(RULES) - set(rules_for(fmt)):
        with pytest.raises(SpellingError, match=rule):
            fmt.with_rule(rule)


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ("int44/row", "did you mean 'int4'"),
        ("e4m33/row", "did you mean 'e4m3'"),
        ("int4/1x128*bf61", "did you mean 'bf16'"),
        ("int4/row+int9", "did you mean 'int8'"),
        ("int4/row~absmaxx", "did you mean 'absmax'"),
        ("e4m3/1x32*e8m0~absmax", "rceil"),
        ("int4/row+int8~absmax", "asymmetric"),
        ("int4", "lacks its block"),
        ("int4/128", "cannot read"),
        ("int4/1x128*bf16 +int8", "cannot read"),
        ("", "cannot read"),
        ("int4/0x128", "holds nothing"),
        ("int4/1x00", "holds nothing"),
        ("bf16/row", "kept as it is"),
        ("fp32~mse", "kept as it is"),
        ("e4m3/row+int8", "only integers take a zero point"),
        ("nf4/row+bf16", "only integers take a zero point"),
        ("e8m0/row", "it is for scales"),
        ("int4/1x32*e8m0+int8", "takes no zero point"),
        ("uint8/row+int8", "write +uint8"),
        ("int4/row+uint8", "write +int8"),
        ("int4/1x16*int8", "unknown scale"),
        ("int4/1x16*bf16/row", "kept as it is"),
        ("int4/1x16*int88/row", "did you mean 'int8'"),
        (4, "is a string"),
        (None, "is a string"),
        (["int4/row"], "is a string"),
    ],
)
def test_a_wrong_format_is_answered(wrong, answer):
    with pytest.raises(SpellingError) as error:
        Format.parse(wrong)
    assert answer in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ("int44", "'int4'"),
        ("mxfp", "'mxfp8'"),
        ("fp8-dynamik", "'fp8_dynamic'"),
        ("int8/row@", "ends in '@'"),
        ("@int8/row", "unknown scheme"),
        ("int8/row@int8/row@int8/row", "cannot read"),
        ("e2m1", "lacks its block"),
        (None, "is a string"),
        ({}, "is a string"),
    ],
)
def test_a_wrong_scheme_is_answered(wrong, answer):
    with pytest.raises(SpellingError) as error:
        Scheme.parse(wrong)
    assert answer in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_in_any_case(name):
    scheme = Scheme.parse(PRESETS[name])
    for spelling in (name, name.lower(), name.title(), name.replace("_", "-"), f" {name} "):
        assert Scheme.parse(spelling) == scheme


@pytest.mark.parametrize(
    ("spelling", "shape", "block", "scale"),
    [
        ("int8/tensor", (8, 256), (8, 256), (1, 1)),
        ("int8/tensor", (3, 8, 256), (8, 256), (3, 1, 1)),
        ("int8/row", (8, 256), (1, 256), (8, 1)),
        ("int8/row", (256,), (1, 256), (1,)),
        ("int4/1x64", (8, 256), (1, 64), (8, 4)),
        ("int4/1x64", (256,), (1, 64), (4,)),
        ("int4/1x64", (2, 3, 8, 256), (1, 64), (2, 3, 8, 4)),
        ("e4m3/4x64", (8, 256), (4, 64), (2, 4)),
        ("int4/1x64", (0, 256), (1, 64), (0, 4)),
        ("int8/tensor", (0, 256), (0, 256), (1, 1)),
        ("int8/row", (4, 0), (1, 0), (4, 1)),
    ],
)
def test_geometry(spelling, shape, block, scale):
    fmt = Format.parse(spelling)
    assert fmt.block_dims(shape) == block
    assert fmt.scale_shape(shape) == scale


@pytest.mark.parametrize(
    ("spelling", "shape", "says"),
    [
        ("int4/1x128", (8, 192), "blocks of 1x64 fit"),
        ("int4/1x128", (8, 100), "use 'row'"),
        ("e4m3/128x128", (100, 256), "multiples of 128 x 128"),
        ("e4m3/4x64", (256,), "wants a matrix"),
        ("int8/row", (), "at least one axis"),
    ],
)
def test_blocks_that_do_not_divide(spelling, shape, says):
    with pytest.raises(MisfitError) as error:
        Format.parse(spelling).block_dims(shape)
    assert says in str(error.value) and spelling in str(error.value)


@pytest.mark.parametrize(
    ("spelling", "bits"),
    [
        ("bf16", 16),
        ("fp32", 32),
        ("int8/row", 8 + 32 / 4096),
        ("int8/tensor", 8 + 32 / 4096**2),
        ("int4/1x128*bf16", 4.125),
        ("int4/1x128*bf16+bf16", 4.25),
        ("int4/1x64*bf16+int8", 4.375),
        ("e4m3/1x32*e8m0", 8.25),
        ("e2m1/1x32*e8m0", 4.25),
        ("e2m1/1x16*e4m3/tensor", 4.5 + 32 / 4096**2),
        ("nf4/1x64*int8/1x256", 4 + 8 / 64 + 2 * 32 / (64 * 256)),
        ("int3/1x64*bf16+bf16", 3.5),
        ("e4m3/128x128", 8 + 32 / 128**2),
    ],
)
def test_bits(spelling, bits):
    assert Format.parse(spelling).bits((4096, 4096)) == pytest.approx(bits, rel=1e-12)
