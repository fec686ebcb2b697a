"""The life of one model: float weights, fine-tuning with quantized numbers, rivals without training, and what serves in the end.

    python examples/life_of_a_model.py                    the bundled model, text of Debian's documentation, 150 steps a format
    python examples/life_of_a_model.py --short            in a minute: two formats, few steps, text that the model writes itself
    python examples/life_of_a_model.py --record           also append to benchmarks/results/qat.csv
    python examples/life_of_a_model.py --start DIR        another float checkpoint to begin with
    python examples/life_of_a_model.py --pretrain 3000    its shape alone: learn the weights from the text first
    python examples/life_of_a_model.py --device cuda --size 30m --pretrain-seconds 60 --seconds 20 --batch 64 --record
                                                          a model of 28 M parameters from random weights to 2 bits on one GPU

What happens, for each format of `FORMATS`:

    prepare      lowp.qat.prepare(model, rules): the float model computes with quantized numbers
    fine-tune    the loss is distillation, KL(float model || quantized model), and cross entropy, on text that is not held out
    control      (--control, with --distill below 1) the float model trained on, by the same loss, text and pace: what of the
                 gain is more training
    convert      lowp.qat.convert(model): what training chose becomes quantized weights
    rivals       lowp.quantize_(float model, same rules, method): rounding ("absmax") and better choices, without training
    evaluate     perplexity, KL, top-1 agreement on the held-out text, and the share of rounding's damage that was recovered:

                     share = (perplexity_rounding - perplexity) / (perplexity_rounding - perplexity_float)

    serve        saved, read again by lowp.load into transformers, which must say the same and writes a sentence

With --size the text is the whole corpus of train_small_lm.py (`corpus --work DIR`, 33 M tokens), its tokenizer and held-out text.
Otherwise: documentation packages as in train_small_lm.py, a part of each, without the documents that the held-out text
was drawn from (by the same hash) and without any paragraph of it. Without it (`--text self`, and in the short form) the model
writes its own, beginning with the end token: data-free, as in LLM-QAT (arXiv 2305.17888, section 3.1).
The token table, tied to the output layer, is int8/row in every row, trained with the rest; norms are trained as floats.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
from lowp.tensor import QTensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import train_small_lm as lm  # noqa: E402 -- the script beside this one

TABLE = {"model.embed_tokens": "int8/row"}  # the token table, tied to the output layer
TITLE = "The life of one model"
CALIBRATION = 32  # sequences of 512 tokens
RIVALS = "absmax,mse,hqq,gptq"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A format to live in, and how it is trained: `learn`, `clamp` as of `qat.prepare`; lr of the weights at its peak;
    share of --seconds."""

    name: str
    scheme: str
    learn: tuple[str, ...] = ()
    clamp: str = "zero"
    lr: float = 3e-4
    share: float = 1.0


CASES = (
    Case(name="int4 g32, int8 activations", scheme="int4/1x32*bf16@int8/row", learn=("weight",), lr=4e-4),
    Case(name="int3 g32", scheme="int3/1x32*bf16+bf16", learn=("weight",), lr=8e-4),
    Case(name="int2 g32", scheme="int2/1x32*bf16+bf16", learn=("weight",), lr=1.2e-3, share=1.25),
)


# -- text -------------------------------------------------------------------------------------------------------------


def documentation(work: Path, tokenizer: Any, heldout: str, cap: int) -> torch.Tensor:
    """Token ids of up to `cap` characters of each package of train_small_lm.py, nothing of the held-out text among them."""
    import numpy as np

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
        yield ids[(starts + torch.arange(context)).to(ids.device)].long()


# -- train ------------------------------------------------------------------------------------------------------------


Loss = Callable[[torch.Tensor], torch.Tensor]


@contextlib.contextmanager
def compiled(*models: Any) -> Iterator[None]:
    """Inside, the layers of models on a GPU are compiled: one by one, so that a model costs one compilation of one layer."""
    layers = [layer for model in models if model.device.type == "cuda" for layer in model.model.layers]
    torch._dynamo.config.recompile_limit = 64  # of one forward: floats, no gradient, and each format
    for layer in layers:
        layer.compile(dynamic=False)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def answer(model: Any, batch_BT: torch.Tensor) -> torch.Tensor:
    """Logits for training: products in bf16 on a GPU, float32 on a CPU."""
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=batch_BT.device.type == "cuda"):
        if not hasattr(getattr(model, "model", None), "rotary_emb"):  # no Llama
            return model(input_ids=batch_BT, use_cache=False).logits
        return lm.logits_of(model, batch_BT)


