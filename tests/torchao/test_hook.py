"""The redirect, each case in a process of its own: nothing is redirected unless asked, and it can be taken back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowp.torchao import hook

SOURCE = Path(__file__).parents[2] / "src"


def run(*arguments, path=(), **environment):
    paths = os.pathsep.join(map(str, (*path, SOURCE)))
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def python(text, **more):
    code, out, err = run("-c", text, **more)
    assert code == 0, err
    return out.split()


PROBE = """
import importlib.metadata as m, importlib.util, sys
import torchao, torchao.quantization
from torchao.quantization import quantize_, Int8Tensor
from torchao.quantization.quantize_.common import KernelPreference
print(torchao.__version__, m.version("torchao"), m.metadata("torchao")["Name"], Int8Tensor.__module__,
      callable(torchao.quantization.quantize_), importlib.util.find_spec("torchao") is not None,
      any(d.name == "torchao" for d in m.distributions()), all("lowp" in v.__name__ for k, v in sys.modules.items()
      if k.split(".")[0] == "torchao"))
"""
SAID = ["0.18.0", "0.18.0", "torchao", "torchao.quantization", "True", "True", "True", "True"]


def test_install_answers_for_torchao():
    assert python("import lowp.torchao; lowp.torchao.install(); lowp.torchao.install()\n" + PROBE) == SAID


def test_a_program_runs_under_the_redirect(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROBE + "print(sys.argv[1:], __name__, sys.path[0] == __file__.rpartition('/')[0])\n")
    code, out, err = run("-m", "lowp.torchao", str(script), "a", "--b")
    assert code == 0, err
    assert out.split() == [*SAID, "['a',", "'--b']", "__main__", "True"]
    (tmp_path / "package.py").write_text(PROBE)
    code, out, err = run("-m", "lowp.torchao", "-m", "package", path=[tmp_path])
    assert code == 0 and out.split() == SAID, err
    code, _, err = run("-m", "lowp.torchao")
    assert code != 0 and "usage" in err


def test_nothing_is_redirected_unless_asked():
    text = "import lowp, lowp.torchao.quantization, sys; print(any(k.split('.')[0] == 'torchao' for k in sys.modules))"
    assert python(text) == ["False"]
    assert python(
        "import lowp.torchao as t; from lowp.torchao.quantization import Int8Tensor as i; print(i.__module__, t.installed())"
    ) == [
        "lowp.torchao.tensors",
        "False",
    ]


def test_it_can_be_taken_back():
    text = (
        "import lowp.torchao as t, sys; t.install(); import torchao.quantization as q; t.uninstall()\n"
        "print([k for k in sys.modules if k.split('.')[0] == 'torchao'], q.Int8Tensor.__module__, t.installed())"
    )
    assert python(text) == ["[]", "lowp.torchao.tensors", "False"]


def test_it_refuses_beside_a_torchao_that_is_imported(tmp_path):
    """A stand-in for the real one: a package of that name."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("__version__ = 'real'")
    text = "import torchao, lowp.torchao\ntry: lowp.torchao.install()\nexcept lowp.LowpError as e: print(e)"
    said = " ".join(python(text, path=[tmp_path]))
    assert "imported already, from" in said and "python -m lowp.torchao" in said
    assert python(
        "import lowp.torchao as t; t.install(); import torchao; print(torchao.__version__)", path=[tmp_path]
    ) == ["0.18.0"]
    assert python("import lowp.torchao as t; import torchao; print(torchao.__version__)", path=[tmp_path]) == ["real"]


def test_an_unknown_name_of_torchao_is_a_sentence():
    text = (
        "import lowp.torchao; lowp.torchao.install()\n"
        "for line in ('from torchao.quantization import Int8Tensr', 'from torchao import sparsty', 'import torchao.affine',"
        " 'from torchao.prototype.parq.api import create_optimizer'):\n"
        "    try: exec(line)\n"
        "    except ImportError as e: print(type(e).__name__, e)"
    )
    lines = " ".join(python(text))
    assert "did you mean Int8Tensor" in lines and "did you mean sparsity" in lines
    assert "No module named 'torchao.affine'" in lines and "lacks PARQ" in lines
    assert lines.count("docs/torchao.md") == 4


@pytest.fixture
def site(tmp_path):
    """A folder of packages that Python reads .pth files from: what an environment has."""
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


def started(site, text):
    """A fresh process of an environment whose site-packages is `site`."""
    return python(f"import site; site.addsitedir({str(site)!r})\n{text}")


def test_an_environment_is_switched_on_and_off(site):
    assert "off" in hook.status(site)
    assert "wrote" in hook.enable(site) and hook.status(site).startswith("on")
    assert sorted(path.name for path in site.iterdir()) == ["_lowp_torchao.pth", "_lowp_torchao.py"]
    assert started(site, PROBE) == SAID
    light = "import sys, importlib.metadata as m; print(m.version('torchao'), 'torch' in sys.modules, 'lowp' in sys.modules)"
    assert started(site, light) == ["0.18.0", "False", "False"], "a process that does not ask for torchao pays nothing"
    assert "removed" in hook.disable(site) and list(site.iterdir()) == []
    assert "nothing to undo" in hook.disable(site) and "off" in hook.status(site)


