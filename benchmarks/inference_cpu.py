"""A whole model on this CPU: decoding one token at a time, a prefill, and the memory that it stays in.

    OMP_PROC_BIND=true python benchmarks/inference_cpu.py --schemes bf16,int4/1x32*bf16

The model has the shape of Llama-3.2-1B and random weights, embedding and lm_head tied; transformers runs it eagerly with its own
dynamic cache. Each scheme has a process of its own; bf16's figures are the baseline of the others. Rows go to
results/inference_cpu.csv: milliseconds a token (median), milliseconds of a prefill, GB of resident memory when all that is over.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import lowp
from lowp.report.results import append, row

RESULTS = Path(__file__).parent / "results" / "inference_cpu.csv"
UNITS = {"decode, batch 1": "ms a token", "prefill": "ms", "resident memory": "GB"}


def resident_gb() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024 / 1e9


@torch.inference_mode()
def measure(scheme: str, layers: int, prompt: int, tokens: int) -> dict[str, float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)  # so that 1.2 billion weights are never float32
    model = LlamaForCausalLM(config).eval()
    if scheme != "bf16":
        lowp.quantize_(model, {"*": scheme})
    ids = torch.randint(0, 1000, (1, prompt))
    model(ids, use_cache=True, logits_to_keep=1)  # the first touches memory for the first time
    start = time.perf_counter()
    made = model(ids, use_cache=True, logits_to_keep=1)
    prefill, times, cache, token = time.perf_counter() - start, list[float](), made.past_key_values, ids[:, -1:]
    for _ in range(tokens):
        start = time.perf_counter()
        made = model(token, past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - start)
        token = made.logits[:, -1:].argmax(dim=-1)
    figures = (1e3 * statistics.median(times), 1e3 * prefill, resident_gb())
    return dict(zip(UNITS, figures, strict=True))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--schemes", default="bf16,int4/1x32*bf16,int4/1x32*bf16@int8/row,int8/row@int8/row")
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--prompt", type=int, default=256)
    p.add_argument("--tokens", type=int, default=24)
    p.add_argument("--one", action="store_true", help="measure the one scheme in this process and print the figures")
    args = p.parse_args()
    sizes = dict(layers=args.layers, prompt=args.prompt, tokens=args.tokens)
    if args.one:
        print(json.dumps(measure(args.schemes, **sizes)))
        return
    baseline: dict[str, float] = {}
    for scheme in args.schemes.split(","):
        more = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, __file__, "--one", "--schemes", scheme, *more]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(ran.stdout.splitlines()[-1])
        baseline = baseline or found
        told = dict(model="llama3.2-1b", scheme=scheme, **sizes)
        rows = [row(what, found[what], unit, baseline[what], **told) for what, unit in UNITS.items()]
        append(RESULTS, rows)
        for one in rows:
            print(f"{scheme} {one['what']}: {one['value']} {one['unit']}, {one['ratio']} of bf16")


if __name__ == "__main__":
    main()
