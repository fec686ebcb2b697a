"""What fake quantization costs a training step: time and memory of a few Llama blocks, against the same step in floats.

    python benchmarks/qat.py                               3 blocks of Llama-3-8B's shape, 8192 tokens, bf16, compiled, on the GPU
    python benchmarks/qat.py --kernels                     also the kernels alone, in GB/s, beside a copy
    python benchmarks/qat.py --device cpu --shape small    on a CPU: 3 blocks of 512, 512 tokens, float32, eager
    python benchmarks/qat.py --no-record                   a dry run

A step is forward, backward and an SGD update. All variants live in one process and take turns, so that a machine that slows down
slows all of them; figures are medians of the turns.

    floats             the baseline of every ratio
    SCHEME             lowp.qat.prepare(model, SCHEME)
    SCHEME + LoRA      the same with lora=Lora(rank=16): beside it the ratio to full QAT in the same scheme
    SCHEME, torchao    torchao's own QAT of that scheme, where the real torchao is installed

    time      milliseconds a step
    memory    CUDA: the largest allocated during a step. CPU: bytes that the forward keeps for the backward, parameters apart.

Goal on one H200, 3 blocks of Llama-3-8B, 8192 tokens: at most 3 % of either over bf16. Rows go to results/qat.csv.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowp import qat
from lowp.report.results import append, row

RESULTS = Path(__file__).parent / "results" / "qat.csv"
SCHEMES = ("int4/1x128*bf16", "int4/1x128*bf16@int8/row")
SHAPES = {  # hidden, intermediate, heads, key and value heads, tokens
    "llama3-8b": (4096, 14336, 32, 8, 8192),
    "small": (512, 1536, 8, 4, 512),
}


def blocks(shape: str, layers: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Llama's blocks as transformers has them, random weights."""
    from transformers import LlamaConfig, LlamaModel

    hidden, intermediate, heads, kv_heads, tokens = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=128, max_position_embeddings=tokens, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return LlamaModel(config).to(dtype).train()


def torchao_prepared(model: nn.Module, scheme: str) -> nn.Module | None:
    """torchao's QAT of one of `SCHEMES`, None where it is not installed."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    act = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False) if "@" in scheme else None
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=128)
    quantize_(model, QATConfig(activation_config=act, weight_config=weight, step="prepare"))
    return model


def variants(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Each variant's model, by name; "floats" first."""
    floats = blocks(args.shape, args.layers, device, dtype)
    made: dict[str, nn.Module] = {"floats": floats}
    for scheme in args.schemes.split(","):
        adapted = {f"{scheme} + LoRA": qat.Lora(rank=16)} if args.lora else {}
        for name, lora in ({scheme: None} | adapted).items():
            model = copy.deepcopy(floats)
            qat.prepare(model, scheme, lora=lora)
            made[name] = model
        theirs = torchao_prepared(copy.deepcopy(floats), scheme) if args.torchao and scheme in SCHEMES else None
        if theirs is not None:
            made[f"{scheme}, torchao"] = theirs
    return made


