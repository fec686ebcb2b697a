"""compressed-tensors: the form of quantized checkpoints that vLLM, SGLang and transformers load without us.

    save(model, directory)       safetensors and a config.json with quant_method "compressed-tensors"
    load(directory, model)       such a directory, whoever wrote it, as a model with our weights

For each linear layer NAME, by the format of its weight:

    intN, by groups or rows          pack-quantized         weight_packed int32 (N, K * bits / 32), weight_scale, weight_shape
      with an integer zero point                            weight_zero_point int32 (N * bits / 32, G), packed down the rows
    intN with int8 activations       int-quantized          weight int8 (N, K), weight_scale
    e4m3                             float-quantized        weight e4m3, weight_scale (N, 1), (1,) or (N / 128, K / 128)
    e2m1/1x16*e4m3[/tensor]          nvfp4-pack-quantized   weight_packed uint8 (N, K / 2), weight_scale e4m3, weight_global_scale
    e2m1/1x32*e8m0                   mxfp4-pack-quantized   weight_packed uint8 (N, K / 2), weight_scale uint8

Integers are stored with an offset of half their range, densely: element i of a row is bits i * n onward, lowest first. Two float4
share a byte, the even one in the low nibble. NVFP4's global scale divides: 448 * 6 / amax where ours is amax / (448 * 6).

Source: github.com/neuralmagic/compressed-tensors, what its compressors read; `tests/guest` compares with the package itself.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, MisfitError
from ..numerics import ELEMENTS, Format, Parts, Scheme
from ..numerics.bits import pack_bits, unpack_bits
from ..quantize.shards import check_directory, read_json
from ..tensor import QTensor

METHOD = "compressed-tensors"
_ROWS = 1024  # how many rows are packed at once: their bits take a byte each


# -- integers in words of 32 bits ----------------------------------------------------------------------------------------------


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Signed integers (R, C) as int32 words (R, ceil(C * bits / 32)).

    >>> pack_words(torch.tensor([[-8, 7, 0, 1]]), 4)
    tensor([[39152]], dtype=torch.int32)
    """
    rows, columns = values.shape
    words = -(-columns * bits // 32)
    out = torch.empty(rows, words, dtype=torch.int32, device=values.device)
    shifts = torch.arange(bits, device=values.device)
    powers = 2 ** torch.arange(8, device=values.device, dtype=torch.int32)
    for start in range(0, rows, _ROWS):
        codes = values[start : start + _ROWS].to(torch.int32) + (1 << bits - 1)
        flat = ((codes[..., None] >> shifts) & 1).to(torch.uint8).flatten(1)
        flat = torch.nn.functional.pad(flat, (0, words * 32 - flat.shape[1]))
        octets = (flat.view(len(codes), -1, 8) * powers.to(torch.uint8)).sum(-1, dtype=torch.int32).to(torch.uint8)
        out[start : start + _ROWS] = octets.contiguous().view(torch.int32)
    return out


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_words`: int8 (R, columns)."""
    octets = words.contiguous().view(torch.uint8)
    out = torch.empty(len(words), columns, dtype=torch.int8, device=words.device)
    eight = torch.arange(8, device=words.device, dtype=torch.uint8)
    powers = 2 ** torch.arange(bits, device=words.device, dtype=torch.int32)
    for start in range(0, len(words), _ROWS):
        flat = ((octets[start : start + _ROWS, :, None] >> eight) & 1).flatten(1)[:, : columns * bits]
        codes = (flat.view(len(flat), columns, bits).to(torch.int32) * powers).sum(-1)
        out[start : start + _ROWS] = (codes - (1 << bits - 1)).to(torch.int8)
    return out


# -- one weight ------------------------------------------------------------------------------------------------------------------


def _integer_bits(fmt: Format) -> int | None:
    name = fmt.element.name
    return int(name.removeprefix("u").removeprefix("int")) if "int" in name else None


def _blocks(fmt: Format, dynamic: bool = False) -> dict[str, Any]:
    """How the library calls what shares a scale."""
    if fmt.block == "tensor":
        return {"strategy": "tensor"}
    if fmt.block == "row":
        return {"strategy": "token" if dynamic else "channel"}
    rows, columns = (int(size) for size in fmt.block.split("x"))
    if rows == 1:
        return {"strategy": "group", "group_size": columns}
    return {"strategy": "block", "block_structure": [rows, columns]}


def _argument(fmt: Format, dynamic: bool = False) -> dict[str, Any]:
    """The library's description of a format."""
    bits = _integer_bits(fmt)
    said: dict[str, Any] = {
        "num_bits": bits or fmt.element.bits,
        "type": "int" if bits else "float",
        "symmetric": not fmt.zero_point,
        "dynamic": dynamic,
        **_blocks(fmt, dynamic),
    }
    if fmt.nested is not None or fmt.scale == "e4m3":
        said["strategy"] = "tensor_group"
    if fmt.element.bits == 4 and not bits:
        said["scale_dtype"] = "torch.uint8" if fmt.scale == "e8m0" else "torch.float8_e4m3fn"
    return said


def layout_of(scheme: Scheme) -> str:
    """The library's name of how a scheme is stored.

    Raises:
        MisfitError: it has none.

    >>> layout_of(Scheme.parse("int4/1x128*bf16"))
    'pack-quantized'
    """
    fmt, act = scheme.weight, scheme.act
    bits = _integer_bits(fmt)
    whole = not fmt.zero_point or fmt.zero_point in ("int8", "uint8")
    if bits and bits <= 8 and whole and fmt.nested is None and fmt.scale != "e8m0":
        if act is None:
            return "pack-quantized"
        if _integer_bits(act) == 8 and not fmt.zero_point:
            return "int-quantized"
    floats = act is None or act.element.name == "e4m3"
    if (
        fmt.element.name == "e4m3"
        and floats
        and not fmt.zero_point
        and fmt.nested is None
        and fmt.scale in ("fp32", "bf16")
    ):
        return "float-quantized"
    if fmt.element.name == "e2m1" and act is None and fmt.block == "1x16" and fmt.nested is not None:
        return "nvfp4-pack-quantized"
    if fmt.element.name == "e2m1" and act is None and fmt.block == "1x32" and fmt.scale == "e8m0":
        return "mxfp4-pack-quantized"
    raise MisfitError(
        f"compressed-tensors has no form for {scheme}: use int1 to int8, symmetric or with an integer zero point, e4m3, "
        "e2m1/1x16*e4m3/tensor or e2m1/1x32*e8m0, or save the model with lowp.save."
    )


def compress(weight: QTensor) -> dict[str, Tensor]:
    """The tensors of one linear layer, by the names that follow the layer's."""
    scheme = Scheme.parse(weight.scheme)
    form, fmt, parts = layout_of(scheme), scheme.weight, weight.parts()
    assert parts.scale is not None
    scale = parts.scale
    made: dict[str, Tensor] = {"weight_scale": scale.reshape(1) if fmt.block == "tensor" else scale}
    if form == "pack-quantized":
        bits, shift = _signed(fmt)
        made["weight_packed"] = pack_words(parts.qdata.to(torch.int32) - shift, bits)
        made["weight_shape"] = torch.tensor(parts.qdata.shape, dtype=torch.int64)
        if parts.zero_point is not None:
            zero = parts.zero_point.to(torch.int32) - shift
            if int(zero.min()) < -(1 << bits - 1) or int(zero.max()) >= 1 << bits - 1:
                raise MisfitError(f"a zero point outside of {bits} bits is not stored: quantize with uint{bits} codes.")
            made["weight_zero_point"] = pack_words(zero.mT, bits).mT.contiguous()
    elif form in ("int-quantized", "float-quantized"):
        made["weight"] = parts.qdata
    else:
        made["weight_packed"] = pack_bits(ELEMENTS["e2m1"].to_codes(parts.qdata), 4)
        made["weight_scale"] = scale.view(torch.uint8) if form.startswith("mx") else scale
        if parts.scale_scale is not None:
            made["weight_global_scale"] = parts.scale_scale.reshape(-1)[:1].float().reciprocal()
    if parts.act_scale is not None:
        made["input_scale"] = parts.act_scale.reshape(1)
    if parts.act_rotation is not None:
        raise MisfitError(
            "compressed-tensors is not written with a rotation of the activation: use rotate, not quarot."
        )
    if parts.act_pre_scale is not None:
        raise MisfitError("compressed-tensors has no scale before the activation: fold it into the layer before it.")
    return {name: tensor.contiguous() for name, tensor in made.items()}


def _signed(fmt: Format) -> tuple[int, int]:
    """Bits, and what is taken off codes so that they are signed."""
    bits = _integer_bits(fmt)
    assert bits is not None
    return bits, 1 << bits - 1 if fmt.element.name.startswith("u") else 0


def decompress(tensors: Mapping[str, Tensor], group: Mapping[str, Any], dtype: torch.dtype) -> QTensor:
    """A weight from the tensors of its layer and the entry of config_groups that names it."""
    scheme = scheme_of(group, tensors)
    fmt, scale = scheme.weight, tensors["weight_scale"]
    bits = _integer_bits(fmt)
    zero = outer = None
    if bits and "weight_packed" in tensors:
        rows, columns = (int(size) for size in tensors["weight_shape"])
        qdata = unpack_words(tensors["weight_packed"], bits, columns)
        if fmt.zero_point:
            zero = unpack_words(tensors["weight_zero_point"].mT, bits, rows).mT.contiguous()
    elif "weight_packed" in tensors:
        packed = tensors["weight_packed"]
        qdata = ELEMENTS["e2m1"].from_codes(unpack_bits(packed, 4, packed.shape[-1] * 2))
        scale = scale.view(torch.float8_e8m0fnu) if fmt.scale == "e8m0" else scale
        if fmt.nested is not None:
            outer = tensors["weight_global_scale"].float().reciprocal()
            outer = outer.reshape(()).expand(fmt.nested.scale_shape(tuple(scale.shape))).contiguous()
    else:
        qdata = tensors["weight"]
    act_scale = (
        tensors["input_scale"].float().reshape(()) if "input_scale" in tensors and scheme.act is not None else None
    )
    scale = scale.reshape(fmt.scale_shape(tuple(qdata.shape)))
    parts = Parts(qdata=qdata, scale=scale, zero_point=zero, scale_scale=outer, act_scale=act_scale)
    return QTensor.from_parts(parts, str(scheme), dtype=dtype)


_SCALES = {torch.float32: "", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def scheme_of(group: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Scheme:
    """Our scheme for an entry of config_groups.

    Raises:
        CheckpointError: something that we have no scheme for, such as an activation order.
    """
    weights, inputs = group["weights"], group.get("input_activations")
    if weights.get("actorder") or "weight_g_idx" in tensors:
        raise CheckpointError("columns in an order of their own (actorder) are not read: quantize without it.")
    if weights["type"] == "float" and weights["num_bits"] == 4:
        if weights.get("group_size") == 32:
            return Scheme.parse("e2m1/1x32*e8m0")
        return Scheme.parse(f"e2m1/1x16*e4m3{'/tensor' if 'weight_global_scale' in tensors else ''}")
    scale = _SCALES.get(tensors["weight_scale"].dtype)
    if scale is None:
        raise CheckpointError(f"scales of {tensors['weight_scale'].dtype} are not read here.")
    tail = (
        ""
        if inputs is None
        else f"@{_element(inputs)}/{_block(inputs)}{'' if inputs.get('symmetric', True) else '+int8'}"
    )
    zero = "" if weights.get("symmetric", True) else "+int8"
    return Scheme.parse(f"{_element(weights)}/{_block(weights)}{scale}{zero}{tail}")


def _element(said: Mapping[str, Any]) -> str:
    bits = int(said["num_bits"])
    if said["type"] == "float" and bits != 8:
        raise CheckpointError(f"floats of {bits} bits are not read here.")
    return "e4m3" if said["type"] == "float" else f"int{bits}"


def _block(said: Mapping[str, Any]) -> str:
    strategy = said.get("strategy") or ("group" if said.get("group_size", -1) > 0 else "tensor")
    if strategy == "group":
        return f"1x{said['group_size']}"
    if strategy == "block":
        return "x".join(str(size) for size in said["block_structure"])
    return "tensor" if strategy == "tensor" else "row"


# -- a model ---------------------------------------------------------------------------------------------------------------------


def state_and_config(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a model and its "quantization_config".

    Raises:
        MisfitError: a weight that no linear layer has, a scheme without a form.
    """
    groups: dict[str, list[str]] = {}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not isinstance(tensor, QTensor)}
    kept: list[str] = []
    for name, module in model.named_modules():
        for parameter, weight in module.named_parameters(recurse=False):
            if isinstance(weight, QTensor):
                if not isinstance(module, nn.Linear) or parameter != "weight":
                    raise MisfitError(
                        f"compressed-tensors holds linear layers alone, got {name}.{parameter} in {weight.scheme}: give it a "
                        "rule None (a tied embedding follows its lm_head), or lowp.dequantize_ the model first."
                    )
                groups.setdefault(weight.scheme, []).append(name)
                tensors |= {f"{name}.{part}": tensor for part, tensor in compress(weight.detach()).items()}
        if isinstance(module, nn.Linear) and not isinstance(module.weight, QTensor):
            kept.append(name)
    if not groups:
        raise MisfitError("no layer of this model is quantized: lowp.quantize_ it first.")
    entries = {f"group_{i}": _entry(scheme, names, len(groups)) for i, (scheme, names) in enumerate(groups.items())}
    forms = {entry["format"] for entry in entries.values()}
    config = {
        "quant_method": METHOD,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": kept,
        "kv_cache_scheme": None,
        "config_groups": entries,
    }
    return tensors, config


def _entry(spelling: str, names: list[str], groups: int) -> dict[str, Any]:
    scheme = Scheme.parse(spelling)
    return {
        "targets": ["Linear"] if groups == 1 else names,
        "weights": _argument(scheme.weight),
        "input_activations": None if scheme.act is None else _argument(scheme.act, dynamic=True),
        "output_activations": None,
        "format": layout_of(scheme),
    }


def save(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a quantized model for other people's loaders: model.safetensors, config.json, generation_config.json.

    Args:
        model: with weights that `lowp.quantize_` made; one of transformers' brings the rest of config.json. directory: new, or
        empty; it appears whole or not at all.

    Raises:
        MisfitError: a scheme without a form there. CheckpointError: the directory holds something.
    """
    from safetensors.torch import save_file

    target = Path(directory)
    if target.exists() and any(target.iterdir()):
        raise CheckpointError(f"wants a directory that is new or empty, got {target}: name another.")
    tensors, quantization = state_and_config(model)
    told = getattr(model, "config", None)
    described = json.loads(told.to_json_string(use_diff=False)) if hasattr(told, "to_json_string") else {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as made:
        inside = Path(made) / "out"
        inside.mkdir()
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if name not in tied}
        save_file(whole, inside / "model.safetensors", metadata={"format": "pt"})
        (inside / "config.json").write_text(
            json.dumps({**described, "quantization_config": quantization}, indent=2) + "\n"
        )
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(inside)  # type: ignore[union-attr, operator]
        if target.exists():
            target.rmdir()
        shutil.move(str(inside), str(target))
    return target


def load(
    directory: str | os.PathLike[str], model: nn.Module | None = None, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """A model from a directory in this form.

    Args:
        model: of the same architecture, in floats; absent, transformers builds it. dtype: that weights stand for.

    Raises:
        CheckpointError: another form, missing or strange tensors.
    """
    from safetensors.torch import load_file

    folder = check_directory(directory)
    described = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    quantization = described.get("quantization_config") or {}
    if quantization.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder} wants a quantization_config of compressed-tensors, got {quantization.get('quant_method')!r}."
        )
    model = _built(folder) if model is None else model
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)
    taken = set()
    for name, module in list(model.named_modules()):
        own = {
            key.removeprefix(f"{name}."): key
            for key in stored
            if key.startswith(f"{name}.") and "." not in key[len(name) + 1 :]
        }
        if "weight_scale" not in own:
            continue
        group = _group_of(name, module, quantization["config_groups"])
        parts = {part: stored[key] for part, key in own.items() if part != "bias"}
        floats = dtype or next((p.dtype for p in module.parameters(recurse=False)), torch.bfloat16)
        module.weight = nn.Parameter(decompress(parts, group, floats), requires_grad=False)
        taken |= {key for part, key in own.items() if part != "bias"}
    rest = {name: tensor for name, tensor in stored.items() if name not in taken}
    found = model.load_state_dict(rest, strict=False)
    quantized = {name for name, p in model.named_parameters() if isinstance(p, QTensor)}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [name for name in found.missing_keys if name not in quantized and name not in tied]
    if missing or found.unexpected_keys:
        raise CheckpointError(
            f"{folder} and the model differ: missing {missing[:3]}, unknown {found.unexpected_keys[:3]}."
        )
    return model.eval()


def _group_of(name: str, module: nn.Module, groups: Mapping[str, Any]) -> Mapping[str, Any]:
    import re

    for group in groups.values():
        for target in group["targets"]:
            pattern = target.removeprefix("re:")
            if target in (name, type(module).__name__) or (target.startswith("re:") and re.match(pattern, name)):
                return group
    raise CheckpointError(f"{name} has scales, but no entry of config_groups names it.")


def _built(folder: Path) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])
    model: nn.Module = kind(config) if not kind.__name__.startswith("Auto") else kind.from_config(config)
    return model.to(config.dtype) if config.dtype is not None else model
