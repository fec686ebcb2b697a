"""Configurations: each row makes a dataclass with a scheme, and JSON gives it back."""

import json

import pytest
import torch
from torch import nn

from lowp.errors import MisfitError, SpellingError
from lowp.numerics import Scheme
from lowp.numerics.compare import relative_error
from lowp.torchao.apply import TENSORS, quantize_
from lowp.torchao.config import (
    CONFIG_ROWS,
    CONFIGS,
    AOBaseConfig,
    FqnToConfig,
    config_from_dict,
    config_to_dict,
    scheme_of,
)
from lowp.torchao.words import (
    Float8PackingFormat,
    Int4ChooseQParamsAlgorithm,
    MappingType,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
VARIANTS = [
    ("Int4WeightOnlyConfig", {"int4_choose_qparams_algorithm": Int4ChooseQParamsAlgorithm.HQQ, "group_size": 64}),
    ("Int4WeightOnlyConfig", {"int4_packing_format": "tile_packed_to_4d", "group_size": 32}),
    ("Int8WeightOnlyConfig", {"granularity": PerTensor()}),
    ("Int8DynamicActivationInt8WeightConfig", {"act_mapping_type": MappingType.ASYMMETRIC}),
    ("Int8DynamicActivationInt8WeightConfig", {"reduce_range": True}),
    ("Float8DynamicActivationFloat8WeightConfig", {"granularity": PerRow()}),
    ("Float8DynamicActivationFloat8WeightConfig", {"granularity": [PerBlock([1, 128]), PerBlock([128, 128])]}),
    ("Float8WeightOnlyConfig", {"weight_dtype": torch.float8_e5m2}),
    ("IntxWeightOnlyConfig", {"weight_dtype": torch.int2, "granularity": PerGroup(32)}),
    ("IntxWeightOnlyConfig", {"weight_dtype": torch.int1, "mapping_type": MappingType.ASYMMETRIC}),
    ("IntxWeightOnlyConfig", {"weight_dtype": torch.int5, "intx_choose_qparams_algorithm": "hqq_scale_only"}),
    ("MXDynamicActivationMXWeightConfig", {"weight_dtype": torch.float4_e2m1fn_x2}),
    ("NVFP4WeightOnlyConfig", {"use_dynamic_per_tensor_scale": False}),
]
CASES = [(row.name, {}) for row in CONFIG_ROWS] + VARIANTS
each_case = pytest.mark.parametrize(("name", "fields"), CASES, ids=[f"{name}-{fields}" for name, fields in CASES])
ONE_BIT = 1.0  # what a quantizer of one or two bits may lose


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_runs_everywhere(name, fields, dtype, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 128)).to(device, dtype)
    if name == "Int8StaticActivationInt8WeightConfig":
        fields = {"act_quant_scale": torch.tensor(0.03)}
    x = torch.randn(5, 256, device=device, dtype=dtype)
    config = CONFIGS[name](**fields)
    with torch.no_grad():
        before = model(x)
        report = quantize_(model, config)
        after = model(x)
    row = next(row for row in CONFIG_ROWS if row.name == name)
    assert type(model[0].weight) is TENSORS[row.tensor(config)]
    assert all(line.kernel and line.scheme for line in report.rows)
    assert Scheme.parse(report.rows[0].scheme)
    bits = Scheme.parse(scheme_of(config, dtype)).weight.element.bits
    limit = {1: ONE_BIT, 2: ONE_BIT, 3: 0.5, 4: 0.3}.get(bits, 0.1)
    assert after.dtype == dtype and relative_error(before, after) < limit


@each_case
def test_json_gives_it_back(name, fields):
    config = CONFIGS[name](**fields)
    told = config_to_dict(config)
    assert config_from_dict(json.loads(json.dumps(told))) == config
    assert told["_type"] == name and "version" not in told["_data"]


def test_json_says_what_is_wrong():
    with pytest.raises(SpellingError, match="did you mean 'Int8WeightOnlyConfig'"):
        config_from_dict({"_type": "Int8WeightOnlyConfg", "_data": {}})
    with pytest.raises(SpellingError, match="did you mean 'granularity'"):
        config_from_dict({"_type": "Int8WeightOnlyConfig", "_data": {"granularty": None}})
    with pytest.raises(MisfitError, match="_type"):
        config_from_dict({})
    with pytest.raises(SpellingError):
        config_from_dict({"_type": "PerRow", "_data": {}})
    with pytest.raises(TypeError, match="Tensor"):
        config_to_dict(CONFIGS["Int8StaticActivationInt8WeightConfig"](act_quant_scale=torch.ones(())))


@pytest.mark.parametrize(
    ("granularity", "scheme"),
    [
        (PerTensor(), "int8/tensor"),
        (PerRow(), "int8/row"),
        (PerAxis(0), "int8/row"),
        (PerToken(), "int8/row"),
        (PerGroup(64), "int8/1x64"),
        (PerBlock([32, 64]), "int8/32x64"),
    ],
)
def test_granularity_is_a_block(granularity, scheme):
    assert scheme_of(CONFIGS["Int8WeightOnlyConfig"](granularity=granularity)) == scheme


def test_what_cannot_be_is_refused():
    with pytest.raises(MisfitError, match="granularity is PerTensor"):
        scheme_of(CONFIGS["Int8WeightOnlyConfig"](granularity=PerAxis(1)))
    with pytest.raises(MisfitError, match="sparse"):
        scheme_of(
            CONFIGS["Float8DynamicActivationFloat8WeightConfig"](
                packing_format=Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA
            )
        )
    with pytest.raises(MisfitError, match="observer"):
        CONFIGS["NVFP4DynamicActivationNVFP4WeightConfig"](step="prepare")
    with pytest.raises(MisfitError, match="register a handler"):
        scheme_of(AOBaseConfig())
    with pytest.raises(MisfitError, match="one mapping under two names"):
        FqnToConfig({"a": None}, {"b": None})
