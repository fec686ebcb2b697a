"""PEFT: LoRA and DoRA over quantized weights; losses fall, gradients reach every adapter, merging keeps the outputs."""

import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

warnings.simplefilter("ignore")
MODEL = sys.argv[1]
CASES = {
    "int8": Int8WeightOnlyConfig(),
    "int8 dynamic": Int8DynamicActivationInt8WeightConfig(),
    "float8": Float8WeightOnlyConfig(),
    "float8 dynamic": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    "intx": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "nvfp4": NVFP4WeightOnlyConfig(),
}
torch.manual_seed(0)
ids = torch.randint(1, 100, (4, 16))
for name, config in CASES.items():
    for dora in (False, True):
        base = AutoModelForCausalLM.from_pretrained(
            MODEL, dtype=torch.bfloat16, quantization_config=TorchAoConfig(config)
        )
        kind = type(base.model.layers[0].self_attn.q_proj.weight)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=dora))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for _ in range(6):
            loss = model(ids, labels=ids).loss
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in trained), name
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], (name, losses)
        model.eval()
        with torch.no_grad():
            apart = model(ids).logits.float()
            merged = model.merge_and_unload()
            together = merged(ids).logits.float()
        assert type(merged.model.layers[0].self_attn.q_proj.weight) is kind, name
        assert (apart - together).norm() / apart.norm() < 0.1, name
        print("ok", name, "dora" if dora else "lora")
