"""What torchao's `utils` answers: about the machine, about a model, and small numbers.

Where a host asks whether a kernel can run ("is this sm90?"), the answer is true to the machine; our kernels do not
hang on it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import return_and_correct_aliasing as return_and_correct_aliasing

from ..errors import MisfitError
from ..tensor import QTensor
from .base import TorchAOBaseTensor
from .export import Exported, Unwrapped, can_export

# -- the machine ------------------------------------------------------------------------------------------------------------


def is_sm_version(major: int, minor: int) -> bool:
    """Whether the GPU has exactly this compute capability."""
    return get_compute_capability() == float(f"{major}.{minor}")


def is_sm_at_least_89() -> bool:
    """Ada, Hopper or later."""
    return get_compute_capability() >= 8.9


def is_sm_at_least_90() -> bool:
    """Hopper or later."""
    return get_compute_capability() >= 9.0


def is_sm_at_least_100() -> bool:
    """Blackwell or later."""
    return get_compute_capability() >= 10.0


def get_compute_capability() -> float:
    """The GPU's compute capability as a number, 0.0 without a GPU of NVIDIA's."""
    if not torch.cuda.is_available() or is_ROCM():
        return 0.0
    major, minor = torch.cuda.get_device_capability()
    return float(f"{major}.{minor}")


def is_ROCM() -> bool:
    """Whether torch was built for AMD."""
    return bool(torch.version.hip)


def _amd(*names: str) -> bool:
    if not is_ROCM() or not torch.cuda.is_available():
        return False
    return any(name in torch.cuda.get_device_properties(0).gcnArchName for name in names)


def is_MI300() -> bool:
    """AMD MI300."""
    return _amd("gfx940", "gfx941", "gfx942")


def is_MI350() -> bool:
    """AMD MI350."""
    return _amd("gfx950")


def is_Navi4() -> bool:
    """AMD Navi 4."""
    return _amd("gfx1200", "gfx1201")


def is_cuda_version_at_least(major: int, minor: int) -> bool:
    """Whether torch was built with this CUDA or a later one."""
    if torch.version.cuda is None:
        return False
    return tuple(int(part) for part in torch.version.cuda.split(".")[:2]) >= (major, minor)


def _cpu_has(name: str) -> bool:
    asked = getattr(torch.cpu, name, None)
    return bool(asked and asked())


def _cpu_is_vnni_supported() -> bool:
    return _cpu_has("_is_vnni_supported")


def _cpu_is_amx_tile_supported() -> bool:
    return _cpu_has("_is_amx_tile_supported")


def should_reduce_range(device: torch.device) -> bool:
    """Whether int8 products on this device may overflow 16 bits: a CPU without VNNI."""
    return torch.device(device).type == "cpu" and not _cpu_is_vnni_supported()


def get_available_devices() -> list[str]:
    """The kinds of devices there are."""
    devices = ["cpu"]
    devices += ["cuda"] if torch.cuda.is_available() else []
    devices += ["xpu"] if torch.xpu.is_available() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return devices


def get_current_accelerator_device() -> torch.device | None:
    """The accelerator, None without one."""
    return torch.accelerator.current_accelerator(check_available=True)


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _is_mslk_available() -> bool:
    return _is_there("mslk")


def _is_flashinfer_available() -> bool:
    return _is_there("flashinfer")


def _is_fbgemm_gpu_genai_available() -> bool:
    return _is_there("fbgemm_gpu") and _is_there("fbgemm_gpu.experimental.gen_ai")


def is_mslk_version_at_least(min_version: str) -> bool:
    """Whether mslk is there in this version or a later one."""
    return is_package_at_least("mslk", min_version)


def check_cpu_version(device: Any, version: str = "2.6.0") -> bool:
    """Whether this is the CPU and torch is this version or a later one."""
    return torch.device(device).type == "cpu" and torch_version_at_least(version)


def check_xpu_version(device: Any, version: str = "2.8.0") -> bool:
    """Whether this is one of Intel's GPUs and torch is this version or a later one."""
    return torch.device(device).type == "xpu" and torch_version_at_least(version)


