"""Checkpoints in torchao's form: a state dict of tensors, and one JSON text for each tensor of a class of ours.

    tensors      "layers.0._weight_qdata", "layers.0._weight_scale" ...      the module, "_", the parameter, "_", the part
    metadata     "layers.0.weight": {"_type": "Int8Tensor", "_data": {attributes}, "_tensor_data_names": [parts]}
                 "layers.0.bias":   {"_type": "Tensor"}
                 "tensor_names":    the names above, in order

The real torchao reads what is written here and the other way round, bit for bit. It knows eight classes: int4 weights whose bytes
it would have shuffled for one device are written as Int4Tensor, which holds the same numbers.

Unlike there a parameter of the model itself, without a module, is written too ("_weight_qdata").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, MisfitError
from ..tensor import QTensor
from .apply import TENSORS, in_best_layout
from .config import from_plain, plain
from .views import View

READABLE = (
    "Float8Tensor", "Int4Tensor", "Int4TilePackedTo4dTensor", "IntxUnpackedToInt8Tensor", "Int8Tensor", "Int4PlainInt32Tensor",
    "MXTensor", "NVFP4Tensor",
)  # fmt: skip
_AS_INT4 = ("Int4PreshuffledTensor", "Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "Int4OpaqueTensor")


# -- write ----------------------------------------------------------------------------------------------------------------


def flatten_tensor_state_dict(tensors_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict as plain tensors and the metadata that says how to put them together.

    Args:
        tensors_dict: name -> tensor, quantized or plain.

    Raises:
        MisfitError: a class that the form does not have (NF4): save it with lowp.save.

    >>> flatten_tensor_state_dict({"bias": torch.zeros(2)})[1]["tensor_names"]
    '["bias"]'
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    written: set[int] = set()
    for name, tensor in tensors_dict.items():
        held = tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor
        if not isinstance(held, QTensor):
            tensors[name], metadata[name] = held, json.dumps({"_type": "Tensor"})
            continue
        view = _readable(name, held)
        parts = _parts(view)
        for part, value in parts.items():
            value = value.contiguous()
            # Tied weights are written twice: hosts know that weights are tied, not what each was taken apart into.
            tensors[_part_name(name, part)] = value.clone() if value.data_ptr() in written else value
            written.add(value.data_ptr())
        attributes = (*view.optional_tensor_attribute_names, *view.tensor_attribute_names)
        data = {key: plain(getattr(view, key), versions=False) for key in attributes if key != "shape"}
        if "shape" in attributes:
            data["shape"] = list(view.spec.shape)
        entry = {"_type": type(view).__name__, "_data": data, "_tensor_data_names": list(parts)}
        metadata[name] = json.dumps(entry)
    metadata["tensor_names"] = json.dumps(list(tensors_dict))
    return tensors, metadata


def _readable(name: str, held: QTensor) -> View:
    kind = type(held).__name__
    if held.transposed or held.is_lazy_view or not isinstance(held, View) or kind not in (*READABLE, *_AS_INT4):
        raise MisfitError(f"{name}: torchao's form has no place for {held!r}: save the model with lowp.save.")
    if kind == "IntxUnpackedToInt8Tensor" and not _said_by_intx(held):
        raise MisfitError(f"{name}: torchao's form has no word for {held.scheme}: save the model with lowp.save.")
    if kind in _AS_INT4:
        return TENSORS["Int4Tensor"].of_qtensor(held)
    return held


def _said_by_intx(view: QTensor) -> bool:
    """Signed weights, and activations as they are or in asymmetric int8 by tokens: all that torchao's class knows."""
    return view.format.element.signed and str(view.spec.act) in ("None", "int8/row+int8")


def _parts(view: View) -> dict[str, Tensor]:
    shown = view.torchao_tensors()
    order = (*view.optional_tensor_data_names, *view.tensor_data_names)
    return {part: shown[part] for part in order if part in shown}


def _part_name(name: str, part: str) -> str:
    module, dot, parameter = name.rpartition(".")
    return f"{module}{dot}_{parameter}_{part}"


# -- read -----------------------------------------------------------------------------------------------------------------


def unflatten_tensor_state_dict(
    tensors_data_dict: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inverse of `flatten_tensor_state_dict`.

    Args:
        tensors_data_dict: plain tensors by name, all or a part. metadata: as written, all of it.

    Returns:
        The tensors that are whole, and what is left over: parts of others, and names that the metadata does not have.

    Raises:
        CheckpointError: metadata of another form, or of a class that is not known.
    """
    if "tensor_names" not in metadata:
        raise CheckpointError("the metadata wants the key tensor_names, got none: it is not torchao's form.")
    found: dict[str, Tensor] = {}
    left = dict(tensors_data_dict)
    for name in json.loads(metadata["tensor_names"]):
        entry = _entry(name, metadata)
        if entry["_type"] == "Tensor":
            if name in left:
                found[name] = left.pop(name)
            continue
        names = {part: _part_name(name, part) for part in entry["_tensor_data_names"]}
        if all(stored in left for stored in names.values()):
            given = {part: left.pop(stored) for part, stored in names.items()}
            found[name] = _built(name, entry, given)
    return found, left


def _entry(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        entry = json.loads(metadata[name])
        return {"_type": str(entry["_type"]), **entry}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the metadata wants JSON with a _type for {name}, got {error}: copy the file again."
        ) from None


def _built(name: str, entry: Mapping[str, Any], given: dict[str, Tensor]) -> Tensor:
    if entry["_type"] not in READABLE:
        raise CheckpointError(
            f"{name} is a {entry['_type']}, which is none of {', '.join(READABLE)}: convert it with torchao."
        )
    kind = TENSORS[entry["_type"]]
    # Views of a mapped file lie anywhere; CPU kernels are fastest, and torch's some only run, on whole vectors.
    given = {part: tensor.clone() if _lies_askew(tensor) else tensor for part, tensor in given.items()}
    attributes = {key: from_plain(value) for key, value in entry.get("_data", {}).items()}
    return in_best_layout(kind(**{key: value for key, value in (given | attributes).items() if key in kind._arguments}))


def _lies_askew(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor) is Tensor and tensor.data_ptr() % 64 != 0


def is_metadata_torchao(metadata: Mapping[str, Any]) -> bool:
    """Whether metadata is of this form: it names its tensors, and each has an entry of a known class."""
    if "tensor_names" not in metadata:
        return False
    try:
        entries = [_entry(name, metadata) for name in json.loads(metadata["tensor_names"])]
    except (CheckpointError, TypeError, ValueError):
        return False
    return bool(entries) and all(entry["_type"] in (*READABLE, "Tensor") for entry in entries)
