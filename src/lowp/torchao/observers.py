"""Observers: modules that watch the range of what passes through them, and answer a scale.

Their ranges are buffers, so they travel with state_dict and `.to(...)`; torchao's are lost on the way.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MisfitError
from . import affine
from .groupwise import get_block_size
from .words import Granularity, MappingType, ZeroPointDomain


class AffineQuantizedObserverBase(nn.Module):
    """What an observer knows: how to map, how large a block is, which codes.

    Args:
        mapping_type, target_dtype, granularity, quant_min, quant_max, eps, scale_dtype, zero_point_dtype: of `affine.py`.
    """

    def __init__(
        self,
        mapping_type: MappingType,
        target_dtype: torch.dtype,
        granularity: Granularity,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
        keepdim: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if granularity is None:
            raise MisfitError("an observer wants a granularity such as PerTensor(), got none.")
        self.mapping_type, self.target_dtype, self.granularity = mapping_type, target_dtype, granularity
        self.quant_min, self.quant_max, self.eps = quant_min, quant_max, eps
        self.scale_dtype, self.zero_point_dtype = scale_dtype, zero_point_dtype
        self.preserve_zero, self.zero_point_domain, self.keepdim = preserve_zero, zero_point_domain, keepdim

    @classmethod
    def with_args(cls, *args: Any, **kwargs: Any) -> Any:
        """What makes observers of this kind: call it, with more arguments if need be."""
        return functools.partial(cls, *args, **kwargs)

    def calculate_qparams(self) -> tuple[Tensor, Tensor | None]:
        """The scale and the zero point for what has passed."""
        raise NotImplementedError(f"{type(self).__name__} gives no scale: write its calculate_qparams.")

    def _of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        return affine.choose_qparams_affine_with_min_max(
            low,
            high,
            self.mapping_type,
            [],  # the blocks are reduced already
            self.target_dtype,
            self.quant_min,
            self.quant_max,
            self.eps,
            self.scale_dtype,
            self.zero_point_dtype,
            self.preserve_zero,
            self.zero_point_domain,
        )


class AffineQuantizedMinMaxObserver(AffineQuantizedObserverBase):
    """The smallest and largest value of each block that has passed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("min_val", None)
        self.register_buffer("max_val", None)

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() == 0:
            return input
        block = get_block_size(tuple(input.shape), self.granularity)
        shape, axes = affine.reduction(block, tuple(input.shape))
        blocks = input.detach().reshape(shape)
        low = blocks.amin(dim=axes, keepdim=self.keepdim)
        high = blocks.amax(dim=axes, keepdim=self.keepdim)
        if self.min_val is None:
            self.min_val, self.max_val = low, high
            return input
        if low.shape != self.min_val.shape:
            raise affine.AssertedError(
                f"Can't update existing min_val - shape mismatch, self.min_val:{self.min_val.shape} != min_val:{low.shape}: "
                "an observer wants one number of blocks."
            )
        self.min_val, self.max_val = torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)
        return input

    def calculate_qparams(self) -> tuple[Tensor, Tensor | None]:
        """The scale and the zero point for the range that has passed."""
        if self.min_val is None:
            raise MisfitError("an observer wants to see data before it answers a scale: run the model on some first.")
        return self._of_range(self.min_val, self.max_val)


class AffineQuantizedFixedQParamObserver(AffineQuantizedObserverBase):
    """A scale and a zero point that are given, whatever passes."""

    def __init__(
        self, *args: Any, scale: Tensor | None = None, zero_point: Tensor | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.ones(1) if scale is None else scale)
        self.register_buffer("zero_point", torch.zeros(1) if zero_point is None else zero_point)

    def set_qparams(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Give another scale and zero point."""
        self.scale = scale
        self.zero_point = torch.zeros_like(scale) if zero_point is None else zero_point

    def forward(self, input: Tensor) -> Tensor:
        return input

    def calculate_qparams(self) -> tuple[Tensor, Tensor | None]:
        """What was given."""
        return self.scale, self.zero_point


class AffineQuantizedMSEObserver(AffineQuantizedObserverBase):
    """For each block the part of its range, of `steps` parts, that gives the least squared error.

    Args:
        steps: how many parts are tried. run_once: only the first input is looked at.
    """

    def __init__(self, *args: Any, steps: int = 100, run_once: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps, self.run_once, self.calibrated = steps, run_once, False
        self.register_buffer("min_val", None)
        self.register_buffer("max_val", None)

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() and not (self.run_once and self.calibrated):
            self.min_val, self.max_val = self._search(input.detach())
            self.calibrated = True
        return input

    def _search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        block = get_block_size(tuple(x.shape), self.granularity)
        shape, axes = affine.reduction(block, tuple(x.shape))
        blocks = x.reshape(shape)
        low, high = blocks.amin(dim=axes), blocks.amax(dim=axes)
        best_low, best_high, best = low, high, torch.full_like(low, torch.inf)
        bounds = affine.quant_bounds(self.target_dtype, self.quant_min, self.quant_max)
        for step in range(1, self.steps + 1):
            part = step / self.steps
            scale, zero = self._of_range(low * part, high * part)
            codes = affine.affine_codes(x, block, scale, zero, *bounds)
            values = affine.affine_values(codes, block, scale, zero, x.dtype)
            error = (values - x).reshape(shape).square().mean(dim=axes)
            better = error < best
            best = torch.where(better, error, best)
            best_low = torch.where(better, low * part, best_low)
            best_high = torch.where(better, high * part, best_high)
        return best_low, best_high

    def calculate_qparams(self) -> tuple[Tensor, Tensor | None]:
        """The scale and the zero point for the best range."""
        if self.min_val is None:
            raise MisfitError("an observer wants to see data before it answers a scale: run the model on some first.")
        return self._of_range(self.min_val, self.max_val)
