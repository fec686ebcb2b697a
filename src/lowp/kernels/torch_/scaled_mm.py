"""float8 x float8 on tensor cores: `torch._scaled_mm`.

    y_MN = (x_q * x_scale) @ (w_q * w_scale).T + bias        scales for the tensor or for each row, multiplied after the sum;
                                                             or for each 128 columns, multiplied as the sum goes (DeepSeek)

The tensor cores sum float8 products in fewer bits than float32 has, so a float32 result would promise more than it holds:
float32 activations are left to other kernels. By row torch writes bfloat16 only.

The scale follows the decoding convention of `numerics`: value = qdata * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layouts import Spec
from ...layouts.base import Packed
from ...numerics import Format, Parts
from ...ops.how import native
from ...ops.linear import quantized_input
from ...ops.registry import Case, Kernel

_PAIRS = {
    ("e4m3/row", "e4m3/row"),
    ("e4m3/tensor", "e4m3/tensor"),
    ("e4m3/tensor", "e5m2/tensor"),
    ("e5m2/tensor", "e4m3/tensor"),
    ("e4m3/128x128", "e4m3/1x128"),
}


def _why_not(case: Case) -> str:
    weight, act = case.weight, case.act
    if act is None or (str(weight), str(act)) not in _PAIRS:
        return f"wants float8 by row (e4m3), by tensor, or e4m3/128x128@e4m3/1x128, got {case.scheme}"
    if case.device != "cuda":
        return f"wants cuda, got {case.device}"
    wanted = 89 if weight.block == "tensor" else 90
    if case.sm < wanted or (weight.block == "128x128" and case.sm != 90):
        return f"wants sm{wanted}, got sm{case.sm}"
    if (
        weight.block == "128x128" and case.shape[-1] % 512
    ):  # torch's versions differ in how they pad the scales of others
        return f"wants K in multiples of 512 with scales by 128x128, got {case.shape}"
    if len(case.shape) != 2 or any(size % 16 for size in case.shape):
        return f"wants a matrix with N and K in multiples of 16, got {case.shape}"
    dtypes = ("bfloat16", "float16") if weight.block == "tensor" else ("bfloat16",)
    if case.dtype not in dtypes:
        return f"wants {' or '.join(dtypes)} results with scales by {weight.block}, got {case.dtype}"
    return ""


def _run(x_MK: Tensor, packed: Packed, spec: Spec, bias: Tensor | None) -> Tensor:
    parts, x_scale = quantized_input(x_MK, packed, spec)
    if spec.weight.block == "128x128":
        y_MN = scaled_mm_blocks(*_whole_rows(parts.qdata, x_scale), packed["qdata"], packed["scale"])[: x_MK.shape[0]]
        return y_MN if bias is None else y_MN + bias.to(y_MN.dtype)
    return scaled_mm_rows(parts.qdata, x_scale, packed["qdata"], packed["scale"], bias, x_MK.dtype)


def scaled_mm_rows(
    a_MK: Tensor, a_scale: Tensor, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
    fast: bool = True,
) -> Tensor:  # fmt: skip
    """float8 (M, K) times float8 (N, K).T, scales by row, (M, 1) and (N, 1), or by tensor, (1, 1) both -> (M, N) in `dtype`."""
    a_scale, w_scale = a_scale.to(torch.float32), w_scale.to(torch.float32)
    by_row = w_scale.numel() == w_NK.shape[0] != 1 or a_scale.numel() != 1
    if by_row:
        scale_a = a_scale.expand(a_MK.shape[0], 1).contiguous()
        scale_b = w_scale.reshape(1, -1).expand(1, w_NK.shape[0]).contiguous()
    else:
        scale_a, scale_b = a_scale.reshape(()), w_scale.reshape(())
    fused = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(
        a_MK, w_NK.t(), scale_a=scale_a, scale_b=scale_b, bias=fused, out_dtype=dtype, use_fast_accum=fast
    )


def scaled_mm_blocks(a_MK: Tensor, a_scale_MG: Tensor, w_NK: Tensor, w_scale: Tensor) -> Tensor:
    """float8 times float8 with a scale for each 128 columns: torch's blockwise product, sm90 only.

    Args:
        a_MK: e4m3; M in multiples of 16, for cuBLAS wants columns of scales to start at 16 bytes.
        a_scale_MG: (M, K/128) float32, best with strides (1, M): else it is copied. w_NK: e4m3.
        w_scale: (N/128, K/128) for 128x128, K/128 in multiples of 4; or (N, K/128) for 1x128, best with strides (1, N).

    Returns:
        (M, N), bfloat16.
    """
    scale_a = a_scale_MG if a_scale_MG.stride(0) == 1 else a_scale_MG.t().contiguous().t()
    by_row = w_scale.shape[0] == w_NK.shape[0]
    scale_b = w_scale.t().contiguous() if by_row else w_scale.contiguous().t()
    return torch._scaled_mm(a_MK, w_NK.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)


def _why_not_product(case: Case) -> str:
    weight, act = case.weight, case.act
    if act is None or not _codes(weight) or not _codes(act) or weight.element.name == act.element.name == "e5m2":
        return f"wants e4m3 times e4m3 or e5m2, with fp32 or e8m0 scales, got {case.scheme}"
    blocks = {weight.block, act.block}
    if not blocks <= {"row", "tensor"} and (weight.block, act.block) not in (("128x128", "1x128"), ("1x128", "1x128")):
        return f"wants scales by row or tensor, or by 128x128 or 1x128 with 1x128, got {case.scheme}"
    if case.device != "cuda":
        return f"wants cuda, got {case.device}"
    by_blocks = "1x128" in blocks
    wanted = 89 if blocks == {"tensor"} else 90
    if case.sm < wanted or (by_blocks and case.sm != 90):
        return f"wants sm{wanted}, got sm{case.sm}"
    if any(size % 16 for size in case.shape) or (weight.block == "128x128" and case.shape[-1] % 512):
        return f"wants N and K in multiples of 16, and K of 512 with scales by 128x128, got {case.shape}"
    if by_blocks and "e5m2" in (weight.element.name, act.element.name):
        return f"wants e4m3 with scales by blocks, got {case.scheme}"
    return (
        ""
        if case.dtype in ("bfloat16", "float16", "float32")
        else f"wants a float of at most 32 bits, got {case.dtype}"
    )


def _codes(fmt: Format) -> bool:
    return fmt.element.name in ("e4m3", "e5m2") and fmt.scale in ("fp32", "e8m0")


def _run_product(a: Parts, b: Parts, scheme: str, dtype: torch.dtype, fast: bool) -> Tensor:
    assert a.scale is not None and b.scale is not None
    a_scale, b_scale = a.scale.to(torch.float32), b.scale.to(torch.float32)
    if scheme.endswith("/1x128") or "/1x128*" in scheme.partition("@")[2]:
        return scaled_mm_blocks(*_whole_rows(a.qdata, a_scale), b.qdata, b_scale)[: len(a.qdata)].to(dtype)
    whole = a_scale.numel() == b_scale.numel() == 1
    written = dtype if whole else torch.bfloat16  # by row torch writes bfloat16 only
    return scaled_mm_rows(a.qdata, a_scale, b.qdata, b_scale, None, written, fast).to(dtype)


def _whole_rows(a_MK: Tensor, scale_MG: Tensor) -> tuple[Tensor, Tensor]:
    """Rows made up to a multiple of 16, and at least 16: torch takes a scale of one row for one by row."""
    more = -a_MK.shape[0] % 16
    bytes_MK = torch.nn.functional.pad(a_MK.view(torch.uint8), (0, 0, 0, more))
    return bytes_MK.view(a_MK.dtype), torch.nn.functional.pad(scale_MG, (0, 0, 0, more))


KERNELS = (
    Kernel(
        op="linear",
        name="scaled_mm",
        rank=200,
        layout="plain",
        why_not=_why_not,
        run=_run,
        how=lambda case: native(case, "float8 tensor cores by torch._scaled_mm"),
        about="torch._scaled_mm, the activation cast first",
        cases=("e4m3/row@e4m3/row", "e4m3/tensor@e4m3/tensor", "e4m3/128x128@e4m3/1x128"),
    ),
    Kernel(
        op="product",
        name="scaled_mm",
        rank=200,
        layout="",
        why_not=_why_not_product,
        run=_run_product,
        how=lambda case: "native: float8 tensor cores by torch._scaled_mm",
        about="torch._scaled_mm",
        cases=(
            "e4m3/row@e4m3/row",
            "e4m3/row*e8m0@e4m3/row*e8m0",
            "e4m3/tensor@e4m3/tensor",
            "e4m3/tensor@e5m2/tensor",
            "e4m3/tensor@e4m3/row",
            "e4m3/128x128@e4m3/1x128",
            "e4m3/1x128@e4m3/1x128",
        ),
    ),
)
