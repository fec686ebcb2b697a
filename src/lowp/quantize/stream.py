"""Quantize a checkpoint that does not fit in memory: tensor by tensor, and a large tensor by slabs of rows.

Every size follows from the plan, so the output's files are laid out and reserved first; then each slab is read, quantized
and written where it belongs:

    source rows [a, b)  ->  quantize_weight  ->  parts  ->  bytes [size * a / rows, size * b / rows) of each part

The result is the same to the bit as `quantize_` and `save`. A slab is cut only where the format allows: no block reaches over
a cut, and nothing is measured over the whole tensor (one scale for a matrix, a quantized scale, HQQ's common unit).

A run that is stopped leaves a work directory `.NAME.partial` with a journal: its first line says what the work is, each
further one that a tensor is finished and durable. The same call goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import MisfitError
from ..layouts.plain import tensor_shapes
from ..numerics import Scheme
from . import shards as files
from .apply import Report, ReportRow
from .checkpoint import SHARD_BYTES, Meaning, check_floats, check_target, copy_configuration, publish, seal
from .journal import JOURNAL, Journal
from .match import Plan, PlanRow
from .method import method_of
from .shards import Shapes, Shard, Stored
from .weight import quantize_weight

_SLAB = 1 << 20  # elements that are quantized at once: 4 MiB in float32, which a processor's cache holds


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a tensor of the model comes from: stored tensors whose rows, one after the other, are its rows.

    One stored tensor for nearly all. A stack of experts (E, N, K) that is stored one expert at a time has E or 2E pieces.
    """

    shape: tuple[int, ...]
    pieces: tuple[Stored, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all pieces."""
        return self.pieces[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Rows of all pieces."""
        return sum(piece.rows for piece in self.pieces)

    def read(self, start: int, stop: int) -> Tensor:
        """The rows [start, stop), counted through all pieces."""
        found, first = [], 0
        for piece in self.pieces:
            a, b = max(start - first, 0), min(stop - first, piece.rows)
            if a < b:
                found.append(piece.read(a, b))
            first += piece.rows
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One tensor of the model: where it comes from, what the plan says, and how it is cut into slabs.

    Args:
        name, source: of the tensor. row: the plan's, None for what no rule can reach (norms, biases, buffers).
        step: source rows in a slab. inner: the shape of one row of a slab, as quantized. shapes: of what is written.
    """

    name: str
    source: Source
    row: PlanRow | None
    step: int
    shapes: Shapes

    @property
    def scheme(self) -> str | None:
        """The scheme, None where it stays."""
        return self.row.scheme if self.row else None

    @property
    def bytes_after(self) -> int:
        """Bytes that are written."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes.values())


Progress = Callable[[str, int, int], None]


def quantize_files(
    sources: Mapping[str, Source],
    plan: Plan,
    directory: str | os.PathLike[str],
    *,
    tied: Mapping[str, str],
    method: str = "absmax",
    device: str | torch.device = "cpu",
    config_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda name, done, total: None,
) -> Report:
    """Carry a plan out from files to files.

    Args:
        sources: every tensor of the model's state, tied ones once, in the model's order. plan: of the same model.
        directory: the new checkpoint; it must not exist. tied: further name -> name.
        method: name of a method. device: where to compute. config_from: directory to copy configuration and tokenizer from.
        overwrite: replace a checkpoint of ours that is there, and unfinished work of another kind.
        shard_bytes: the largest size of one file. progress: called with a tensor's name, bytes read so far, bytes in all.

    Returns:
        A Report with a row for each tensor; where a run was resumed, the same as of an uninterrupted one.

    Raises:
        CheckpointError, MisfitError, QuantizedError: damaged input, the directory exists, lack of space, non-finite weights.
    """
    target = check_target(directory, overwrite)
    by_name = {row.fqn: row for row in plan.rows}
    units = [_unit(name, source, by_name.get(name), method) for name, source in sources.items()]
    laid_out = files.shards_of([unit.shapes for unit in units], shard_bytes)
    work = target.with_name(f".{target.name}.partial")
    with Journal.open(
        work, _job(units, laid_out, method, device), partial(files.create, shards=laid_out), overwrite
    ) as journal:
        _run(units, laid_out, work, journal, method, device, progress)
        meanings = {unit.name: _meaning(unit) for unit in units if unit.scheme is not None}
        if config_from is not None:
            copy_configuration(Path(config_from), work)
        seal(work, laid_out, meanings, tied)
    publish(work, target)
    (target / JOURNAL).unlink()
    return Report(rows=tuple(_report_row(unit, journal.done[unit.name]) for unit in units))


def work_directory(directory: str | os.PathLike[str]) -> Path:
    """Where the unfinished work for a directory lies."""
    target = Path(os.path.abspath(directory))
    return target.with_name(f".{target.name}.partial")


# -- the work ---------------------------------------------------------------------------------------------------------


def _run(
    units: Sequence[Unit],
    laid_out: Sequence[Shard],
    work: Path,
    journal: Journal,
    method: str,
    device: str | torch.device,
    progress: Progress,
) -> None:
    slots = {name: (shard.name, offset, size) for shard in laid_out for name, (offset, size) in shard.slots.items()}
    total = sum(unit.source.nbytes for unit in units)
    read = sum(unit.source.nbytes for unit in units if unit.name in journal.done)
    progress("", read, total)
    for unit in units:
        if unit.name in journal.done:
            continue
        shard, _, _ = slots[next(iter(unit.shapes))]
        noise = signal = 0.0
        with open(work / shard, "r+b", buffering=0) as file:
            for start, stop in files.pieces(unit.source.rows, unit.step):
                slab = unit.source.read(start, stop)
                parts, error = (
                    _quantized(unit, slab, method, device) if unit.scheme else ({unit.name: slab}, (0.0, 0.0))
                )
                noise, signal = noise + error[0], signal + error[1]
                for name, tensor in parts.items():
                    _, offset, size = slots[name]
                    _write(file, offset + size * start // unit.source.rows, tensor)
                read += slab.numel() * slab.element_size()
                progress(unit.name, read, total)
            journal.finished(unit.name, {"noise": noise, "signal": signal}, [Path(file.name)], unit.bytes_after)


def _quantized(
    unit: Unit, slab: Tensor, method: str, device: str | torch.device
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """The parts of a slab by full name, and the squared norms of its error and of itself."""
    assert unit.row is not None and unit.scheme is not None
    weight = slab.to(device).view(_slab_shape(unit, slab))
    weight = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
    signal = _squares(weight)
    if not math.isfinite(signal):
        raise _not_finite(unit)
    quantized = quantize_weight(weight, unit.scheme, method=method, name=unit.name, kind=unit.row.kind)
    noise = _squares(quantized.dequantize(weight.dtype).sub_(weight))
    return {f"{unit.name}.{part}": tensor for part, tensor in quantized.packed.items()}, (noise, signal)


def _squares(x: Tensor) -> float:
    """The squared norm of a slab: of each row in the slab's precision, of all rows in float64."""
    total = x.norm(dim=-1).double().square().sum().item()
    return total if math.isfinite(total) else x.double().square().sum().item()


def _slab_shape(unit: Unit, slab: Tensor) -> tuple[int, ...]:
    """The shape in which a slab is quantized: a part of a stack of experts (E, N, K) counts as rows (E * N, K)."""
    shape = unit.source.shape
    if unit.step >= unit.source.rows:
        return shape
    assert unit.row is not None
    return (slab.numel() // shape[-1], shape[-1]) if unit.row.kind == "experts" else (slab.shape[0], *shape[1:])


def _not_finite(unit: Unit) -> MisfitError:
    nans = infinite = 0
    for start, stop in files.pieces(unit.source.rows, unit.step):
        slab = unit.source.read(start, stop)
        nans += int(slab.isnan().sum())
        infinite += int(slab.isinf().sum())
    return MisfitError(
        f"{unit.name} {unit.source.shape} wants finite numbers, got {nans} NaN and {infinite} infinite of "
        f"{math.prod(unit.source.shape)}: repair the checkpoint, or keep this layer with a rule None."
    )


def _write(file: IO[bytes], offset: int, tensor: Tensor) -> None:
    view = files.as_bytes(tensor)
    file.seek(offset)
    while view:
        view = view[file.write(view) :]


# -- units ------------------------------------------------------------------------------------------------------------


def _unit(name: str, source: Source, row: PlanRow | None, method: str) -> Unit:
    if row is None or row.scheme is None:
        row_elements = max(math.prod(source.shape) // max(source.rows, 1), 1)
        return Unit(
            name=name,
            source=source,
            row=row,
            step=max(1, _SLAB // row_elements),
            shapes={name: (source.shape, source.dtype)},
        )
    for piece in source.pieces:
        check_floats(name, piece)
    parts = tensor_shapes(Scheme.parse(row.scheme).weight, _matrix_shape(row))
    return Unit(
        name=name,
        source=source,
        row=row,
        step=_step(source, row, method),
        shapes={f"{name}.{part}": shape for part, shape in parts.items()},
    )


def _matrix_shape(row: PlanRow) -> tuple[int, ...]:
    if row.kind == "conv":
        return (row.shape[0], math.prod(row.shape[1:]))
    return (row.shape[1], row.shape[0]) if row.kind == "conv1d" else row.shape


def _step(source: Source, row: PlanRow, method: str) -> int:
    """Rows of the source that may be quantized apart from the others."""
    fmt = Scheme.parse(row.scheme or "").weight
    whole = not method_of(method).by_rows and not method_of(method).why_not(fmt)
    if whole or row.kind == "conv1d" or fmt.nested is not None:
        return source.rows
    if fmt.block == "tensor":
        return source.rows // row.shape[0] if row.kind == "experts" else source.rows
    width = (
        math.prod(row.shape) // source.rows
    )  # elements in a row of the source: a whole matrix of a stack stored as one
    block_rows = 1 if fmt.is_identity or width > _matrix_shape(row)[-1] else fmt.block_dims(_matrix_shape(row))[0]
    return min(max(1, _SLAB // (width * block_rows)) * block_rows, source.rows)


def _meaning(unit: Unit) -> Meaning:
    assert unit.row is not None and unit.scheme is not None
    return Meaning(
        scheme=unit.scheme,
        shape=unit.row.shape,
        dtype=unit.source.dtype,
        stored_shape=_matrix_shape(unit.row),
        transposed=unit.row.kind == "conv1d",
        kind=unit.row.kind,
    )


def _report_row(unit: Unit, done: Mapping[str, Any]) -> ReportRow:
    row = unit.row
    error = math.sqrt(done["noise"] / done["signal"]) if done["signal"] else 0.0
    return ReportRow(
        fqn=unit.name,
        tied=row.tied if row else (),
        kind=row.kind if row else "other",
        shape=unit.source.shape,
        scheme=unit.scheme,
        layout=row.layout if row else "",
        kernel=row.kernel if row else "",
        bytes_before=unit.source.nbytes,
        bytes_after=unit.bytes_after,
        error=error,
        why=row.why if row else "no weight of a layer that multiplies or looks up",
    )


# -- the journal ------------------------------------------------------------------------------------------------------


def _job(units: Sequence[Unit], laid_out: Sequence[Shard], method: str, device: str | torch.device) -> str:
    """A fingerprint of all that decides the result: input files, plan, method, layout of the output."""
    stats = {str(piece.path): os.stat(piece.path) for unit in units for piece in unit.source.pieces}
    value = [
        method,
        torch.device(device).type,
        {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()},
        [(u.name, u.scheme, u.step, [(str(p.path), p.offset, p.shape) for p in u.source.pieces]) for u in units],
        [hashlib.sha256(shard.header).hexdigest() for shard in laid_out],
    ]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