# -- versions ---------------------------------------------------------------------------------------------------------------


def parse_version(version_string: str) -> list[int]:
    """The numbers of a version, without what follows them.

    >>> parse_version("2.13.0+cpu")
    [2, 13, 0]
    """
    numbers = []
    for part in version_string.partition("+")[0].split(".")[:3]:
        leading = len(part) - len(part.lstrip("0123456789"))
        if not leading:
            break
        numbers.append(int(part[:leading]))
    return numbers


def torch_version_at_least(min_version: str) -> bool:
    """Whether torch is this version or a later one; what comes before a release (2.5.0a0, 2.5.0.dev...) is less than it."""
    return _with_stage(torch.__version__) >= _with_stage(min_version)


def _with_stage(version: str) -> tuple[list[int], bool]:
    """The numbers of a version, and whether it is a release."""
    return parse_version(version), re.search(r"\d(a|b|rc)\d|\.dev", version.partition("+")[0]) is None


def is_package_at_least(package_name: str, min_version: str) -> bool:
    """Whether a package is there in this version or a later one."""
    try:
        return parse_version(importlib.metadata.version(package_name)) >= parse_version(min_version)
    except importlib.metadata.PackageNotFoundError:
        return False


def recommended_inductor_config_setter() -> None:
    """Nothing: lowp sets no switch for the whole process. torch._inductor.config is yours."""


def is_fbcode() -> bool:
    """Whether this is Meta's own build of torch: it is not."""
    return not hasattr(torch.version, "git_version")


# -- numbers and models -------------------------------------------------------------------------------------------------------


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The smallest multiple of b that is at least a."""
    return ceil_div(a, b) * b


def find_multiple(n: int, *args: int) -> int:
    """The smallest number from n on that all of the others divide.

    >>> find_multiple(10, 4, 6)
    12
    """
    return round_up(n, math.lcm(*(args or (1,))))


def fill_defaults(args: Iterable[Any], n: int, defaults_tail: list[Any]) -> list[Any]:
    """Arguments filled up to n of them from a list of defaults for the last ones."""
    given = list(args)
    if n - len(defaults_tail) > len(given):
        raise MisfitError(f"{n} arguments are wanted, {len(defaults_tail)} of them have defaults, got {len(given)}.")
    return given + [defaults_tail[i - n] for i in range(len(given), n)]


def compute_error(x: Tensor, y: Tensor) -> Tensor:
    """The signal to noise ratio of y against x, in dB.

    >>> compute_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])).item()
    20.0
    """
    return 20 * torch.log10(torch.linalg.vector_norm(x) / torch.linalg.vector_norm(x - y))


def compute_max_diff(output: Tensor, output_ref: Tensor) -> Tensor:
    """The mean absolute difference in units of the mean magnitude of the reference."""
    return torch.mean(torch.abs(output - output_ref)) / torch.mean(torch.abs(output_ref))


def get_model_size_in_bytes(model: nn.Module, ignore_embeddings: bool = False) -> int:
    """Bytes of a model's parameters and buffers as they are stored, tied ones once.

    >>> get_model_size_in_bytes(nn.Linear(8, 8))
    288
    """
    seen: dict[int, int] = {}
    for module in model.modules():
        if ignore_embeddings and isinstance(module, nn.Embedding):
            continue
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        seen |= {id(tensor): _nbytes(tensor) for tensor in tensors}
    return sum(seen.values())


def _nbytes(tensor: Tensor) -> int:
    if isinstance(tensor, QTensor):
        return tensor.packed_nbytes
    if isinstance(tensor, TorchAOBaseTensor):
        return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


# -- time -------------------------------------------------------------------------------------------------------------------


def benchmark_model(
    model: Callable[..., Any],
    num_runs: int,
    args: tuple[Any, ...] = (),
    kwargs: Any = None,
    device_type: str | None = None,
) -> float:
    """Milliseconds of one run, the mean of `num_runs`."""
    device = device_type or get_current_accelerator_device() or "cpu"
    synchronize = getattr(getattr(torch, device), "synchronize", lambda: None)
    synchronize()
    start = time.perf_counter()
    for _ in range(num_runs):
        model(*args, **(kwargs or {}))
    synchronize()
    return (time.perf_counter() - start) * 1000 / num_runs


def benchmark_torch_function_in_microseconds(f: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Microseconds of one call, by torch's own clock."""
    from torch.utils.benchmark import Timer

    timer = Timer(stmt="f(*args, **kwargs)", globals={"f": f, "args": args, "kwargs": kwargs})
    return timer.blocked_autorange().median * 1e6


