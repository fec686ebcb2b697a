"""The table of models: the shapes add up to the models' known sizes, separate and fused alike."""

import math

import pytest

from lowp.errors import SpellingError
from lowp.report.models import MODELS, model_of

# parameters of the whole model as its card states them, in billions
KNOWN = {"llama3-8b": 8.03, "llama3-70b": 70.55, "qwen3-32b": 32.76}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.mark.parametrize("name", MODELS)
def test_the_linears_add_up_to_the_model(name):
    model = model_of(name)
    separate = sum(math.prod(shape) for part, shape in model.linears().items() if part not in FUSED)
    total = model.layers * separate + 2 * model.vocabulary * model.hidden  # norms are below a thousandth of it
    assert total / 1e9 == pytest.approx(KNOWN[name], rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_fused_layers_are_their_parts_stacked(name):
    shapes = MODELS[name].linears()
    for fused, parts in FUSED.items():
        assert shapes[fused] == (sum(shapes[part][0] for part in parts), shapes[parts[0]][1])
    assert shapes["down_proj"] == shapes["up_proj"][::-1] and shapes["o_proj"] == shapes["q_proj"][::-1]


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(SpellingError, match="did you mean 'llama3-8b'"):
        model_of("llama-8b")
