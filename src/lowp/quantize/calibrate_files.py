"""Calibrate a checkpoint that does not fit in memory: one block of the model at a time, from files to files.

    model on the meta device  ->  block's tensors read  ->  calibrated  ->  its shard written, durable  ->  line in the journal
                                                                        ->  back to the meta device

The hidden states between two blocks lie in files of the work directory (see `activations.py`). A block is finished when its
shard and the hidden states behind it are durable; a run that was killed goes on there, and ends with the same bytes as one that
was not. Each block is one file of the checkpoint, and what lies outside the blocks is the last. Embedding, final norm and head
are read when the model calls them, and are let go when the first block is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError
from ..tensor import QTensor
from . import shards as files
from .activations import Activations
from .apply import Report, ReportRow
from .blocks import Batch
from .calibrate import How, Outcome, Planned, calibrate
from .checkpoint import Meaning, check_target, copy_configuration, publish, seal
from .edit import edit_, edited
from .journal import JOURNAL, Journal
from .match import PlanRow, Rules, planned
from .memory import in_use
from .method import Edits
from .shards import Shard
from .stream import Source

_SLAB = 1 << 24  # bytes of a tensor that is copied as it is, at once


def calibrate_files(
    model: nn.Module,
    sources: Mapping[str, Source],
    rules: Rules,
    directory: str | os.PathLike[str],
    *,
    batches: Sequence[Batch],
    how: How,
    tied: Mapping[str, str],
    on_misfit: str = "error",
    config_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Report:
    """Calibrate from files to files.

    Args:
        model: on the meta device, in eval mode. sources: every tensor of its state, tied ones once.
        rules, on_misfit: as `quantize_` takes them. directory: the new checkpoint; it must not exist.
        batches: what the model is run on. how: see `calibrate`. tied: further name -> name.
        config_from: directory to copy configuration and tokenizer from.
        overwrite: replace a checkpoint of ours that is there, and unfinished work of another kind.

    Returns:
        A Report with a row for each tensor; of a resumed run the same as of an uninterrupted one.

    Raises:
        CheckpointError, MisfitError, QuantizedError: damaged input, the directory exists, non-finite numbers, too little memory.
    """
    target = check_target(directory, overwrite)
    edits = how.method.edit(model) if how.method.edit else Edits(by_name={})
    if edits.unties:
        edit_(model, Edits(by_name={}, unties=edits.unties))
        sources = {**sources, **{name: sources[tied[name]] for name in edits.unties}}
        tied = {name: other for name, other in tied.items() if name not in edits.unties}
    rows = list(planned(model, rules, method=how.method, device=how.device, on_misfit=on_misfit))
    work = target.with_name(f".{target.name}.partial")
    job = _job(sources, rows, batches, how, edits, config_from)
    with Journal.open(work, job, lambda folder: None, overwrite) as journal:
        place = _Files(model, sources, rows, tied, edits, how, work, journal)
        hidden = Activations(work)
        if place.blocks_done:
            shapes = journal.done[str(place.blocks_done - 1)]["hidden"]
            hidden.remember([(tuple(shape), files.DTYPES[dtype]) for shape, dtype in shapes])
            hidden.resume(place.blocks_done)
        if not place.complete:
            with place.on_call():
                calibrate(model, [one for one in rows if one[1].scheme is not None], batches, place, hidden, how)
        hidden.remove()
        entries = [journal.done[key] for key in sorted(journal.done, key=int)]
        names = [f"model-{i + 1:05}-of-{len(entries):05}.safetensors" for i in range(len(entries))]
        for i, name in enumerate(names):
            if (work / _shard_name(i)).exists():
                (work / _shard_name(i)).rename(work / name)
        meanings = {
            name: Meaning.from_json(name, value) for entry in entries for name, value in entry["meanings"].items()
        }
        if config_from is not None:
            copy_configuration(Path(config_from), work, untied=bool(edits.unties))
        seal(work, [_written(work / name) for name in names], meanings, tied)
    publish(work, target)
    (target / JOURNAL).unlink()
    reported = [ReportRow(**_row_from(value)) for entry in entries for value in entry["rows"]]
    order = {name: i for i, name in enumerate(sources)}
    return Report(rows=tuple(sorted(reported, key=lambda row: order[row.fqn])))


@dataclass
class _Piece:
    """A tensor that is written: as it is in memory, or copied from where it lies."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Tensor | None = None
    source: Source | None = None

    def write(self, file: Any) -> None:
        """Append its bytes."""
        if self.tensor is not None:
            file.write(files.as_bytes(self.tensor))
            return
        assert self.source is not None
        row = max(self.source.nbytes // max(self.source.rows, 1), 1)
        for start, stop in files.pieces(self.source.rows, max(1, _SLAB // row)):
            file.write(files.as_bytes(self.source.read(start, stop)))


class _Files:
    """Files as the place of a model's weights."""

    def __init__(
        self,
        model: nn.Module,
        sources: Mapping[str, Source],
        rows: Sequence[Planned],
        tied: Mapping[str, str],
        edits: Edits,
        how: How,
        work: Path,
        journal: Journal,
    ) -> None:
        self.model, self.sources, self.edits, self.how, self.work = model, sources, edits, how, work
        self.journal, self.tied, self.rows = journal, tied, {row.fqn: row for _, row in rows}
        self.written: set[str] = {name for entry in journal.done.values() for name in entry["tensors"]}
        self.on_demand: list[nn.Module] = []
        self.loaded: nn.Module | None = None

    @contextmanager
    def on_call(self) -> Iterator[None]:
        """While this is entered, what lies outside of the blocks is read when the model calls it."""
        handles = [m.register_forward_pre_hook(self._wanted) for m in self.model.modules() if m._parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def complete(self) -> bool:
        """Whether all was done, and only the end is missing."""
        return any(entry.get("last") for entry in self.journal.done.values())

    @property
    def blocks_done(self) -> int:
        """By an earlier run."""
        return len(self.journal.done)

    def load(self, module: nn.Module) -> None:
        """Read what a block holds; at last, for the model, what the plan names outside of the blocks."""
        if self.loaded is not module:
            self._let_go()
            if self.loaded is not None:
                self._empty(self.loaded)
        self.loaded = None if module is self.model else module
        if module is not self.model:
            self._fill(module)
            return
        for name, row in self.rows.items():
            if name not in self.written and row.scheme is not None:
                self._fill(self.model.get_submodule(name.rpartition(".")[0]))

    def finished(self, name: str, module: nn.Module, outcomes: Mapping[str, Outcome], hidden: Activations) -> None:
        """Write a block's shard and a line in the journal."""
        inside = [key for key in self.sources if key not in self.written and (not name or key.startswith(f"{name}."))]
        index = self.blocks_done
        pieces: dict[str, _Piece] = {}
        for key in inside:
            pieces |= self._pieces(key, outcomes.get(key))
        path = self.work / _shard_name(index)
        _write_shard(path, pieces)
        files.sync(path)
        entry = {
            "tensors": inside,
            "meanings": {key: self._meaning(key, outcomes[key]).to_json() for key in inside if key in outcomes},
            "rows": [_row_to(self._report_row(key, outcomes.get(key), pieces)) for key in inside],
            "hidden": [(list(shape), files.NAMES[dtype]) for shape, dtype in hidden.shapes],
            "last": not name,
        }
        self.journal.finished(str(index), entry, [path], path.stat().st_size)
        self.journal.flush()
        self.written |= set(inside)
        self._empty(module if name else self.model)

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> Tensor:
        """A tensor as the files have it."""
        source = self.sources[name]
        return source.read(0, source.rows).view(source.shape)

    def _edited(self, name: str) -> Tensor:
        edit = self.edits.by_name.get(name)
        return self.read(name) if edit is None else edited(edit, name, self.read)

    def _fill(self, module: nn.Module) -> None:
        """Give a module and those below it their tensors, on the device."""
        prefix = next(name for name, found in self.model.named_modules() if found is module)
        self._check_memory(prefix, module)
        for below, child in module.named_modules(prefix=prefix):
            for own, parameter in list(child._parameters.items()):
                if parameter is None or parameter.device.type != "meta":
                    continue
                name = f"{below}.{own}" if below else own
                self._read(self.tied.get(name, name))
            for own, buffer in list(child._buffers.items()):
                name = f"{below}.{own}" if below else own
                if buffer is not None and buffer.device.type == "meta" and name in self.sources:
                    child._buffers[own] = self.read(name).to(self.how.device)
                elif buffer is not None and buffer.device != self.how.device and buffer.device.type != "meta":
                    child._buffers[own] = buffer.to(self.how.device)

    def _check_memory(self, prefix: str, module: nn.Module) -> None:
        """Before anything is read: whether what a module holds fits under the limit."""
        if self.how.limit is None:
            return
        names = {self.tied.get(name, name) for name, p in module.named_parameters(prefix) if p.device.type == "meta"}
        wanted, used = sum(self.sources[name].nbytes for name in names), in_use(self.how.device)
        if used + wanted > self.how.limit:
            raise MisfitError(
                f"{prefix or 'the model'} wants {wanted / 1e9:.3f} GB for its weights beside {used / 1e9:.2f} GB in use, got a "
                f"limit of {self.how.limit / 1e9:.2f} GB: raise max_ram or max_vram."
            )

    def _read(self, name: str) -> None:
        """Read a tensor and put it under all of its names: where it is tied, what watches one must see the other."""
        parameter = nn.Parameter(self._edited(name).to(self.how.device), requires_grad=False)
        for other in (name, *(tied for tied, first in self.tied.items() if first == name)):
            module_name, _, own = other.rpartition(".")
            module = self.model.get_submodule(module_name)
            module._parameters[own] = parameter
            if other != name:
                self.on_demand.append(module)

    def _wanted(self, module: nn.Module, args: Any) -> None:
        """A module outside of the blocks is called: read what it holds."""
        if any(p is not None and p.device.type == "meta" for p in module._parameters.values()):
            self._fill(module)
            self.on_demand.append(module)

    def _let_go(self) -> None:
        for module in self.on_demand:
            self._empty(module)
        self.on_demand = []

    def _empty(self, module: nn.Module) -> None:
        for child in module.modules():
            for own, parameter in child._parameters.items():
                if parameter is not None and parameter.device.type != "meta":
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    child._parameters[own] = nn.Parameter(empty, requires_grad=False)

    # -- writing ------------------------------------------------------------------------------------------------------

    def _pieces(self, name: str, outcome: Outcome | None) -> dict[str, _Piece]:
        if outcome is not None:
            packed = outcome.quantized.packed
            return {f"{name}.{part}": _Piece(tuple(t.shape), t.dtype, tensor=t) for part, t in packed.items()}
        module_name, _, own = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        held: Tensor | None = module._parameters.get(own)
        if held is None:
            held = module._buffers.get(own)
        source = self.sources[name]
        if isinstance(held, Tensor) and held.device.type != "meta" and held.dtype == source.dtype:
            return {name: _Piece(source.shape, source.dtype, tensor=held)}
        if name in self.edits.by_name:
            return {name: _Piece(source.shape, source.dtype, tensor=self._edited(name))}
        return {name: _Piece(source.shape, source.dtype, source=source)}

    def _meaning(self, name: str, outcome: Outcome) -> Meaning:
        quantized: QTensor = outcome.quantized
        return Meaning.of(quantized, self.rows[name].kind)

    def _report_row(self, name: str, outcome: Outcome | None, pieces: Mapping[str, _Piece]) -> ReportRow:
        row: PlanRow | None = self.rows.get(name)
        parts = [p for key, p in pieces.items() if key == name or (outcome and key.rpartition(".")[0] == name)]
        why = row.why if row else "no weight of a layer that multiplies or looks up"
        return ReportRow(
            fqn=name,
            tied=row.tied if row else (),
            kind=row.kind if row else "other",
            shape=self.sources[name].shape,
            scheme=row.scheme if row else None,
            layout=row.layout if row else "",
            kernel=row.kernel if row else "",
            bytes_before=self.sources[name].nbytes,
            bytes_after=sum(math.prod(p.shape) * p.dtype.itemsize for p in parts),
            error=outcome.error if outcome else 0.0,
            why="; ".join(filter(None, (why, outcome.why if outcome else ""))),
            rounding_error=outcome.rounding_error if outcome else math.nan,
            output_error=outcome.output_error if outcome else math.nan,
        )


def _write_shard(path: Path, pieces: Mapping[str, _Piece]) -> None:
    shapes = {name: (piece.shape, piece.dtype) for name, piece in pieces.items()}
    (shard,) = files.shards_of([shapes], shard_bytes=1 << 62)
    with open(path, "wb") as file:
        file.write(shard.header)
        for name in sorted(shard.slots, key=lambda name: shard.slots[name][0]):
            pieces[name].write(file)


def _written(path: Path) -> Shard:
    """A shard that was written, as `seal` wants to know it."""
    found = files.read_header(path)
    slots = {name: (stored.offset, stored.nbytes) for name, stored in found.items()}
    return Shard(name=path.name, header=b"", size=path.stat().st_size, slots=slots)


def _shard_name(index: int) -> str:
    return f"model-block-{index:05}.safetensors"


def _row_to(row: ReportRow) -> dict[str, Any]:
    value = dataclasses.asdict(row)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in value.items()}


def _row_from(value: Mapping[str, Any]) -> dict[str, Any]:
    tuples = {"tied", "shape"}
    errors = {"rounding_error", "output_error"}
    return {k: tuple(v) if k in tuples else (math.nan if v is None and k in errors else v) for k, v in value.items()}


def _job(
    sources: Mapping[str, Source],
    rows: Sequence[Planned],
    batches: Sequence[Batch],
    how: How,
    edits: Edits,
    config_from: str | os.PathLike[str] | None,
) -> str:
    """A fingerprint of all that decides the result: input files, configuration, plan, options and data."""
    stats = {str(piece.path): os.stat(piece.path) for source in sources.values() for piece in source.pieces}
    config = Path(config_from or "") / "config.json"
    value = [
        (how.method.name, how.method.options, how.device.type, how.static, how.propagate, how.sequential),
        {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()},
        files.sha256(config) if config_from is not None and config.is_file() else "",
        [(row.fqn, row.scheme) for _, row in rows],
        (sorted(edits.by_name), edits.unties, edits.seed),
        _digest(list(batches)),
        torch.__version__,
    ]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _digest(value: Any) -> str:
    """A fingerprint of calibration data: its structure, and every number in it."""
    digest = hashlib.sha256()
    if isinstance(value, Tensor):
        digest.update(repr((tuple(value.shape), value.dtype)).encode())
        digest.update(files.as_bytes(value))
    elif isinstance(value, Mapping):
        digest.update(repr([(key, _digest(one)) for key, one in value.items()]).encode())
    elif isinstance(value, (tuple, list)):
        digest.update(repr([_digest(one) for one in value]).encode())
    elif value is None or isinstance(value, (bool, int, float, str)):
        digest.update(repr(value).encode())
    else:
        raise MisfitError(f"calibration data wants tensors and plain values, got {type(value).__name__}.")
    return digest.hexdigest()
