"""Checkpoints: a model in low precision as files that anyone can read.

    DIR/model.safetensors                    or model-00001-of-0000N.safetensors ... and model.safetensors.index.json
    DIR/lowp.json                            what the tensors mean, and the size and SHA-256 of each file
    DIR/config.json, tokenizer.json ...      copied as they were

A quantized tensor "layer.weight" lies there as its parts, in the plain layout (repacked for the device when it is loaded):

    layer.weight.qdata   layer.weight.scale   layer.weight.zero_point   ...        value = (qdata - zero_point) * scale

Tied weights are stored once. There is no pickle anywhere. A directory is written under another name beside its own and
renamed when it is whole: there is never a half one. On loading, every file is compared with its size and SHA-256.

    save(model, "out")                       state = load_state("out")                       load_into(model, "out")
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, LowpError, QuantizedError
from ..layouts import Spec
from ..layouts.plain import tensor_shapes
from ..numerics import Scheme
from ..ops import Case, best_layout
from ..ops.registry import device_capability
from ..tensor import QTensor
from . import shards as files
from .match import Target, targets
from .shards import Shapes, Shard, Stored

RECORD = "lowp.json"
SHARD_BYTES = 4_000_000_000
HOW_TO_READ = (
    "This directory holds a model in low precision. Each tensor that `tensors` names is stored as several: NAME.qdata and, "
    "as its format has them, NAME.scale, NAME.zero_point, NAME.scale_scale, NAME.scale_zero_point, NAME.act_pre_scale, "
    "NAME.act_scale, NAME.act_rotation. Tensors that are not in `tensors` are stored as they are.",
    "value = (qdata - zero_point) * scale. One entry of scale and zero_point serves a block of elements: the size of an axis "
    "of the tensor divided by that of the same axis of scale. Without zero_point it is 0. Where there is a scale_scale, the "
    "true scale is (scale - scale_zero_point) * scale_scale, in blocks that are counted row by row.",
    "A layer's input is multiplied by act_pre_scale before it is quantized, and before that by the signs in act_rotation and, in "
    "groups as wide as the largest power of two that divides their number, by Sylvester's Hadamard matrix / sqrt(width).",
    "Elements that have a dtype of 8 bits are stored in it. Others are codes of b bits, a little-endian stream along the last "
    "axis: code i of a row takes the bits [i*b, (i+1)*b) of that row, lowest first; rows are padded to whole bytes. Code c "
    "stands for the number codes[ELEMENT][c]; null is NaN.",
    "scheme := weight format [@ activation format]; format := element/block[*scale][+zero_point][~rule]. `shape` and `dtype` "
    "are those of the float tensor. `stored_shape`, where given, is the shape in which it was quantized; `transposed` says "
    "that the tensor is the transpose of that. `tied` maps further names to the tensor that they share.",
)


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What lowp.json says about one quantized tensor.

    Args:
        scheme: spelling. shape, dtype: of the float tensor that it stands for. stored_shape: the shape as quantized.
        transposed: it is shown with the last two axes swapped. kind: "linear", "embedding" ... for a reader.
    """

    scheme: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored_shape: tuple[int, ...]
    transposed: bool
    kind: str

    @classmethod
    def of(cls, tensor: QTensor, kind: str) -> Meaning:
        """The meaning of a tensor."""
        return cls(
            scheme=tensor.scheme,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            stored_shape=tensor.spec.shape,
            transposed=tensor.transposed,
            kind=kind,
        )

    def shapes(self) -> Shapes:
        """Shape and dtype of every part, as the plain layout has them."""
        return tensor_shapes(Scheme.parse(self.scheme).weight, self.stored_shape)

    def to_json(self) -> dict[str, Any]:
        """As it stands in lowp.json."""
        out = {"scheme": self.scheme, "shape": list(self.shape), "dtype": _dtype_name(self.dtype), "kind": self.kind}
        if self.stored_shape != self.shape:
            out["stored_shape"] = list(self.stored_shape)
        return out | ({"transposed": True} if self.transposed else {})

    @classmethod
    def from_json(cls, name: str, value: Any) -> Meaning:
        """The inverse of `to_json`; anything else is a CheckpointError that names the tensor."""
        try:
            shape = tuple(int(size) for size in value["shape"])
            made = cls(
                scheme=str(Scheme.parse(value["scheme"])),
                shape=shape,
                dtype=_FLOATS[value["dtype"]],
                stored_shape=tuple(int(size) for size in value.get("stored_shape", shape)),
                transposed=bool(value.get("transposed", False)),
                kind=str(value.get("kind", "")),
            )
            made.shapes()
        except (LowpError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{RECORD} wants scheme, shape and dtype of {name}, got {json.dumps(value)[:200]} ({error}): "
                "copy the directory again."
            ) from None
        if math.prod(made.shape) != math.prod(made.stored_shape):
            raise CheckpointError(
                f"{RECORD} wants one number of elements for {name}, got {made.shape} stored as {made.stored_shape}."
            )
        return made

    def build(self, packed: dict[str, Tensor]) -> QTensor:
        """The tensor, from its parts."""
        spec = Spec(scheme=self.scheme, layout="plain", shape=self.stored_shape)
        return QTensor(packed, spec, dtype=self.dtype, shape=self.shape, transposed=self.transposed)


