"""Unsloth: its QAT schemes prepare a model, which trains and is converted; the saved checkpoint loads with transformers.

Unsloth imports and trains on a CPU too, but hangs its own QAT arguments and save_pretrained_torchao on models only where it finds
a GPU: here its functions behind them are called.
"""

import copy
import sys
import tempfile
import warnings

import torch

from unsloth.models._utils import _convert_torchao_model, _prepare_model_for_qat  # isort: skip -- before transformers
from torchao.utils import TorchAOBaseTensor
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
MODEL = sys.argv[1]
ids = torch.arange(1, 33).view(2, 16)
floats = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
KINDS = {
    "int4": "Int4Tensor", "fp8-int4": "Int4PreshuffledTensor", "fp8-fp8": "Float8Tensor", "int8": "IntxUnpackedToInt8Tensor",
    "int8-int4": "IntxUnpackedToInt8Tensor", "nvfp4": "NVFP4Tensor", "mxfp8": "MXTensor",
}  # fmt: skip
SAVED = ("int4", "fp8-fp8", "int8")
for scheme, kind in KINDS.items():
    model = _prepare_model_for_qat(copy.deepcopy(floats), scheme)
    fakes = sum("FakeQuantized" in type(module).__name__ for module in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert fakes > 10 and losses[-1] < losses[0], (scheme, fakes, losses)
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        _convert_torchao_model(model)
        kinds = {type(p).__name__ for p in model.parameters() if isinstance(p, TorchAOBaseTensor)}
        logits = model(input_ids=ids).logits
        error = (logits - trained).norm() / trained.norm()
        assert kinds == {kind} and error < 0.15, (scheme, kinds, error)
        if scheme in SAVED:
            from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

            model.hf_quantizer = TorchAoHfQuantizer(model.config.quantization_config)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                again = AutoModelForCausalLM.from_pretrained(folder)
            assert torch.equal(again(ids).logits, logits), scheme
    print("ok", scheme, fakes, losses, error.item())
