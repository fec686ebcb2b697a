"""CPUOffloadOptimizer does what its optimizer_class does, on a GPU and on a CPU alone: accumulation, clipping, checkpoints."""

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

import lowp.optim as optim
from lowp.errors import MisfitError
from lowp.optim import CPUOffloadOptimizer


def model(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64)).to(device)


def batches(device, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 64, generator=generator).to(device) for _ in range(count)]


def train(net, optimizer, data, passes=1, clip=None):
    for i in range(0, len(data), passes):
        optimizer.zero_grad()
        for x in data[i : i + passes]:
            net(x).square().mean().backward()
        if clip is not None:
            clip(net)
        optimizer.step()


class OnTheHost:
    """CPUOffloadOptimizer's step without its streams: large parameters are copied to the host, stepped there, and copied back."""

    def __init__(self, params, kind, **options):
        self.params = list(params)
        self.hosts = [nn.Parameter(p.detach().cpu()) if p.numel() >= 4096 else p for p in self.params]
        self.optimizers = [kind([p], **options) for p in self.hosts]

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self):
        for p, host, optimizer in zip(self.params, self.hosts, self.optimizers, strict=True):
            host.grad = p.grad.to(host.device)
            host.copy_(p)
            optimizer.step()
            p.copy_(host)


def wrapped(params, kind, device, **options):
    """The optimizer itself; for parameters of a GPU its step on the host, so that the numbers are the same to the last bit."""
    return kind(params, **options) if device.type == "cpu" else OnTheHost(params, kind, **options)


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), (p - q).abs().max()


def assert_near(a, b, device):
    """A GPU's fused step rounds otherwise than a CPU's."""
    if device.type == "cpu":
        return assert_same(a, b)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