_FLOATS = {_: getattr(torch, _) for _ in ("float64", "float32", "float16", "bfloat16")}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- writing ----------------------------------------------------------------------------------------------------------


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    config_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model, quantized or not, as a checkpoint's directory.

    Args:
        model: any nn.Module. directory: where; it must not exist.
        config_from: a directory whose configuration and tokenizer files are copied. Absent, a Hugging Face model writes its own.
        overwrite: replace a checkpoint of ours that is there.
        shard_bytes: the largest size of one file.

    Returns:
        The directory.

    Raises:
        CheckpointError: the directory exists, a tensor is on the meta device, or the disk is full.

    >>> from tempfile import TemporaryDirectory
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    >>> report = lowp.quantize_(model, "int8")
    >>> with TemporaryDirectory() as folder:
    ...     sorted(path.name for path in save(model, f"{folder}/out").iterdir())
    ['lowp.json', 'model.safetensors']
    """
    state, tied = _once(state_of(model))
    meta = [name for name, tensor in state.items() if tensor.device.type == "meta"]
    if meta:
        raise CheckpointError(
            f"save wants a model with data, got {meta[0]} on the meta device: load its weights first."
        )
    kinds = {target.fqn: target.kind for target in targets(model)}
    plain = {name: _storable(tensor) for name, tensor in state.items()}
    meanings = {name: Meaning.of(t, kinds.get(name, "")) for name, t in plain.items() if isinstance(t, QTensor)}
    groups = [_parts_of(name, tensor) for name, tensor in plain.items()]
    with _new_directory(directory, overwrite) as work:
        laid_out = files.shards_of([_shapes(group) for group in groups], shard_bytes)
        files.create(work, laid_out)
        _fill(work, laid_out, groups)
        if config_from is not None:
            tied_now = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
            copy_configuration(Path(config_from), work, untied=tied_now is False)
        else:
            _save_configuration(model, work)
        seal(work, laid_out, meanings, tied)
    return Path(directory)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a model's state by name, tied ones under each of their names and as one object."""
    state = model.state_dict(keep_vars=True)
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"a checkpoint holds tensors, got {strange[0]}: {type(state[strange[0]]).__name__}; keep it elsewhere."
        )
    return dict(state)


