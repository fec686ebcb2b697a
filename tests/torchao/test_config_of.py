"""From a scheme to torchao's configuration and back: exactly the same scheme, or none."""

import pytest
import torch

from lowp.numerics import Scheme, known_formats
from lowp.torchao.config import CONFIG_ROWS, CONFIGS, config_from_dict, config_to_dict, scheme_of
from lowp.torchao.config_of import config_of

OURS = sorted({known.spelling for known in known_formats()})
# of their prototypes or gone
NONE_OF_THEIRS = (
    "NF4WeightOnlyConfig",
    "GGUFWeightOnlyConfig",
    "FPXWeightOnlyConfig",
    "Int4DynamicActivationInt4WeightConfig",
)


@pytest.mark.parametrize("scheme", OURS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_configuration_says_exactly_its_scheme(scheme, dtype):
    config = config_of(scheme, dtype)
    if config is not None:
        assert scheme_of(config, dtype) == str(Scheme.parse(scheme))
        assert config_from_dict(config_to_dict(config)) == config
        floats = "e4m3" in scheme.replace("*e4m3", "") or "e5m2" in scheme
        assert ("Float8" in type(config).__name__) == floats or "MX" in type(config).__name__


@pytest.mark.parametrize(
    "row", [row for row in CONFIG_ROWS if "uintx" not in row.name.lower()], ids=lambda row: row.name
)
def test_every_configurations_scheme_has_one(row):
    scheme = scheme_of(CONFIGS[row.name]())
    config = config_of(scheme)
    assert (config is None) == (row.name in NONE_OF_THEIRS)
    assert config is None or scheme_of(config) == scheme


@pytest.mark.parametrize("scheme", ["bf16", "nf4/1x64*bf16", "int3/1x64*bf16+bf16", "ternary/tensor*bf16"])
def test_what_torchao_has_no_configuration_for(scheme):
    assert config_of(scheme) is None
