"""The life of one model: float weights, fine-tuning with quantized numbers, rivals without training, and what serves in the end.

    python examples/life_of_a_model.py                    the bundled model, text of Debian's documentation, 150 steps a format
    python examples/life_of_a_model.py --short            in a minute: two formats, few steps, text that the model writes itself
    python examples/life_of_a_model.py --record           also append to benchmarks/results/qat.csv
    python examples/life_of_a_model.py --start DIR        another float checkpoint to begin with
    python examples/life_of_a_model.py --pretrain 3000    its shape alone: learn the weights from the text first

What happens, for each format of `FORMATS`:

    prepare      lowp.qat.prepare(model, rules): the float model computes with quantized numbers
    fine-tune    the loss is distillation: KL(float model || quantized model) on text that is not the held-out one
    convert      lowp.qat.convert(model): what training chose becomes quantized weights
    rivals       lowp.quantize_(float model, same rules, method): rounding ("absmax") and better choices, without training
    evaluate     perplexity, KL, top-1 agreement on the held-out text, and the share of rounding's damage that was recovered:

                     share = (perplexity_rounding - perplexity) / (perplexity_rounding - perplexity_float)

    serve        saved, read again by lowp.load into transformers, which must say the same and writes a sentence

The training text: documentation packages as in train_small_lm.py, a part of each, without the documents that the held-out text
was drawn from (by the same hash) and without any paragraph of it. Without it (`--text self`, and in the short form) the model
writes its own, beginning with the end token: data-free, as in LLM-QAT (arXiv 2305.17888, section 3.1).
The token table, tied to the output layer, is int8/row in every row, trained with the rest; norms are trained as floats.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait in a spin slow a busy machine down twofold

import torch

import lowp
from lowp import qat
from lowp.cli.eval import load
from lowp.integrations import transformers as hf
from lowp.numerics import Scheme
from lowp.quantize import METHODS
from lowp.report import Evaluation, evaluation, measure, tokens_of
from lowp.report.continuation import continuation
from lowp.report.page import page
from lowp.report.plots import picture
from lowp.report.results import append, device_name, row

ROOT = Path(__file__).parents[1]
TABLE = {"model.embed_tokens": "int8/row"}  # the token table, tied to the output layer
TITLE = "The life of one model"
RIVALS = ("absmax", "mse", "hqq")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A format to live in, and how it is trained: `learn`, `clamp` as of `qat.prepare`; lr of the weights at its peak."""

    name: str
    scheme: str
    learn: tuple[str, ...] = ()
    clamp: str = "zero"
    lr: float = 3e-4


CASES = (
    Case(name="int4 g32, int8 activations", scheme="int4/1x32*bf16@int8/row", learn=("weight",), lr=2e-4),
    Case(name="int3 g32", scheme="int3/1x32*bf16+bf16", learn=("weight",), lr=5e-4),
    Case(name="int2 g32", scheme="int2/1x32*bf16+bf16", learn=("weight",), lr=1e-3),
)


# -- text -------------------------------------------------------------------------------------------------------------


def documentation(work: Path, tokenizer: Any, heldout: str, cap: int) -> torch.Tensor:
    """Token ids of up to `cap` characters of each package of train_small_lm.py, nothing of the held-out text among them."""
    import numpy as np

    sys.path.insert(0, str(ROOT / "examples"))
    import train_small_lm as lm

    kept = work / f"text-{cap}.npy"
    if not kept.is_file():
        seen = {lm.key(paragraph) for paragraph in heldout.replace(lm.END, "").split("\n\n") if len(paragraph) >= 80}
        documents = []
        for source in lm.SOURCES:
            lm.fetch(source, work)
            documents += lm.read_source(source, work, cap)
        documents = sorted(lm.deduplicate(documents, Counter()), key=lambda document: document.digest)
        texts = [
            "\n\n".join(p for p in document.text.split("\n\n") if len(p) < 80 or lm.key(p) not in seen)
            for document in documents
            if document.digest % 1000 >= 20  # the 2 % that train_small_lm.py holds out
        ]
        ids = tokenizer([text + "\n" + lm.END for text in texts], add_special_tokens=False, verbose=False).input_ids
        work.mkdir(parents=True, exist_ok=True)
        np.save(kept, np.array([token for one in ids for token in one], dtype=np.uint16))
    return torch.from_numpy(np.load(kept).astype(np.int32))


