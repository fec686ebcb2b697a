"""The affine primitives as operators of torch, under torchao's names and schemas: what exporters look for by name.

Defined while the redirect stands, for ExecuTorch names them when it is imported; never otherwise, because a real torchao that is
imported later defines them itself and may not find them taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import affine
from .words import MappingType

_RANGE = "Scalar? quant_min=None, Scalar? quant_max=None"
SCHEMAS = {
    "choose_qparams_affine": f"(Tensor? input, str mapping_type, SymInt[] block_size, ScalarType target_dtype, {_RANGE}, "
    "float? eps=None, ScalarType? scale_dtype=None, ScalarType? zero_point_dtype=None, bool keepdim=False) -> (Tensor, Tensor)",
    "quantize_affine": "(Tensor input, SymInt[] block_size, Tensor scale, Tensor? zero_point, ScalarType output_dtype, "
    f"{_RANGE}) -> Tensor",
    "dequantize_affine": "(Tensor input, SymInt[] block_size, Tensor scale, Tensor? zero_point, ScalarType input_dtype, "
    f"{_RANGE}, ScalarType output_dtype=6) -> Tensor",
}


def _choose(
    x: Tensor,
    mapping_type: str,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: affine.Bound = None,
    quant_max: affine.Bound = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:
    mapping = MappingType[mapping_type]
    bounds = (quant_min, quant_max, eps, scale_dtype, zero_point_dtype or torch.int32, keepdim)
    return affine.choose_qparams_affine(x, mapping, block_size, target_dtype, *bounds)


def _dequantize(
    codes: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    input_dtype: torch.dtype,
    quant_min: affine.Bound = None,
    quant_max: affine.Bound = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    return affine.affine_values(codes, block_size, scale, zero_point, output_dtype)


_RUN = {"choose_qparams_affine": _choose, "quantize_affine": affine.quantize_affine, "dequantize_affine": _dequantize}
_LIBRARY: list[torch.library.Library] = []


def define() -> None:
    """Define the operators, if nobody has."""
    if _LIBRARY or torch._C._dispatch_has_kernel("torchao::quantize_affine"):
        return
    library = torch.library.Library("torchao", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, _RUN[name], "CompositeExplicitAutograd")
    _LIBRARY.append(library)


def undefine() -> None:
    """Take them back, as the redirect is taken back."""
    for library in _LIBRARY:
        library._destroy()
    _LIBRARY.clear()
