"""Hugging Face transformers: build a model without its weights, and say which stored tensor each of its tensors comes from.

    empty_model(directory)          parameters on the meta device, buffers that no checkpoint holds with their numbers
    sources(model, stored)          name in the model -> where it lies in the files
    tokenizer(directory)
    LowpConfig(rules)               for from_pretrained(..., quantization_config=...); see `quantizer.py`

Since version 5 a model's names may differ from its checkpoint's: experts that are stored one by one are one tensor (E, N, K) in
the model. transformers' own conversion table says which; of it, renaming, stacking and concatenating by rows are followed here.
Anything else is an error that names the tensor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, LowpError, QuantizedError
from ..quantize.checkpoint import check_floats, is_ours, load_into
from ..quantize.shards import Stored, check_directory, read_json
from ..quantize.stream import Source


def _library() -> Any:
    try:
        import accelerate  # noqa: F401
        import transformers
    except ImportError as error:
        raise LowpError(f"Hugging Face models want the package {error.name}: pip install 'lowp[hf]'.") from None
    return transformers


def __getattr__(name: str) -> Any:
    if name == "LowpConfig":
        _library()
        from .quantizer import classes

        return classes()[0]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def configuration(directory: str | os.PathLike[str]) -> Any:
    """The configuration in a checkpoint's directory.

    Raises:
        CheckpointError: no config.json, or an architecture that the installed transformers does not know.
    """
    folder = check_directory(directory)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} wants a config.json that says which model it is, got none: copy it from the original."
        )
    given = read_json(folder / "config.json")
    if not isinstance(given, dict):
        raise CheckpointError(
            f"{folder / 'config.json'} wants a JSON object, got {type(given).__name__}: copy it again."
        )
    foreign = given.get("quantization_config")
    if foreign and not is_ours(folder):
        how = foreign.get("quant_method", "another library") if isinstance(foreign, dict) else "another library"
        raise QuantizedError(
            f"{folder} is quantized already (by {how}): name the checkpoint in floats that it was made from."
        )
    try:
        return _library().AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} wants a model that transformers knows, got {given.get('model_type')!r} "
            f"({str(error).splitlines()[0]}): install the version that brings it."
        ) from None


def empty_model(directory: str | os.PathLike[str]) -> nn.Module:
    """A model of the architecture in config.json: parameters on the meta device, other buffers computed, weights tied.

    Raises:
        CheckpointError: no config.json, or no such architecture in transformers.
    """
    transformers, config = _library(), configuration(directory)
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    names = list(getattr(config, "architectures", None) or ())
    known = [name for name in names if hasattr(transformers, name)]
    if not known:
        raise CheckpointError(
            f"{Path(directory) / 'config.json'} wants an architecture that transformers has, got {names}: "
            "write the class of the model there, such as LlamaForCausalLM."
        )
    with init_empty_weights(include_buffers=False), no_init_weights():
        model: nn.Module = getattr(transformers, known[0])._from_config(config)
    model.tie_weights()
    if getattr(model, "can_generate", lambda: False)() and (Path(directory) / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(directory), local_files_only=True)
    return model.eval()


def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> nn.Module:
    """The model of a directory, from a checkpoint of ours or from one in floats.

    Args:
        directory: config.json and safetensors. device: where it goes. dtype: of floats; absent, as stored.
        verify: compare every file with its SHA-256, where it is known.
    """
    if is_ours(directory):
        return load_into(empty_model(directory), directory, device=device, dtype=dtype, verify=verify).eval()
    configuration(directory)
    from ..quantize.shards import read_directory

    read_directory(directory)  # a damaged file is found here, with a sentence
    kind = type(empty_model(directory))
    return kind.from_pretrained(str(directory), local_files_only=True, dtype=dtype or "auto").to(device).eval()


def tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The tokenizer in a checkpoint's directory.

    Raises:
        CheckpointError: there is none, or no checkpoint.
    """
    configuration(directory)  # a directory that is missing or no checkpoint is named as such
    try:
        return _library().AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} wants tokenizer files, got none that transformers can read ({str(error).splitlines()[0]}): "
            "copy tokenizer.json and tokenizer_config.json from the original."
        ) from None


# -- names in the model and names in the files ------------------------------------------------------------------------


