"""How a kernel computes a case, in one sentence: what the device multiplies as it is, and what is emulated.

    native: int8 tensor cores, ...     the codes of both operands go to units that are made for them
    emulated ...: activations ...      the activation is rounded to its format and back, and floats are multiplied: the format's
                                       numbers, at the speed of floats
    int4 decoded to bf16 ...           weight-only: the scheme asks for floats times floats, and gets them

MX (a power of two for 32 numbers) and NVFP4 (an e4m3 number for 16) have tensor cores from sm100 on; float8 from sm89 on; int8
from sm75 on. Source: PTX ISA, "mma" and "tcgen05.mma", their tables of types.
"""

from __future__ import annotations

from ..numerics import Format
from .registry import Case

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
_BLOCK_SCALED = 100  # the first compute capability whose tensor cores multiply by scales of blocks


def short(case: Case) -> str:
    """The activation's dtype, as formats spell it."""
    return _SHORT.get(case.dtype, case.dtype)


def decoded(case: Case, where: str = "for each call", to: str = "") -> str:
    """What is done to the weight.

    >>> decoded(Case(op="linear", scheme="int4/1x128"), "in registers")
    'int4 decoded to bf16 in registers'
    """
    return f"{case.weight.element.name} decoded to {to or short(case)} {where}"


def float_units(case: Case) -> str:
    """What multiplies floats inside a kernel: float32 is not left to tensor cores, which would round it."""
    return f"{short(case)} tensor cores" if case.dtype in ("bfloat16", "float16") else f"{short(case)} arithmetic"


def with_activation(case: Case, product: str) -> str:
    """The sentence of a kernel that multiplies floats: what happens to the activation, then `product`.

    >>> with_activation(Case(op="linear", scheme="int4/1x128@int8/row"), "torch's product")
    "emulated: activations quantized to int8/row and dequantized, torch's product"
    """
    act = case.act
    if act is None or act.is_identity:
        return product
    return f"emulated{_lacking(act, case)}: activations quantized to {act} and dequantized, {product}"


def native(case: Case, units: str) -> str:
    """The sentence of a kernel that multiplies the codes themselves."""
    return f"native: {units}, activations cast to {case.act} on the way in"


def _lacking(act: Format, case: Case) -> str:
    scale = str(act.scale)
    kind = "MX" if scale == "e8m0" else "NVFP4" if scale.startswith("e4m3") else ""
    if not kind or act.element.kind != "float":
        return ""
    if case.device != "cuda":
        return f", {case.device} has no {kind} products"
    if case.sm < _BLOCK_SCALED:
        return f", sm{case.sm} has no {kind} tensor cores"
    return f", the {kind} tensor cores of sm{case.sm} are not used"