def _once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state without repetitions, and the further names of what is tied."""
    first: dict[int, str] = {}
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            kept[name] = tensor
    return kept, tied


def _storable(tensor: Tensor) -> Tensor:
    return tensor.to_layout("plain") if isinstance(tensor, QTensor) else tensor


def _parts_of(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if isinstance(tensor, QTensor):
        return {f"{name}.{part}": value for part, value in tensor.packed.items()}
    return {name: tensor}


def _shapes(group: Mapping[str, Tensor]) -> Shapes:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in group.items()}


def _fill(work: Path, laid_out: Iterable[Shard], groups: Iterable[Mapping[str, Tensor]]) -> None:
    tensors = {name: tensor for group in groups for name, tensor in group.items()}
    for shard in laid_out:
        with open(work / shard.name, "r+b") as file:
            for name, (offset, _) in shard.slots.items():
                file.seek(offset)
                file.write(files.as_bytes(tensors[name]))


def seal(work: Path, laid_out: Iterable[Shard], meanings: Mapping[str, Meaning], tied: Mapping[str, str]) -> None:
    """Write what goes beside the finished shards: the index if there are several, and lowp.json with their checksums."""
    laid_out = list(laid_out)
    if len(laid_out) > 1:
        names = {name: shard.name for shard in laid_out for name in shard.slots}
        total = sum(count for shard in laid_out for _, count in shard.slots.values())
        _write_json(work / files.INDEX, {"metadata": {"total_size": total}, "weight_map": names})
    sums = {shard.name: {"bytes": shard.size, "sha256": files.sha256(work / shard.name)} for shard in laid_out}
    record = {
        "how_to_read": HOW_TO_READ,
        "codes": _codes(meanings.values()),
        "files": sums,
        "tied": dict(tied),
        "tensors": {name: meaning.to_json() for name, meaning in meanings.items()},
    }
    _write_json(work / RECORD, record)


def _codes(meanings: Iterable[Meaning]) -> dict[str, list[float | None]]:
    """The number behind each code, for the elements that no dtype of torch's holds."""
    used = {fmt.element for m in meanings for fmt in (Scheme.parse(m.scheme).weight,) if not fmt.is_identity}
    coded = sorted((e for e in used if e.bits < 8 or e.kind == "codebook"), key=lambda element: element.name)
    return {e.name: [None if math.isnan(value) else value for value in e.values] for e in coded}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx")


def copy_configuration(source: Path, target: Path, *, untied: bool = False) -> None:
    """Copy what lies in a checkpoint's directory beside its weights: configuration, tokenizer, licence, model card.

    untied: embedding and head are two tensors now, whatever the configuration says (a rotation unties them).
    """
    for path in sorted(files.check_directory(source).iterdir()):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json") or path.name == RECORD
        if path.is_file() and not weights and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
    path = target / "config.json"
    if untied and path.is_file() and (known := files.read_json(path)).get("tie_word_embeddings") is not False:
        path.write_text(json.dumps(known | {"tie_word_embeddings": False}, indent=2) + "\n")


def _save_configuration(model: nn.Module, work: Path) -> None:
    for name in ("config", "generation_config"):  # as Hugging Face models have them
        write = getattr(getattr(model, name, None), "save_pretrained", None)
        if write is not None:
            write(work)


# -- a directory that is whole or not there ---------------------------------------------------------------------------


def check_target(directory: str | os.PathLike[str], overwrite: bool) -> Path:
    """A directory that may be written; it must not exist, or hold a checkpoint of ours that may be replaced."""
    target = Path(os.path.abspath(directory))
    if not target.parent.is_dir():
        raise CheckpointError(f"wants to write {target.name} in {target.parent}, which is no directory: make it first.")
    if not target.exists():
        return target
    if not overwrite:
        raise CheckpointError(
            f"wants to write {target}, got one that exists: choose another name, or pass overwrite (--overwrite)."
        )
    if not (target / RECORD).is_file():
        raise CheckpointError(
            f"overwrite replaces a lowp checkpoint, got {target}, which has no {RECORD}: remove it yourself."
        )
    return target


def publish(work: Path, target: Path) -> None:
    """Give a finished work directory its name, replacing a checkpoint that `check_target` has allowed."""
    for path in work.iterdir():
        files.sync(path)
    files.sync(work)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        if old.exists():  # from a run that ended between the next two lines and was then repeated
            shutil.rmtree(old)
        target.rename(old)
    work.rename(target)
    files.sync(target.parent)
    if is_ours(old):
        shutil.rmtree(old)