@torch.no_grad()
def self_written(model: Any, sequences: int, length: int) -> torch.Tensor:
    """Token ids that the model draws from itself, one sequence after the other."""
    torch.manual_seed(1)
    start = torch.full((sequences, 1), model.config.bos_token_id, dtype=torch.int64)
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=length, min_new_tokens=length, do_sample=True, pad_token_id=1
    )  # fmt: skip
    return ids.flatten().to(torch.int32)


def batches(ids: torch.Tensor, batch: int, context: int, generator: torch.Generator) -> Any:
    """Endless batches (B, T) cut from the text at random places."""
    while True:
        starts = torch.randint(len(ids) - context + 1, (batch, 1), generator=generator)
        yield ids[starts + torch.arange(context)].long()


# -- train ------------------------------------------------------------------------------------------------------------


def pretrain(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Forget the checkpoint's weights and learn from the text anew, in place: bf16 products, float32 weights.

    `--precision float8` is for lowp.train: it takes the place of autocast here once that room is there.
    """
    if args.precision != "bf16":
        raise SystemExit(f"--precision {args.precision} wants lowp.train, which is not there yet: use bf16")
    torch.manual_seed(args.seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=model.config.initializer_range)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.pretrain_lr, betas=(0.9, 0.95), weight_decay=0.1)
    stream = batches(ids, args.batch, args.context + 1, torch.Generator().manual_seed(args.seed + 1))
    model.train()
    for step in range(args.pretrain):
        for group in optimizer.param_groups:
            group["lr"] = args.pretrain_lr * max(pace((step + 1) / args.pretrain), 1e-3)
        batch_BT = next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch_BT[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch_BT[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(args.pretrain // 10, 1) == 0:
            print(f"  step {step + 1:4d}  loss {loss.item():.4f}", flush=True)
    model.eval()


def groups(model: Any, lr: float) -> list[dict[str, Any]]:
    """Parameters by pace: learned scales are small numbers, learned zero points are counted in steps between codes."""
    learned = {
        id(parameter): name
        for module in model.modules()
        if isinstance(module, qat.FakeQuantize)
        for name, parameter in module.named_parameters(recurse=False)
    }
    made = []
    for name, factor in ((None, 1.0), ("scale", 0.2), ("zero_point", 5.0)):
        found = [parameter for parameter in model.parameters() if learned.get(id(parameter)) == name]
        made += [dict(params=found, peak=factor * lr)] if found else []
    return made


def pace(done: float, warmup: float = 0.1) -> float:
    """Of the peak learning rate: up over the first tenth, then down to zero by a cosine."""
    return done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def finetune(model: Any, teacher: Any, ids: torch.Tensor, case: Case, args: argparse.Namespace) -> float:
    """Train a prepared model, in place; answers the mean loss of the last tenth, in nats a token."""
    optimizer = torch.optim.AdamW(groups(model, case.lr), lr=case.lr, betas=(0.9, 0.95), weight_decay=0.0)
    stream = batches(ids, args.batch, args.context, torch.Generator().manual_seed(args.seed))
    model.train()
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * max(pace((step + 1) / args.steps), 1e-3)
        batch_BT = next(stream)
        with torch.no_grad():
            wanted = teacher(input_ids=batch_BT, use_cache=False).logits
        loss = qat.distill(model(input_ids=batch_BT, use_cache=False).logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % max(args.steps // 10, 1) == 0:
            print(f"  step {step + 1:4d}  KL {losses[-1]:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
    model.eval()
    last = losses[-max(args.steps // 10, 1) :]
    return sum(last) / max(len(last), 1)


def lived(original: Any, ids: torch.Tensor, case: Case, args: argparse.Namespace) -> tuple[Any, Any]:
    """Prepare, fine-tune, convert: the quantized model and its report."""
    model = copy.deepcopy(original)
    qat.prepare(model, TABLE | {"*": case.scheme}, learn=case.learn, clamp=case.clamp)
    finetune(model, original, ids, case, args)
    return model, qat.convert(model)


# -- show -------------------------------------------------------------------------------------------------------------


def shares(evaluations: list[Evaluation]) -> dict[str, float]:
    """The share of rounding's loss of perplexity that each model recovered, by name."""
    damage = {
        one.scheme: one.quality.perplexity - one.quality.original_perplexity
        for one in evaluations
        if one.name.endswith("absmax")
    }
    return {
        one.name: 1 - (one.quality.perplexity - one.quality.original_perplexity) / damage[one.scheme]
        for one in evaluations
        if damage.get(one.scheme)
    }


def show(evaluations: list[Evaluation]) -> None:
    """The table on the terminal."""
    first, recovered = evaluations[0].quality, shares(evaluations)
    print(f"\n{'':38}{'MB':>7}{'perplexity':>12}{'KL, nats':>10}{'top-1':>8}{'recovered':>11}")
    print(f"{'float':38}{evaluations[0].bytes_before / 1e6:7.2f}{first.original_perplexity:12.3f}")
    for one in evaluations:
        q = one.quality
        print(
            f"{one.name:38}{one.bytes_after / 1e6:7.2f}{q.perplexity:12.3f}{q.kl:10.4f}{100 * q.top1:7.1f}%"
            f"{100 * recovered[one.name]:10.1f}%"
        )


def served(model: Any, tokenizer: Any, folder: Path, args: argparse.Namespace) -> str:
    """Save, read again through transformers, compare, and let it write."""
    lowp.save(model, folder, config_from=args.start, overwrite=True)
    again = lowp.load(folder)
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        if not torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits):
            raise SystemExit(f"{folder} says something else than the model that was saved")
    return continuation(again, tokenizer, args.prompt, max_new_tokens=args.new_tokens, temperature=0.0).text