def test_processes_that_are_spawned_are_switched_too(site, tmp_path):
    hook.enable(site)
    script = tmp_path / "spawns.py"
    script.write_text(
        "import multiprocessing as mp\n"
        "def child(q):\n    import torchao; q.put(torchao.__version__ + torchao.__name__)\n"
        "if __name__ == '__main__':\n"
        "    c = mp.get_context('spawn'); q = c.Queue(); p = c.Process(target=child, args=(q,)); p.start()\n"
        "    print(q.get()); p.join()\n"
    )
    start = tmp_path / "sitecustomize.py"
    start.write_text(f"import site; site.addsitedir({str(site)!r})")
    code, out, err = run(str(script), path=[tmp_path])
    assert code == 0 and out.split() == ["0.18.0lowp.torchao"], err


def test_a_switch_that_outlives_lowp_steps_aside(site, tmp_path):
    hook.enable(site)
    (tmp_path / "torchao.py").write_text("__version__ = 'real'")
    without = f"import sys, site; site.addsitedir({str(site)!r}); sys.modules['lowp'] = None"
    text = f"{without}\nimport torchao; print(torchao.__version__)"
    code, out, err = run("-W", "ignore", "-c", text, path=[tmp_path])
    assert code == 0 and out.split() == ["real"], err


OPERATORS = """
import torch, lowp.torchao as t
names = ("choose_qparams_affine", "quantize_affine", "dequantize_affine")
has = lambda: [torch._C._dispatch_has_kernel(f"torchao::{name}") for name in names]
print(*has())
t.install(); print(*has())
ops = torch.ops.torchao
class Layer(torch.nn.Module):
    def forward(self, x):
        scale, zero = ops.choose_qparams_affine(x, "ASYMMETRIC", [1, x.shape[1]], torch.int8, -128, 127)
        q = ops.quantize_affine(x, [1, x.shape[1]], scale, zero, torch.int8, -128, 127)
        return ops.dequantize_affine(q, [1, x.shape[1]], scale, zero, torch.int8, -128, 127)
x = torch.randn(4, 32)
exported = torch.export.export(Layer(), (x,))
kept = [str(n.target) for n in exported.graph.nodes if "torchao" in str(n.target)]
print(*kept, (exported.module()(x) - x).abs().max().item() < 0.02)
t.uninstall(); print(*has())
"""


def test_operators_are_there_while_the_redirect_stands():
    """An exported graph keeps them whole, which is what exporters look for."""
    no, yes = ["False"] * 3, ["True"] * 3
    kept = [f"torchao.{name}.default" for name in ("choose_qparams_affine", "quantize_affine", "dequantize_affine")]
    assert python(OPERATORS) == [*no, *yes, *kept, "True", *no]


SAVES = """
import sys, torch
from torch import nn
import lowp.torchao; lowp.torchao.install()
from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8Tensor, Int8WeightOnlyConfig, quantize_
from torchao.optim import AdamW8bit
model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
for i, config in enumerate((Int8WeightOnlyConfig(), Int4WeightOnlyConfig(group_size=32), Float8WeightOnlyConfig())):
    quantize_(model, config, lambda m, name, i=i: name == str(i))
layer = nn.Linear(64, 64)
optimizer = AdamW8bit(layer.parameters())
layer(torch.randn(2, 64)).sum().backward()
optimizer.step()
assert Int8Tensor.__module__ == "torchao.quantization"
values = [p.dequantize() for p in model.state_dict().values() if hasattr(p, "qdata")]
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "x": values}, sys.argv[1])
"""
READS = """
import sys, torch
{first}
from lowp.torchao.tensors import Int8Tensor
read = torch.load(sys.argv[1], weights_only=True)
weights = [p for p in read["model"].values() if hasattr(p, "qdata")]
assert type(weights[0]) is Int8Tensor and len(weights) == 3
assert all(torch.equal(w.dequantize(), x) for w, x in zip(weights, read["x"], strict=True))
print(type(weights[0]).__module__, type(read["optimizer"]["state"][0]["exp_avg"]).__name__)
"""


@pytest.mark.parametrize(
    ("first", "says"),
    [("", "lowp.torchao.tensors"), ("import lowp.torchao; lowp.torchao.install()", "torchao.quantization")],
    ids=["without", "with"],
)
def test_what_torch_saved_under_the_redirect_is_read_without_it(first, says, tmp_path):
    """Whether or not a real torchao is installed, whose class of that name it is not."""
    for script in (SAVES, READS.format(first=first)):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "state.pt")], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [says, "OptimState8bit"]


@pytest.mark.parametrize("argument", ["nosuch.py", "-c"])
def test_what_is_no_script_is_told(argument):
    done = subprocess.run([sys.executable, "-m", "lowp.torchao", argument, "x"], capture_output=True, text=True)
    assert done.returncode == 1 and "wants a script or -m MODULE" in done.stderr and "Traceback" not in done.stderr
