"""A whole model: milliseconds a token when decoding, and for a prefill, in bf16 and then in each scheme, in one run.

    python benchmarks/inference.py                                               Llama-3-8B's shape on the GPU
    python benchmarks/inference.py --schemes int4,fp8-dynamic --fused            q, k, v in one layer, gate and up too
    python benchmarks/inference.py --model tiny --layers 2 --device cpu --no-record          a dry run

The model is Llama's block in plain torch: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases; random weights,
made on the device. Only time is measured here, so the numbers need not mean anything, but they stay finite. What engines do is
done here too: a static KV cache, each block compiled by torch.compile (one graph for all layers), a whole step captured in a CUDA
graph; the position lives in a tensor, so that one graph serves every step. From sm90 on the compiler's kernels too begin while
the one before ends (inductor's `triton.enable_pdl`), in bf16 as in every scheme.

    decode    batch 1, in a cache of --context tokens, half of them filled before: the median replay
    prefill   --prompt tokens, the logits of the last: the median replay
    weights   GB of all parameters, the embedding included, which stays in bf16
    lm_head   in the scheme where it is weight-only, in bf16 where activations are quantized; each row says which

Correct first: the logits that the graph leaves behind are compared with those of the same model run eagerly; a model that is off
by more than `TOLERANCE`, or not finite, gets no row, and the run ends with exit code 1. Rows go to results/inference_gpu.csv.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

import lowp
from lowp.cli.app import show, table
from lowp.numerics import Scheme
from lowp.numerics.compare import relative_error
from lowp.report.clock import event_us
from lowp.report.models import MODELS, Decoder, model_of
from lowp.report.results import append, device_name, row

RESULTS = Path(__file__).parent / "results" / "inference_gpu.csv"
SCHEMES = "int4,int8,fp8-dynamic,mxfp4,nvfp4"
TINY = Decoder(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, head_dim=64, vocabulary=512)
# bf16 keeps 8 bits, so two orders of rounding part by some 2**-8 in each layer, and by sqrt(32) times that after 32. Where the
# activation is quantized too, a number that falls to the other side of a tie moves by a whole step, 2**-4 in float8: 0.25 was
# seen. A wrong layer is off by about 1.
TOLERANCE, TOLERANCE_QUANTIZED_INPUT = 0.15, 0.4


# -- the model --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One layer of a Llama. The residual stream comes as h and what the layer before adds to it, so that the sum is
    taken in the same kernel as the norm."""

    def __init__(self, size: Decoder, fused: bool) -> None:
        super().__init__()
        shapes = size.linears()
        self.size, self.fused = size, fused
        attention = ("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj")
        for name in (*attention, "o_proj", *(("gate_up_proj",) if fused else ("gate_proj", "up_proj")), "down_proj"):
            rows, columns = shapes[name]
            setattr(self, name, nn.Linear(columns, rows, bias=False))
        self.attention_norm = nn.RMSNorm(size.hidden, eps=1e-5)
        self.mlp_norm = nn.RMSNorm(size.hidden, eps=1e-5)

    def forward(
        self, h: Tensor, delta: Tensor, position: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h, delta: (1, T, hidden). position: (T,). cos, sin: (S, head_dim). keys, values: (1, kv_heads, S, head_dim)."""
        h = h + delta
        h = h + self.attend(self.attention_norm(h), position, cos, sin, keys, values)
        x = self.mlp_norm(h)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return h, self.down_proj(F.silu(gate) * up)

    def attend(self, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of T new tokens: to themselves in a prefill, to the whole cache when there is one."""
        size, tokens = self.size, x.shape[1]
        widths = [size.heads * size.head_dim, size.kv_heads * size.head_dim, size.kv_heads * size.head_dim]
        found = (
            self.qkv_proj(x).split(widths, dim=-1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k, v = (t.view(1, tokens, -1, size.head_dim).transpose(1, 2) for t in found)
        q, k = rotated(q, cos[position], sin[position]), rotated(k, cos[position], sin[position])
        keys[:, :, position] = k
        values[:, :, position] = v
        if tokens == 1:
            y = one_query(q, keys, values, position)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=size.heads != size.kv_heads)
        return self.o_proj(y.transpose(1, 2).reshape(1, tokens, -1))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (1, heads, T, head_dim), its two halves taken as pairs; cos, sin (T, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1).float() * sin).to(x.dtype)


def one_query(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Attention of one token: the heads that share a key are the rows of one product, so that the cache is read once."""
    heads, kv_heads, size = q.shape[1], keys.shape[1], q.shape[-1]
    grouped = q.reshape(1, kv_heads, heads // kv_heads, size)
    scores = (grouped @ keys.mT).float() / math.sqrt(size)
    seen = torch.arange(keys.shape[2], device=q.device) <= position
    shares = scores.masked_fill(~seen, -math.inf).softmax(dim=-1).to(q.dtype)
    return (shares @ values).reshape(1, heads, 1, size)


def likeliest(logits: Tensor) -> Tensor:
    """argmax of (1, vocabulary) as (1, 1), in two steps: over one long row it would run on a single multiprocessor."""
    width = logits.shape[1] // math.gcd(logits.shape[1], 256)
    best, at = logits.view(-1, width).max(dim=-1)
    piece = best.argmax(dim=0, keepdim=True)
    return (piece * width + at[piece]).unsqueeze(0)


class Llama(nn.Module):
    """Embedding, blocks, norm, lm_head."""

    def __init__(self, size: Decoder, layers: int, fused: bool) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Embedding(size.vocabulary, size.hidden)
        self.layers = nn.ModuleList(Block(size, fused) for _ in range(layers))
        self.norm = nn.RMSNorm(size.hidden, eps=1e-5)
        self.lm_head = nn.Linear(size.hidden, size.vocabulary, bias=False)


@torch.no_grad()
def random_model(size: Decoder, layers: int, fused: bool, device: str) -> Llama:
    """A model in bf16 with random weights, made where it will run."""
    with torch.device("meta"):
        model = Llama(size, layers, fused)
    model = model.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)
    return model.requires_grad_(False).eval()


def quantized(model: Llama, scheme: str) -> tuple[Llama, str]:
    """Another model with the linear layers quantized, and what lm_head is; the embedding and the norms are shared."""
    with torch.device("meta"):
        made = Llama(model.size, len(model.layers), model.layers[0].fused)
    made.load_state_dict(model.state_dict(), assign=True)
    keeps_head = Scheme.parse(scheme).act is not None
    rules: dict[Any, str | None] = {"lm_head": None} if keeps_head else {}
    lowp.quantize_(made.requires_grad_(False).eval(), rules | {"*": scheme})
    return made, "bf16" if keeps_head else scheme


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters as they are stored."""
    return sum(
        p.packed_nbytes if isinstance(p, lowp.QTensor) else p.numel() * p.element_size() for p in model.parameters()
    )


# -- a run of it ------------------------------------------------------------------------------------------------------


class Run:
    """A model at work: its cache, and the tensors that a captured step reads and writes."""

    def __init__(self, model: Llama, context: int, block: Callable[..., tuple[Tensor, Tensor]]) -> None:
        size, device = model.size, model.norm.weight.device
        self.model, self.block = model, block
        shape = (1, size.kv_heads, context, size.head_dim)
        self.cache = [[torch.zeros(shape, device=device, dtype=torch.bfloat16) for _ in range(2)] for _ in model.layers]
        angles = torch.outer(torch.arange(context), 5e5 ** -(torch.arange(0, size.head_dim, 2) / size.head_dim))
        self.cos, self.sin = (f(angles).repeat(1, 2).to(device) for f in (torch.cos, torch.sin))
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(1, size.vocabulary, device=device)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The logits (1, vocabulary) after the last of (1, T) tokens at positions (T,)."""
        h = self.model.embed(tokens)
        delta = torch.zeros_like(h)
        for layer, (keys, values) in zip(self.model.layers, self.cache, strict=True):
            h, delta = self.block(layer, h, delta, position, self.cos, self.sin, keys, values)
        h = self.model.norm(h[:, -1:] + delta[:, -1:])
        return self.model.lm_head(h)[:, 0].float()

    def step(self) -> None:
        """One token more: read where the last step left off, choose the likeliest, move on."""
        self.logits.copy_(self.forward(self.token, self.position))
        self.token.copy_(likeliest(self.logits))
        self.position.add_(1)

    def at(self, position: int) -> None:
        """Put the run back to a position with the first token of the vocabulary."""
        self.token.zero_()
        self.position.fill_(position)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one model took: milliseconds, and the error of its logits against the same model run eagerly."""

    decode_ms: float
    prefill_ms: float
    decode_error: float
    prefill_error: float
    gigabytes: float

    @property
    def error(self) -> float:
        """The larger error; NaN where one is."""
        both = (self.decode_error, self.prefill_error)
        return math.nan if any(map(math.isnan, both)) else max(both)


@torch.no_grad()
def measure(model: Llama, *, context: int, prompt: int, steps: int, mode: str, compiled: bool) -> Measured:
    """Compile, capture, compare, time."""
    torch._dynamo.reset()
    block = torch.compile(Block.forward, dynamic=False, mode=mode) if compiled else Block.forward
    decode_ms, decode_error = decoding(model, context, steps, block)
    prefill_ms, prefill_error = prefilling(model, prompt, block)
    return Measured(
        decode_ms=decode_ms, prefill_ms=prefill_ms, decode_error=decode_error, prefill_error=prefill_error,
        gigabytes=weight_bytes(model) / 1e9,
    )  # fmt: skip


def decoding(model: Llama, context: int, steps: int, block: Callable[..., Any]) -> tuple[float, float]:
    """Milliseconds a token and the error of the first step's logits."""
    filled = context // 2
    run = Run(model, context, Block.forward)
    tokens = torch.arange(filled, device=run.token.device).remainder(model.size.vocabulary).unsqueeze(0)
    run.forward(tokens, torch.arange(filled, device=run.token.device))
    run.at(filled)
    run.step()
    expected = run.logits.clone()
    run.block = block
    replay = captured(run.step, run.token.device)
    run.at(filled)
    replay()
    error = checked(expected, run.logits)
    return statistics.median(times_ms(replay, min(steps, context - filled - 1), run.token.device)), error


def prefilling(model: Llama, prompt: int, block: Callable[..., Any]) -> tuple[float, float]:
    """Milliseconds for a prompt and the error of its logits."""
    run = Run(model, prompt, Block.forward)
    device = run.token.device
    tokens = torch.randint(0, model.size.vocabulary, (1, prompt), device=device)
    position = torch.arange(prompt, device=device)
    expected = run.forward(tokens, position)
    run.block = block
    replay = captured(lambda: run.logits.copy_(run.forward(tokens, position)), device)
    run.logits.zero_()
    replay()
    return statistics.median(times_ms(replay, 5, device)), checked(expected, run.logits)


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The step as the replay of a CUDA graph; on a CPU the step itself, compiled by now."""
    step()
    if device.type != "cuda":
        return step
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def checked(expected: Tensor, got: Tensor) -> float:
    """The relative error of logits, NaN where one is not finite."""
    return relative_error(expected, got) if bool(got.isfinite().all()) else math.nan


def times_ms(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """The time of each of some calls in turn."""
    if device.type == "cuda":
        return [us / 1000 for us in event_us([call] * count)]
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    return found


# -- the command ------------------------------------------------------------------------------------------------------


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="llama3-8b", help=f"whose shape: {', '.join(MODELS)}, tiny")
    p.add_argument("--layers", type=int, default=0, help="so many layers instead of the model's own")
    p.add_argument("--schemes", default=SCHEMES, help="by commas; bf16 always comes first")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--context", type=int, default=512, help="length of the cache when decoding")
    p.add_argument("--prompt", type=int, default=2048, help="tokens of the prefill")
    p.add_argument("--steps", type=int, default=50, help="tokens that are decoded and timed")
    p.add_argument("--fused", action="store_true", help="q, k, v in one layer, gate and up in one")
    p.add_argument("--mode", default="default", help="of torch.compile, such as max-autotune-no-cudagraphs")
    p.add_argument("--eager", action="store_true", help="do not compile")
    p.add_argument("--csv", default=str(RESULTS), help="the file that rows are appended to")
    p.add_argument("--no-record", action="store_true", help="append nothing")
    return p.parse_args(words)


def rows_of(args: argparse.Namespace, scheme: str, head: str, got: Measured, base: Measured | None) -> list[Any]:
    """Three rows: decode, prefill, weights."""
    more = dict(model=args.model, layers=args.layers, scheme=scheme, lm_head=head, fused=args.fused)
    more |= dict(compiled="no" if args.eager else f"{args.mode}, early" if args.early else args.mode)
    make = functools.partial(row, device=args.device)
    measures = (
        ("decode, batch 1", got.decode_ms, "ms a token", base and base.decode_ms, args.context, got.decode_error),
        ("prefill", got.prefill_ms, "ms", base and base.prefill_ms, args.prompt, got.prefill_error),
        ("weights", got.gigabytes, "GB", base and base.gigabytes, "", None),
    )
    return [
        make(what, value, unit, baseline, **more, tokens=tokens, error="" if error is None else f"{error:.2e}")
        for what, value, unit, baseline, tokens, error in measures
    ]


def result_table(args: argparse.Namespace, found: list[tuple[str, str, Measured]]) -> Any:
    numbers = ("ms a token", "tokens/s", "times bf16", "prefill ms", "times bf16's", "GB", "of bf16", "error")
    title = f"{args.model}, {args.layers} layers, cache of {args.context}, prompt of {args.prompt}, {device_name(args.device)}"
    made = table(title, "scheme", "lm_head", *numbers, right=numbers)
    base = found[0][2]
    for scheme, head, got in found:
        made.add_row(
            scheme, head, f"{got.decode_ms:.3f}", f"{1000 / got.decode_ms:.1f}", f"{base.decode_ms / got.decode_ms:.2f}",
            f"{got.prefill_ms:.2f}", f"{base.prefill_ms / got.prefill_ms:.2f}", f"{got.gigabytes:.2f}",
            f"{got.gigabytes / base.gigabytes:.3f}", f"{got.error:.1e}",
        )  # fmt: skip
    return made


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    size = TINY if args.model == "tiny" else model_of(args.model)
    args.layers = args.layers or size.layers
    settings = dict(context=args.context, prompt=args.prompt, steps=args.steps, mode=args.mode)
    args.early = args.device.startswith("cuda") and torch.cuda.get_device_capability()[0] >= 9
    with torch._inductor.config.patch({"triton.enable_pdl": args.early}):
        return compared(args, size, settings)


def compared(args: argparse.Namespace, size: Decoder, settings: dict[str, Any]) -> int:
    """bf16, then each scheme; 1 where one failed or was wrong."""
    floats = random_model(size, args.layers, args.fused, args.device)
    found: list[tuple[str, str, Measured]] = []
    wrong: list[str] = []
    for scheme in ("bf16", *(str(Scheme.parse(name)) for name in args.schemes.split(",") if name)):
        start = time.perf_counter()
        try:
            model, head = (floats, "bf16") if scheme == "bf16" else quantized(floats, scheme)
            ready = time.perf_counter() - start
            got = measure(model, compiled=not args.eager, **settings)
        except Exception as error:  # one scheme that fails does not lose the others
            wrong.append(f"{scheme}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(wrong[-1], flush=True)
            continue
        finally:
            model = None
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
        spent = f"quantized in {ready:.1f} s, measured in {time.perf_counter() - start - ready:.1f} s"
        print(f"{scheme}: {got.decode_ms:.3f} ms a token, prefill {got.prefill_ms:.2f} ms; {spent}", flush=True)
        most = TOLERANCE_QUANTIZED_INPUT if "@" in scheme else TOLERANCE
        if not got.error <= most:
            wrong.append(f"{scheme}: its logits are off by {got.error:.2e}, at most {most} is wanted: no row.")
            print(wrong[-1], flush=True)
            continue
        found.append((scheme, head, got))
        if not args.no_record and found[0][0] == "bf16":
            append(args.csv, rows_of(args, scheme, head, got, None if scheme == "bf16" else found[0][2]))
    if found and found[0][0] == "bf16":
        show(result_table(args, found))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
