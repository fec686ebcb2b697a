"""torchtitan: its model registry builds a model by our converter, and by its own float8 converter over the redirect."""

import dataclasses

import torch
from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.models.llama3 import model_registry

from lowp.integrations.torchtitan import converter
from lowp.train import Linear


def built(converters):
    torch.manual_seed(0)
    config = model_registry("debugmodel", converters=converters).model
    model = config.build()
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    return model


floats = built(None)
ours = built([converter("float8_rowwise", keep_small=False)])
theirs = built([Float8LinearConverter.Config(recipe_name="rowwise", emulate=True)])
assert list(ours.state_dict()) == list(floats.state_dict())
assert dataclasses.is_dataclass(converter())
for name, model in (("ours", ours), ("theirs", theirs)):
    count = sum(isinstance(module, Linear) for module in model.modules())
    assert count > 10, count
    print("ok", name, count, "layers built")
layer = next(module for module in ours.modules() if isinstance(module, Linear))
x = torch.randn(8, layer.in_features, requires_grad=True)
layer(x).square().sum().backward()
assert layer.weight.grad.isfinite().all() and x.grad.isfinite().all()
print("ok", "a layer trains")
