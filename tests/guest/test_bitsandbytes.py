"""bitsandbytes' optimizers, the real ones, on a CPU: their states come over code for code, and training goes on from them.

Its maps are computed in float32, ours in float64: of 256 values 72 and 100 differ in their last bit.
"""

import pytest
import torch
from torch import nn

import lowp.optim as optim
from lowp.optim.state import floats, packed_of

pytestmark = pytest.mark.guest("bitsandbytes>=0.50")
SHAPES = (
    (64, 256),
    (16, 1024),
    (40, 50),
    (70, 60),
)  # two of whole blocks, a small one, and one that ends inside a block
NAMES = {
    "AdamW8bit": ("exp_avg", "exp_avg_sq"),
    "Adam8bit": ("exp_avg", "exp_avg_sq"),
    "Lion8bit": ("exp_avg",),
    "SGD8bit": ("momentum_buffer",),
}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def step(optimizer, params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def options(name):
    return {"lr": 1e-2} | ({"momentum": 0.9} if name == "SGD8bit" else {})


@pytest.mark.parametrize("name", NAMES)
def test_states_come_over_code_for_code_and_go_on(name):
    import bitsandbytes

    theirs, mine = parameters(), parameters()
    other = getattr(bitsandbytes.optim, name)(theirs, **options(name))
    for seed in range(3):
        step(other, theirs, seed)
    optimizer = getattr(optim, name)(mine, **options(name))
    optimizer.load_state_dict(other.state_dict())
    codes = 0
    for p, q in zip(mine, theirs, strict=True):
        with torch.no_grad():
            p.copy_(q)
        held, state = other.state[q], optimizer.state[p]
        assert int(state["step"]) == 3
        for i, moment in enumerate(NAMES[name], 1):
            value = held[f"state{i}"]
            if value.dtype == torch.uint8:
                scale = held[f"absmax{i}"].repeat_interleave(256)[: p.numel()].view(p.shape)
                value = held[f"qmap{i}"][value.long()] * scale
            torch.testing.assert_close(floats(state[moment]), value, rtol=1e-6, atol=0.0)
            packed = packed_of(state[moment])
            if "scale" in packed:
                assert torch.equal(packed["qdata"].flatten(), held[f"state{i}"].flatten())
                assert torch.equal(packed["scale"].flatten(), held[f"absmax{i}"].flatten())
                codes += 1
    assert codes == 2 * len(NAMES[name])
    before = [p.detach().clone() for p in mine]
    step(optimizer, mine, 9)
    step(other, theirs, 9)
    for p, q, start in zip(mine, theirs, before, strict=True):
        assert ((p - q).norm() / (q - start).norm()).item() < 0.01, p.shape


def test_float_states_come_over():
    import bitsandbytes

    theirs, mine = parameters(), parameters()
    other = bitsandbytes.optim.AdamW(theirs, lr=1e-2)
    step(other, theirs, 0)
    optimizer = optim.AdamW(mine, lr=1e-2, state="fp32")
    optimizer.load_state_dict(other.state_dict())
    for p, q in zip(mine, theirs, strict=True):
        for i, moment in enumerate(NAMES["AdamW8bit"], 1):
            assert torch.equal(optimizer.state[p][moment], other.state[q][f"state{i}"])
