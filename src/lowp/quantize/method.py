"""A method: how the numbers of a weight are chosen, given its format. A pure function from a float weight to parts.

    absmax   the format's own rule: fast, no search
    mse      for each block the range of least squared error
    hqq      half-quadratic quantization (see `lowp/methods/hqq.py`)

Methods of the rooms above register themselves in `METHODS`; that is why `quantize_(..., method="hqq")` finds them although
this floor does not know them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import SpellingError
from ..numerics import Format, Parts, quantize
from ..numerics.format import rules_for


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to choose codes and scales.

    Args:
        name: its spelling in `method=`.
        about: one line.
        run: weight (..., N, K) float32 and format -> parts.
        why_not: format -> "" or one sentence why it does not apply; such a layer is quantized by absmax, and the report says so.
        takes_any: it answers NaN and infinity too, and says so itself; weights with one are an error otherwise.
    """

    name: str
    about: str
    run: Callable[[Tensor, Format], Parts]
    why_not: Callable[[Format], str]
    takes_any: bool = False


def _mse(weight: Tensor, fmt: Format) -> Parts:
    return quantize(weight, fmt.with_rule("mse"))


def _mse_why_not(fmt: Format) -> str:
    return "" if not fmt.is_identity and "mse" in rules_for(fmt) else f"mse has no range to search in {fmt}"


METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a method to the table."""
    METHODS[method.name] = method


def method_of(name: str | Method) -> Method:
    """The method of that name, or a SpellingError that names the nearest; a method is its own answer."""
    if isinstance(name, Method):
        return name
    if name not in METHODS:
        raise SpellingError.of("method", name, METHODS)
    return METHODS[name]


register(Method(name="absmax", about="the format's own rule", run=quantize, why_not=lambda fmt: ""))
register(Method(name="mse", about="for each block the range of least squared error", run=_mse, why_not=_mse_why_not))