def command_of(words: list[str]) -> str:
    """The command as others would type it: a folder of this machine is named by its last part.

    >>> command_of(["--steps", "9", "--out", "/somewhere/out"])
    'python examples/life_of_a_model.py --steps 9 --out out'
    """
    parts = [option + ("=" if equals else "") + (Path(value).name if value.startswith("/") else value)
             for option, equals, value in (word.rpartition("=") for word in words)]  # fmt: skip
    return " ".join(["python examples/life_of_a_model.py", *parts])


def record(evaluations: list[Evaluation], cases: list[Case], args: argparse.Namespace) -> None:
    """Append the figures to benchmarks/results/qat.csv."""
    recovered, rows = shares(evaluations), []
    command = command_of(sys.argv[1:])
    for one in evaluations:
        q, method = one.quality, one.name.rsplit(", ", 1)[1]
        more = dict(model=Path(args.start).name, scheme=one.scheme, method=method, steps=args.steps if method == "QAT" else 0,
                    batch=args.batch, context=args.context, tokens=q.tokens, command=command)  # fmt: skip
        rows += [
            row("perplexity", q.perplexity, "1", q.original_perplexity, **more),
            row("KL to the original", q.kl, "nats a token", None, **more),
            row("top-1 agreement", q.top1, "share", 1.0, **more),
            row("recovered share of rounding's perplexity", recovered[one.name], "share", None, **more),
        ]
    append(ROOT / "benchmarks" / "results" / "qat.csv", rows)


