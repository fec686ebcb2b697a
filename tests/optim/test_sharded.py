"""Parameters that are DTensors: 2 processes over gloo or on 2 GPUs step as one process does, and checkpoints come back.

A shard's blocks are the whole tensor's own blocks, so with the same gradients the numbers are the same bit for bit.
"""

import faulthandler
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.multiprocessing as mp
from torch import nn

import lowp.optim as optim
from lowp.optim.state import is_dtensor, local
from lowp.tensor import QTensor


def build(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.LayerNorm(256)).to(device)


def train(model, optimizer, device, steps, first=0):
    """Steps with the same gradients however the parameters lie: a model's own differ in the order of their sums."""
    for i in range(first, first + steps):
        generator = torch.Generator().manual_seed(i)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(device)
            p.grad = dist.tensor.distribute_tensor(grad, p.device_mesh, p.placements) if is_dtensor(p) else grad
        optimizer.step()


def whole(model):
    return [(p.full_tensor() if is_dtensor(p) else p).detach() for p in model.parameters()]


def assert_same(model, expected):
    for p, q in zip(whole(model), whole(expected), strict=True):
        assert torch.equal(p, q), (p - q).abs().max()


def fsdp(rank, device, mesh, folder):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    for make in (optim.AdamW8bit, optim.AdamW4bit, optim.AdamWFp8):
        alone = build(device)
        train(alone, make(alone.parameters(), lr=1e-3), device, 4)
        model = build(device)
        fully_shard(model, mesh=mesh)
        model(torch.randn(8, 256, device=device)).square().mean().backward()
        optimizer = make(model.parameters(), lr=1e-3)
        train(model, optimizer, device, 3)
        moment = optimizer.state[model[0].weight]["exp_avg"]
        assert is_dtensor(moment) and moment.shape == (512, 256) and isinstance(local(moment), QTensor)
        assert is_dtensor(optimizer.state[model[0].bias]["exp_avg"])
        middle = whole(model)
        saved = get_optimizer_state_dict(model, optimizer)
        dist.checkpoint.save({"optimizer": saved}, checkpoint_id=f"{folder}/{make.__name__}")
        train(model, optimizer, device, 1, first=3)
        assert_same(model, alone)

        again = build(device)
        fully_shard(again, mesh=mesh)
        with torch.no_grad():
            for p, q in zip(again.parameters(), middle, strict=True):
                local(p).copy_(local(dist.tensor.distribute_tensor(q, p.device_mesh, p.placements)))
        fresh = make(again.parameters(), lr=1e-3)
        found = {"optimizer": get_optimizer_state_dict(again, fresh)}
        dist.checkpoint.load(found, checkpoint_id=f"{folder}/{make.__name__}")
        set_optimizer_state_dict(again, fresh, found["optimizer"])
        for p, q in zip(again.parameters(), model.parameters(), strict=True):
            assert int(fresh.state[p]["step"]) == 3 and int(optimizer.state[q]["step"]) == 4
        train(again, fresh, device, 1, first=3)
        assert_same(again, model)


def gathered(rank, device, mesh, folder):
    """A whole state dict of shards that are not equal (33 and 32 rows): one process' codes; and it loads into shards again."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    options = StateDictOptions(full_state_dict=True)
    for make in (optim.AdamW8bit, optim.AdamW4bit, optim.AdamWFp8):
        models = []
        for _ in range(3):
            torch.manual_seed(0)
            models.append(nn.Linear(256, 65, device=device))
        alone, model, again = models
        one = make(alone.parameters(), lr=1e-3)
        train(alone, one, device, 2)
        for sharded in (model, again):
            fully_shard(sharded, mesh=mesh)
        optimizer, fresh = make(model.parameters(), lr=1e-3), make(again.parameters(), lr=1e-3)
        train(model, optimizer, device, 2)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(saved["state"]["weight"][name], one.state[alone.weight][name])
        set_optimizer_state_dict(again, fresh, saved, options=options)
        for name in ("exp_avg", "exp_avg_sq"):
            mine, theirs = (local(o.state[m.weight][name]) for o, m in ((optimizer, model), (fresh, again)))
            assert torch.equal(mine, theirs)


def tensor_parallel(rank, device, mesh, folder):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for state, cut in (("dyn8/1x256", True), ("dyn4/1x512", False)):  # halves of 256 columns are no whole blocks of 512
        alone, model = build(device), build(device)
        if cut:
            train(alone, optim.AdamW(alone.parameters(), state=state), device, 3)
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        optimizer = optim.AdamW(model.parameters(), state=state)
        train(model, optimizer, device, 3)
        held = local(optimizer.state[model[2].weight]["exp_avg"])
        assert isinstance(held, QTensor) == cut and held.shape == (256, 256)
        if cut:
            assert_same(model, alone)


def noise(rank, device, mesh, folder):
    """Shards round with noise of their own, replicas with the same."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    for placement, alike in ((Shard(0), False), (Replicate(), True)):
        held = torch.ones(64, 256, device=device, dtype=torch.bfloat16)
        p = nn.Parameter(DTensor.from_local(held, mesh, [placement], run_check=False))
        p.grad = DTensor.from_local(torch.ones_like(held), mesh, [placement], run_check=False)
        optim.AdamW8bit([p], lr=2.0**-11, stochastic_rounding=True).step()
        mine = local(p).detach().float()
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both) == alike and mine.unique().numel() == 2


def work(rank, world, port, device_type, folder):
    faulthandler.enable()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    torch.set_num_threads(1)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        for what in (
            fsdp,
            gathered,
            tensor_parallel,
            noise,
        ):  # one after the other: to start two processes takes longer than the work
            what(rank, device, dist.device_mesh.init_device_mesh(device_type, (world,)), folder)
        dist.barrier()  # nobody leaves while the other still speaks
    finally:
        dist.destroy_process_group()
    os._exit(0)  # what a process group leaves running need not outlive Python's own end


@pytest.mark.multi
def test_two_processes(device, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(2, port, device.type, str(tmp_path)), nprocs=2)
    loaded_in_one_process(device, tmp_path)


def loaded_in_one_process(device, folder):
    """What two processes saved, whole: the shards' codes put together are those of one process after the same steps."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    for make in (optim.AdamW8bit, optim.AdamW4bit, optim.AdamWFp8):
        model, other = build(device), build(device)
        optimizer, fresh = make(model.parameters(), lr=1e-3), make(other.parameters(), lr=1e-3)
        train(model, optimizer, device, 3)
        found = {"optimizer": get_optimizer_state_dict(other, fresh)}
        dist.checkpoint.load(found, checkpoint_id=f"{folder}/{make.__name__}", no_dist=True)
        set_optimizer_state_dict(other, fresh, found["optimizer"])
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[p][name], fresh.state[q][name]), (make.__name__, name, p.shape)