def train(model: Any, loss_of: Loss, parameters: list[dict[str, Any]], stream: Any, steps: int, seconds: float) -> int:
    """Train in place for so many steps, or by the clock where seconds are given (from the second step on, compiled by then).

    Args:
        parameters: groups as an optimizer takes them, the peak of each learning rate as `peak`. stream: batches of token ids.

    Returns:
        The number of steps.
    """
    cuda = model.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), fused=cuda)
    losses, started, step, done = [], time.perf_counter(), 0, 0.0
    model.train()
    while done < 1.0:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * max(pace(done if seconds else step / steps), 1e-3)
        loss = loss_of(next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == 2 or not cuda:
            losses.append(loss.item())  # waits for the device, so that the clock tells the truth
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"wanted a finite loss, got {losses[-1]} at step {step}: lower the learning rate")
        if step == 2:
            started = time.perf_counter() if seconds else started
        passed = time.perf_counter() - started
        if (step % 100 == 0 and cuda) or (not cuda and step % max(steps // 10, 1) == 0):
            print(f"  step {step:4d}  loss {losses[-1]:.4f}  {passed:.0f} s", flush=True)
        done = passed / seconds if seconds and step > 2 else 0.0 if seconds else step / steps
    model.eval()
    print(f"  {step} steps, loss {sum(losses[-10:]) / len(losses[-10:]):.4f}, {passed:.1f} s", flush=True)
    return step


def pretrain(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> None:
    """Forget the checkpoint's weights and learn from the text anew, in place: products in bf16 or float8, float32 weights."""
    torch.manual_seed(args.seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=model.config.initializer_range)
    learner = copy.deepcopy(model)
    if args.precision == "float8":
        from lowp.train import convert

        print(convert(learner, "float8_rowwise", keep_small=False))
    decayed = [p for p in learner.parameters() if p.ndim >= 2]
    parameters = [
        dict(params=decayed, peak=args.pretrain_lr, weight_decay=0.1),
        dict(params=[p for p in learner.parameters() if p.ndim < 2], peak=args.pretrain_lr, weight_decay=0.0),
    ]

    def loss_of(batch_BT: torch.Tensor) -> torch.Tensor:
        logits = answer(learner, batch_BT[:, :-1]).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch_BT[:, 1:].flatten())

    stream = batches(ids, args.batch, args.context + 1, torch.Generator().manual_seed(args.seed + 1))
    with compiled(learner):
        train(learner, loss_of, parameters, stream, args.pretrain, args.pretrain_seconds)
    model.load_state_dict(learner.state_dict())


def groups(model: Any, lr: float) -> list[dict[str, Any]]:
    """Parameters by pace. Adam's steps are as large as the learning rate, whatever the gradient: a learned scale gets three times
    the rate as a share of itself (to the nearest power of two), a learned zero point, counted in codes, five times the rate."""
    learned = {
        id(parameter): name
        for module in model.modules()
        if isinstance(module, qat.FakeQuantize)
        for name, parameter in module.named_parameters(recurse=False)
    }
    found: dict[float, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        name, factor = learned.get(id(parameter)), 1.0
        if name == "scale":
            factor = 3 * 2.0 ** round(math.log2(float(parameter.detach().mean())))
        elif name == "zero_point":
            factor = 5.0
        found.setdefault(factor, []).append(parameter)
    return [dict(params=params, peak=factor * lr, weight_decay=0.0) for factor, params in found.items()]


def pace(done: float, warmup: float = 0.1) -> float:
    """Of the peak learning rate: up over the first tenth, then down to zero by a cosine."""
    return done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def finetune(model: Any, teacher: Any, ids: torch.Tensor, case: Case, args: argparse.Namespace) -> int:
    """Train a prepared model, in place; answers the number of steps."""

    def loss_of(batch_BT: torch.Tensor) -> torch.Tensor:
        inputs_BT = batch_BT[:, :-1]
        with torch.no_grad():
            wanted = answer(teacher, inputs_BT)
        return qat.distill(answer(model, inputs_BT), wanted, batch_BT[:, 1:], weight=args.distill)

    stream = batches(ids, args.batch, args.context + 1, torch.Generator().manual_seed(args.seed))
    with compiled(model, teacher):
        return train(
            model, loss_of, groups(model, args.lr_scale * case.lr), stream, args.steps, args.seconds * case.share
        )


def lived(original: Any, ids: torch.Tensor, case: Case, args: argparse.Namespace) -> tuple[Any, int]:
    """Prepare, fine-tune, convert: the quantized model and the steps it took."""
    model = copy.deepcopy(original)
    qat.prepare(model, TABLE | {"*": case.scheme}, learn=case.learn, clamp=case.clamp)
    steps = finetune(model, original, ids, case, args)
    qat.convert(model)
    return model, steps


def rival(floats: Any, ids: torch.Tensor, scheme: str, method: str) -> Any | None:
    """A float model quantized without training; None where the method cannot take the format."""
    if METHODS[method].why_not(Scheme.parse(scheme).weight):
        return None
    model = copy.deepcopy(floats)
    lowp.quantize_(model, TABLE, method="absmax")  # the table is looked up: its rows see no calibration
    lowp.quantize_(
        model,
        {"lm_head": None, "model.embed_tokens": None, "*": scheme},
        method=method,
        data=calibration(ids) if METHODS[method].wants_data else None,
    )
    return model


def calibration(ids: torch.Tensor) -> list[torch.Tensor]:
    """Up to `CALIBRATION` sequences of 512 tokens, in batches; a shorter text, such as the short form's own, is one sequence."""
    length = min(512, len(ids))
    count = min(CALIBRATION, len(ids) // length)
    return list(ids[: count * length].view(count, length).long().split(8))


# -- show -------------------------------------------------------------------------------------------------------------


def shares(evaluations: list[Evaluation]) -> dict[str, float]:
    """The share of rounding's loss of perplexity that each model recovered, by name."""
    damage = {
        one.name.removesuffix(", absmax"): one.quality.perplexity - one.quality.original_perplexity
        for one in evaluations
        if one.name.endswith(", absmax")
    }
    return {
        one.name: 1 - (one.quality.perplexity - one.quality.original_perplexity) / damage[one.name.rsplit(", ", 1)[0]]
        for one in evaluations
        if damage.get(one.name.rsplit(", ", 1)[0])
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


def served(model: Any, tokenizer: Any, folder: Path, start: Path, args: argparse.Namespace) -> str:
    """Save, read again through transformers, compare, and let it write."""
    lowp.save(model, folder, config_from=start, overwrite=True)
    again = lowp.load(folder, device=args.device)
    ids = torch.arange(2, 34, device=args.device)[None]
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


def named(args: argparse.Namespace) -> str:
    """The model's name in figures."""
    return f"small_lm {args.size}" if args.size else Path(args.start).name


def record(evaluations: list[Evaluation], life: Life, args: argparse.Namespace) -> None:
    """Append the figures to benchmarks/results/qat.csv."""
    recovered, rows, schemes = shares(evaluations), [], {case.name: case.scheme for case in CASES}
    command, tokens = command_of(sys.argv[1:]), evaluations[0].quality.tokens

    def more(scheme: str, method: str, name: str) -> dict[str, Any]:
        return dict(device=args.device, model=named(args), scheme=scheme, method=method, steps=life.steps.get(name, 0),
                    batch=args.batch, context=args.context, tokens=tokens, command=command)  # fmt: skip

    for one in evaluations:
        q, (case, method) = one.quality, one.name.rsplit(", ", 1)
        own = more(schemes[case], method, one.name)
        rows += [
            row("perplexity", q.perplexity, "1", q.original_perplexity, **own),
            row("KL to the original", q.kl, "nats a token", None, **own),
            row("top-1 agreement", q.top1, "share", 1.0, **own),
            row("recovered share of rounding's perplexity", recovered[one.name], "share", None, **own),
        ]
    for name, q in life.controls.items():
        rows.append(row("perplexity", q.perplexity, "1", q.original_perplexity, **more("float", name, "trained on")))
    for name, share in life.fair.items():
        own = more(schemes[name], "QAT", f"{name}, QAT")
        rows.append(row("recovered share, against the float model trained on and rounded", share, "share", None, **own))
    append(ROOT / "benchmarks" / "results" / "qat.csv", rows)


# -- the life ---------------------------------------------------------------------------------------------------------


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--start", type=Path, default=ROOT / "examples" / "small_lm", help="the float checkpoint")
    p.add_argument("--heldout", type=Path, help="held-out text; heldout.txt of the bundled model if absent")
    p.add_argument("--text", choices=("documentation", "self"), help="what is trained on; documentation unless --short")
    p.add_argument("--work", type=Path, default=ROOT / "build" / "lm", help="where the documentation is kept")
    p.add_argument("--device", default="cpu")
    p.add_argument(
        "--size", choices=lm.SIZES, help="a model of train_small_lm.py from random weights, on the corpus in --work"
    )
    p.add_argument(
        "--pretrain", type=int, default=0, help="train the float model from random weights first, so many steps"
    )
    p.add_argument("--precision", choices=("bf16", "float8"), default="bf16", help="of --pretrain")
    p.add_argument("--pretrain-seconds", type=float, default=0.0, help="by the clock instead")
    p.add_argument("--pretrain-lr", type=float, default=3e-3)
    p.add_argument("--distill", type=float, default=1.0, help="weight of KL; the rest is cross entropy")
    p.add_argument(
        "--lr-scale", type=float, default=1.0, help="of the learning rates of fine-tuning, for small batches"
    )
    p.add_argument("--control", action="store_true", help="also train the float model on; with --distill below 1")
    p.add_argument("--control-lr", type=float, default=5e-4)
    p.add_argument("--cases", help="only the formats whose name has one of these words, by commas")
    p.add_argument("--rivals", default=RIVALS, help="methods without training; absmax is the measure of all")
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--seconds", type=float, default=0.0, help="of a format, by the clock instead of --steps")
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
    if "absmax" not in args.rivals.split(","):
        p.error("--rivals wants absmax among them: shares are of its damage")
    if args.size and not (args.pretrain or args.pretrain_seconds):
        p.error("--size wants --pretrain STEPS or --pretrain-seconds SECONDS: it begins with random weights")
    if args.control and args.distill >= 1:
        p.error("--control wants --distill below 1: from itself alone the float model has nothing to learn")
    args.text = args.text or ("self" if args.short else "documentation")
    args.heldout = args.heldout or ROOT / "examples" / "small_lm" / "heldout.txt"
    if args.short:
        args.cases = args.cases or "int4,int2"
        args.steps, args.batch, args.context = min(args.steps, 12), 4, 128
        args.tokens, args.new_tokens = min(args.tokens or 2049, 2049), 8
    return args


@dataclass
class Life:
    """What came of it: models by name, the steps each was trained for, the control and what it says of the shares."""

    models: dict[str, Any]
    steps: dict[str, int]
    controls: dict[str, Any]
    fair: dict[str, float]


def begun(args: argparse.Namespace) -> tuple[Any, Any, str, torch.Tensor, Path]:
    """The float model, its tokenizer, the held-out text, the ids to train on, and the folder of its configuration."""
    if args.size:
        start, heldout = args.out / "float", (args.work / "heldout.txt").read_text(encoding="utf-8")
        original = lm.build(lm.SIZES[args.size], 1024)
        lm.save_model(original, start, args.work / "tokenizer", "16MB")
        tokenizer = hf.tokenizer(start)
        ids = torch.from_numpy(lm.load_tokens(args.work / "train.u16.xz").astype("int32"))
        return original.to(args.device), tokenizer, heldout, ids.to(args.device), start
    tokenizer, original = hf.tokenizer(args.start), load(str(args.start), args.device, "fp32")
    heldout = args.heldout.read_text(encoding="utf-8")
    if args.text == "self":
        ids = self_written(original, 8, 2 * args.context)
    else:
        ids = documentation(args.work, tokenizer, heldout, 400_000)
    return original, tokenizer, heldout, ids.to(args.device), args.start


def live(original: Any, ids: torch.Tensor, cases: list[Case], args: argparse.Namespace) -> Life:
    """Train and quantize: every case and its rivals, and the control."""
    life = Life(models={}, steps={}, controls={}, fair={})
    for case in cases:
        print(f"{case.name}  {case.scheme}", flush=True)
        name = f"{case.name}, QAT"
        life.models[name], life.steps[name] = lived(original, ids, case, args)
        for method in args.rivals.split(","):
            model = rival(original, ids, case.scheme, method)
            if model is not None:
                life.models[f"{case.name}, {method}"] = model
    if args.control:
        print("the float model, trained on", flush=True)
        model = copy.deepcopy(original)
        life.steps["trained on"] = finetune(model, original, ids, Case(name="", scheme="", lr=args.control_lr), args)
        life.controls["trained on"] = model
        for case in cases:
            life.controls[f"trained on, {case.scheme} absmax"] = rival(model, ids, case.scheme, "absmax")
    return life


@torch.no_grad()
def as_defined(model: Any, original: Any) -> Any:
    """A quantized model as it is defined: its weights' values in float32, activations quantized and dequantized before a product.

    What a GPU measures quickly: the kernels that serve would be compiled for every format and shape first."""
    floats, own = copy.deepcopy(original), dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in floats.named_parameters(remove_duplicate=False):
        stored = own[name]
        parameter.copy_(stored.dequantize() if isinstance(stored, QTensor) else stored)
        act = Scheme.parse(stored.scheme).act if isinstance(stored, QTensor) else None
        if act is not None:
            fake = qat.FakeQuantize(act)
            floats.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda module, inputs, fake=fake: (fake(inputs[0].flatten(0, -2)).reshape(inputs[0].shape),)
            )
    return floats


def judged(
    life: Life, original: Any, tokenizer: Any, heldout: str, cases: list[Case], args: argparse.Namespace
) -> list[Evaluation]:
    """Measure all models on the held-out text; the control's models become their qualities."""
    tokens = tokens_of(tokenizer, heldout, args.tokens or None)
    models = life.models | life.controls
    if args.device != "cpu":
        models = {name: as_defined(model, original) for name, model in models.items()}
    qualities = measure(original, models, tokens)
    life.controls = {name: qualities[name] for name in life.controls}
    evaluations = [
        evaluation(name, model, original, qualities[name], floats=torch.bfloat16) for name, model in life.models.items()
    ]
    show(evaluations)
    for name, quality in life.controls.items():
        print(f"{name:45}{quality.perplexity:12.3f}{quality.kl:10.4f}{100 * quality.top1:7.1f}%")
    for case in cases if life.controls else ():
        floats, rounded = (life.controls[n].perplexity for n in ("trained on", f"trained on, {case.scheme} absmax"))
        got = qualities[f"{case.name}, QAT"].perplexity
        life.fair[case.name] = 1 - (got - floats) / (rounded - floats)
        print(
            f"{case.name}: {100 * life.fair[case.name]:.1f} % recovered, against the float model trained on and rounded"
        )
    return evaluations


def facts_of(life: Life, evaluations: list[Evaluation], args: argparse.Namespace) -> tuple[dict[str, str], str]:
    """What the page says of the run, and the line below its title."""
    facts = {"model": named(args), "held-out tokens": str(evaluations[0].quality.tokens), "device": device_name(args.device),
             "recovered": ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares(evaluations).items())}  # fmt: skip
    steps = ", ".join(str(number) for number in life.steps.values())
    return (
        facts,
        f"{steps} steps of {args.batch} x {args.context} tokens, distilled from the float model; token table int8/row.",
    )


def main(words: list[str] | None = None) -> list[Evaluation]:
    args = arguments(words)
    args.out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if not args.cases or any(word in case.name for word in args.cases.split(","))]
    original, tokenizer, heldout, ids, start = begun(args)
    count = sum(p.numel() for p in original.parameters()) / 1e6
    print(f"{count:.2f} M parameters, {len(ids)} tokens to train on, {device_name(args.device)}", flush=True)
    if args.pretrain or args.pretrain_seconds:
        pretrain(original, ids, args)
        if args.size:
            lm.save_model(original, start, args.work / "tokenizer", "16MB")
    original.requires_grad_(True)
    life = live(original, ids, cases, args)
    evaluations = judged(life, original, tokenizer, heldout, cases, args)
    if args.record:
        record(evaluations, life, args)
    facts, caption = facts_of(life, evaluations, args)
    subtitle = f"{facts['model']}, {facts['held-out tokens']} tokens. {caption}"
    picture(evaluations, TITLE, subtitle, str(args.out / "life.png"))
    texts = {
        name: served(model, tokenizer, args.out / name.split(",")[0].replace(" ", "-"), start, args)
        for name, model in life.models.items()
        if name.endswith("QAT")
    }
    html = args.out / "report.html"
    html.write_text(
        page(evaluations, title=TITLE, caption=caption, facts=facts, texts=texts, prompt=args.prompt), encoding="utf-8"
    )
    print(f"\nreport {html}, picture {args.out / 'life.png'}, checkpoints beside them")
    return evaluations


if __name__ == "__main__":
    main()
