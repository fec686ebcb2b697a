"""Floor 5: training in low precision.

convert(model, recipe)      nn.Linear -> Linear, in place: three products by a recipe, the parameters stay what they are
RECIPES                     float8 by tensor, row and block, MXFP8, MXFP4, NVFP4, int8, BitNet
"""

from .convert import convert, revert
from .linear import Linear, cached_weights, linear
from .moe import grouped_linear
from .monitor import Monitor
from .recipes import RECIPES, Recipe
from .sharded import gather_codes, precompute_scales

__all__ = [
    "RECIPES",
    "Linear",
    "Monitor",
    "Recipe",
    "cached_weights",
    "convert",
    "gather_codes",
    "grouped_linear",
    "linear",
    "precompute_scales",
    "revert",
]
