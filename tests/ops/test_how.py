"""Every kernel that can run a case says how in one sentence: what is native to the device and what is emulated."""

import dataclasses
import re

import pytest
import torch

from lowp.numerics import Scheme, known_formats
from lowp.ops import Case, all_ops, explain, kernels_of
from lowp.ops.registry import why_not_from_plain

SCHEMES = tuple(known.spelling for known in known_formats())
OPS = all_ops()
MACHINES = (("cpu", 0), ("cuda", 80), ("cuda", 89), ("cuda", 90), ("cuda", 100), ("cuda", 120))
MX = tuple(s for s in SCHEMES if "@" in s and Scheme.parse(s).act.block in ("1x32", "1x16"))


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """A machine with NVRTC: what a kernel answers to a case is asked here, not what is installed."""
    from lowp.kernels.cuda_ import mixed

    monkeypatch.setattr(mixed, "_compiler_missing", lambda: "")


def answers(op, scheme, device, sm, dtype="bfloat16"):
    """{kernel: sentence} of the kernels that can run the case."""
    shape = (4, 1024, 2048) if op == "grouped" else (1024, 2048)
    case = Case(op=op, scheme=scheme, device=device, sm=sm, dtype=dtype, shape=shape)
    able = [kernel for kernel in kernels_of(op) if not why_not_from_plain(kernel, case)]
    return {k.name: k.how(dataclasses.replace(case, layout=k.layout or "plain")) for k in able}


@pytest.mark.parametrize(("device", "sm"), MACHINES)
@pytest.mark.parametrize("op", OPS)
def test_whatever_can_run_says_how(op, device, sm):
    for scheme in SCHEMES:
        for dtype in ("bfloat16", "float16", "float32"):
            for said in answers(op, scheme, device, sm, dtype).values():
                assert re.fullmatch(r"[^\n.]+(\.[^\n]*)?[^.\n]", said) and len(said) < 300


@pytest.mark.parametrize(("device", "sm"), MACHINES)
@pytest.mark.parametrize("op", ["linear", "grouped"])
def test_an_activation_format_is_native_or_emulated_and_weight_only_is_neither(op, device, sm):
    for scheme in SCHEMES:
        words = ("native: ", "emulated") if "@" in scheme else ()
        for said in answers(op, scheme, device, sm).values():
            assert said.startswith(words) if words else "native" not in said and "emulated" not in said, (scheme, said)


@pytest.mark.parametrize("scheme", MX)
@pytest.mark.parametrize("op", ["linear", "grouped"])
def test_block_scaled_activations_are_emulated_on_hopper_and_explain_says_why(op, scheme):
    kind = "NVFP4" if "e4m3/tensor" in scheme else "MX"
    found = answers(op, scheme, "cuda", 90)
    assert {"linear": "mixed", "grouped": "w16"}[op] in found
    for said in found.values():
        assert said.startswith(f"emulated, sm90 has no {kind} tensor cores: activations quantized to ")
    for said in answers(op, scheme, "cuda", 100).values():
        assert said.startswith(f"emulated, the {kind} tensor cores of sm100 are not used: ")


def test_eight_bits_are_native_where_the_device_has_units_for_them():
    for scheme, units in (("int8/row@int8/row", "int8"), ("e4m3/row@e4m3/row", "float8")):
        first = next(iter(answers("linear", scheme, "cuda", 90).values()))
        assert first.startswith(f"native: {units} tensor cores")
    assert all(said.startswith("emulated:") for said in answers("linear", "e4m3/row@e4m3/row", "cuda", 80).values())


@pytest.mark.parametrize("sm", [sm for device, sm in MACHINES if device == "cuda"])
def test_the_number_of_tokens_that_w16_names_is_where_it_changes(sm):
    from lowp.kernels.triton_.w16 import choose

    most = int(re.search(r"above (\d+) tokens", answers("linear", "int4/1x128*bf16", "cuda", sm)["w16"])[1])
    assert choose(most, 1024, 2048, sm) and choose(most + 1, 1024, 2048, sm) is None


def test_explain_answers_how_or_why_not():
    for verdict in explain("linear", "int8/row@int8/row", shape=(64, 64), dtype=torch.float32):
        assert bool(verdict.how) != bool(verdict.why_not)
