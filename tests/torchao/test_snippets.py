"""What torchao's README shows runs verbatim under the redirect, as far as lowp has the thing; each in one process of its own."""

import os
import subprocess
import sys

import pytest

MODEL = """
import copy, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 64)).bfloat16()
floats, x = copy.deepcopy(model), torch.randn(8, 256, dtype=torch.bfloat16)
"""
LAST = """
from torchao.quantization.utils import compute_error
with torch.no_grad():
    expected, got = floats(x).float(), model(x).float()
print(compute_error(expected, got).item() > {least}, type(model[0].weight).__module__)
"""
INT4 = """
from torchao.quantization import Int4WeightOnlyConfig, quantize_
quantize_(model, Int4WeightOnlyConfig(
    group_size=32, int4_packing_format="tile_packed_to_4d", int4_choose_qparams_algorithm="hqq"
))
"""
FLOAT8 = """
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
"""
OLD = """
from torchao.quantization.quant_api import quantize_, int8_dynamic_activation_int4_weight
quantize_(model, int8_dynamic_activation_int4_weight(group_size=32))
"""
QAT = """
from torchao.quantization import quantize_, Int8DynamicActivationIntxWeightConfig, PerGroup
from torchao.quantization.qat import QATConfig
my_model = model

# prepare: swap `torch.nn.Linear` -> `FakeQuantizedLinear`
base_config = Int8DynamicActivationIntxWeightConfig(
    weight_dtype=torch.int4,
    weight_granularity=PerGroup(32),
)
quantize_(my_model, QATConfig(base_config, step="prepare"))

# train
my_model(x).square().mean().backward()

# convert: swap `FakeQuantizedLinear` -> `torch.nn.Linear`, then quantize using `base_config`
quantize_(my_model, QATConfig(base_config, step="convert"))
"""
BY_NAME = """
from collections import OrderedDict
from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
config = FqnToConfig(OrderedDict({"0": Int4WeightOnlyConfig(group_size=64), "re:1": Int8WeightOnlyConfig()}))
quantize_(model, config, filter_fn=None)
"""
FLOAT8_TRAINING = """
import torch
import torch.nn as nn

from torchao.float8 import convert_to_float8_training

m = nn.Sequential(
    nn.Linear(2048, 4096),
    nn.Linear(4096, 128),
    nn.Linear(128, 1),
).bfloat16()
x = torch.randn(4096 // 64, 2048, dtype=torch.bfloat16)
optimizer = torch.optim.SGD(m.parameters(), lr=0.1)

def module_filter_fn(mod: torch.nn.Module, fqn: str):
    # don't convert the last module
    if fqn == "1":
        return False
    # don't convert linear modules with weight dimensions not divisible by 16
    if isinstance(mod, torch.nn.Linear):
        if mod.in_features % 16 != 0 or mod.out_features % 16 != 0:
            return False
    return True

convert_to_float8_training(m, module_filter_fn=module_filter_fn)

for _ in range(2):
    optimizer.zero_grad()
    output = m(x)
    fake_labels = torch.ones_like(output)
    loss = torch.nn.functional.mse_loss(output, fake_labels)
    loss.backward()
    optimizer.step()

from torchao.float8.float8_linear import Float8Linear
print([isinstance(layer, Float8Linear) for layer in m], type(m[0]).__module__, loss.isfinite().item())
"""


def run(script):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "lowp.torchao", str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training(tmp_path):
    """The float8 training snippet as torchao shows it, but for its size and torch.compile."""
    script = tmp_path / "training.py"
    script.write_text(FLOAT8_TRAINING)
    assert run(script).split() == ["[True,", "False,", "False]", "torchao.float8.float8_linear", "True"]


@pytest.mark.parametrize(
    ("snippet", "least"),
    [(INT4, 20), (FLOAT8, 25), (OLD, 17), (BY_NAME, 17), (QAT, 17)],
    ids=["int4", "float8", "old", "by name", "qat"],
)
def test_snippet(snippet, least, tmp_path):
    script = tmp_path / "snippet.py"
    script.write_text(MODEL + snippet + LAST.format(least=least))
    assert run(script).split() == ["True", "torchao.quantization"]
