"""Training beside torchao 0.18 on the same numbers: the SQNR of output and gradients against float64 is at least torchao's.

torchao runs as it does on a CPU: float8 and MXFP8 emulated, int8 by its quantizer. Our codes are divided by a rounded scale where
torchao's are multiplied by one, so equal recipes may part by a last bit: 0.05 dB is allowed for that.
"""

import copy

import pytest
import torch
from torch import nn

from lowp.train import convert
from lowp.train.recipes import RECIPES

pytestmark = [
    pytest.mark.guest("torchao>=0.18,<0.19"),
    pytest.mark.filterwarnings("ignore"),  # the guest's own
]


def float8(recipe):
    def make(layer):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(recipe)
        object.__setattr__(config, "emulate", True)
        return convert_to_float8_training(nn.Sequential(layer), config=config)

    return make


def int8(layer):
    """By torchao's quantizer: its layer multiplies floats where there is no GPU."""
    from torchao.prototype.quantized_training import quantize_int8_rowwise

    def product(a, b):
        a, b = (codes.double() * scale.double()[:, None] for codes, scale in map(quantize_int8_rowwise, (a, b)))
        return a @ b.t()

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return product(x, w).to(x.dtype)

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return product(g, w.t()).to(g.dtype), product(g.t(), x.t()).to(g.dtype)

    class Layer(nn.Linear):
        def forward(self, x):
            return Products.apply(x, self.weight)

    layer.__class__ = Layer
    return layer


def bitnet(layer):
    from torchao.prototype.quantized_training import bitnet_training
    from torchao.quantization import quantize_

    model = nn.Sequential(layer)
    quantize_(model, bitnet_training())
    return model


def mxfp8(layer):
    from torchao.prototype.moe_training.config import MXFP8TrainingOpConfig, MXFP8TrainingRecipe
    from torchao.quantization import quantize_

    model = nn.Sequential(layer)
    quantize_(model, MXFP8TrainingOpConfig.from_recipe(MXFP8TrainingRecipe.MXFP8_EMULATED_RCEIL))
    return model


PAIRS = {
    "float8_tensorwise": float8("tensorwise"),
    "float8_rowwise": float8("rowwise"),
    "float8_rowwise_gw_hp": float8("rowwise_with_gw_hp"),
    "mxfp8": mxfp8,
    "int8": int8,
    "bitnet": bitnet,
}


def numbers(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(shape, generator=generator) for shape in ((256, 512), (384, 512), (256, 384)))
    if kind == "outliers":
        x[:, ::97] *= 30
        g[::31] *= 50
        w[::53] *= 20
    return x.to(dtype), (w * 0.05).to(dtype), g.to(dtype)


def sqnr(model, x, w, g):
    """Of output, grad_input and grad_weight, in dB."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(g)
    weight = next(p for p in model.parameters() if p.dim() == 2)
    exact = (x.detach().double() @ w.double().t(), g.double() @ w.double(), g.double().t() @ x.detach().double())
    grads = weight.grad._tensor if hasattr(weight.grad, "_tensor") else weight.grad
    return [
        (20 * torch.log10(e.norm() / (e - f.double()).norm())).item()
        for e, f in zip(exact, (y.detach(), x.grad, grads), strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("name", PAIRS)
def test_signal_to_noise_is_at_least_torchaos(name, kind, dtype):
    x, w, g = numbers(kind, dtype)
    layer = nn.Linear(512, 384, bias=False, dtype=dtype)
    layer.weight.data.copy_(w)
    ours = nn.Sequential(copy.deepcopy(layer))
    convert(ours, name, keep_small=False)
    mine, theirs = sqnr(ours, x, w, g), sqnr(PAIRS[name](layer), x, w, g)
    for what, a, b in zip(("output", "grad_input", "grad_weight"), mine, theirs, strict=True):
        chance = (
            3.1 if RECIPES[name].stochastic and what != "output" else 0.05
        )  # rounding at random costs up to twice the noise
        assert a >= b - chance, (what, mine, theirs)
