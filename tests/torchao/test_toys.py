"""What torchao's tests lean on: the engine's checks pass for what can be cut, and the decorators skip."""

import unittest

import pytest
import torch

from lowp.torchao import toys
from lowp.torchao.config import CONFIGS
from lowp.torchao.words import PerGroup, PerRow

CUTTABLE = [
    CONFIGS["Int8WeightOnlyConfig"](),
    CONFIGS["Int8DynamicActivationInt8WeightConfig"](),
    CONFIGS["Float8WeightOnlyConfig"](),
    CONFIGS["Float8DynamicActivationFloat8WeightConfig"](granularity=PerRow()),
    CONFIGS["IntxWeightOnlyConfig"](weight_dtype=torch.int4, granularity=PerGroup(32)),
    CONFIGS["Int4WeightOnlyConfig"](),
    CONFIGS["MXDynamicActivationMXWeightConfig"](),
]


@pytest.mark.filterwarnings("ignore:.*lies in the layout plain now")
@pytest.mark.parametrize("config", CUTTABLE, ids=lambda config: type(config).__name__)
def test_what_a_serving_engine_does(config):
    case = toys.TorchAOIntegrationTestCase()
    case._test_slice_and_copy_similar_to_vllm(config)
    case._test_narrow_similar_to_vllm(config)
    for dim in (0, 1):
        case._test_chunk_similar_to_vllm_llama4(toys._quantized(config).weight.data, dim)
    case._test_quantize_3d_param_similar_to_vllm(config)
    case._test_moe_weight_reshape_ops(config)


def test_small_models():
    for model in (
        toys.ToySingleLinearModel(8, 4, torch.float32, "cpu"),
        toys.ToyTwoLinearModel(8, 16, 4, torch.float32, "cpu", has_bias=True),
    ):
        assert model(*model.example_inputs(3)).shape == (3, 4)


def test_reasons_to_skip():
    @toys.skip_if_compute_capability_less_than(99.0)
    def never():
        raise AssertionError

    with pytest.raises(unittest.SkipTest, match="sm99"):
        never()
    assert toys.skip_if_rocm("why")(lambda: 1)() == toys.skip_if_xpu(lambda: 1)() == 1