@contextmanager
def _new_directory(directory: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    target = check_target(directory, overwrite)
    work = target.with_name(f".{target.name}.{os.getpid()}.writing")
    work.mkdir()
    try:
        yield work
        publish(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint of ours holds, before any number is read.

    Args:
        directory: where. stored: every tensor in its files. meanings: of the quantized ones. tied: further name -> name.
        files: name -> bytes and sha256.
    """

    directory: Path
    stored: dict[str, Stored]
    meanings: dict[str, Meaning]
    tied: dict[str, str]
    files: dict[str, tuple[int, str]]

    def parts(self, name: str) -> dict[str, Stored]:
        """The stored parts of a quantized tensor, by part name."""
        found = {part: self.stored.get(f"{name}.{part}") for part in (*self.meanings[name].shapes(), *_ACTIVATION)}
        return {part: stored for part, stored in found.items() if stored is not None}

    def plain(self) -> dict[str, Stored]:
        """The tensors that are stored as they are."""
        taken = {f"{name}.{part}" for name in self.meanings for part in self.parts(name)}
        return {name: stored for name, stored in self.stored.items() if name not in taken}


_ACTIVATION = ("act_rotation", "act_pre_scale", "act_scale")


def is_ours(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a lowp checkpoint."""
    return (Path(directory) / RECORD).is_file()


def read_contents(directory: str | os.PathLike[str], *, verify: bool = True) -> Contents:
    """What a checkpoint holds: every name, shape and size checked, and with `verify` every byte.

    Raises:
        CheckpointError: files that are missing, truncated, altered or foreign; it says what was wanted, what came, what to do.
    """
    folder = files.check_directory(directory)
    if not is_ours(folder):
        files.read_directory(folder)
        raise CheckpointError(
            f"{folder} wants {RECORD}, got a checkpoint in floats: quantize it with `lowp quantize {folder} --to int4 --out DIR`."
        )
    record = files.read_json(folder / RECORD)
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), dict) for key in ("files", "tied", "tensors")
    ):
        raise CheckpointError(
            f"{folder / RECORD} wants the fields files, tied and tensors, got something else: copy it again."
        )
    sums = {
        files.plain_name(name, folder / RECORD): _sum(folder, name, entry) for name, entry in record["files"].items()
    }
    for name, (size, digest) in sums.items():
        _check_file(folder / name, size, digest if verify else "")
    stored = {key: tensor for name in sums for key, tensor in files.read_header(folder / name).items()}
    meanings = {name: Meaning.from_json(name, value) for name, value in record["tensors"].items()}
    contents = Contents(directory=folder, stored=stored, meanings=meanings, tied=dict(record["tied"]), files=sums)
    for name in meanings:
        _check_parts(contents, name)
    known = contents.plain().keys() | meanings.keys()
    for name, other in contents.tied.items():
        if other not in known or name in known:
            raise CheckpointError(
                f"{folder / RECORD} ties {name} to {other}, which the files contradict: copy the directory again."
            )
    return contents


