"""How much memory `lowp quantize` needs for a model larger than the memory it may have.

A Llama-shaped checkpoint of about 8 GB with random weights is written to a scratch directory, in shards of 2 GB, and
quantized to int4 by the command line in a process of its own, which a memory cgroup limits to 2 GB (page cache included: the
kernel must be able to drop it). Then the process is run again without limit for comparison.

    PYTHONPATH=src python benchmarks/quantize_stream.py [--scratch DIR] [--gb 8] [--limit-gb 2]

Peak memory is the largest resident set that the kernel has seen (VmHWM in /proc, asked 20 times a second). Rows are appended to
results/quantize_stream.csv. The time is worth something on an idle machine only, the processor time on any. Without the right
to make a cgroup the run is not limited, and its row says so.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
COLUMNS = ("what", "value", "unit", "baseline", "ratio", "device", "torch", "commit", "date")
HIDDEN, INTERMEDIATE, VOCABULARY, KEY_VALUE = 4096, 14336, 128256, 1024  # Llama 3 8B, with fewer layers
LAYER_BYTES = 2 * (2 * HIDDEN * HIDDEN + 2 * KEY_VALUE * HIDDEN + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN)


def write_model(folder: Path, gigabytes: float) -> None:
    """A checkpoint of about that size: embedding, lm_head and as many layers as fit."""
    from safetensors.torch import save_file

    ends = 2 * 2 * VOCABULARY * HIDDEN
    layers = max(1, round((gigabytes * 1e9 - ends) / LAYER_BYTES))
    folder.mkdir(parents=True)
    names: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        save_file(
            {name: torch.randn(shape, dtype=torch.bfloat16).mul_(0.02) for name, shape in shapes.items()}, folder / file
        )
        names.update(dict.fromkeys(shapes, file))

    write("embed.safetensors", {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)})
    write("head.safetensors", {"lm_head.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)})
    for first in range(0, layers, 4):  # 1.7 GB a shard
        write(
            f"layers-{first}.safetensors",
            {k: v for i in range(first, min(first + 4, layers)) for k, v in layer(i).items()},
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def layer(i: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEY_VALUE, HIDDEN), "self_attn.v_proj": (KEY_VALUE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    return {f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()}


class Limit:
    """A memory cgroup for one child, below our own: version 1 or 2, if this process may make one."""

    def __init__(self, limit: int) -> None:
        self.limit, self.folder = limit, None
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        for _, controllers, path in lines:
            if controllers == "memory":
                self._make(Path("/sys/fs/cgroup/memory") / path.strip("/"), "memory.limit_in_bytes")
            elif not controllers and self.folder is None:
                self._make(Path("/sys/fs/cgroup") / path.strip("/"), "memory.max")

    def _make(self, parent: Path, file: str) -> None:
        folder = parent / f"quantize_stream_{os.getpid()}"
        try:
            folder.mkdir()
            (folder / file).write_text(str(self.limit))
            self.folder = folder
        except OSError as error:
            print(f"no limit by {folder}: {error}")
            folder.rmdir() if folder.is_dir() else None

    def enter(self) -> None:
        """Called in the child before it starts."""
        if self.folder is not None:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def failures(self) -> str:
        """How often the limit was met (the kernel then drops page cache), as the kernel counts it."""
        for name in ("memory.failcnt", "memory.events"):
            if self.folder is not None and (self.folder / name).is_file():
                return (self.folder / name).read_text().strip().replace("\n", " ")
        return ""

    def remove(self) -> None:
        """Take the cgroup away again."""
        if self.folder is not None:
            self.folder.rmdir()


def run(
    model: Path, out: Path, limit: Limit | None, arguments: list[str], most: float = float("inf")
) -> tuple[float, float, float]:
    """Quantize in a child. Returns seconds, seconds of processor time, and peak resident bytes.

    most: seconds after which it is killed; `out` is not there then."""
    command = [sys.executable, "-m", "lowp.cli", "quantize", str(model), "--out", str(out), *arguments]
    start, peak, ended = time.perf_counter(), 0, 0
    child = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, preexec_fn=limit.enter if limit else None
    )
    while not ended:
        peak = max(peak, high_water_mark(child.pid))
        time.sleep(0.05)
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if time.perf_counter() - start > most and not ended:
            child.kill()
            ended, status, usage = os.wait4(child.pid, 0)
            status = 0
    seconds = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"lowp quantize ended with status {status}")
    return seconds, usage.ru_utime + usage.ru_stime, peak


def high_water_mark(process: int) -> int:
    """The largest resident set so far, in bytes. Not getrusage's: that one still counts this process, before the exec."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/quantize_stream"))
    parser.add_argument("--gb", type=float, default=8.0)
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--to", default="int4")
    parser.add_argument("--method", default="absmax")
    parser.add_argument("--keep", action="store_true", help="keep the model in the scratch directory, for another run")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    model, out = options.scratch / "model", options.scratch / "out"
    rows = []
    try:
        if not model.exists():
            write_model(model, options.gb)
        layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        largest = 2 * VOCABULARY * HIDDEN
        what = f"lowp quantize --to {options.to} --method {options.method}, Llama of {layers} layers, {size / 1e9:.2f} GB in bf16"
        print(what)
        for limited in (True, False):
            limit = Limit(int(options.limit_gb * 1e9)) if limited else None
            where = conditions()
            seconds, processor_seconds, peak = run(model, out, limit, ["--to", options.to, "--method", options.method])
            bound = f"{what}, {f'limited to {options.limit_gb:g} GB' if limit and limit.folder else 'no limit'}"
            if limit:
                print("times the limit was met:", limit.failures())
                limit.remove()
            shutil.rmtree(out)
            tensor = (f"largest tensor {largest / 1e9:.2f} GB", f"{peak / largest:.3f}")
            rows.append((f"{bound}: peak resident memory", f"{peak / 1e9:.3f}", "GB", *tensor, *where))
            rows.append((f"{bound}: time", f"{seconds:.1f}", "s", "", "", *where))
            rows.append((f"{bound}: processor time", f"{processor_seconds:.1f}", "s", "", "", *where))
            rows.append((f"{bound}: rate of bf16 read", f"{size / 1e9 / seconds:.3f}", "GB/s", "", "", *where))
            print(*rows[-4:], sep="\n")
    finally:
        if not options.keep:
            shutil.rmtree(options.scratch, ignore_errors=True)
    if not options.no_record:
        record(rows)


def conditions() -> tuple[str, ...]:
    """Device (with its load before the run, which makes the time worth more or less), torch, commit, date."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    device = f"cpu, {threads} of {os.cpu_count()} cores ({processor()}), load {os.getloadavg()[0]:.1f}"
    return device, torch.__version__, git.stdout.strip(), str(datetime.date.today())


def record(rows: list[tuple[str, ...]]) -> None:
    """Append the rows to the results."""
    path = ROOT / "benchmarks" / "results" / "quantize_stream.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([COLUMNS, *rows] if new else rows)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
