"""What torchao's own tests lean on: small models, reasons to skip, and what a serving engine does to quantized weights.

`TorchAOIntegrationTestCase` checks by values, where torchao's looks at addresses: writing to a slice writes to its parent, a
stack of experts can be reshaped, a chunk is a part.
"""

from __future__ import annotations

import functools
import unittest
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .apply import quantize_
from .config import AOBaseConfig, FqnToConfig
from .predicates import get_compute_capability, is_ROCM


class ToySingleLinearModel(nn.Module):
    """One linear layer."""

    def __init__(
        self, input_dim: int, output_dim: int, dtype: torch.dtype, device: Any, has_bias: bool = False
    ) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device
        self.linear1 = nn.Linear(input_dim, output_dim, bias=has_bias, dtype=dtype, device=device)

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor]:
        """Numbers that fit it."""
        return (torch.randn(batch_size, self.linear1.in_features, dtype=self.dtype, device=self.device),)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear1(x)


class ToyTwoLinearModel(nn.Module):
    """Two linear layers."""

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, dtype: torch.dtype, device: Any, has_bias: bool = False
    ) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device
        self.linear1 = nn.Linear(input_dim, hidden_dim, bias=has_bias, dtype=dtype, device=device)
        self.linear2 = nn.Linear(hidden_dim, output_dim, bias=has_bias, dtype=dtype, device=device)

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor]:
        """Numbers that fit it."""
        return (torch.randn(batch_size, self.linear1.in_features, dtype=self.dtype, device=self.device),)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x))


# -- reasons to skip ----------------------------------------------------------------------------------------------------------


def _skip_if(condition: Callable[[], bool], why: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> Any:
            if condition():
                raise unittest.SkipTest(why)
            return test(*args, **kwargs)

        return run

    return decorate


def skip_if_rocm(message: Any = None) -> Any:
    """A decorator: not on AMD."""
    skip = _skip_if(is_ROCM, message if isinstance(message, str) else "not on ROCm")
    return skip(message) if callable(message) else skip


def skip_if_xpu(message: Any = None) -> Any:
    """A decorator: not on Intel's GPUs."""
    skip = _skip_if(torch.xpu.is_available, message if isinstance(message, str) else "not on XPU")
    return skip(message) if callable(message) else skip


def skip_if_no_cuda() -> Any:
    """A decorator: only with a GPU."""
    return _skip_if(lambda: not torch.cuda.is_available(), "wants a GPU")


def skip_if_no_xpu() -> Any:
    """A decorator: only with a GPU of Intel's."""
    return _skip_if(lambda: not torch.xpu.is_available(), "wants an XPU")


def skip_if_compute_capability_less_than(min_capability: float) -> Any:
    """A decorator: only with a GPU of this capability, 9.0 for Hopper."""
    return _skip_if(lambda: get_compute_capability() < min_capability, f"wants sm{min_capability}")


# -- what a serving engine does -------------------------------------------------------------------------------------------------


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _quantized(config: AOBaseConfig, rows: int = 1024, columns: int = 1024) -> nn.Linear:
    layer = nn.Linear(columns, rows, dtype=torch.bfloat16, device=_device())
    quantize_(layer, config)
    return layer


class _Engine:
    """The checks, for any unittest.TestCase."""

    def _test_slice_and_copy_similar_to_vllm(self, config: AOBaseConfig) -> None:
        for dim in (0, 1):
            target, source = _quantized(config).weight.data, _quantized(config).weight.data
            expected = target.dequantize()
            expected.narrow(dim, 0, 512).copy_(source.dequantize().narrow(dim, 0, 512))
            part = target.narrow(dim, 0, 512)
            if part.torchao_tensors().keys() and all(_own(target, part, name) for name in part.packed):
                part.copy_(source.narrow(dim, 0, 512))
                assert torch.equal(target.dequantize(), expected)

    def _test_narrow_similar_to_vllm(self, config: AOBaseConfig) -> None:
        for dim in (0, 1):
            weight = _quantized(config).weight.data
            expected = weight.dequantize().narrow(dim, 256, 512)
            assert torch.equal(weight.narrow(dim, 256, 512).dequantize(), expected)

    def _test_chunk_similar_to_vllm_llama4(self, weight: Any, dim: int) -> None:
        for part, expected in zip(weight.chunk(2, dim), weight.dequantize().chunk(2, dim), strict=True):
            assert torch.equal(part.dequantize(), expected)

    def _test_moe_weight_reshape_ops(self, config: AOBaseConfig) -> None:
        experts = _experts(config)
        floats = experts.dequantize()
        swapped = experts.transpose(-2, -1)
        assert swapped.shape == floats.mT.shape and torch.equal(swapped.dequantize(), floats.mT)
        rows = experts.reshape(-1, floats.shape[-1])
        assert torch.equal(rows.dequantize(), floats.reshape(-1, floats.shape[-1]))
        assert torch.equal(rows.unflatten(0, floats.shape[:2]).dequantize(), floats)

    def _test_quantize_3d_param_similar_to_vllm(self, config: AOBaseConfig) -> None:
        assert _experts(config).shape == (2, 512, 1024)


def _own(target: Any, part: Any, name: str) -> bool:
    """Whether a packed tensor belongs to the part alone: what the rest shares cannot be written for it."""
    return part.packed[name].shape != target.packed[name].shape


def _experts(config: AOBaseConfig) -> Any:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(2, 512, 1024, dtype=torch.bfloat16, device=_device()))
    quantize_(holder, FqnToConfig({"weight": config}), filter_fn=None)
    return holder.weight.data


@functools.cache
def _test_case() -> type:
    try:
        from torch.testing._internal.common_utils import TestCase
    except ImportError:  # it wants the package expecttest
        TestCase = unittest.TestCase  # type: ignore[assignment,misc]
    return type("TorchAOIntegrationTestCase", (_Engine, TestCase), {"__module__": __name__, "__doc__": _Engine.__doc__})


def __getattr__(name: str) -> Any:
    if name == "TorchAOIntegrationTestCase":
        return _test_case()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
