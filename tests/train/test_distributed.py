"""Sharded training, 2 processes over gloo or on 2 GPUs: the numbers of one process, and how many bytes travel."""

import copy
import dataclasses
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowp.errors import MisfitError
from lowp.numerics.compare import relative_error
from lowp.train import RECIPES, Recipe, convert, gather_codes, precompute_scales
from lowp.train.parallel import ColwiseParallel, RowwiseParallel
from lowp.train.sharded import ShardedWeight

HOUSE = Path(__file__).parents[1] / "tensor" / "test_distributed.py"
EXACT = ("float8_tensorwise", "float8_rowwise", "float8_blockwise", "mxfp8")
ROWS = 512


def work(rank, world, port, name, device_type):
    """In a process of its own: the function of this file, under the house's set-up."""
    spec = importlib.util.spec_from_file_location("house", HOUSE)
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    house.work(rank, world, port, globals()[name], device_type)


class Bytes(TorchDispatchMode):
    """How many bytes each collective is given."""

    def __init__(self):
        super().__init__()
        self.given = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            given = (
                args[1]
                if name in ("allgather_base_", "reduce_scatter_base_", "allgather_base", "reduce_scatter_base")
                else args[0]
            )
            self.given[name] = [
                *self.given.get(name, []),
                sum(t.nbytes for t in tree_leaves(given) if isinstance(t, torch.Tensor)),
            ]
        return func(*args, **(kwargs or {}))

    def of(self, name):
        return [size for key, sizes in self.given.items() if key.startswith(name) for size in sizes]


def build(name, device, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, ROWS, bias=False), nn.GELU(), nn.Linear(ROWS, 256, bias=False)).to(
        device, dtype
    )
    convert(model, name, keep_small=False)
    return model, copy.deepcopy(model)


def step(model, x, seed):
    torch.manual_seed(seed)
    y = model(x)
    y.square().mean().backward()
    return y.detach()


def fsdp(rank, device, mesh):
    from torch.distributed.fsdp import fully_shard

    for name in RECIPES:
        model, alone = build(name, device)
        left = gather_codes(model)
        assert set(left) == (set() if RECIPES[name].operands.w_column else {"0", "2"}), name
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        x = torch.randn(64, 256, device=device, dtype=torch.bfloat16)
        for seed in range(3):
            with Bytes() as wire:
                y = step(model, x, seed)
            expected = step(alone, x, seed)
            errors = [relative_error(expected, y)] + [
                relative_error(q.grad, p.grad.full_tensor())
                for p, q in zip(model.parameters(), alone.parameters(), strict=True)
            ]
            limit = 0 if name in EXACT and device.type == "cpu" else 0.03
            assert all(error <= limit for error in errors), (name, errors)
            _count(name, wire, seed)
            optimizer.step()
            optimizer.zero_grad()
            alone.zero_grad()
            with torch.no_grad():
                for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                    q.copy_(p.full_tensor())
            with Bytes() as wire:
                found = precompute_scales(model)
            assert found == (2 if RECIPES[name].output.split("@")[0].endswith("/tensor") and not left else 0), name
            assert len(wire.of("allreduce")) == bool(found), "one all-reduce for all weights"
        states = [s for state in optimizer.state.values() for s in state.values() if s.dim()]
        assert all(type(s.to_local()) is torch.Tensor for s in states)


def _count(name, wire, seed):
    """Two layers of 256 x ROWS numbers, gathered forward and backward: a rank gives half of the codes, and their scales."""
    numbers = 2 * 2 * 256 * ROWS // 2
    scales = {
        "float8_tensorwise": 0,
        "float8_rowwise": 2 * (ROWS + 256) // 2,
        "float8_blockwise": 4 * numbers // 128**2,
        "mxfp8": numbers // 32,
        "mxfp4": numbers,  # floats travel, as gather_codes said: two bytes a number
    }
    if name in scales:
        assert sum(wire.of("allgather")) == numbers + scales[name], (name, wire.given)
    if name == "float8_tensorwise":
        assert len(wire.of("allreduce")) == (0 if seed else 4), "from the second step on scales were precomputed"


