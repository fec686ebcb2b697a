"""Training in low precision: milliseconds and memory of Llama's layers forward and backward, in bf16 and by each recipe.

    python benchmarks/training.py                                          layers of Llama-3-70B's and 8B's shape on the GPU
    python benchmarks/training.py --what linears,experts --recipes float8_tensorwise
    torchrun --nproc-per-node 2 benchmarks/training.py --what sharded      FSDP2 on two GPUs: tokens/s, bytes on the wire
    python benchmarks/training.py --device cpu --small --no-record         a dry run

    layers    so many of Llama's blocks, batch of 2 sequences of 8,192 tokens, compiled by the block and eager; median of steps
    linears   the linear layers of one block alone, those that share an input in the block share it, eager and compiled
    experts   one grouped product of 16 experts 5120 x 8192, 131,072 tokens in uneven groups, forward and backward
    sharded   the layers under FSDP2 with codes gathered, and with floats gathered, in the same run

A step is forward and backward from a fixed gradient of the output; gradients are cleared first, as an optimizer leaves them.
Each row's baseline is bf16 compiled, in the same run (eager rows: also bf16 eager, in the column eager_ratio). torchao's recipes
run beside ours where it is installed, on the same layers. Memory is the peak of one step, weights and activations included.

Correct first: the mean square of what a recipe's step answers must be near that of bf16 and its gradients finite, else it gets no
row and the run ends with exit code 1. Rows go to results/training_gpu.csv.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.util
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lowp.numerics.compare import relative_error
from lowp.ops.cast_groups import cast_groups, stack_form
from lowp.ops.grouped_product import grouped_product
from lowp.report.models import Decoder, model_of
from lowp.report.results import append, row
from lowp.train import RECIPES, convert, gather_codes, grouped_linear, precompute_scales

RESULTS = Path(__file__).parent / "results" / "training_gpu.csv"
TINY = Decoder(hidden=128, intermediate=256, layers=1, heads=4, kv_heads=2, head_dim=32, vocabulary=512)
OURS = "float8_tensorwise,float8_rowwise,float8_rowwise_gw_hp,float8_blockwise,mxfp8,int8"
TORCHAO = {"tensorwise": "float8_tensorwise", "rowwise": "float8_rowwise", "rowwise_with_gw_hp": "float8_rowwise_gw_hp"}
EXPERTS_NEAR = (
    0.08  # how far the output and the gradients of experts may be from bf16's: 8 bits are off by 0.02 to 0.05
)
NEAR = 0.15  # a recipe's mean square may be off by so much of bf16's


class Block(nn.Module):
    """One layer of a Llama."""

    def __init__(self, size: Decoder) -> None:
        super().__init__()
        self.size = size
        for name, (rows, columns) in size.linears().items():
            if name.endswith("_proj") and name not in ("qkv_proj", "gate_up_proj"):
                setattr(self, name, nn.Linear(columns, rows, bias=False))
        self.attention_norm, self.mlp_norm = nn.RMSNorm(size.hidden), nn.RMSNorm(size.hidden)

    def forward(self, h: Tensor) -> Tensor:
        """h: (B, T, hidden)."""
        size, x = self.size, self.attention_norm(h)
        heads = (*h.shape[:2], -1, size.head_dim)
        q, k, v = (proj(x).view(heads).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        h = h + self.o_proj(a.transpose(1, 2).flatten(2))
        x = self.mlp_norm(h)
        return h + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What one run is told: device, steps, batch and tokens of a sequence, whether torchao runs beside, whether rows are kept."""

    device: str
    steps: int
    batch: int
    tokens: int
    small: bool
    beside: bool
    record: bool


def step_of(model: nn.Module, x: Tensor | list[Tensor]) -> Callable[[], list[Tensor]]:
    """Forward and backward, from a fixed gradient; answers the outputs."""
    gradients: list[Tensor] = []

    def step() -> list[Tensor]:
        for leaf in (*model.parameters(), *([x] if isinstance(x, Tensor) else x)):
            leaf.grad = None
        found = model(x)
        outputs = [found] if isinstance(found, Tensor) else found
        if not gradients:
            gradients.extend(torch.randn_like(y) for y in outputs)
        torch.autograd.backward(outputs, gradients)
        return [y.detach() for y in outputs]

    return step


def mean_square(step: Callable[[], list[Tensor]], model: nn.Module) -> float:
    """Of a step's outputs; NaN where a gradient is not finite."""
    outputs = step()
    whole = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    return sum(y.float().square().mean().item() for y in outputs) if whole else math.nan


