"""What a step remembers from one to the next may not outlive what it was made from: states, options, counts, parameters."""

import gc
import weakref
from collections import defaultdict

import pytest
import torch
from torch import nn

import lowp.optim as optim
from lowp.errors import MisfitError, SpellingError
from lowp.optim.base import _shard
from lowp.optim.state import floats, packed_of


def parameters(count=1, device="cpu", shape=(64, 256)):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for _ in range(count)]


def step(optimizer, params, seed, only=None):
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        p.grad = grad if only is None or i in only else None
    optimizer.step()


def assert_same(params, others):
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("how", ["clear", "new", "one"])
def test_states_that_were_taken_away_start_again(how, device):
    mine, other = parameters(2, device), parameters(2, device)
    optimizer = optim.AdamW8bit(mine, lr=1e-2)
    step(optimizer, mine, 0)
    with torch.no_grad():
        for p, q in zip(mine, other, strict=True):
            q.copy_(p)
    if how == "clear":
        optimizer.state.clear()
    elif how == "new":
        optimizer.state = defaultdict(dict)
    else:
        optimizer.state[mine[0]] = {}
    step(optimizer, mine, 1)
    fresh = optim.AdamW8bit(other, lr=1e-2)
    step(fresh, other, 1)
    assert torch.equal(mine[0], other[0])
    assert torch.equal(mine[1], other[1]) == (how != "one")
    assert [int(optimizer.state[p]["step"]) for p in mine] == [1, 1 if how != "one" else 2]
    assert sorted(optimizer.state_dict()["state"]) == [0, 1] and optimizer.state_nbytes() == fresh.state_nbytes()


def test_a_moment_or_a_count_that_was_written_is_used():
    mine, other = parameters(2), parameters(2)
    one, two = optim.AdamW8bit(mine), optim.AdamW8bit(other)
    for optimizer, params in ((one, mine), (two, other)):
        step(optimizer, params, 0)
    saved = two.state_dict()
    saved["state"][0]["step"].fill_(7.0)  # two counts in place, as torch.distributed.checkpoint writes them
    saved["state"][1]["step"].fill_(3.0)
    for p, count in zip(mine, (7.0, 3.0), strict=True):
        one.state[p]["step"] = torch.tensor(count)
        one.state[p]["exp_avg"] = one.state[p]["exp_avg"].clone()
    for optimizer, params in ((one, mine), (two, other)):
        step(optimizer, params, 1)
        assert [int(optimizer.state[p]["step"]) for p in params] == [8, 4]
    assert_same(mine, other)


def test_counts_are_tensors_of_their_own_and_equal_ones_step_together_again():
    params = parameters(4)
    optimizer = optim.AdamW8bit(params)
    for i in range(4):
        step(optimizer, params, i, only={i})
    step(optimizer, params, 4)
    assert len(optimizer._plans[0].batches) == 1
    addresses = {optimizer.state[p]["step"].data_ptr() for p in params}
    assert len(addresses) == 4 and [int(optimizer.state[p]["step"]) for p in params] == [2, 2, 2, 2]


def test_amsgrad_that_is_switched_on_later(device):
    (p,), (q,) = parameters(1, device), parameters(1, device)
    optimizer, always = optim.AdamW([p], state="fp32"), optim.AdamW([q], state="fp32", amsgrad=True)
    step(optimizer, [p], 0)
    step(always, [q], 0)
    optimizer.param_groups[0]["amsgrad"] = True
    step(optimizer, [p], 1)
    v = optimizer.state[p]
    assert torch.equal(v["max_exp_avg_sq"], v["exp_avg_sq"])


@pytest.mark.parametrize("after", ["e4m3/1x256", "fp32", "dyn4/1x128", "bf16"])
def test_a_format_that_is_changed_later_converts_the_states(after, device):
    (p,) = parameters(1, device)
    optimizer = optim.AdamW([p], lr=1e-3, state="dyn8/1x256")
    p.grad = p.detach().sign() * (p.detach().abs().clamp(0.5, 1))  # second moments near one another: none becomes 0
    optimizer.step()
    before, was = p.detach().clone(), floats(optimizer.state[p]["exp_avg"])
    optimizer.param_groups[0]["state"] = after
    p.grad = torch.zeros_like(p)
    optimizer.step()
    now = floats(optimizer.state[p]["exp_avg"])
    assert ((now - was * 0.9).norm() / was.norm()).item() < (0.2 if "4/1x128" in after else 0.05)
    moved = (p - before * (1 - 1e-5)).norm() / (1e-3 * p.numel() ** 0.5)
    assert moved.item() < 2
    assert (getattr(optimizer.state[p]["exp_avg"], "scheme", "") or "float") == (after if "/" in after else "float")


def test_who_counts_may_change_between_steps(device):
    (p,), (q,) = parameters(1, device), parameters(1, device)
    one, two = optim.AdamW8bit([p], lr=1e-2), optim.AdamW8bit([q], lr=1e-2)
    for i, changed in enumerate((False, True, True, False)):
        one.param_groups[0]["capturable"] = changed
        for optimizer, params in ((one, [p]), (two, [q])):
            step(optimizer, params, i)
        batch = one._plans[0].batches[0]
        assert batch.on_device == changed and batch.counts.device.type == (device.type if changed else "cpu")
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert int(one.state[p]["step"]) == 4


