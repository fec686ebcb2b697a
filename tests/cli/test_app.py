"""The frame: verbs are found, errors are one sentence with exit code 2, --json is JSON and nothing else."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowp.cli.app import answering, build, commands, device_of, dtype_of, sentence, size
from lowp.errors import LowpError, SpellingError

SOURCE = Path(__file__).parents[2] / "src"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lowp.cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
        capture_output=True,
        text=True,
    )


def raising(error: BaseException):
    def verb(json: bool = False) -> None:
        """A verb that fails."""
        raise error

    return verb


def answer(error: BaseException, *arguments: str):
    import typer

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("other")(answering("other", raising(LowpError("never"))))
    app.command("fail")(answering("fail", raising(error)))
    return CliRunner().invoke(app, ["fail", *arguments])


def test_every_verb_is_found_and_has_help_and_debug(lowp):
    assert {"quantize", "inspect", "explain"} <= set(commands())
    for verb in commands():
        shown = lowp(verb, "--help")
        assert shown.code == 0 and "--debug" in shown.out, verb


@pytest.mark.parametrize(
    "error, said",
    [
        (LowpError("wants this,\n got that: do it."), "wants this, got that: do it."),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "/x: no space left on device. Free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Change its permissions"),
        (OSError("odd"), "odd"),
    ],
)
def test_an_error_is_one_sentence_and_2(error, said):
    result = answer(error)
    assert result.exit_code == 2
    assert said in result.stderr and result.stderr.startswith("lowp fail: ")
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_debug_lets_the_error_through():
    error = LowpError("wants this")
    assert answer(error, "--debug").exception is error


def test_a_bug_is_not_hidden():
    assert isinstance(answer(ZeroDivisionError()).exception, ZeroDivisionError)


def test_ctrl_c_is_130_and_says_what_it_was_told():
    result = answer(KeyboardInterrupt("Go on with the same command."))
    assert result.exit_code == 130 and "stopped. Go on" in result.stderr


def test_sentences_name_the_file():
    assert sentence(FileNotFoundError(2, "No such file or directory", "m")).startswith("m: no such file")


def test_wrong_usage_is_2():
    for arguments in (["quantize"], ["explain", "--nothing"], ["nothing"]):
        assert CliRunner().invoke(build(), arguments).exit_code == 2


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_here(name):
    with pytest.raises(SpellingError):
        device_of(name)


def test_dtypes_have_short_and_long_names():
    assert dtype_of("bf16") == dtype_of("bfloat16")
    with pytest.raises(SpellingError, match="bf16"):
        dtype_of("bf17")


def test_sizes_are_for_a_person():
    assert [size(n) for n in (0, 999, 1000, 12_345_678, 8.2e9, 5e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.3 MB",
        "8.2 GB",
        "5 TB",
    ]


# -- in a process of its own ------------------------------------------------------------------------------------------


def test_bad_input_in_a_process(tmp_path):
    result = run("quantize", str(tmp_path / "nothing"), "--to", "int4", "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "does not exist" in result.stderr and result.stdout == ""
    shown = run("quantize", str(tmp_path / "nothing"), "--to", "int4", "--out", str(tmp_path / "out"), "--debug")
    assert shown.returncode != 0 and "Traceback" in shown.stderr


def test_a_pipe_that_closes_is_no_error():
    script = f"{sys.executable} -m lowp.cli explain | head -1"
    result = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_without_typer_the_command_line_says_what_to_install(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('no typer here', name='typer')")
    result = run("explain", PYTHONPATH=f"{tmp_path}{os.pathsep}{SOURCE}")
    assert result.returncode == 2
    assert result.stderr == "lowp: the command line wants the package typer: pip install 'lowp[cli]'\n"


def test_help_imports_no_model_library():
    probe = "import sys; from lowp.cli.app import build; build(); print('transformers' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", probe], env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True
    )
    assert result.stdout.strip() == "False", result.stderr
