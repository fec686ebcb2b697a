"""torchao's optimizers against the real ones: states made there go on here, code for code, and the arithmetic names agree.

The real optimizers compile at their first step, so their states are made by their tensor classes alone.
"""

import subprocess
import sys

import pytest
import torch
from torch import nn

import lowp.optim
from lowp.torchao import optimizers as ours

pytestmark = pytest.mark.guest("torchao>=0.18")
MAPS = [(True, 7, 8), (False, 7, 8), (True, 3, 4)]
MAKE = """
import sys, torch
from torchao.optim.quant_utils import create_dynamic_map, quantize_4bit_with_qmap, quantize_8bit_with_qmap, scale_tensor
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8
state = {}
values = torch.load(sys.argv[1])
for number, (kind, block) in enumerate(((OptimState8bit, 256), (OptimState4bit, 128), (OptimStateFp8, 256))):
    held = {"step": torch.tensor(5.0)}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        args = () if kind is OptimStateFp8 else (signed,)
        held[name] = kind.zeros((64, 256), *args, block).copy_(values[name])
    state[number] = held
torch.save({"state": state, "codes": [s["exp_avg"].codes for s in state.values()],
            "floats": [s["exp_avg_sq"].dequantize() for s in state.values()]}, sys.argv[2])
"""
READ = """
import sys, torch
from torchao.optim import AdamW8bit, AdamW4bit, AdamWFp8
from torchao.optim.subclass_8bit import OptimState8bit
found = torch.load(sys.argv[1], weights_only=True)
for number, kind in enumerate((AdamW8bit, AdamW4bit, AdamWFp8)):
    p = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = kind([p])
    group = optimizer.state_dict()["param_groups"][0]
    optimizer.load_state_dict({"state": {0: found["state"][number]}, "param_groups": [group]})
    state = optimizer.state[p]
    assert type(state["exp_avg"]).__module__.startswith("torchao.optim."), type(state["exp_avg"])
    assert torch.equal(state["exp_avg"].codes.view(torch.uint8), found["codes"][number].view(torch.uint8)), number
    torch.testing.assert_close(state["exp_avg_sq"].dequantize(), found["floats"][number], rtol=1e-6, atol=0)
    assert int(state["step"]) == 5
    p.grad = torch.randn(64, 256)
    optimizer.step()
    assert int(optimizer.state[p]["step"]) == 6
print("ok")
"""


def test_states_that_torchao_saved_are_read_under_the_redirect(tmp_path):
    torch.save({"exp_avg": torch.randn(64, 256), "exp_avg_sq": torch.rand(64, 256)}, tmp_path / "values.pt")
    made, given = str(tmp_path / "state.pt"), str(tmp_path / "values.pt")
    subprocess.run([sys.executable, "-c", MAKE, given, made], check=True, capture_output=True, timeout=300)
    (tmp_path / "read.py").write_text(READ)
    command = [sys.executable, "-m", "lowp.torchao", str(tmp_path / "read.py"), made]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "ok", done.stderr[-3000:]


NUMBERS = """
import sys, torch
from torchao.optim import quant_utils as q
from torchao.optim.subclass_fp8 import quantize_fp8
x = torch.load(sys.argv[1])
out = {}
for signed, exponent, bits in ((True, 7, 8), (False, 7, 8), (True, 3, 4)):
    qmap = torch.tensor(q.create_dynamic_map(signed, exponent, bits))
    scaled, scale = q.scale_tensor(x if signed else x.abs(), 128)
    codes = (q.quantize_8bit_with_qmap if bits == 8 else q.quantize_4bit_with_qmap)(scaled, qmap)
    out[signed, bits] = qmap, scaled, scale, codes, q.dequant_with_qmap(codes, qmap, scale)
out["fp8"] = quantize_fp8(x, 128)
torch.save(out, sys.argv[2])
"""


def test_the_arithmetic_is_torchaos(tmp_path):
    x = torch.randn(32, 128)
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", NUMBERS, str(tmp_path / "x.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    theirs = torch.load(tmp_path / "out.pt")
    for signed, exponent, bits in MAPS:
        qmap = torch.tensor(ours.create_dynamic_map(signed, exponent, bits))
        scaled, scale = ours.scale_tensor(x if signed else x.abs(), 128)
        codes = (ours.quantize_8bit_with_qmap if bits == 8 else ours.quantize_4bit_with_qmap)(scaled, qmap)
        mine = qmap, scaled, scale, codes, ours.dequant_with_qmap(codes, qmap, scale)
        for a, b in zip(mine, theirs[signed, bits], strict=True):
            torch.testing.assert_close(a, b.view(a.shape), rtol=1e-6, atol=1e-12)
    codes, scale = ours.quantize_fp8(x, 128)
    assert torch.equal(codes.view(torch.uint8), theirs["fp8"][0].view(x.shape).view(torch.uint8))
    torch.testing.assert_close(scale, theirs["fp8"][1].view(-1), rtol=1e-6, atol=0)


def test_states_show_themselves_as_torchaos():
    p = nn.Parameter(torch.randn(64, 256))
    for kind, state in (
        (ours.AdamW8bit, ours.OptimState8bit),
        (ours.AdamW4bit, ours.OptimState4bit),
        (ours.AdamWFp8, ours.OptimStateFp8),
    ):
        optimizer = kind([p], bf16_stochastic_round=True)
        assert isinstance(optimizer, lowp.optim.AdamW)
        p.grad = torch.randn_like(p)
        optimizer.step()
        held = optimizer.state[p]["exp_avg"]
        given = {name: getattr(held, name) for name in held.tensor_data_names}
        more = {"signed": held.signed} if state is not ours.OptimStateFp8 else {}
        more |= {"shape": held.shape} if state is ours.OptimState4bit else {}
        again = state(**given, **more, dtype=torch.float32)
        assert type(held) is state and torch.equal(again.dequantize(), held.dequantize())
        assert state.zeros((64, 256)).dequantize().abs().max() < 1e-30
