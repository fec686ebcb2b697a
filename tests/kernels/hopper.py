"""Triton's kernels compiled for a Hopper that need not be there, with the Triton that is installed.

A test hands `lines_of` a program. It runs in a process of its own, where Triton does not interpret, and imports this file:

    made = hopper.compiling(cast, cast_both)    from now on a launch compiles, and starts nothing
    cast_both._run(x, ...)
    print(made[0].kernel, hopper.widest(made[0].ptx))

Arguments are specialized as Triton does it: pointers are multiples of 16 bytes, integers of 16 if they are, where the kernel does
not forbid to look.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lowp

_NAMES = {
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip
_MEMORY = re.compile(r"\b(ld\.global|st\.global|cp\.async|atom\.|red\.)")
_ACCESS = re.compile(r"(ld|st)\.global(?:\.[a-z0-9_:]+)*?(\.v[248])?\.b(\d+)")


class Made(NamedTuple):
    """A kernel that was compiled: its name and constants, what Triton made of it, warps of a program, seconds it took."""

    kernel: str
    constants: tuple[Any, ...]
    compiled: Any
    warps: int
    seconds: float

    @property
    def ptx(self) -> str:
        return self.compiled.asm["ptx"]


def lines_of(program: str, folder: Path, *arguments: str, beside: str = "") -> list[str]:
    """What a program prints, run in `folder`; `beside`: another folder whose files it may import."""
    here = (Path(__file__).parent, Path(lowp.__file__).parents[1])  # this file, and the lowp that is tested
    paths = filter(None, (*map(str, here), beside, os.environ.get("PYTHONPATH")))
    environment = os.environ | {
        "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip
    command = [sys.executable, "-c", program, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=folder)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def compiling(*modules: Any) -> list[Made]:
    """Let launches compile for sm90, and the modules take every device for one; each kernel is put into the list, once."""
    from lowp.kernels.triton_ import launch

    made: list[Made] = []
    seen = set()

    def first(
        kernel: Any, key: Any, grid: Any, args: Any, constants: Any, device: Any, warps: int, stages: int, fusion: bool,
        registers: int,
    ) -> None:  # fmt: skip
        constants = (*constants, True)
        assert kernel.arg_names[-1] == "EARLY" and len(kernel.arg_names) == len(args) + len(constants)
        if (kernel.__name__, key) not in seen:
            seen.add((kernel.__name__, key))
            made.append(_compiled(kernel, args, constants, warps, stages, fusion, registers))

    launch._first = first
    for module in modules:
        module.device_capability = lambda *device: 90
    return made


def _compiled(
    kernel: Any, args: Any, constants: Any, warps: int, stages: int, fusion: bool, registers: int
) -> Made:  # fmt: skip
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    signature, values, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, (*args, *constants), strict=True)):
        looked_at = not kernel.params[i].do_not_specialize
        if value is None or i >= len(args) or (type(value) is int and value == 1 and looked_at):
            signature[name], values[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _NAMES[value.dtype]
            if looked_at and not kernel.params[i].do_not_specialize_on_alignment:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_NAMES[value.base.dtype]}{list(value.block_shape)}>"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and looked_at:
                attributes[(i,)] = [["tt.divisibility", 16]]
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=fusion, launch_pdl=True)
    options |= {"maxnreg": registers} if registers else {}
    start = time.perf_counter()
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return Made(kernel.__name__, constants, compiled, warps, time.perf_counter() - start)


def before_it_waits(ptx: str) -> int:
    """Accesses to memory in front of where a kernel waits for the one before; it waits once, and lets the next begin once."""
    assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == 1
    assert _MEMORY.search(ptx)
    return len(_MEMORY.findall(ptx.partition("griddepcontrol.wait")[0]))


def widest(ptx: str) -> dict[str, int]:
    """Bits of the widest load and store of a thread."""
    found = _ACCESS.findall(ptx)
    return {
        way: max([int(wide[2:] or 1) * int(bits) for op, wide, bits in found if op == way], default=0)
        for way in ("ld", "st")
    }


def machine_code(compiled: Any) -> dict[str, int]:
    """Instructions, those that spill, and registers of a thread; nothing where Triton brings no disassembler."""
    import triton

    tools, told = Path(triton.__file__).parent / "backends" / "nvidia" / "bin", {}
    Path("made.cubin").write_bytes(compiled.asm["cubin"])
    if (tools / "nvdisasm").exists():
        text = subprocess.run([tools / "nvdisasm", "-c", "made.cubin"], capture_output=True, text=True).stdout
        lines = [line for line in text.splitlines() if re.search(r"/[*][0-9a-f]{4,5}[*]/", line)]
        told |= {"instructions": len(lines), "spills": sum("LDL" in line or "STL" in line for line in lines)}
    if (tools / "cuobjdump").exists():
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", "made.cubin"], capture_output=True, text=True).stdout
        told["registers"] = int(re.search(r"REG:([0-9]+)", usage).group(1))
    return told