def sources(model: Any, stored: Mapping[str, Stored]) -> tuple[dict[str, Source], dict[str, str], list[str]]:
    """Where each tensor of a model's state lies in the files.

    Args:
        model: from `empty_model`; its tensors get the dtypes of the files. stored: every tensor in the files.

    Returns:
        name -> Source, tied ones once and in the model's order; further name -> name; stored names that the model does not have.

    Raises:
        CheckpointError: a tensor of the model that the files lack, or of another shape there.
    """
    own = dict(model.state_dict(keep_vars=True))
    pieces = _pieces(model, stored, own)
    first: dict[int, str] = {}
    for name, tensor in own.items():
        first.setdefault(id(tensor), name)
    tied = {name: first[id(tensor)] for name, tensor in own.items() if first[id(tensor)] != name}
    found: dict[str, Source] = {}
    missing = []
    for name in first.values():
        given = next((pieces[n] for n in (name, *(k for k, v in tied.items() if v == name)) if n in pieces), None)
        if given is None:
            missing.append(name)
            continue
        found[name] = _source(name, tuple(own[name].shape), given)
    if missing:
        raise CheckpointError(
            f"the files want {missing[0]}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''} for "
            f"{type(model).__name__}, got none: config.json and the weights do not belong together."
        )
    taken = {piece.name for source in found.values() for piece in source.pieces}
    spare = {piece.name for name in tied for piece in pieces.get(name, ())}
    _take_dtypes(model, found, tied)
    return found, tied, [name for name in stored if name not in taken | spare]


def _source(name: str, shape: tuple[int, ...], pieces: tuple[Stored, ...]) -> Source:
    one = len(pieces) == 1 and pieces[0].shape == shape
    rows = sum(piece.rows for piece in pieces)
    stacked = len(shape) == 3 and rows == shape[0] * shape[1] and all(p.shape[1:] == shape[2:] for p in pieces)
    joined = len(shape) >= 1 and rows == shape[0] and all(p.shape[1:] == shape[1:] for p in pieces)
    if not (one or stacked or joined):
        got = ", ".join(str(piece.shape) for piece in pieces[:3])
        raise CheckpointError(
            f"{name} wants the shape {shape}, got {got} in the files: config.json and the weights do not belong together."
        )
    if len({piece.dtype for piece in pieces}) > 1:
        raise CheckpointError(
            f"{name} wants one dtype, got {', '.join(sorted({str(p.dtype) for p in pieces}))}: save the model in one."
        )
    return Source(shape=shape, pieces=pieces)


def _take_dtypes(model: nn.Module, found: Mapping[str, Source], tied: Mapping[str, str]) -> None:
    """Give the parameters on the meta device the dtypes that the files have, so that a plan sees what will be read."""
    made: dict[str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        other = tied.get(name, name)
        if other not in made:
            source = found[other]
            if parameter.is_floating_point():
                check_floats(other, source.pieces[0])
            tensor = torch.empty(source.shape, dtype=source.dtype, device="meta")
            made[other] = nn.Parameter(tensor, requires_grad=False)
        module_name, _, last = name.rpartition(".")
        model.get_submodule(module_name)._parameters[last] = made[other]


def _pieces(model: Any, stored: Mapping[str, Stored], own: Mapping[str, Any]) -> dict[str, tuple[Stored, ...]]:
    """The stored tensors of each name in the model, in the order of the rows."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    table = get_model_conversion_mapping(model)
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in table if not isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    grouped: dict[str, dict[str, list[Stored]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        if name in own:
            grouped.setdefault(name, {}).setdefault("", []).append(stored[name])
            continue
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if renamed in own:
            grouped.setdefault(renamed, {}).setdefault(pattern or "", []).append(stored[name])
    return {name: _in_order(name, by_source, by_pattern) for name, by_source in grouped.items()}


def _in_order(name: str, by_source: Mapping[str, list[Stored]], by_pattern: Mapping[str, Any]) -> tuple[Stored, ...]:
    """The pieces in the order of the model's rows: for each expert, one of each source (gate, then up)."""
    if set(by_source) == {""}:
        return tuple(by_source[""])
    converter = by_pattern[next(pattern for pattern in by_source if pattern)]
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    columns = [by_source[pattern] for pattern in converter.source_patterns if pattern in by_source]
    if operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return tuple(piece for experts in zip(*columns, strict=True) for piece in experts)
    if operations == [("Concatenate", 0)]:
        return tuple(piece for column in columns for piece in column)
    raise CheckpointError(
        f"{name} is stored in another form ({', '.join(kind for kind, _ in operations)}), which "
        "cannot be followed tensor by tensor: load the model with transformers and use lowp.quantize_ and lowp.save."
    )
