"""safetensors files, read and written a slice at a time: what a checkpoint of any size needs.

    file    := length (8 bytes, little-endian)  header (JSON, `length` bytes)  data
    header  := {"name": {"dtype": "BF16", "shape": [N, K], "data_offsets": [start, stop]}, ..., "__metadata__": {...}}

The offsets count from the end of the header, and the tensors cover the data without gaps. So a header can be written before
any number is known, and the tensors filled in, in any order, by any process: that is how a conversion is stopped and resumed.

Reading goes through plain reads into fresh memory, not through a memory map: what is resident is what was asked for.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100_000_000  # bytes; the reference implementation refuses longer headers too
_CHUNK = 1 << 24  # 16 MiB: bytes that are read, hashed or copied at once


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file: where its bytes lie and how to read them.

    Args:
        name: its name in the file. path: the file. dtype, shape: of the tensor. offset: of its first byte in the file.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """The size of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows [start, stop) of the first axis, in fresh memory.

        Raises:
            CheckpointError: the file ends before the tensor does.
        """
        stop = self.rows if stop is None else stop
        row = self.nbytes // max(self.rows, 1)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        data = read_bytes(self.path, self.offset + start * row, (stop - start) * row)
        return data.view(self.dtype).view(shape)


def read_bytes(path: Path, offset: int, count: int) -> Tensor:
    """`count` bytes of a file from `offset` on, as a uint8 tensor; a file that ends early is a CheckpointError."""
    data = torch.empty(count, dtype=torch.uint8)
    view, done = data.numpy().data, 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while done < count:
            got = file.readinto(view[done : done + (1 << 30)])
            if not got:
                raise CheckpointError(
                    f"{path} wants {count} bytes at offset {offset}, got {done}: it is cut short, copy it again."
                )
            done += got
    return data


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    plain = tensor.detach().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else memoryview(b"")


# -- reading ----------------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name, in the order of the header.

    Raises:
        CheckpointError: it is not a safetensors file, or it is cut short, or its header contradicts its size.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(_HEADER_LIMIT, max(size - 8, 0)):
            raise CheckpointError(
                f"{path} wants the header of a safetensors file, got {size} bytes without one: "
                "it is cut short or of another kind, copy it again."
            )
        text = file.read(length)
    try:
        entries = json.loads(text)
        found = [_stored(path, name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} wants a safetensors header, got one that cannot be read ({error}): copy it again."
        ) from None
    end = max((tensor.offset + tensor.nbytes for tensor in found), default=8 + length)
    if end == size and sum(tensor.nbytes for tensor in found) != size - 8 - length:
        raise CheckpointError(
            f"{path} wants tensors side by side, got some that overlap: it is altered, copy it again."
        )
    if end != size:
        raise CheckpointError(
            f"{path} wants {end} bytes by its header, got {size}: "
            f"it is {'cut short' if size < end else 'altered'}, copy it again."
        )
    return {tensor.name: tensor for tensor in found}


def _stored(path: Path, name: str, entry: Any, base: int) -> Stored:
    start, stop = (int(offset) for offset in entry["data_offsets"])
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the dtype {entry['dtype']!r}, known are {', '.join(DTYPES)}")
    shape = tuple(int(size) for size in entry["shape"])
    tensor = Stored(name=name, path=path, dtype=DTYPES[entry["dtype"]], shape=shape, offset=base + start)
    if start < 0 or any(size < 0 for size in shape) or stop - start != tensor.nbytes:
        raise ValueError(f"{name} {shape} wants {tensor.nbytes} bytes, its offsets are {start} and {stop}")
    return tensor


def read_directory(directory: str | os.PathLike[str]) -> dict[str, Stored]:
    """Every tensor of a checkpoint's directory: its index, its one file, or whatever safetensors files lie there.

    Raises:
        CheckpointError: no such directory; no safetensors file in it; a shard is missing or damaged; two hold one name.
    """
    folder = check_directory(directory)
    if (folder / INDEX).is_file():
        names = sorted(set(_weight_map(folder / INDEX).values()))
        paths = [folder / plain_name(name, folder / INDEX) for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder / INDEX} wants {', '.join(missing[:3])}, got no such file: copy the missing shards too."
            )
    elif (folder / "model.safetensors").is_file():
        paths = [folder / "model.safetensors"]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} wants safetensors files, got {_instead(folder)}")
    found: dict[str, Stored] = {}
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in found:
                raise CheckpointError(
                    f"{name} lies in {found[name].path.name} and in {path.name}: "
                    f"remove the file that does not belong to {folder}."
                )
            found[name] = tensor
    _check_index(folder, found)
    return found


def _check_index(folder: Path, found: Mapping[str, Stored]) -> None:
    if (folder / INDEX).is_file():
        lost = [name for name in _weight_map(folder / INDEX) if name not in found]
        if lost:
            raise CheckpointError(
                f"{folder / INDEX} wants {lost[0]} and {len(lost) - 1} more, which no shard holds: copy the directory again."
            )


def check_directory(directory: str | os.PathLike[str]) -> Path:
    """The directory as a path; a CheckpointError where there is none."""
    folder = Path(directory)
    if not folder.exists():
        raise CheckpointError(
            f"wants a checkpoint's directory, got {folder}, which does not exist: check the spelling of the path."
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"wants a checkpoint's directory, got the file {folder}: name the directory that holds it."
        )
    return folder


def plain_name(name: str, source: Path) -> str:
    """The name of a file beside `source`; anything that points elsewhere is a CheckpointError."""
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(
            f"{source} names the file {name!r}, which does not lie beside it: the file is damaged or not to be trusted."
        )
    return name


def _weight_map(path: Path) -> dict[str, str]:
    value = read_json(path)
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f'{path} wants {{"weight_map": {{tensor: file}}}}, got something else: copy it again.')
    return names


def read_json(path: Path) -> Any:
    """The value of a JSON file; a CheckpointError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} wants JSON, got text that is none ({error}): copy it again.") from None


