"""What every test may ask for, and which tests this machine can run.

Tests are sorted by what they need; what cannot run here is skipped with its reason, never in silence:

    (no mark)                    a CPU
    gpu                          a CUDA GPU
    multi                        2 processes over gloo on a CPU; `multi` and `gpu` together: 2 CUDA GPUs
    guest("torchao>=0.18")       another project's package, the version included
    slow                         over a minute or many GB: left out unless asked for with `pytest -m slow`

Without a GPU, Triton's interpreter runs Triton's kernels where a test calls them: none is ever picked for a CPU.

Fixtures: `device` runs a test on the CPU and again on a GPU; `poison` fills all memory that torch leaves uninitialised.
Every test starts from the same random seed.
"""

import importlib.metadata
import os
import random
import tempfile

import pytest
import torch
from packaging.requirements import Requirement

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined: before anything imports lowp.kernels.triton_
_GRAPHS = tempfile.TemporaryDirectory(prefix="lowp-inductor-", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _GRAPHS.name  # no graph that other code left on the disk
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: more threads than cores only wait for each other
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def missing(item: pytest.Item) -> str:
    """Why this machine cannot run the test, or "" if it can."""
    if item.get_closest_marker("gpu"):
        wanted = 2 if item.get_closest_marker("multi") else 1
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found < wanted:
            return "needs a CUDA GPU" if wanted == 1 else f"needs {wanted} CUDA GPUs, found {found}"
    if item.get_closest_marker("multi") and not torch.distributed.is_available():
        return "needs torch.distributed"
    for mark in item.iter_markers("guest"):
        wanted = Requirement(mark.args[0])
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            return f"needs the package {wanted}, not installed"
        if not wanted.specifier.contains(found, prereleases=True):
            return f"needs the package {wanted}, found {found}"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if why := missing(item):
        pytest.skip(why)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def poison():
    """Memory from torch.empty holds NaN (integers: their maximum), so a kernel that leaves some unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # what switches torch.utils.deterministic's filling on
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