CLASSES = {
    "AdamW": (torch.optim.AdamW, {"fused": True}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "AdamW8bit": (optim.AdamW8bit, {}),
}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_it_is_the_optimizer_it_wraps(name, passes, offload, device):
    kind, options = CLASSES[name]
    a, b = model(device), model(device)
    data = batches(device, 6)
    train(a, wrapped(a.parameters(), kind, device, lr=1e-2, **options), data, passes)
    optimizer = CPUOffloadOptimizer(b.parameters(), kind, offload_gradients=offload, ahead=1, lr=1e-2, **options)
    train(b, optimizer, data, passes)
    assert_same(a, b)
    big = [p for p in b.parameters() if p.numel() >= 4096]
    assert all((p.grad is None) == offload for p in big) and all(
        p.grad is not None for p in b.parameters() if p not in set(big)
    )
    for p in big:
        held = optimizer.state[p]
        assert held and all(t.device.type == "cpu" for t in held.values() if isinstance(t, torch.Tensor))
    assert optimizer.host_nbytes >= sum(p.numel() * p.element_size() for p in big)


@pytest.mark.parametrize(
    ("offload", "how"), [(False, "torch"), (False, "own"), (True, "own"), (True, "max_norm"), (False, "max_norm")]
)
def test_clipping(offload, how, device):
    a, b = model(device), model(device)
    data = [1000 * x for x in batches(device, 3)]
    clip = functools.partial(torch.nn.utils.clip_grad_norm_, max_norm=0.1, foreach=False)
    given = wrapped(a.parameters(), torch.optim.AdamW, device, lr=1e-2, fused=True)
    train(a, given, data, clip=lambda net: clip(list(net.parameters())))
    options = {"max_norm": 0.1} if how == "max_norm" else {}
    optimizer = CPUOffloadOptimizer(b.parameters(), offload_gradients=offload, lr=1e-2, **options)
    ways = {
        "torch": lambda net: clip(list(net.parameters())),
        "own": lambda net: optimizer.clip_grad_norm_(0.1),
        "max_norm": None,
    }
    train(b, optimizer, data, clip=ways[how])
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    c = model(device)
    train(c, torch.optim.AdamW(c.parameters(), lr=1e-2, fused=True), data)
    assert any(
        not torch.allclose(p, q, rtol=1e-3, atol=1e-4) for p, q in zip(a.parameters(), c.parameters(), strict=True)
    )


@pytest.mark.parametrize("offload", [False, True])
def test_a_checkpoint_goes_on_and_is_the_wrapped_optimizers_own(offload, device, tmp_path):
    net, data = model(device), batches(device, 6)
    optimizer = CPUOffloadOptimizer(net.parameters(), offload_gradients=offload, lr=1e-2)
    train(net, optimizer, data[:3])
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    train(net, optimizer, data[3:])
    for kind in (
        functools.partial(CPUOffloadOptimizer, offload_gradients=offload),
        functools.partial(torch.optim.AdamW, fused=True),
    ):
        again = model(device)
        other = kind(again.parameters(), lr=5.0)
        again.load_state_dict(saved["model"])
        other.load_state_dict(saved["optimizer"])
        train(again, other, data[3:])
        assert_near(again, net, device)


def test_weights_that_someone_else_writes_are_taken_over(device):
    net = model(device)
    optimizer = CPUOffloadOptimizer(net.parameters(), lr=1e-3)
    data = batches(device, 2)
    train(net, optimizer, data[:1])
    with torch.no_grad():
        net[0].weight.fill_(2.0)
    train(net, optimizer, data[1:])
    assert (net[0].weight - 2.0).abs().max() < 0.01


def test_schedulers_and_groups(device):
    nets = model(device), model(device)
    data, made = batches(device, 4), []
    for net, kind in zip(nets, (CPUOffloadOptimizer, torch.optim.AdamW), strict=True):
        groups = [{"params": net[0].parameters(), "weight_decay": 0.0}, {"params": net[2].parameters(), "lr": 1e-2}]
        optimizer = kind(groups, lr=1e-3, fused=True)
        optimizer.add_param_group({"params": net[3].parameters()})
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for x in data:
            train(net, optimizer, [x])
            schedule.step()
        made.append(net)
    assert_near(*made, device)


def test_a_gradient_that_was_dropped_is_not_stepped(device):
    net = model(device)
    optimizer = CPUOffloadOptimizer(net.parameters(), offload_gradients=True, lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    net(batches(device, 1)[0]).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


class Fails(torch.optim.SGD):
    """Once, at the parameter with this many elements."""

    at = 0

    def step(self, closure=None):
        if self.param_groups[0]["params"][0].numel() == Fails.at:
            Fails.at = 0
            raise RuntimeError("no")
        super().step(closure)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("sizes", "fails"), [((64, 128, 65), 0), ((8, 16, 9), 1)], ids=["on the host", "in place"])
def test_an_error_amid_a_step_leaves_no_parameter_to_be_stepped_twice(
    sizes, fails, offload, again, device, monkeypatch
):
    """One layer is stepped, then the other one's step fails: on the host the last layer comes first, in place the first one. The
    step is tried again, or given up."""
    a, b, c = sizes
    nets = [nn.Sequential(nn.Linear(a, b, bias=False), nn.Linear(b, c, bias=False)).to(device) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizer = CPUOffloadOptimizer(nets[0].parameters(), Fails, offload_gradients=offload, lr=0.1)
    plain = torch.optim.SGD(nets[1].parameters(), lr=0.1)
    for i in range(2):
        x = torch.randn(16, a, device=device)
        for net, one in zip(nets, (optimizer, plain), strict=True):
            one.zero_grad()
            net(x).square().mean().backward()
        if i == 0:
            monkeypatch.setattr(Fails, "at", nets[0][fails].weight.numel())
            with pytest.raises(RuntimeError, match="no"):
                optimizer.step()
            if not again:
                nets[1][fails].weight.grad = None
        if i == 1 or again:
            optimizer.step()
        plain.step()
    assert_near(*nets, device)


class Refuses(torch.optim.SGD):
    """No group of a negative learning rate."""

    def __init__(self, groups, **options):
        if any(isinstance(group, dict) and group["lr"] < 0 for group in groups):
            raise ValueError("learning rate")
        super().__init__(groups, **options)


def test_a_group_that_cannot_be_made_is_not_there(device):
    optimizer = CPUOffloadOptimizer(model(device).parameters(), Refuses, lr=0.1)
    with pytest.raises(ValueError, match="learning rate"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(64, 64, device=device))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


@pytest.mark.parametrize("offload", [False, True])
def test_a_model_that_is_let_go_goes(offload, device):
    net = model(device)
    optimizer = CPUOffloadOptimizer(net.parameters(), offload_gradients=offload)
    train(net, optimizer, batches(device, 1))
    held = weakref.ref(net[0].weight), weakref.ref(optimizer)
    del net, optimizer
    gc.collect()
    assert [ref() for ref in held] == [None, None]


@pytest.mark.gpu
def test_gradients_that_leave_make_room_for_the_next():
    """16 gradients of 4 MiB, of which two may wait for their copies, and one is being made."""
    net = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, device="cuda") for _ in range(16)))
    optimizer = CPUOffloadOptimizer(net.parameters(), offload_gradients=True, ahead=2 << 22, lr=1e-3)
    x = torch.randn(8, 1024, device="cuda")
    for _ in range(2):
        loss = net(x).square().mean()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss.backward()
        assert torch.cuda.max_memory_allocated() - before < 5 << 22
        optimizer.step()


def test_what_it_refuses(device):
    embedding = nn.Embedding(128, 64, sparse=True, device=device)
    optimizer = CPUOffloadOptimizer(embedding.parameters())
    with pytest.raises(MisfitError, match="sparse=False"):
        embedding(torch.tensor([1], device=device)).sum().backward()
    with pytest.raises(MisfitError, match="state_dict"):
        optimizer.__getstate__()