# -- the life ---------------------------------------------------------------------------------------------------------


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--start", type=Path, default=ROOT / "examples" / "small_lm", help="the float checkpoint")
    p.add_argument("--heldout", type=Path, help="held-out text; heldout.txt of the bundled model if absent")
    p.add_argument("--text", choices=("documentation", "self"), help="what is trained on; documentation unless --short")
    p.add_argument("--work", type=Path, default=ROOT / "build" / "lm", help="where the documentation is kept")
    p.add_argument(
        "--pretrain", type=int, default=0, help="train the float model from random weights first, so many steps"
    )
    p.add_argument("--precision", choices=("bf16", "float8"), default="bf16", help="of --pretrain")
    p.add_argument("--pretrain-lr", type=float, default=3e-3)
    p.add_argument("--cases", help="only the formats whose name has one of these words, by commas")
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--tokens", type=int, default=20481, help="held-out tokens that are read; 0 for all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--prompt", default="The CREATE INDEX command")
    p.add_argument("--new-tokens", type=int, default=32)
    p.add_argument("--out", type=Path, default=ROOT / "out" / "life")
    p.add_argument("--short", action="store_true", help="two formats, few steps, no text from elsewhere")
    p.add_argument("--record", action="store_true", help="append to benchmarks/results/qat.csv")
    args = p.parse_args(words)
    args.text = args.text or ("self" if args.short else "documentation")
    args.heldout = args.heldout or ROOT / "examples" / "small_lm" / "heldout.txt"
    if args.short:
        args.cases = args.cases or "int4,int2"
        args.steps, args.batch, args.context = min(args.steps, 12), 4, 128
        args.tokens, args.new_tokens = min(args.tokens or 2049, 2049), 8
    return args


def main(words: list[str] | None = None) -> list[Evaluation]:
    args = arguments(words)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer, original = hf.tokenizer(args.start), load(str(args.start), "cpu", "fp32")
    heldout = args.heldout.read_text(encoding="utf-8")
    cases = [case for case in CASES if not args.cases or any(word in case.name for word in args.cases.split(","))]
    if args.text == "self":
        ids = self_written(original, 8, 2 * args.context)
    else:
        ids = documentation(args.work, tokenizer, heldout, 400_000)
    print(
        f"{args.start.name}: {sum(p.numel() for p in original.parameters()) / 1e6:.2f} M parameters, {len(ids)} to train on"
    )

    if args.pretrain:
        pretrain(original, ids, args)
    models: dict[str, tuple[Any, Any]] = {}
    for case in cases:
        print(f"{case.name}  {case.scheme}", flush=True)
        models[f"{case.name}, QAT"] = lived(original, ids, case, args)
        for method in RIVALS:
            if not METHODS[method].why_not(Scheme.parse(case.scheme).weight):
                model = copy.deepcopy(original)
                models[f"{case.name}, {method}"] = (
                    model,
                    lowp.quantize_(model, TABLE | {"*": case.scheme}, method=method),
                )
    qualities = measure(
        original,
        {name: model for name, (model, _) in models.items()},
        tokens_of(tokenizer, heldout, args.tokens or None),
    )
    evaluations = [
        evaluation(name, model, original, qualities[name], floats=torch.bfloat16) for name, (model, _) in models.items()
    ]
    show(evaluations)

    texts = {
        name: served(model, tokenizer, args.out / name.split(",")[0].replace(" ", "-"), args)
        for name, (model, _) in models.items()
        if name.endswith("QAT")
    }
    facts = {"model": args.start.name, "held-out tokens": str(evaluations[0].quality.tokens), "device": device_name("cpu"),
             "recovered": ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares(evaluations).items())}  # fmt: skip
    caption = f"{args.steps} steps of {args.batch} x {args.context} tokens, distilled from the float model; token table int8/row."
    html = args.out / "report.html"
    html.write_text(
        page(evaluations, title=TITLE, caption=caption, facts=facts, texts=texts, prompt=args.prompt), encoding="utf-8"
    )
    picture(
        evaluations,
        TITLE,
        f"{facts['model']}, {facts['held-out tokens']} tokens. {caption}",
        str(args.out / "life.png"),
    )
    print(f"\nreport {html}, picture {args.out / 'life.png'}, checkpoints beside them")
    if args.record:
        record(evaluations, cases, args)
    return evaluations


if __name__ == "__main__":
    main()