def test_on_the_device_no_number_is_asked_for(device, monkeypatch):
    """`capturable` on any device: learning rate and count reach the op as a tensor."""
    from lowp.ops import update

    (p,) = parameters(1, device)
    optimizer = optim.AdamW8bit([p], capturable=True)
    monkeypatch.setattr(update, "coefficients", lambda *args: pytest.fail("numbers were made on the host"))
    for i in range(2):
        step(optimizer, [p], i)
    assert int(optimizer.state[p]["step"]) == 2


def test_what_a_graph_replays_lives_as_long_as_its_optimizer(monkeypatch):
    params = parameters(2)
    optimizer = optim.AdamW8bit(params, capturable=True)
    with monkeypatch.context() as patch:
        patch.setattr("lowp.optim.base._is_capturing", lambda: True)
        step(optimizer, params, 0)
    held = [weakref.ref(slot) for slot in optimizer._plans[0].batches[0].slots]
    step(optimizer, params, 1, only={0})
    gc.collect()
    assert all(slot() is not None for slot in held)
    del optimizer
    gc.collect()
    assert all(slot() is None for slot in held)


def test_overflows_on_two_devices_are_one_step_less(device):
    (p,) = parameters(1, device)
    optimizer = optim.AdamW8bit([p])
    step(optimizer, [p], 0)
    optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=device) for x in (2.0, 2.0))
    step(optimizer, [p], 1)
    assert int(optimizer.state[p]["step"]) == 1


def test_scale_and_overflow_reach_the_moments(device):
    """Adam hides a scale in its parameters, so the moment is looked at; an overflow leaves both as they were."""
    (p,), (q,) = parameters(1, device), parameters(1, device)
    one, two = optim.AdamW([p], state="fp32"), optim.AdamW([q], state="fp32")
    p.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(device)
    q.grad = p.grad * 1024
    two.grad_scale, two.found_inf = torch.tensor(1024.0, device=device), torch.tensor(0.0, device=device)
    one.step()
    two.step()
    torch.testing.assert_close(one.state[p]["exp_avg"], two.state[q]["exp_avg"])
    torch.testing.assert_close(p, q)
    before = [t.detach().clone() for t in (q, two.state[q]["exp_avg"], two.state[q]["exp_avg_sq"])]
    q.grad = torch.full_like(q, float("inf"))
    two.found_inf = torch.tensor(1.0, device=device)
    two.step()
    for now, then in zip((q, two.state[q]["exp_avg"], two.state[q]["exp_avg_sq"]), before, strict=True):
        assert torch.equal(now, then)


def test_parameters_that_are_replaced_step_and_the_old_are_let_go():
    (p,), (q,) = parameters(), parameters()
    optimizer = optim.AdamW8bit([p], stochastic_rounding=True)
    step(optimizer, [p], 0)
    optimizer.param_groups[0]["params"] = [q]
    step(optimizer, [q], 0)
    assert torch.equal(p, q) and optimizer.explain()[0][0] == "0"
    optimizer.state.pop(p)
    held = weakref.ref(p)
    del p
    gc.collect()
    assert held() is None


def test_each_parameter_draws_noise_of_its_own():
    shape = (64, 256)
    params = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = optim.AdamW8bit(
        [{"params": params[:1]}, {"params": params[1:]}], lr=2.0**-10, stochastic_rounding=True, weight_decay=0.0
    )
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert params[0].unique().numel() == 2 and not torch.equal(*params)


def test_doubles_and_unsigned_first_moments_are_refused():
    double = nn.Parameter(torch.ones(4, dtype=torch.float64))
    with pytest.raises(MisfitError, match=r"float64.*torch.optim"):
        optim.AdamW([double])
    optimizer = optim.AdamW(parameters())
    with pytest.raises(MisfitError, match="float64"):
        optimizer.add_param_group({"params": [double]})
    assert len(optimizer.param_groups) == 1
    for state in ("udyn8/1x256", "ulin4/1x128", ("udyn8/1x256", "fp32"), "udyn8/1x256@fp32"):
        with pytest.raises(SpellingError, match="signed"):
            optim.SGD(parameters(), momentum=0.9, state=state)


def test_strided_shards_are_shards():
    """FSDP2 over tensor parallelism, rank 5 of 32 x 2: rows cut twice are no blocks of 256, and a shard of its own number."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=64)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (32, 2))
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        for shape, quantized in (((4096,), False), ((128, 256), True)):
            held = torch.ones(shape[0] // 64, *shape[1:])
            stride = tuple(torch.empty(shape, device="meta").stride())
            made = DTensor.from_local(held, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
            p = nn.Parameter(made)
            p.grad = torch.ones_like(p)
            optimizer = optim.AdamW8bit([p])
            optimizer.step()
            assert _shard(p) == 5 and optimizer._plans[0].batches[0].slots[0].key == 5 << 20
            assert ("scale" in packed_of(optimizer.state[p]["exp_avg"])) == quantized
    finally:
        dist.destroy_process_group()
