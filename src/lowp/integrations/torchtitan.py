"""torchtitan: a converter of model configurations, so that its trainer trains by a recipe of ours.

    model_registry("8B", converters=[converter("float8_rowwise")])

torchtitan builds a model from a tree of configurations, and a converter changes the tree: here each linear layer's configuration
becomes one that builds a `lowp.train.Linear`, by the rules of `convert` (shapes that the recipe blocks do not divide, and layers
too small to gain, stay). Weights, checkpoints and parallel plans see the names that they know.

Source: torchtitan 0.3, protocols/model.py (`ModelConfigConverter`) and components/quantization.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..train import Linear
from ..train.convert import misfit, too_small
from ..train.recipes import recipe_of


def converter(
    recipe: str = "float8_rowwise", *, filter_fqns: tuple[str, ...] = ("lm_head", "output"), keep_small: bool = True
) -> Any:
    """The configuration of a converter, for `model_registry(..., converters=[...])`; it wants torchtitan >= 0.3.

    Args:
        recipe: a name of `lowp.train.RECIPES`. filter_fqns: parts of the names of layers that stay in floats.
        keep_small: layers too small to gain stay in floats.

    Raises:
        SpellingError: an unknown recipe.
    """
    recipe_of(recipe)
    return _classes()[0].Config(recipe=recipe, filter_fqns=list(filter_fqns), keep_small=keep_small)


@functools.cache
def _classes() -> tuple[Any, Any]:
    """The converter and the layer, which inherit from torchtitan's classes."""
    from torchtitan.components.quantization import QuantizationConverter
    from torchtitan.models.common.linear import Linear as TheirLinear
    from torchtitan.protocols.module import Module

    class LowpLinear(Linear, Module):
        """A linear layer that torchtitan builds and lowp trains."""

        @dataclass(kw_only=True, slots=True)
        class Config(TheirLinear.Config):
            recipe: str = "float8_rowwise"

        def __init__(self, config: Config) -> None:
            nn.Linear.__init__(self, config.in_features, config.out_features, bias=config.bias)
            self.recipe = recipe_of(config.recipe)

    class LowpConverter(QuantizationConverter):
        """Linear layers by a recipe; `left` says which stayed in floats, and why."""

        @dataclass(kw_only=True, slots=True)
        class Config(QuantizationConverter.Config):
            recipe: str = "float8_rowwise"
            filter_fqns: Any = ()
            keep_small: bool = True

        def __init__(self, config: Config) -> None:
            self.config, self.left = config, {}

        def convert(self, model_config: Any) -> Any:
            for fqn, layer, parent, attr in list(model_config.traverse(TheirLinear.Config)):
                if reason := self._stays(fqn, layer):
                    self.left[fqn] = reason
                    continue
                made = LowpLinear.Config(
                    in_features=layer.in_features,
                    out_features=layer.out_features,
                    bias=layer.bias,
                    param_init=layer.param_init,
                    recipe=self.config.recipe,
                )
                if parent is None:
                    model_config = made
                elif isinstance(parent, list):
                    parent[attr] = made
                else:
                    setattr(parent, attr, made)
            return model_config

        def _stays(self, fqn: str, layer: Any) -> str:
            recipe, shape = recipe_of(self.config.recipe), (layer.out_features, layer.in_features)
            if type(layer) is not TheirLinear.Config:
                return f"{type(layer).__qualname__} is a linear layer with a forward of its own."
            if any(part in fqn for part in self.config.filter_fqns):
                return "its name is filtered."
            if self.config.keep_small and too_small(recipe, *shape):
                return f"{shape[0]}x{shape[1]} is too small to gain by {recipe.name}."
            return misfit(recipe, *shape)

    return LowpConverter, LowpLinear