def _sum(folder: Path, name: str, entry: Any) -> tuple[int, str]:
    try:
        return int(entry["bytes"]), str(entry["sha256"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{folder / RECORD} wants bytes and sha256 of {name}, got {entry!r}: copy it again."
        ) from None


def _check_file(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} wants {path.name}, got no such file: copy the directory again.")
    got = path.stat().st_size
    if got != size:
        raise CheckpointError(
            f"{path} wants {size} bytes, got {got}: it is {'cut short' if got < size else 'altered'}, copy it again."
        )
    if digest and files.sha256(path) != digest:
        raise CheckpointError(f"{path} wants the SHA-256 {digest[:12]}..., got another: it was altered, copy it again.")


def _check_parts(contents: Contents, name: str) -> None:
    wanted, got = contents.meanings[name].shapes(), contents.parts(name)
    for part, (shape, dtype) in wanted.items():
        found = f"{_dtype_name(got[part].dtype)} {got[part].shape}" if part in got else "none"
        if found != f"{_dtype_name(dtype)} {shape}":
            raise CheckpointError(
                f"{contents.directory}: {name} ({contents.meanings[name].scheme}) wants {part} as {_dtype_name(dtype)} {shape}, "
                f"got {found}: copy the directory again."
            )


def load_state(
    directory: str | os.PathLike[str], *, device: str | torch.device = "cpu", verify: bool = True
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of ours by name, quantized ones as QTensor in the plain layout.

    Args:
        directory: where. device: where the tensors go. verify: compare every file with its SHA-256.

    Returns:
        name -> Tensor or QTensor; tied names hold one object.

    Raises:
        CheckpointError: files that are missing, truncated, altered or foreign.
    """
    contents = read_contents(directory, verify=verify)
    state: dict[str, Tensor] = {name: stored.read().to(device) for name, stored in contents.plain().items()}
    for name, meaning in contents.meanings.items():
        state[name] = meaning.build({part: stored.read().to(device) for part, stored in contents.parts(name).items()})
    return state | {name: state[other] for name, other in contents.tied.items()}


def load_into(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> nn.Module:
    """Put a checkpoint's tensors into a model of the same architecture, which may be on the meta device.

    Args:
        model: its parameters are replaced, quantized ones by QTensors in the layout that is best on the device.
        directory: a checkpoint of ours. device: where the model goes. dtype: cast floats to it; absent, as they were.
        verify: compare every file with its SHA-256.

    Returns:
        The model.

    Raises:
        CheckpointError: names or shapes that differ, or damaged files; the model is then unchanged.
    """
    state = load_state(directory, device=device, verify=verify)
    own = state_of(model)
    _check_names(directory, own, state)
    _check_ties(directory, own, state)
    others = _other_buffers(model, state)
    made: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if id(tensor) not in made:
            made[id(tensor)] = _as_own(tensor, own[name], dtype)
        module_name, _, last = name.rpartition(".")
        module = model.get_submodule(module_name)
        if last in module._parameters:
            module._parameters[last] = made[id(tensor)]  # type: ignore[assignment]
        else:
            module._buffers[last] = made[id(tensor)]
    for module, last, buffer in others:
        module._buffers[last] = buffer.to(device)
    repack(model)
    return model


def _check_names(directory: Any, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        said = [f"{what} {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
                for what, names in (("lacks", missing), ("has besides", unexpected)) if names]  # fmt: skip
        raise CheckpointError(
            f"{directory} wants the tensors of the model, got one that {' and '.join(said)}: "
            "build the model from the same configuration."
        )
    for name, tensor in state.items():
        if tuple(tensor.shape) != tuple(own[name].shape):
            raise CheckpointError(
                f"{directory}: {name} wants the shape {tuple(own[name].shape)} in this model, got {tuple(tensor.shape)}: "
                "build the model from the same configuration."
            )


def _check_ties(directory: Any, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, other in _once(own)[1].items():
        if state[name] is not state[other]:
            raise CheckpointError(
                f"{directory}: {name} and {other} are one tensor in this model, got two: build the model without tied weights."
            )


def _as_own(tensor: Tensor, own: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and tensor.is_floating_point() and tensor.dtype in _FLOATS.values():
        tensor = tensor.to(dtype)
    if not isinstance(own, nn.Parameter):
        return tensor
    trainable = own.requires_grad and not isinstance(tensor, QTensor) and tensor.is_floating_point()
    return nn.Parameter(tensor, requires_grad=trainable)


def _other_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> list[tuple[nn.Module, str, Tensor]]:
    """Module, name and value of each buffer that no checkpoint holds; one without data is a CheckpointError."""
    found = []
    for module_name, module in model.named_modules():
        for name, buffer in module._buffers.items():
            fqn = f"{module_name}.{name}" if module_name else name
            if buffer is None or fqn in state:
                continue
            if buffer.device.type == "meta":
                raise CheckpointError(
                    f"{fqn} is not part of a checkpoint and has no data in this model: "
                    "build it with real buffers, not under torch.device('meta')."
                )
            found.append((module, name, buffer))
    return found


def repack(model: nn.Module) -> None:
    """Give every quantized weight of a model the layout that its kernels read fastest on the device where it is."""
    for target in targets(model):
        if isinstance(target.weight, QTensor):
            packed = nn.Parameter(target.weight.to_layout(_layout_for(target, target.weight)), requires_grad=False)
            for fqn in (target.fqn, *target.tied):
                module_name, _, name = fqn.rpartition(".")
                setattr(model.get_submodule(module_name), name, packed)


def _layout_for(target: Target, weight: QTensor) -> str:
    if weight.is_lazy_view:
        return weight.spec.layout
    case = Case(
        op="linear",
        scheme=weight.scheme,
        device=weight.device.type,
        sm=device_capability(weight.device.type, weight.device.index),
        dtype=_dtype_name(weight.dtype),
        shape=weight.spec.shape,
    )
    return best_layout(target.ops, case)[0]


def check_floats(name: str, stored: Stored) -> None:
    """Raise a QuantizedError where a weight that should be a float is something else (an int8 or float8 checkpoint)."""
    if stored.dtype not in _FLOATS.values():
        raise QuantizedError(
            f"{name} in {stored.path} wants a float of 16 bits or more, got {_dtype_name(stored.dtype)}: "
            "it is quantized already, name the checkpoint that it was made from."
        )