def timed(step: Callable[[], Any], bench: Bench) -> tuple[float, float]:
    """Median milliseconds of a step, and the peak of its memory in GB (0 on a CPU)."""
    for _ in range(2 if bench.small else 3):
        step()
    if bench.device != "cuda":
        times = []
        for _ in range(bench.steps):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times), 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(bench.steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(times), torch.cuda.max_memory_allocated() / 1e9


def variants(recipes: list[str], bench: Bench) -> Iterator[tuple[str, str, Callable[[nn.Module], nn.Module]]]:
    """Library, recipe, and what converts a model; bf16 first."""
    yield "torch", "bf16", lambda model: model
    for name in recipes:
        yield "lowp", name, lambda model, name=name: convert(model, name, keep_small=False) and model
    if bench.beside and importlib.util.find_spec("torchao") is not None:
        for theirs, ours in TORCHAO.items():
            if ours in recipes:
                yield "torchao", ours, lambda model, theirs=theirs: _torchao(model, theirs, bench)


def _torchao(model: nn.Module, recipe: str, bench: Bench) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    if bench.device == "cpu":
        object.__setattr__(config, "emulate", True)
    return convert_to_float8_training(model, config=config)


class Rows:
    """Rows of one run; what is wrong is printed and gets none."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.rows, self.base, self.wrong = bench, [], {}, 0

    def add(self, what: str, mode: str, library: str, recipe: str, ms: float, gb: float, **more: Any) -> None:
        """One timing, and the memory of it; bf16's are the baselines of those after."""
        if recipe == "bf16":
            self.base[what, mode] = ms, gb
        base_ms, base_gb = self.base.get((what, "compiled"), self.base.get((what, mode), (ms, gb)))
        eager = self.base.get((what, "eager"), (None, None))[0]
        label = f"{what} {recipe.removeprefix('float8_')} {mode}"
        about = dict(
            library=library, recipe=recipe, mode=mode, tokens=more.get("tokens", self.bench.batch * self.bench.tokens)
        )
        about["eager_ratio"] = round(eager / ms, 4) if eager and mode == "eager" else ""
        about["note"] = more.get("note", "")
        ratio = row(label, base_ms / ms, "times bf16 compiled", device=self.bench.device, **about)
        self.rows.append(row(label, ms, "ms", base_ms, device=self.bench.device, **about))
        self.rows.append(ratio)
        if gb:
            self.rows.append(row(f"{label} peak memory", gb, "GB", base_gb, device=self.bench.device, **about))
        print(f"{label:48} {library:8} {ms:10.2f} ms  {base_ms / ms:6.3f}x  {gb:7.2f} GB {about['note']}", flush=True)

    def alone(self, what: str, recipe: str, value: float, unit: str, base: float, note: str, tokens: int) -> None:
        """A figure with a baseline of its own."""
        about = dict(library="lowp", recipe=recipe, mode="eager", tokens=tokens, eager_ratio="", note=note)
        self.rows.append(
            row(f"{what} {recipe.removeprefix('float8_')}", value, unit, base, device=self.bench.device, **about)
        )
        print(f"{what:48} {recipe:8} {value:10.2f} {unit}  {value / base:6.3f}x", flush=True)

    def refuse(self, label: str, why: str) -> None:
        """No row, and the reason."""
        self.wrong += 1
        print(f"{label}: no row, {why}", flush=True)


def measure(
    what: str, make: Callable[[], tuple[nn.Module, Any]], rows: Rows, recipes: list[str], modes: list[str]
) -> None:
    """All variants of a model, in each mode."""
    squares: dict[str, float] = {}
    for mode in modes:
        for library, recipe, converted in variants(recipes, rows.bench):
            torch.manual_seed(0)
            model, x = make()
            label = f"{what} {library} {recipe} {mode}"
            try:
                model = converted(model)
                if mode == "compiled":
                    torch._dynamo.reset()
                    for block in model.children():
                        block.compile()
                step = step_of(model, x)
                square = mean_square(step, model)
                wanted = squares.setdefault("bf16", square)
                if not abs(square - wanted) <= NEAR * abs(wanted):
                    rows.refuse(label, f"its mean square is {square}, that of bf16 {wanted}")
                    continue
                rows.add(what, mode, library, recipe, *timed(step, rows.bench))
            except (
                RuntimeError,
                NotImplementedError,
                AssertionError,
            ) as error:  # a guest's recipe that this device lacks
                rows.refuse(label, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
            del model, x
            step = None
            gc.collect()  # a compiled model is a cycle: it would count as memory of the next
            if rows.bench.device == "cuda":
                torch.cuda.empty_cache()


def layers_of(size: Decoder, count: int, bench: Bench) -> tuple[nn.Module, Tensor]:
    """So many blocks, and what goes in."""
    with torch.device(bench.device):
        model = nn.Sequential(*(Block(size) for _ in range(count))).to(torch.bfloat16)
        x = torch.randn(bench.batch, bench.tokens, size.hidden, dtype=torch.bfloat16, requires_grad=True)
    return model, x


class Linears(nn.Module):
    """The linear layers of a block alone; those that read one tensor in the block do so here."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({n: layer for n, layer in block.named_children() if isinstance(layer, nn.Linear)})

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """inputs: of q, k and v; of o; of gate and up; and of down, (B, T, width) each."""
        reads = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
        return [layer(inputs[reads[name]]) for name, layer in self.layers.items()]


def linears(size: Decoder, bench: Bench) -> tuple[nn.Module, list[Tensor]]:
    """`Linears` of one block, in a container whose child is compiled."""
    model, x = layers_of(size, 1, bench)
    widths = [model[0].get_submodule(name).in_features for name in ("q_proj", "o_proj", "gate_proj", "down_proj")]
    inputs = [torch.randn(*x.shape[:2], n, dtype=x.dtype, device=x.device, requires_grad=True) for n in widths]
    return nn.Sequential(Linears(model[0])), inputs


def experts(rows: Rows, recipes: list[str]) -> None:
    """One grouped product, forward and backward, in uneven groups."""
    bench = rows.bench
    count, n, k, tokens = (4, 64, 128, 256) if bench.small else (16, 8192, 5120, 131_072)
    torch.manual_seed(0)
    shares = torch.rand(count) + 0.2
    ends = (shares.cumsum(0) / shares.sum() * tokens).round().to(torch.int32).to(bench.device)
    ends[-1] = tokens
    x = torch.randn(tokens, k, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(count, n, k, device=bench.device, dtype=torch.bfloat16) * k**-0.5).requires_grad_()
    g = torch.randn(tokens, n, device=bench.device, dtype=torch.bfloat16)

    def step(recipe: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            x.grad = w.grad = None
            y = torch._grouped_mm(x, w.mT, offs=ends) if recipe == "bf16" else grouped_linear(x, w, ends, recipe)
            y.backward(g)
            return y

        return run

    wanted: list[Tensor] = []
    for recipe in ("bf16", *(name for name in recipes if not RECIPES[name].not_for_experts)):
        note, library = f"{count} experts {n}x{k}, uneven groups", "torch" if recipe == "bf16" else "lowp"
        try:
            y = step(recipe)()
            found = [t.detach()[-1000:].clone() for t in (y, x.grad, w.grad[-1])]
            wanted, y = wanted or found, None
            off = max(float(relative_error(*pair)) for pair in zip(wanted, found, strict=True))
            if not off <= EXPERTS_NEAR:
                rows.refuse(f"experts {recipe}", f"its output or a gradient is off by {off:.3f} of bf16's")
                continue
            rows.add("experts", "eager", library, recipe, *timed(step(recipe), bench), note=note, tokens=tokens)
            if bench.device == "cuda" and RECIPES.get(recipe, RECIPES["mxfp8"]).grad_weight.startswith("e4m3/row"):
                products(rows, recipe, x.detach(), w.detach(), g, ends, note)
        except (RuntimeError, NotImplementedError) as error:
            rows.refuse(f"experts {recipe}", str(error).splitlines()[0][:160])


def products(rows: Rows, recipe: str, x: Tensor, w: Tensor, g: Tensor, ends: Tensor, note: str) -> None:
    """The three products of experts alone, beside torch's float8 product of 8192 x 8192 x 8192, and their casts alone."""
    (tokens, k), n, bench, made = x.shape, w.shape[1], rows.bench, RECIPES[recipe]
    of, square = made.operands, torch.randn(8192, 8192, device=x.device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=x.device)
    dense = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
    rate = 2 * 8192**3 / timed(lambda: dense(square, square.t(), one, one), bench)[0] / 1e9
    x_parts, g_parts = cast_groups(x, ends, of.x_row, of.x_column), cast_groups(g, ends, of.g_row, of.g_column)
    w_row, w_column = stack_form(w, of.w_row), stack_form(w.mT, of.w_column)
    for name, scheme, a, b, offs in (
        ("output", made.output, x_parts[:2], w_row, ends),
        ("grad_input", made.grad_input, g_parts[:2], w_column, ends),
        ("grad_weight", made.grad_weight, g_parts[2:4], x_parts[2:4], x_parts[4]),
    ):
        ms = timed(lambda a=a, b=b, offs=offs, scheme=scheme: grouped_product(a, b, offs, scheme, x.dtype), bench)[0]
        rows.alone(f"experts {name} product", recipe, 2 * tokens * n * k / ms / 1e9, "TFLOP/s", rate, note, tokens)
    for name, cast in (
        ("x", lambda: cast_groups(x, ends, of.x_row, of.x_column)),
        ("gradient", lambda: cast_groups(g, ends, of.g_row, of.g_column)),
        ("weight by row", lambda: stack_form(w, of.w_row)),
        ("weight by column", lambda: stack_form(w.mT, of.w_column)),
    ):
        source = {"x": x, "gradient": g}.get(name, w)
        copied = timed(source.clone, bench)[0]
        rows.alone(
            f"experts cast of {name}", recipe, timed(cast, bench)[0], "ms", copied, f"{note}; baseline: a copy", tokens
        )


def sharded(size: Decoder, count: int, rows: Rows, recipes: list[str]) -> None:
    """FSDP2 over all processes of torchrun, floats gathered and codes gathered: tokens/s of all, bytes on the wire of a rank."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    bench = rows.bench
    cuda = bench.device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    mesh = dist.device_mesh.init_device_mesh(bench.device, (dist.get_world_size(),))
    for recipe, gathers in [("bf16", "floats"), *((name, kind) for name in recipes for kind in ("floats", "codes"))]:
        torch.manual_seed(0)
        model, x = layers_of(size, count, bench)
        if recipe != "bf16":
            convert(model, recipe, keep_small=False)
            left = gather_codes(model) if gathers == "codes" else {}
            if left:
                continue
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model:
            if cuda:
                block.compile()
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
        step = step_of(model, x)

        def train(step: Callable[[], Tensor] = step, optimizer: Any = optimizer, model: nn.Module = model) -> None:
            step()
            optimizer.step()
            optimizer.zero_grad()
            precompute_scales(model)

        ms, gb = timed(train, bench)
        sent = _bytes_on_the_wire(train)
        if dist.get_rank() == 0:
            tokens = bench.batch * bench.tokens * dist.get_world_size() / ms * 1e3
            note = (
                f"{mesh.size()} ranks, {gathers} gathered, {sent / 1e6:.1f} MB a rank and step, {tokens:.0f} tokens/s"
            )
            rows.add(
                f"sharded {gathers}", "compiled", "torch" if recipe == "bf16" else "lowp", recipe, ms, gb, note=note
            )
            if recipe == "bf16":
                rows.base["sharded codes", "compiled"] = rows.base["sharded floats", "compiled"]
    dist.destroy_process_group()


def _bytes_on_the_wire(train: Callable[[], None]) -> int:
    """Bytes that one rank gives to all-gathers in a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d" and "allgather_base" in func.__name__:
                self.total += args[1].nbytes
            return func(*args, **(kwargs or {}))

    with Count() as count:
        train()
    return count.total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", default="layers,linears,experts")
    parser.add_argument("--recipes", default=OURS)
    parser.add_argument("--modes", default="compiled,eager")
    parser.add_argument("--shapes", default="70B,8B", help="whose layers: 70B, 8B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny layers, for a dry run")
    parser.add_argument("--no-torchao", action="store_true", help="do not run torchao beside")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    batch, tokens = (2, 64) if args.small else (2, 8192)
    bench = Bench(
        device=args.device,
        steps=args.steps,
        batch=batch,
        tokens=tokens,
        small=args.small,
        beside=not args.no_torchao,
        record=not args.no_record,
    )
    rows, recipes, modes = Rows(bench), args.recipes.split(","), args.modes.split(",")
    unknown = [name for name in recipes if name not in RECIPES]
    if unknown:
        parser.error(f"unknown recipes {unknown}: choose from {', '.join(RECIPES)}")
    shapes = {"70B": (model_of("llama3-70b"), 2), "8B": (model_of("llama3-8b"), 3)}
    shapes = {"tiny": (TINY, 2)} if args.small else {name: shapes[name] for name in args.shapes.split(",")}
    for name, (size, count) in shapes.items():
        if "layers" in args.what:
            measure(name, lambda size=size, count=count: layers_of(size, count, bench), rows, recipes, modes)
        if "linears" in args.what:
            measure(f"{name} linears", lambda size=size: linears(copy.copy(size), bench), rows, recipes, modes)
    if "experts" in args.what:
        experts(rows, recipes)
    if "sharded" in args.what:
        sharded(*next(reversed(shapes.values())), rows, recipes)
    if bench.record and rows.rows:
        append(args.out, rows.rows)
    return 1 if rows.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