def _instead(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        return (
            f"only pickles ({', '.join(pickles[:3])}), which can run code when they are read: save the model again with "
            "`model.save_pretrained(directory, safe_serialization=True)`."
        )
    names = sorted(path.name for path in folder.iterdir())
    held = f"only {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" if names else "an empty directory"
    return f"{held}: name a directory with model.safetensors in it."


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digest.update(memoryview(buffer)[:got])
    return digest.hexdigest()


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A file to write: its name, header and size, and where each tensor goes (its offset in the file and its bytes)."""

    name: str
    header: bytes
    size: int
    slots: dict[str, tuple[int, int]]


Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def shards_of(groups: Iterable[Shapes], shard_bytes: int) -> list[Shard]:
    """Lay tensors out in files.

    Args:
        groups: shapes and dtypes by name; a group is kept together in one file (the parts of a quantized tensor).
        shard_bytes: a file grows no larger than this, unless one group alone does.
    """
    files: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    filled = 0
    for group in groups:
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in group.values())
        if files[-1] and filled + size > shard_bytes:
            files.append({})
            filled = 0
        files[-1].update(group)
        filled += size
    total = len(files)
    names = (
        ["model.safetensors"] if total == 1 else [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    )
    return [_shard(name, tensors) for name, tensors in zip(names, files, strict=True)]


def _shard(name: str, tensors: Shapes) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    slots, offset = {}, 0
    # The widest dtypes first, as the reference writer does: then every tensor starts at a multiple of its element's size.
    for key, (shape, dtype) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        if dtype not in NAMES:
            raise CheckpointError(f"{key} has the dtype {dtype}, which safetensors does not hold: cast it first.")
        count = math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + count]}
        slots[key] = (offset, count)
        offset += count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return Shard(
        name=name,
        header=len(text).to_bytes(8, "little") + text,
        size=base + offset,
        slots={key: (base + start, count) for key, (start, count) in slots.items()},
    )


def create(folder: Path, shards: Iterable[Shard]) -> None:
    """Reserve every shard's bytes on the disk and write the headers, so that lack of space is found before the work.

    Raises:
        CheckpointError: not enough space; says how much is wanted.
    """
    shards = list(shards)
    try:
        for shard in shards:
            with open(folder / shard.name, "wb") as file:
                _reserve(file.fileno(), shard.size)
                file.write(shard.header)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        for shard in shards:
            (folder / shard.name).unlink(missing_ok=True)
        total, free = sum(shard.size for shard in shards), shutil.disk_usage(folder).free
        raise CheckpointError(
            f"{folder.parent} wants {total / 1e9:.3f} GB of space, got {free / 1e9:.3f} GB free: "
            "free some, or write to another disk."
        ) from None


def _reserve(descriptor: int, size: int) -> None:
    reserve = getattr(os, "posix_fallocate", None)
    try:
        if reserve is not None:
            reserve(descriptor, 0, size)
            return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    os.ftruncate(descriptor, size)


def sync(path: Path) -> None:
    """Make a file's or directory's bytes durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pieces(count: int, step: int) -> Iterator[tuple[int, int]]:
    """[0, count) in steps.

    >>> list(pieces(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    for start in range(0, count, step):
        yield start, min(start + step, count)
