"""Recipes: in which format each operand of the three products of a linear layer stands.

    output       y_MN  = x_MK     w_NK^T          scheme "format of w@format of x"
    grad_input   dx_MK = g_MN     (w^T)_KN^T             "format of w^T@format of g"
    grad_weight  dw_NK = (g^T)_NM (x^T)_KM^T             "format of x^T@format of g^T"

Every operand is quantized along the axis that its product sums, so a "row" is a token, an output channel or a column of either.
"" is a product of floats, in the dtype of the activation; a scheme without "@" leaves the other operand a float.

A scale that is a power of two (`*e8m0`) moves no bits of the numbers: a weight whose rows were coded and decoded has the same
codes by column, but for the smallest, and scales are rounded nowhere.

The rows and what they were taken from:

    float8_tensorwise       one scale a tensor, e5m2 gradients           Micikevicius et al., arXiv 2209.05433
    float8_rowwise          one scale a row, powers of two               the fp8 rowwise recipe of torchtitan
    float8_rowwise_gw_hp    one scale a row in fp32, grad_weight in floats, the weight of grad_input with one scale. torchao's
                            recipe of this name rounds scales to powers of two: `power_of_two()`, and lowp.torchao does
    float8_blockwise        1x128 and 128x128, e4m3 throughout           DeepSeek-V3, arXiv 2412.19437, section 3.3
    mxfp8                   1x32, e4m3 throughout                        arXiv 2506.08027
    mxfp4, nvfp4            4 bits forward, floats backward (straight-through)
    int8                    rows, gradients rounded at random            SwitchBack, arXiv 2304.13013; Gupta, arXiv 1502.02551
    bitnet                  ternary weights, int8 activations            BitNet b1.58, arXiv 2402.17764
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from ..errors import SpellingError
from ..numerics import Format, Scheme
from ..ops.cast import part_names


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train a linear layer.

    Args:
        name: its own. output, grad_input, grad_weight: the schemes of its products, "" for floats.
        stochastic: the gradient is rounded at random, unbiased.
        fast: products whose sums may stay in the tensor core, which holds about 14 bits of them: a tenth faster by row, no
            difference by tensor. Gradients are summed in float32 unless you say so.
        least: (N, K) pairs: a layer with at most that many rows and columns is too small to gain (see `convert.too_small`).
        about: one line.

    Example:
        >>> RECIPES["float8_tensorwise"].grad_input
        'e4m3/tensor@e5m2/tensor'
    """

    name: str
    output: str
    grad_input: str
    grad_weight: str
    stochastic: bool = False
    fast: tuple[str, ...] = ("output",)
    least: tuple[tuple[int, int], ...] = ()
    about: str = ""

    def __post_init__(self) -> None:
        for field in ("output", "grad_input", "grad_weight"):
            if scheme := getattr(self, field):
                object.__setattr__(self, field, str(Scheme.parse(scheme)))
        _ = self.operands, self.not_for_experts  # now: torch.compile traces no parsing of spellings

    def power_of_two(self) -> Recipe:
        """The same with every float32 scale rounded up to a power of two."""

        def scheme(spelling: str) -> str:
            return "@".join(_power_of_two(part) for part in spelling.split("@")) if spelling else ""

        products = {name: scheme(getattr(self, name)) for name in ("output", "grad_input", "grad_weight")}
        return dataclasses.replace(self, **products)

    @functools.cached_property
    def operands(self) -> Operands:
        """The formats by operand."""
        (w_row, x_row), (w_column, g_row), (x_column, g_column) = (
            _both(scheme) for scheme in (self.output, self.grad_input, self.grad_weight)
        )
        formats = (x_row, x_column, w_row, w_column, g_row, g_column)
        return Operands(
            *formats,
            counts=tuple(_count(fmt) for fmt in formats),
            multiple=_multiple(x_column, g_column),
            reuses_scale=w_row == w_column == f"{w_row}".split("/")[0] + "/tensor"
            and Format.parse(w_row).rule == "absmax",
        )

    @functools.cached_property
    def not_for_experts(self) -> str:
        """ "" or why grouped products cannot run by it."""
        of = self.operands
        columns = (of.x_column, of.g_column) if self.grad_weight else ()
        formats = [Format.parse(fmt) if fmt else None for fmt in (of.x_row, of.w_row, of.w_column, of.g_row, *columns)]
        if any(fmt is None or fmt.nested or not (fmt.block == "row" or fmt.block.startswith("1x")) for fmt in formats):
            return f"{self.name} is not for experts: they want every operand with scales by row or by parts of a row."
        return f"{self.name} is not for experts: they round to nearest." if self.stochastic else ""


