"""Muon: against torch's own where it has one, its AdamW against ours, states in any format, and what it refuses."""

import pytest
import torch
from torch import nn

import lowp.optim as optim
from lowp.errors import MisfitError
from lowp.ops.update import orthogonal, scale_by_shape
from lowp.tensor import QTensor

SHAPES = ((64, 256), (256, 64), (128, 128))


def parameters(shapes=SHAPES, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def run(optimizer, params, steps=3, first=0):
    for i in range(first, first + steps):
        generator = torch.Generator().manual_seed(i)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotation_has_singular_values_near_one(shape, device):
    x = torch.randn(shape, device=device) @ torch.diag(torch.logspace(0, -2, shape[1], device=device))
    s = torch.linalg.svdvals(orthogonal(x).float().cpu())
    assert s.max() < 1.3 and s.median() > 0.6
    exact = torch.linalg.svd(x.cpu(), full_matrices=False)
    agreement = (orthogonal(x).float().cpu() * (exact.U @ exact.Vh)).sum() / (s.norm() * min(shape) ** 0.5)
    assert agreement > 0.9


@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"weight_decay": 0.0, "momentum": 0.5}], ids=str)
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_it_is_torchs(scale, options, device):
    mine, other = parameters(device=device), parameters(device=device)
    start = [p.detach().clone() for p in mine]
    run(optim.Muon(mine, lr=1e-2, adjust_lr_fn=scale, state="fp32", **options), mine)
    run(torch.optim.Muon(other, lr=1e-2, adjust_lr_fn=scale, **({"weight_decay": 0.1} | options)), other)
    for p, q, before in zip(mine, other, start, strict=True):
        assert ((p - q).norm() / (q - before).norm()).item() < 0.02, p.shape


def test_steps_are_as_large_as_adamws():
    for shape in SHAPES:
        u = orthogonal(torch.randn(shape)).float() * scale_by_shape(shape, "match_rms_adamw")
        assert 0.1 < u.square().mean().sqrt() < 0.3  # AdamW's own are 0.2 to 0.4 (Liu et al., section 2.2)


def test_the_rest_is_adamw(device):
    shapes = ((64, 256), (4096,), (8,), (32, 128))
    mine, other = parameters(shapes, device), parameters(shapes, device)
    groups = [{"params": mine[:3]}, {"params": mine[3:], "use_muon": False}]
    optimizer = run(optim.Muon(groups, lr=1e-2, weight_decay=0.1, eps=1e-7), mine)
    kinds = [(group["use_muon"], len(group["params"])) for group in optimizer.param_groups]
    assert kinds == [(True, 1), (False, 2), (False, 1)]
    rest = [other[1], other[2], other[3]]
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        for p in other:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        if i == 0:
            adam = optim.AdamW(rest, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-7)
        adam.step()
    assert not torch.equal(mine[0], other[0])
    for p, q in zip(mine[1:], other[1:], strict=True):
        assert torch.equal(p, q)
    assert set(optimizer.state[mine[0]]) == {"momentum_buffer", "step"}
    assert {type(optimizer.state[p].get("exp_avg")) for p in mine[1:]} == {QTensor, torch.Tensor}


@pytest.mark.parametrize("state", ["bf16", "dyn8/1x256", "dyn4/1x128", "e4m3/1x256"])
def test_momentum_in_low_precision_stays_near(state, device):
    mine, other = parameters(device=device), parameters(device=device)
    start = [p.detach().clone() for p in mine]
    optimizer = run(optim.Muon(mine, lr=1e-2, state=state), mine, steps=5)
    run(optim.Muon(other, lr=1e-2, state="fp32"), other, steps=5)
    for p, q, before in zip(mine, other, start, strict=True):
        assert ((p - q).norm() / (q - before).norm()).item() < (0.15 if "dyn4" in state else 0.03), p.shape
    if "/" in state:
        assert optimizer.state[mine[0]]["momentum_buffer"].scheme == state