# -- subclasses as plain tensors ----------------------------------------------------------------------------------------------


class UnwrapTensorSubclass(nn.Module):
    """A parametrization: a tensor subclass stored as the plain tensors that it holds, put together when it is read."""

    def forward(self, *tensors: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return self._build(self.kept, list(tensors))
        return self._eager(list(tensors))

    @torch.compiler.disable  # torch.compile cannot follow how a tensor subclass is made: it calls this and goes on
    def _eager(self, tensors: list[Tensor]) -> Tensor:
        return self._build(self.kept, tensors)

    def right_inverse(self, tensor: Tensor) -> list[Tensor]:
        plain: list[Tensor] = []
        self.kept = self._take_apart(tensor, plain)
        return plain

    def _take_apart(self, tensor: Tensor, plain: list[Tensor]) -> Any:
        tensor = Exported.of(tensor) if can_export(tensor) else tensor
        names, context = tensor.__tensor_flatten__()
        inside = []
        for name in names:
            inner = getattr(tensor, name)
            nested = type(inner) is not Tensor and hasattr(inner, "__tensor_flatten__")
            inside.append((name, self._take_apart(inner, plain) if nested else None))
            if not nested:
                plain.append(inner)
        return type(tensor), inside, context, tensor.shape, tensor.stride()

    def _build(self, kept: Any, rest: list[Tensor]) -> Tensor:
        kind, inside, context, shape, stride = kept
        if torch.compiler.is_exporting() and issubclass(kind, QTensor):
            return Unwrapped.of({name: rest.pop(0) for name, _ in inside}, kind, context)
        inner = {name: rest.pop(0) if below is None else self._build(below, rest) for name, below in inside}
        return kind.__tensor_unflatten__(inner, context, shape, stride)


def unwrap_tensor_subclass(model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    """Store the weights that are tensor subclasses as plain tensors, in place, so that torch.export sees only those.

    Args:
        filter_fn: (module, name) -> whether its weight is taken; all are if absent.
    """
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        wanted = (
            weight is not None and type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "__tensor_flatten__")
        )
        if wanted and (filter_fn is None or filter_fn(module, name)):
            parametrize.register_parametrization(module, "weight", UnwrapTensorSubclass(), unsafe=True)
    return model


def register_as_pytree_constant(cls: type) -> type:
    """A decorator: torch.export takes values of this class as they are."""
    torch.utils._pytree.register_constant(cls)
    return cls


class DummyModule(nn.Module):
    """A module that holds a weight and a bias and does nothing."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias


# -- flags of torchao before 0.14 -------------------------------------------------------------------------------------------

TORCH_VERSION_AT_LEAST_2_2 = TORCH_VERSION_AFTER_2_2 = torch_version_at_least("2.2.0")
TORCH_VERSION_AT_LEAST_2_3 = TORCH_VERSION_AFTER_2_3 = torch_version_at_least("2.3.0")
TORCH_VERSION_AT_LEAST_2_4 = TORCH_VERSION_AFTER_2_4 = torch_version_at_least("2.4.0")
TORCH_VERSION_AT_LEAST_2_5 = TORCH_VERSION_AFTER_2_5 = torch_version_at_least("2.5.0")
TORCH_VERSION_AT_LEAST_2_6 = torch_version_at_least("2.6.0")
TORCH_VERSION_AT_LEAST_2_7 = torch_version_at_least("2.7.0")
TORCH_VERSION_AT_LEAST_2_8 = torch_version_at_least("2.8.0")