def split_by_recipes_of_your_own(rank, device, mesh):
    """One operand in floats, the other not: its rows of zeros, its rounding and its one scale for all ranks are kept."""
    from torch.distributed.tensor.parallel import parallelize_module

    styles = (ColwiseParallel, RowwiseParallel)
    for form, style in itertools.product(("int8/row", "e4m3/row", "e5m2/tensor"), styles):
        for product in (f"{form}@{form}", f"bf16@{form}", form):
            recipe = Recipe(name="mine", output="e4m3/row@e4m3/row", grad_input="", grad_weight=product)
            model, alone = build(recipe, device, torch.float32)
            parallelize_module(model, mesh, {"0": style()})
            x = torch.randn(37, 256, device=device)
            mine = x if style is ColwiseParallel else x.chunk(2, 1)[rank]
            y, expected = model[0](mine), alone[0](x)
            g = torch.randn_like(expected)
            y.backward(g.chunk(2, 1)[rank] if style is ColwiseParallel else g)
            expected.backward(g)
            error = relative_error(alone[0].weight.grad, model[0].weight.grad.full_tensor())
            assert error < 1e-5, (product, style, error)
    recipe = dataclasses.replace(RECIPES["int8"], grad_input="")
    model, _ = build(recipe, device, torch.float32)
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    x, g, found = torch.randn(64, 256, device=device), torch.randn(64, ROWS // 2, device=device), []
    for _ in range(2):
        model.zero_grad()
        model[0](x).backward(g)
        found.append(model[0].weight.grad.to_local().clone())
    assert not torch.equal(*found), "rounded at random"


def layouts(rank, device, mesh):
    """torchao's styles give what they are asked for, a split layer takes a DTensor of any placement, and a copy of it works."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import parallelize_module

    from lowp.torchao.float8_training import Float8ColwiseParallel, Float8RowwiseParallel

    up = Float8ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
    down = Float8RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    model, alone = build("mxfp8", device, torch.float32)
    parallelize_module(model, mesh, {"0": up, "2": down})
    x = torch.randn(2, 64, 256, device=device)
    y, expected = copy.deepcopy(model)[0](x), alone[0](x)
    assert y.placements == (Replicate(),) and y.shape == expected.shape
    assert relative_error(expected, y.to_local()) < 1e-5
    y, expected = model(DTensor.from_local(x.chunk(2, 1)[rank], mesh, [Shard(1)])), alone(x)
    assert y.placements == (Shard(1),) and relative_error(expected, y.full_tensor()) < 1e-5
    y.square().mean().backward(), expected.square().mean().backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert relative_error(q.grad, p.grad.full_tensor()) < 1e-5


def split_and_sharded(device, shape):
    """Layers split over some ranks and sharded over the others: codes of each rank's part travel, and the numbers the same."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import parallelize_module

    both = dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
    for name in [name for name in RECIPES if RECIPES[name].operands.w_column]:
        model, alone = build(name, device, torch.float32)
        parallelize_module(model, both["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        assert gather_codes(model) == {}, name
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=both["data"])
        assert "sharded already" not in gather_codes(model).values() and precompute_scales(model) in (0, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        x = torch.randn(64, 256, device=device)
        for seed in range(2):
            with Bytes() as wire:
                y = step(model, x, 0)
            expected = step(alone, x, 0)
            errors = [relative_error(expected, y)] + [
                relative_error(q.grad, p.grad.full_tensor())
                for p, q in zip(model.parameters(), alone.parameters(), strict=True)
            ]
            limit = 0.08 if name not in EXACT or name == "float8_blockwise" else 1e-5 if device.type == "cpu" else 0.01
            assert all(error < limit for error in errors), (name, seed, errors)
            if (
                name == "float8_tensorwise" and shape[0] > 1
            ):  # a rank gives its codes, of one byte, forward and backward
                assert sum(wire.of("allgather")) == 2 * 2 * 256 * ROWS // (shape[0] * shape[1]), wire.given
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                    q.copy_(p.full_tensor())
            optimizer.zero_grad(), alone.zero_grad()
            precompute_scales(model)


def split_and_sharded_over_four(rank, device, mesh):
    split_and_sharded(device, (2, 2))


def tensor_parallel(rank, device, mesh):
    from torch.distributed.tensor.parallel import parallelize_module

    world = mesh.size()
    split_and_sharded(device, (1, 2))
    split_and_sharded(device, (2, 1))
    layouts(rank, device, mesh)
    split_by_recipes_of_your_own(rank, device, mesh)
    for sequence in (False, True):
        for name in RECIPES:
            model, alone = build(name, device, torch.float32)
            parallelize_module(
                model, mesh, {"0": ColwiseParallel(sequence=sequence), "2": RowwiseParallel(sequence=sequence)}
            )

            def cut(t, sequence=sequence):
                return (t.chunk(world, 1)[rank] if sequence else t).detach().clone()

            x, g = torch.randn(2, 64, 256, device=device), torch.randn(2, 64, 256, device=device)
            mine, whole = cut(x).requires_grad_(), x.clone().requires_grad_()
            with Bytes() as wire:
                (y := model(mine)).backward(cut(g))
            (expected := alone(whole)).backward(g)
            errors = [relative_error(cut(expected), y), relative_error(cut(whole.grad), mine.grad)] + [
                relative_error(q.grad, p.grad.full_tensor())
                for p, q in zip(model.parameters(), alone.parameters(), strict=True)
            ]
            # Scales of rows that the ranks share are each rank's own; 1x128 in float32 is rounded twice.
            limit = 0.08 if name not in EXACT or name == "float8_blockwise" else 1e-5 if device.type == "cpu" else 0.01
            assert all(error < limit for error in errors), (name, sequence, errors)
            if sequence and name in ("float8_tensorwise", "mxfp8"):
                codes = 2 * 2 * 64 * 256 // world  # x of the first layer and the gradient of the second
                assert sum(wire.of("allgather")) == codes + (codes // 32 if name == "mxfp8" else 0)


def data_parallel(rank, device, mesh):
    for name in ("float8_rowwise", "mxfp8"):
        model, alone = build(name, device)
        model = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(64, 256, device=device, dtype=torch.bfloat16)
        step(model, x, 0), step(alone, x, 0)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters(), strict=True)), (
            name
        )


def one_rank(rank, device, mesh):
    from torch.distributed.fsdp import fully_shard

    for name in EXACT:
        model, alone = build(name, device)
        gather_codes(model)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        for seed in range(2):
            x = torch.randn(64, 256, device=device, dtype=torch.bfloat16)
            assert torch.equal(step(model, x, seed), step(alone, x, seed)), name
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(p.grad.full_tensor(), q.grad), name


def checkpoints(rank, device, mesh):
    """Saved, loaded into a sharded model and into one that never was; scales found before are not those of new numbers."""
    import os
    import tempfile

    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    x = torch.randn(64, 256, device=device, dtype=torch.bfloat16)

    def sharded(times):
        model, alone = build("float8_tensorwise", device)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(times)
        gather_codes(model)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        precompute_scales(model)
        return model, alone

    first, alone = sharded(100)
    with torch.no_grad():
        for p in alone.parameters():
            p.mul_(100)
    dcp.save(first.state_dict(), checkpoint_id=os.path.join(folder[0], "model"))
    second, plain = sharded(1)
    second(x)
    state = second.state_dict()
    dcp.load(state, checkpoint_id=os.path.join(folder[0], "model"))
    second.load_state_dict(state)
    assert torch.equal(second(x), alone(x)), "the scales of the numbers before are not used"
    state = plain.state_dict()
    dcp.load(state, checkpoint_id=os.path.join(folder[0], "model"))
    plain.load_state_dict(state)
    assert torch.equal(plain(x), alone(x))
    for foreach in (False, True):
        precompute_scales(second)
        optimizer = torch.optim.Adam(second.parameters(), lr=50.0, foreach=foreach)
        second(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(second.parameters(), alone.parameters(), strict=True):
                q.copy_(p.full_tensor())
        assert torch.equal(second(x), alone(x)), foreach


@pytest.mark.multi
@pytest.mark.parametrize(
    "what, world", [("fsdp", 2), ("tensor_parallel", 2), ("data_parallel", 2), ("checkpoints", 2), ("one_rank", 1)]
)
def test_processes(what, world, device):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(world, port, what, device.type), nprocs=world)


@pytest.mark.slow
@pytest.mark.multi
def test_four_processes(device):
    if device.type == "cuda" and torch.cuda.device_count() < 4:
        pytest.skip("needs 4 CUDA GPUs")
    test_processes("split_and_sharded_over_four", 4, device)


def test_styles_want_converted_layers_whose_weights_are_whole():
    with pytest.raises(MisfitError, match="convert first"):
        ColwiseParallel()._apply(nn.Linear(4, 4), None)
    model = nn.Sequential(nn.Linear(32, 32))
    convert(model, "float8_rowwise", keep_small=False)
    gather_codes(model)
    with pytest.raises(MisfitError, match=r"got a ShardedWeight: split layers first, .* then call gather_codes"):
        ColwiseParallel()._apply(model[0], None)


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].operands.w_column])
def test_a_file_holds_the_floats_of_a_sharded_weight(name, tmp_path):
    model, plain = build(name, "cpu")
    gather_codes(model)
    floats = copy.deepcopy(plain).state_dict()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(type(t) is torch.Tensor and torch.equal(t, floats[key]) for key, t in state.items())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_state_dict(state)
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    assert torch.equal(step(model, x, 0), step(plain, x, 0)) and type(model[0].weight) is ShardedWeight