def test_a_checkpoint_goes_on_where_it_stopped(device):
    shapes = ((64, 256), (4096,), (8, 4, 8, 16))
    mine, other = parameters(shapes, device, torch.bfloat16), parameters(shapes, device, torch.bfloat16)
    options = {"lr": 1e-2, "stochastic_rounding": True}
    optimizer = run(optim.Muon(mine, **options), mine)
    with torch.no_grad():
        for p, q in zip(mine, other, strict=True):
            q.copy_(p)
    again = optim.Muon(other, **options)
    again.load_state_dict(optimizer.state_dict())
    for one, params in ((optimizer, mine), (again, other)):
        run(one, params, first=3)
    for p, q in zip(mine, other, strict=True):
        assert torch.equal(p, q)
    assert int(again.state[other[0]]["step"]) == 6


def test_a_skipped_step_and_a_scaled_gradient(device):
    mine, other = parameters(device=device), parameters(device=device)
    one, two = (optim.Muon(params, state="fp32") for params in (mine, other))
    for factor, found in ((1.0, 0.0), (float("inf"), 1.0), (1.0, 0.0)):
        generator = torch.Generator().manual_seed(int(found))
        for p, q in zip(mine, other, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(device)
            q.grad = p.grad * 1024 * factor
        two.grad_scale, two.found_inf = (torch.tensor(x, device=device) for x in (1024.0, found))
        two.step()
        if not found:
            one.step()
    for p, q in zip(mine, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_it_learns_what_adamw_learns():
    """Least squares with directions of very different size, where one step size for all singular values is what counts."""
    torch.manual_seed(0)
    x = torch.randn(512, 64) @ torch.diag(torch.logspace(0, -1.5, 64))
    target = x @ torch.randn(64, 64)
    losses = {}
    for name, kind, lr in (("muon", optim.Muon, 0.1), ("adamw", optim.AdamW8bit, 0.02)):  # steps of one size
        layer = nn.Linear(64, 64)
        torch.nn.init.zeros_(layer.weight)
        optimizer = kind(layer.parameters(), lr=lr, weight_decay=0.0)
        for _ in range(100):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["muon"] < losses["adamw"] < target.square().mean()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p, v: optim.Muon([{"params": [v], "use_muon": True}]), "use_muon=False"),
        (lambda p, v: optim.Muon([p], adjust_lr_fn="none"), "match_rms_adamw"),
        (lambda p, v: optim.Muon([{"params": [p], "adjust_lr_fn": "none"}]), "match_rms_adamw"),
        (lambda p, v: optim.Muon([p], ns_steps=2.5), "ns_steps wants"),
        (lambda p, v: optim.Muon([{"params": [p], "ns_steps": 0}]), "ns_steps wants"),
        (lambda p, v: optim.Muon([p], momentum=1.0), "momentum wants"),
        (lambda p, v: optim.Muon([p], lr=-1.0), "lr wants"),
    ],
)
def test_what_it_refuses(make, said):
    with pytest.raises(MisfitError, match=said):
        make(nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4)))


def test_empty_groups_and_names():
    p, v = nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(8))
    optimizer = optim.Muon([{"params": []}])
    optimizer.add_param_group({"params": [p, v]})
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1, 1]
    named = optim.Muon([("weight", p), ("bias", v)])
    assert [row[0] for row in named.explain()] == ["weight", "bias"]


def test_a_group_that_is_refused_leaves_nothing_behind():
    optimizer = optim.Muon([nn.Parameter(torch.ones(64, 64))])
    with pytest.raises(MisfitError, match="float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8).double())]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 5000), (5000, 1), (1, 1), (16, 8, 3, 3)])
def test_any_matrix_is_stepped(shape, scale):
    (p,) = parameters([shape])
    run(optim.Muon([p], adjust_lr_fn=scale), [p])
    assert p.shape == shape and p.isfinite().all()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon of its own")
@pytest.mark.parametrize("scale", [None, "original", "match_rms_adamw"])
def test_it_goes_on_from_torchs_checkpoint(scale):
    (one,), (other,) = parameters([(64, 256)]), parameters([(64, 256)])
    torchs = run(torch.optim.Muon([one], lr=0.02, adjust_lr_fn=scale), [one])
    start = one.detach().clone()
    with torch.no_grad():
        other.copy_(one)
    ours = optim.Muon([other], state="fp32")
    ours.load_state_dict(torchs.state_dict())
    run(torchs, [one], first=3)
    run(ours, [other], first=3)
    assert (one - other).norm() < 0.02 * (one - start).norm()  # products in bf16
