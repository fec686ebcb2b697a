"""FSDP2 and tensor parallel with QTensor parameters: 2 processes, over gloo or on 2 GPUs, give what one process gives."""

import faulthandler
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lowp
from lowp.tensor import QTensor

SCHEMES = ("int8", "fp8", "e4m3/tensor", "int4/1x128*bf16+bf16", "int3", "mxfp4", "nvfp4", "nf4", "int8/row@int8/row")
SCHEMES_TP = tuple(
    scheme for scheme in SCHEMES if scheme != "nf4"
)  # its scales of scales run over rows: no cut across K


def build(scheme, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.LayerNorm(256)).to(device)
    lowp.quantize_(model, scheme)
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(layer.weight.data.to_layout("plain"), requires_grad=False)
    return model, torch.randn(8, 256, device=device)


def error(y, expected):
    return ((y - expected).norm() / expected.norm()).item()


def fsdp(rank, device, mesh):
    from torch.distributed.fsdp import fully_shard

    for scheme in SCHEMES:
        model, x = build(scheme, device)
        x.requires_grad_()
        expected = model(x)
        (expected_grad,) = torch.autograd.grad(expected.pow(3).sum(), x)
        fully_shard(model, mesh=mesh)
        assert model[0].weight.to_local().shape[0] == 256, scheme
        for _ in range(2):  # the second time the gathered memory is used again
            y = model(x)
            (grad,) = torch.autograd.grad(y.pow(3).sum(), x)
        assert error(y, expected) == 0 and error(grad, expected_grad) < 1e-5, scheme


def tensor_parallel(rank, device, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for scheme in SCHEMES_TP:
        model, x = build(scheme, device)
        expected = model(x)
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        assert isinstance(model[0].weight.to_local(), QTensor), scheme
        assert model[0].weight.to_local().shape == (256, 256) and model[2].weight.to_local().shape == (256, 256), scheme
        # each rank quantizes its half of the tokens' channels, so dynamic activations differ in their scales
        assert error(model(x), expected) < (0.03 if "@" in scheme else 1e-5), scheme


def work(rank, world, port, what, device_type):
    faulthandler.enable()  # a crash inside a collective shows its line
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    torch.set_num_threads(1)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        what(rank, device, dist.device_mesh.init_device_mesh(device_type, (world,)))
        dist.barrier()  # nobody leaves while the other still speaks
    finally:
        dist.destroy_process_group()
    os._exit(0)  # what a process group leaves running need not outlive Python's own end


@pytest.mark.multi
@pytest.mark.parametrize("what", [fsdp, tensor_parallel], ids=lambda f: f.__name__)
def test_two_processes(what, device):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(
        work, args=(2, port, what, device.type), nprocs=2
    )  # raises what a process raised: the assertions of `what`