def stepper(model: nn.Module, x: torch.Tensor, compiled: bool) -> Callable[[], None]:
    """One training step. Blocks are compiled one by one: one compilation serves all blocks of a model."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for layer in model.layers if compiled else ():  # type: ignore[union-attr, attr-defined]
        layer.compile(dynamic=False)

    def step() -> None:
        model(inputs_embeds=x, use_cache=False).last_hidden_state.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def kernels(device: torch.device) -> list[dict[str, Any]]:
    """Rows of the kernels alone on a weight and on activations of Llama-3-8B: GB/s of what has to be read and written."""
    from lowp.numerics import Format, quantize
    from lowp.numerics.math import read_scale
    from lowp.ops import fake_quantize_given
    from lowp.ops.fake_quantize import fake_quantize_again

    w_NK = torch.randn(14336, 4096, device=device, dtype=torch.bfloat16)
    learned = Format.parse("int3/1x32*bf16+bf16")
    parts = quantize(w_NK, learned)
    scale, zero = read_scale(parts, learned), parts.zero_point
    grad, size = torch.randn_like(w_NK), w_NK.numel() * w_NK.element_size()
    grad_of = torch.ops.lowp.fake_quantize_given_grad
    jobs: dict[str, tuple[Callable[[], Any], int]] = {"copy": (lambda: w_NK.clone(), 2)}
    for spelling in (SCHEMES[0], "int4/1x32*bf16", "int8/row", "e4m3/row", "e4m3/1x32*e8m0", "e2m1/1x16*e4m3/tensor"):
        jobs[spelling] = functools.partial(fake_quantize_again, w_NK, Format.parse(spelling)), 2
    jobs[f"{learned}, learned"] = (lambda: fake_quantize_given(w_NK, learned, scale, zero.float())), 2
    jobs[f"{learned}, learned, gradient"] = (lambda: grad_of(grad, w_NK, str(learned), scale, zero.float(), "zero")), 3
    times = timed({name: _tenfold(job) for name, (job, _) in jobs.items()}, 11, device)
    rows = []
    for name, (_, passes) in jobs.items():
        rate = 10 * passes * size / times[name] / 1e6
        base = 10 * 2 * size / times["copy"] / 1e6
        print(f"{name:44} {rate:9.0f} GB/s {rate / base:6.3f} of a copy")
        rows.append(row("fake quantization", rate, "GB/s", base, device=str(device), model="14336 x 4096", scheme=name))
    return rows


def _tenfold(job: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(10):
            job()

    return run


def timed(steps: dict[str, Callable[[], None]], turns: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 2):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            if turn >= 2:  # the first two compile and warm up
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(model: nn.Module, step: Callable[[], None], device: torch.device) -> float:
    """MB: see the top of this file. On CUDA what the other variants hold is not counted, the model's own parameters are."""
    if device.type == "cuda":
        _wait(device)
        own = sum(p.numel() * p.element_size() for p in model.parameters())
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before + own) / 1e6
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values()) / 1e6


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    p.add_argument("--layers", type=int, default=3)
    p.add_argument("--schemes", default=",".join(SCHEMES))
    p.add_argument("--turns", type=int, default=11)
    p.add_argument("--lora", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--torchao", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--kernels", action="store_true", help="also the kernels alone (CUDA)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="absent: on CUDA")
    p.add_argument("--record", action=argparse.BooleanOptionalAction, default=True)
    args = p.parse_args()
    device = torch.device(args.device)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, *_, tokens = SHAPES[args.shape]
    x = torch.randn(1, tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    models = variants(args, device, dtype)
    steps = {name: stepper(model, x, compiled) for name, model in models.items()}
    times = timed(steps, args.turns, device)
    peaks = {name: memory(models[name], step, device) for name, step in steps.items()}
    rows: list[dict[str, Any]] = []
    blank = dict.fromkeys(("method", "steps", "batch", "context", "tokens", "command"), "")
    command = "python benchmarks/qat.py " + " ".join(sys.argv[1:])
    for name in models:
        more = dict(
            model=f"{args.shape} x {args.layers}", scheme=name, method="compiled" if compiled else "eager",
            steps=args.turns, batch=1, context=tokens, tokens=tokens, command=command,
        )  # fmt: skip
        rows.append(row("training step", times[name], "ms", times["floats"], device=str(device), **more))
        what = "peak memory of a step" if device.type == "cuda" else "kept for the backward"
        rows.append(row(what, peaks[name], "MB", peaks["floats"], device=str(device), **more))
        if name.endswith("+ LoRA"):
            full = times[name.removesuffix(" + LoRA")]
            rows.append(
                row(
                    "LoRA + QAT step against full QAT",
                    full / times[name],
                    "times as fast",
                    None,
                    device=str(device),
                    **more,
                )
            )
        ms, mb = times[name], peaks[name]
        print(f"{name:44} {ms:9.2f} ms {ms / times['floats']:6.3f} {mb:9.1f} MB {mb / peaks['floats']:6.3f}")
    if args.kernels:
        rows += [blank | one for one in kernels(device)]
    if args.record:
        append(RESULTS, rows)


if __name__ == "__main__":
    main()
