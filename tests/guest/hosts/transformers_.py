"""transformers with TorchAoConfig: quantize while loading, generate, save, load again; bit-equal, and the next token too."""

import sys
import tempfile
import warnings

import torch
from torchao.prototype.mx_formats import (
    MXDynamicActivationMXWeightConfig,
    NVFP4DynamicActivationNVFP4WeightConfig,
    NVFP4WeightOnlyConfig,
)
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
)
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM, TorchAoConfig

warnings.simplefilter("ignore")
MODEL = sys.argv[1]
CASES = {
    "int8": Int8WeightOnlyConfig(),
    "int8 dynamic": Int8DynamicActivationInt8WeightConfig(),
    "int4": Int4WeightOnlyConfig(group_size=32),
    "int4 hqq": Int4WeightOnlyConfig(
        group_size=32, int4_packing_format="tile_packed_to_4d", int4_choose_qparams_algorithm="hqq"
    ),
    "float8": Float8WeightOnlyConfig(),
    "float8 dynamic": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    "intx": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "8da4w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    "mxfp8": MXDynamicActivationMXWeightConfig(),
    "nvfp4": NVFP4WeightOnlyConfig(),
    "nvfp4 dynamic": NVFP4DynamicActivationNVFP4WeightConfig(),
    "by name": FqnToConfig(
        {"re:.*mlp.*": Int8WeightOnlyConfig(), "re:.*q_proj": None, "_default": IntxWeightOnlyConfig()}
    ),
}
ids = torch.arange(1, 9)[None]
floats = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
with torch.no_grad():
    expected = floats(ids).logits.float()
for name, config in CASES.items():
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, quantization_config=TorchAoConfig(config))
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, TorchAOBaseTensor)}
    assert weights and all(type(p).__module__.startswith("torchao.") for p in weights.values()), name
    if name == "by name":
        assert not any("q_proj" in n for n in weights)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        logits, tokens = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
        assert (logits - expected).norm() / expected.norm() < 0.35, name
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(again(ids).logits, logits), name
        assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), tokens), name
        loaded = dict(again.named_parameters())
        assert all(torch.equal(loaded[n].dequantize(), p.dequantize()) for n, p in weights.items()), name
    print("ok", name)
