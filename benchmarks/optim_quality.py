"""What low-bit states cost in quality: one model trained with each optimizer on the same seed, held-out loss beside fp32's.

    python benchmarks/optim_quality.py                                  on a CPU, minutes: bytes of heldout.txt, 2 layers of 128
    python benchmarks/optim_quality.py --device cuda --layers 4 --hidden 256 --steps 700 --batch 16 --context 512 --seeds 0,1 \
        --jobs 8 --tokens build/lm/train.bin --heldout build/lm/heldout.bin          on a GPU, half a minute, side by side
    ... --layers 8 --steps 3400 --batch 128 --context 1024                           the shape and length of examples/small_lm

The corpus of the others is made by `examples/train_small_lm.py corpus`; a token is two bytes there. Without --tokens the text is
examples/small_lm/heldout.txt, a byte a token, its last tenth held out. Weights are float32, so that the states alone differ, but
for the rows that say bf16. Rows go to results/optim_quality.csv, with fp32 AdamW's loss of the same seed as the baseline.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lowp.optim as optim
from lowp.report.results import append, row

HERE = Path(__file__).parent
TEXT = HERE.parent / "examples" / "small_lm" / "heldout.txt"
OPTIMIZERS: dict[str, Callable] = {
    "torch AdamW, fp32 states": torch.optim.AdamW,
    "AdamW, fp32 states": lambda params, **options: optim.AdamW(params, state="fp32", **options),
    "AdamW8bit": optim.AdamW8bit,
    "AdamWFp8": optim.AdamWFp8,
    "AdamW4bit": optim.AdamW4bit,
    "AdamW8bit, bf16 weights, stochastic rounding": lambda p, **o: optim.AdamW8bit(p, stochastic_rounding=True, **o),
    "torch AdamW, bf16 weights": torch.optim.AdamW,
}


def model(args: argparse.Namespace, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64), num_key_value_heads=max(1, args.hidden // 128), head_dim=64,
        vocab_size=vocabulary, max_position_embeddings=args.context, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokens(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Training and held-out tokens, and how many different ones there are."""
    if args.tokens:
        train, held = (
            torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))
            for path in (args.tokens, args.heldout)
        )
        return train, held, int(max(train.max(), held.max())) + 1
    text = torch.from_numpy(np.frombuffer(TEXT.read_bytes(), dtype=np.uint8).astype(np.int64))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:], 256


def heldout_loss(net: nn.Module, held: torch.Tensor, args: argparse.Namespace) -> float:
    """Nats a token over the first windows of the held-out text, in float32 or the weights' dtype."""
    windows = held[: len(held) // args.context * args.context].view(-1, args.context)[: args.windows]
    total = 0.0
    with torch.no_grad():
        for x in windows.split(args.batch):
            x = x.to(args.device)
            total += net(input_ids=x, labels=x).loss.item() * len(x)
    return total / len(windows)


def train(what: str, args: argparse.Namespace) -> tuple[float, float]:
    """The held-out loss at the end, and the seconds it took."""
    data, held, vocabulary = tokens(args)
    net = model(args, vocabulary).to(args.device, torch.bfloat16 if "bf16 weights" in what else torch.float32)
    decay = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = OPTIMIZERS[what](groups, lr=args.lr, betas=(0.9, 0.95))
    warm = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, i / args.steps)))),
    )
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    for _ in range(args.steps):
        at = torch.randint(len(data) - args.context, (args.batch,), generator=generator)
        x = torch.stack([data[i : i + args.context] for i in at]).to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            loss = net(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return heldout_loss(net, held, args), time.perf_counter() - start


def trained(runs: list[tuple[str, argparse.Namespace]], jobs: int) -> Iterator[tuple[float, float]]:
    """The answers of `train`, in order; more than one job: in processes of their own."""
    if jobs == 1:
        yield from (train(what, args) for what, args in runs)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(train, *zip(*runs, strict=True))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cpu")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--context", type=int, default=128)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--windows", type=int, default=256, help="of the held-out text")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--seeds", default="0")
    p.add_argument("--jobs", type=int, default=1, help="trainings side by side")
    p.add_argument("--tokens", default="")
    p.add_argument("--heldout", default="")
    p.add_argument("--optimizers", default=",".join(name.replace(",", ";") for name in OPTIMIZERS))
    args = p.parse_args()
    args.optimizers = [name.replace(";", ",") for name in args.optimizers.split(",")]
    shape = f"{args.layers} layers of {args.hidden}, {args.steps} steps of {args.batch} x {args.context}"
    corpus = Path(args.tokens or TEXT).name
    runs = [
        (what, argparse.Namespace(**{**vars(args), "seed": int(seed)}))
        for seed in args.seeds.split(",")
        for what in args.optimizers
    ]
    base: dict[int, float] = {}
    for (what, one), (loss, seconds) in zip(runs, trained(runs, args.jobs), strict=True):
        base.setdefault(one.seed, loss)
        made = row(
            what, loss, "nats a token, held out", base[one.seed], device=args.device, model=shape, corpus=corpus, seed=one.seed,
            lr=args.lr, seconds=round(seconds, 1),
        )  # fmt: skip
        append(HERE / "results" / "optim_quality.csv", [made])
        print(what, one.seed, f"{loss:.4f} {100 * (loss / base[one.seed] - 1):+.2f} % {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