@dataclass(frozen=True)
class Operands:
    """A recipe by operand: the format of x, w and the gradient g by row (along their last axis) and by column, None for floats.

    counts: how many tensors each has, in this order. multiple: what M is filled up to, where a product sums over it.
    reuses_scale: both forms of w have the one scale of the tensor, so that its magnitude is looked for once.
    """

    x_row: str | None
    x_column: str | None
    w_row: str | None
    w_column: str | None
    g_row: str | None
    g_column: str | None
    counts: tuple[int, ...]
    multiple: int
    reuses_scale: bool


def _power_of_two(spelling: str) -> str:
    fmt = Format.parse(spelling)
    return spelling if fmt.is_identity or fmt.scale != "fp32" else f"{fmt.element.name}/{fmt.block}*e8m0"


def _both(scheme: str) -> tuple[str | None, str | None]:
    if not scheme:
        return None, None
    parsed = Scheme.parse(scheme)
    return tuple(None if fmt is None or fmt.is_identity else str(fmt) for fmt in (parsed.weight, parsed.act))  # type: ignore[return-value]


def _count(fmt: str | None) -> int:
    return len(part_names(Format.parse(fmt))) if fmt else 0


def _multiple(*formats: str | None) -> int:
    """Numbers that the product wants whole: 16 for tensor cores of 8 bits, and a block."""
    blocks = [Format.parse(fmt).block for fmt in formats if fmt]
    return max([16, *(int(block.partition("x")[2]) for block in blocks if "x" in block)])


# Layers of so many rows and columns ran slower than in bf16 on an H100, casts included: torchao 0.18's measured filter.
_ROWWISE = ((2048, 1 << 62), (1 << 62, 1024), (4096, 2048))
_TENSORWISE = ((1024, 4096),)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="float8_tensorwise",
            output="e4m3/tensor@e4m3/tensor",
            grad_input="e4m3/tensor@e5m2/tensor",
            grad_weight="e4m3/tensor@e5m2/tensor",
            least=_TENSORWISE,
            about="float8, one scale a tensor",
        ),
        Recipe(
            name="float8_rowwise",
            output="e4m3/row*e8m0@e4m3/row*e8m0",
            grad_input="e4m3/row*e8m0@e4m3/row*e8m0",
            grad_weight="e4m3/row*e8m0@e4m3/row*e8m0",
            least=_ROWWISE,
            about="float8, one power of two a row",
        ),
        Recipe(
            name="float8_rowwise_gw_hp",
            output="e4m3/row@e4m3/row",
            grad_input="e4m3/tensor@e4m3/row",
            grad_weight="",
            least=_ROWWISE,
            about="float8 by row, the weight's gradient in floats",
        ),
        Recipe(
            name="float8_blockwise",
            output="e4m3/128x128@e4m3/1x128",
            grad_input="e4m3/128x128@e4m3/1x128",
            grad_weight="e4m3/1x128@e4m3/1x128",
            least=_ROWWISE,
            about="float8 in blocks of 128, as DeepSeek-V3",
        ),
        Recipe(
            name="mxfp8",
            output="e4m3/1x32*e8m0@e4m3/1x32*e8m0",
            grad_input="e4m3/1x32*e8m0@e4m3/1x32*e8m0",
            grad_weight="e4m3/1x32*e8m0@e4m3/1x32*e8m0",
            least=_ROWWISE,
            about="MXFP8 throughout",
        ),
        Recipe(
            name="mxfp4",
            output="e2m1/1x32*e8m0@e2m1/1x32*e8m0",
            grad_input="",
            grad_weight="",
            least=_ROWWISE,
            about="MXFP4 forward, floats backward",
        ),
        Recipe(
            name="nvfp4",
            output="e2m1/1x16*e4m3/tensor@e2m1/1x16*e4m3/tensor",
            grad_input="",
            grad_weight="",
            least=_ROWWISE,
            about="NVFP4 forward, floats backward",
        ),
        Recipe(
            name="int8",
            output="int8/row@int8/row",
            grad_input="int8/row@int8/row",
            grad_weight="int8/row@int8/row",
            stochastic=True,
            least=_ROWWISE,
            about="int8 throughout, gradients rounded at random",
        ),
        Recipe(
            name="bitnet",
            output="ternary/tensor@int8/row",
            grad_input="ternary/tensor",
            grad_weight="",
            about="BitNet b1.58: ternary weights, int8 activations",
        ),
    )
}


def recipe_of(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or itself.

    Raises:
        SpellingError: an unknown name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise SpellingError.of("recipe", str(recipe), RECIPES)
    return RECIPES[recipe]
