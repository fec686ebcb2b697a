"""axolotl: its quantization module (QAT prepared, trained, converted; quantized models saved and loaded again), its patches of
torchao's optimizer states, and its optimizer that extends torchao's base."""

import copy
import sys
import tempfile
import warnings

import torch
from axolotl.monkeypatch.torchao_optim import patch_torchao_optim_state_8bit
from axolotl.utils.quantization import (
    convert_qat_model,
    prepare_model_for_qat,
    quantize_model,
    save_quantized_model,
)
from axolotl.utils.schemas.enums import TorchAOQuantDType as T
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
MODEL = sys.argv[1]
ids = torch.arange(1, 33).view(2, 16)
floats = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
with torch.no_grad():
    expected = floats(ids).logits.float()
PAIRS = {  # weight, activation, group
    "8da4w": (T.int4, T.int8, 32),
    "int4": (T.int4, None, 32),
    "float8": (T.float8_e4m3fn, T.float8_e4m3fn, None),
    "mxfp4": (T.mxfp4, None, 32),
    "nvfp4": (T.nvfp4, None, None),
}


def quantized(model):
    return [n for n, p in model.named_parameters() if isinstance(p, TorchAOBaseTensor)]


def trained(model, optimizer):
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    return losses


for name, (weight, act, group) in PAIRS.items():
    model = copy.deepcopy(floats)
    if name != "nvfp4":  # no QAT for it there
        prepare_model_for_qat(model, weight_dtype=weight, activation_dtype=act, group_size=group)
        losses = trained(model, torch.optim.SGD(model.parameters(), lr=1e-2))
        convert_qat_model(model)
        assert not any("Fake" in type(module).__name__ for module in model.modules()), name
        print("ok", "QAT", name, losses)
    else:
        quantize_model(model, weight_dtype=weight, activation_dtype=act, group_size=group)
        with torch.no_grad():
            error = (model(ids).logits - expected).norm() / expected.norm()
        assert quantized(model) and error < 0.35, (name, error)
        print("ok", name, error.item())
    if name in ("8da4w", "int4", "float8"):
        quantize_model(model, weight_dtype=weight, activation_dtype=act, group_size=group)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            logits = model(ids).logits
            save_quantized_model(model, folder)
            again = AutoModelForCausalLM.from_pretrained(folder)
            assert quantized(again) and torch.equal(again(ids).logits, logits), name
        print("ok", "saved and loaded", name)

patch_torchao_optim_state_8bit()
for kind in (AdamW8bit, AdamW4bit, AdamWFp8):
    model = copy.deepcopy(floats)
    optimizer = kind(model.parameters(), lr=1e-3)
    losses = trained(model, optimizer)
    states = [s for held in optimizer.state.values() for s in held.values() if isinstance(s, TorchAOBaseTensor)]
    assert states, kind.__name__
    moved = states[0].to(torch.float32)
    assert type(moved) is type(states[0]) and torch.equal(moved.dequantize(), states[0].dequantize())
    print("ok", kind.__name__, losses)
