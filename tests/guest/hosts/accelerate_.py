"""accelerate: quantized models dispatched with offloaded layers, wrapped with adapters in them, trained in float8."""

import sys
import warnings

import torch
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from accelerate.utils import AORecipeKwargs
from torch import nn
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

warnings.simplefilter("ignore")
MODEL = sys.argv[1]
ids = torch.arange(1, 9)[None]
for name, config in {"int8": Int8WeightOnlyConfig(), "int8 dynamic": Int8DynamicActivationInt8WeightConfig()}.items():
    quantization = TorchAoConfig(config)
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, quantization_config=quantization)
    mapped = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
    )
    with torch.no_grad():
        expected = plain(ids).logits
        assert torch.equal(mapped(ids).logits, expected), name
        offloaded = cpu_offload(mapped, execution_device=torch.device("cpu"))
        assert torch.equal(offloaded(ids).logits, expected), name
    print("ok", name, "dispatched")

x, target = torch.randn(32, 64), torch.randn(32, 64)


def losses(accelerator, model):
    model, optimizer = accelerator.prepare(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    )
    found = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return model, found


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
quantize_(model, Int8DynamicActivationInt8WeightConfig(), lambda module, fqn: fqn == "1")
_, found = losses(Accelerator(cpu=True), model)
assert found[-1] < 0.8 * found[0], found
print("ok", "trained through a quantized layer")

AcceleratorState._reset_state(True)
recipe = AORecipeKwargs(config=Float8LinearConfig.from_recipe_name("rowwise"))
model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
model, found = losses(Accelerator(cpu=True, mixed_precision="fp8", kwargs_handlers=[recipe]), model)
assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 2  # the first and the last stay
assert found[-1] < 0.5 * found[0], found
print("ok", "trained in float8")
