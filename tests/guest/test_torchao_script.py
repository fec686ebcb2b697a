"""One script, run with the real torchao 0.18 and again with `python -m lowp.torchao`: what both find is compared."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.guest("torchao>=0.18,<0.19")

SCRIPT = """
import dataclasses, json, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8
from torchao.prototype.qat import MXFakeQuantizeConfig
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig, Int8DynamicActivationInt8WeightConfig, Int8StaticActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis,
    PerGroup, PerRow, PerTensor, quantize_,
)
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

found = {}

def model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).to(dtype)

x = torch.randn(16, 128, generator=torch.Generator().manual_seed(3))

def trained(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().mean().backward()
    return [t.detach().double().flatten()[::7].tolist() for t in (y, x.grad, model[0].weight.grad)]

for name in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
    config = Float8LinearConfig.from_recipe_name(name)
    plain = dataclasses.asdict(config)
    found[f"fields {name}"] = json.dumps(plain, default=str, sort_keys=True)
    made = convert_to_float8_training(model(torch.bfloat16), config=dataclasses.replace(config, emulate=True))
    found[f"repr {name}"] = repr(made).replace('"', "")
    found[f"float8 {name}"] = trained(made, x.bfloat16())

bases = {
    "8da4w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
    "8da8w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0)),
    "intx4": IntxWeightOnlyConfig(torch.int4, PerGroup(64)),
}
for name, base in bases.items():
    made = model()
    quantize_(made, QATConfig(base, step="prepare"))
    found[f"qat {name}"] = made(x).detach().double().flatten()[::7].tolist()
    quantize_(made, QATConfig(base, step="convert"))
    found[f"converted {name}"] = made(x).detach().double().flatten()[::7].tolist()
for name, base in {"row": PerRow(), "tensor": PerTensor()}.items():
    made = model()
    quantize_(made, QATConfig(Float8DynamicActivationFloat8WeightConfig(granularity=base), step="prepare"))
    found[f"qat float8 {name}"] = made(x).detach().double().flatten()[::7].tolist()
for name, config in {
    "mxfp4": MXFakeQuantizeConfig(), "mxfp8": MXFakeQuantizeConfig(dtype=torch.float8_e4m3fn),
    "int4": IntxFakeQuantizeConfig(torch.int4, group_size=32), "by channel": IntxFakeQuantizeConfig(torch.int4, "per_channel"),
}.items():
    act = config if "mx" in name else None
    made = model(torch.bfloat16)
    quantize_(made, QATConfig(activation_config=act, weight_config=config, step="prepare"))
    found[f"qat by itself {name}"] = made(x.bfloat16()).detach().double().flatten()[::7].tolist()
for kind in (AdamW8bit, AdamW4bit, AdamWFp8):
    optimizer = kind(model().parameters(), lr=1e-2)
    optimizer.param_groups[0]["lr"].fill_(1e-3)
    found[f"lr {kind.__name__}"] = float(optimizer.param_groups[0]["lr"])
for base in (Int8StaticActivationInt8WeightConfig(granularity=PerTensor()), Int8DynamicActivationInt8WeightConfig()):
    made, name = model(), type(base).__name__
    quantize_(made, SmoothQuantConfig(base_config=base, step="prepare", alpha=0.5))
    for scale in (1, 2, 3):
        made(x * scale)
    quantize_(made, SmoothQuantConfig(base_config=base, step="convert"))
    weight = made[0].weight
    found[f"smooth {name}"] = weight.act_pre_scale.double().tolist()
    if "Static" in name:
        found["smooth scale"] = weight.act_quant_scale.double().flatten().tolist()
        found["smooth static"] = made[0](x).detach().double().flatten()[::7].tolist()
json.dump(found, open(sys.argv[1], "w"))
"""


def far(a, b):
    """The largest difference, relative to the largest number."""
    if isinstance(a, list) and a and isinstance(a[0], list):
        return max(far(one, other) for one, other in zip(a, b, strict=True))
    return max(abs(p - q) for p, q in zip(a, b, strict=True)) / max(map(abs, a))


def test_a_script_gives_torchaos_numbers(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    results = []
    for redirect in ([], ["-m", "lowp.torchao"]):
        out = tmp_path / f"{len(results)}.json"
        command = [sys.executable, *redirect, str(tmp_path / "script.py"), str(out)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(out.read_text()))
    theirs, ours = results
    for name, expected in theirs.items():
        got = ours[name]
        if isinstance(expected, list):
            # a static code that falls between two is rounded after x * (1 / s) there and after x / s here
            assert far(expected, got) < (1e-2 if name == "smooth static" else 1e-5), (name, far(expected, got))
        else:
            assert got == expected, name
