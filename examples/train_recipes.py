"""Train one small language model from scratch in bf16 and by each recipe: same seed, same data, loss curves in one plot.

    python examples/train_recipes.py                                minutes on a CPU, which emulates what it has no units for
    python examples/train_recipes.py --steps 300 --out build/recipes --record
    python examples/train_recipes.py --width 512 --layers 4 --batch 32 --steps 200 --recipes float8_tensorwise,float8_rowwise,int8
                                                                    under a minute on an H200, on its tensor cores

The model is a byte-level transformer (2 layers, 128 wide, or what you say), the text is what the bundled model never saw, cut
in two: training and held out. It is small so that anyone can run it; what it shows is whether a recipe's rounding changes what is
learned, not how fast. The larger model of this project trains the same way: `train_small_lm.py train --recipe float8_rowwise`.

The held-out loss is the mean of the negative log-likelihood of the next byte, in nats, computed in the recipe's own precision.
"""

import argparse
import csv
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lowp.report.results import append, row
from lowp.train import RECIPES, convert

HERE = Path(__file__).parent
TEXT = HERE / "small_lm" / "heldout.txt"
RESULTS = HERE.parent / "benchmarks" / "results" / "training_quality.csv"


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, h):
        shape = (*h.shape[:2], self.heads, -1)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.qkv(self.norm1(h)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(a.transpose(1, 2).flatten(2))
        x = self.norm2(h)
        return h + self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, width: int = 128, layers: int = 2, heads: int = 4, context: int = 128):
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        self.apply(lambda m: nn.init.normal_(m.weight, std=0.05) if isinstance(m, (nn.Linear, nn.Embedding)) else None)

    def forward(self, ids_BT):
        h = self.embed(ids_BT) + self.place.weight[: ids_BT.shape[1]]
        return self.head(self.norm(self.blocks(h)))


def loss_of(model, pieces_BT):
    with torch.autocast(pieces_BT.device.type, torch.bfloat16):
        logits = model(pieces_BT[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), pieces_BT[:, 1:].flatten())


def train(recipe: str, args) -> tuple[list[tuple[int, float]], float]:
    """The held-out losses by step, and seconds."""
    started = time.monotonic()
    data = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long().to(args.device)
    cut = int(0.9 * len(data))
    text, heldout = data[:cut], data[cut:]
    torch.manual_seed(args.seed)
    model = Model(args.width, args.layers).to(args.device)
    if recipe != "bf16":
        convert(model, recipe, rules={"head": None}, keep_small=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(args.seed)
    window = torch.arange(129, device=args.device)
    evaluated = heldout[: 64 * 128 + 1].unfold(0, 129, 128)
    curve = []
    for step in range(args.steps + 1):
        if step % max(1, args.steps // 5) == 0:
            with torch.no_grad():
                curve.append(
                    (step, sum(loss_of(model, part).item() for part in evaluated.split(32)) / len(evaluated.split(32)))
                )
        warmup, left = min(1.0, (step + 1) / 20), 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * warmup * (0.1 + 0.9 * left)
        starts = torch.randint(0, len(text) - 129, (args.batch, 1), generator=draw).to(args.device)
        loss_of(model, text[starts + window]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return curve, time.monotonic() - started


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for name, curve in curves.items():
        style = dict(color="black", linewidth=2.2, zorder=3) if name == "bf16" else dict(linewidth=1.2)
        axes.plot(*zip(*curve, strict=True), label=f"{name}  {curve[-1][1]:.4f}", **style)
    axes.set(xlabel="step", ylabel="held-out loss, nats a byte", title="One model, same seed and data, by recipe")
    axes.legend(fontsize=8, title="final")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("build/recipes"))
    parser.add_argument("--record", action="store_true", help="append rows to benchmarks/results/training_quality.csv")
    args = parser.parse_args()
    curves, rows = {}, []
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("bf16", *args.recipes.split(",")):
        curves[name], seconds = train(name, args)
        final, base = curves[name][-1][1], curves["bf16"][-1][1]
        print(f"{name:22} final held-out loss {final:.4f}  {final / base:.4f} of bf16  {seconds:.0f} s", flush=True)
        about = dict(recipe=name, steps=args.steps, seed=args.seed, model=f"bytes {args.layers}x{args.width}")
        rows.append(row("final held-out loss", final, "nats a byte", base, device=args.device, **about))
    with (args.out / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["recipe", "step", "heldout_loss"])
        writer.writerows((name, *point) for name, curve in curves.items() for point in curve)
    plot(curves, args.out / "curves.png")
    if args.record:
        append(RESULTS, rows)


if __name__ == "__main__":
    main()
