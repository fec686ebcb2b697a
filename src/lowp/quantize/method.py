"""A method: how the numbers of a weight are chosen, given its format and what calibration has seen of its inputs.

    run(weight, statistics, format) -> parts          the one step that every method has

Without data, statistics is None, and only methods that need none are allowed:

    absmax   the format's own rule: fast, no search
    mse      for each block the range of least squared error
    hqq      half-quadratic quantization (see `lowp/methods/hqq.py`)

Three further steps come before it where a method has them, and leave the float model's outputs as they are:

    edit(model) -> edits                              weights in another basis: rotations
    turn(name, K) -> signs_K                          an input rotated at run time, and the weight with it
    smooth(weights, statistics, scheme) -> factor_K   inputs times a factor, weights divided by it: AWQ, SmoothQuant

"rotate+gptq" is a method too: the edits and factors of every part, and the last one's run. Methods of the rooms above register
themselves in `METHODS`; that is why `quantize_(..., method="hqq")` finds them although this floor does not know them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..errors import SpellingError
from ..numerics import Format, Parts, Scheme, quantize
from ..numerics.format import rules_for
from .statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of one tensor that, with all others of its method, leaves the model's outputs as they are.

    Args:
        reads: names of other tensors that the change reads (a norm's weight).
        change: the tensor and those that it reads, float32 -> the new tensor.
    """

    reads: tuple[str, ...]
    change: Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Edits:
    """The changes of a whole model, by a tensor's name.

    Args:
        by_name: in the order in which they are made: a tensor that others read comes after them.
        unties: names that are no longer one tensor with another. seed: of what is random in them.
    """

    by_name: Mapping[str, Edit]
    unties: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to choose codes and scales.

    Args:
        name: its spelling in `method=`.
        about: one line.
        run: weight (..., N, K) float32, statistics or None, and format -> parts.
        why_not: format -> "" or one sentence why it does not apply; such a layer is quantized by absmax, and the report says so.
        takes_any: it answers NaN and infinity too, and says so itself; weights with one are an error otherwise.
        by_rows: it looks at nothing beyond a block, so that a weight may be quantized in slabs of rows.
        wants_data: it reads statistics of the inputs: `data=` must be given.
        smooth: weights [(N, K)] that share an input, its statistics, and their schemes -> factor (K,) for the input, or None.
        edit: model -> changes of its tensors.
        turn: name of a linear layer's weight and its K -> signs (K,) by which its input is rotated at run time, or None.
        options: how it differs from the method of that name in the table, for whoever must know whether two are the same.
    """

    name: str
    about: str
    run: Callable[[Tensor, Statistics | None, Format], Parts]
    why_not: Callable[[Format], str]
    takes_any: bool = False
    by_rows: bool = False
    wants_data: bool = False
    smooth: Callable[[Sequence[Tensor], Statistics, Sequence[Scheme]], Tensor | None] | None = None
    edit: Callable[[nn.Module], Edits] | None = None
    turn: Callable[[str, int], Tensor | None] | None = None
    options: str = ""


def _absmax(weight: Tensor, statistics: Statistics | None, fmt: Format) -> Parts:
    return quantize(weight, fmt)


def _mse(weight: Tensor, statistics: Statistics | None, fmt: Format) -> Parts:
    return quantize(weight, fmt.with_rule("mse"))


def _mse_why_not(fmt: Format) -> str:
    return "" if not fmt.is_identity and "mse" in rules_for(fmt) else f"mse has no range to search in {fmt}"


METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a method to the table."""
    METHODS[method.name] = method


def method_of(name: str | Method) -> Method:
    """The method of that name, or a SpellingError that names the nearest; a method is its own answer.

    >>> method_of("mse").by_rows
    True
    """
    if isinstance(name, Method):
        return name
    parts = []
    for one in name.split("+"):
        if one not in METHODS:
            raise SpellingError.of("method", one, METHODS)
        parts.append(METHODS[one])
    return functools.reduce(then, parts)


def then(first: Method, second: Method) -> Method:
    """One method after another: what the first changes of the model stays, the second rounds."""
    name = f"{first.name}+{second.name}"
    for step in ("smooth", "edit", "turn"):
        if getattr(first, step) and getattr(second, step):
            raise SpellingError(f"method {name!r}: {first.name} and {second.name} do the same step, take one of them.")
    if not first.smooth and not first.edit and not first.turn:
        raise SpellingError(
            f"method {name!r}: {first.name} only rounds, so nothing can come after it: write it last, as in "
            f"'{second.name}+{first.name}'."
        )
    return replace(
        second,
        name=name,
        about=f"{first.about}; then {second.about}",
        wants_data=first.wants_data or second.wants_data,
        by_rows=False,
        smooth=first.smooth or second.smooth,
        edit=first.edit or second.edit,
        turn=first.turn or second.turn,
        options=f"{first.options}; {second.options}".strip("; "),
    )


register(
    Method(name="absmax", about="the format's own rule", run=_absmax, why_not=lambda fmt: "", by_rows=True),
)
register(
    Method(
        name="mse",
        about="for each block the range of least squared error",
        run=_mse,
        why_not=_mse_why_not,
        by_rows=True,
    )
)
