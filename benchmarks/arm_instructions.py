"""Instructions that ARM spends on a weight: counted in what the compiler made, since an emulator has no speed.

    make cpp-arm
    python benchmarks/arm_instructions.py

Decoding one token, codes times int8: the loop over a tile of 16 rows x 32 columns is the innermost one of `few_in_registers`,
whole without a branch, so its instructions over 512 are those a weight costs; what a group adds (its scales) stands outside. Many
tokens: the loop over a panel's columns, over the weights that it multiplies by 5 tokens. A row's baseline is the instruction set
before it: NEON alone has none, dot products have NEON, matrix instructions have dot products.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from lowp.report.results import append, row

ROOT = Path(__file__).parents[1]
OBJECTS = ROOT / "build/arm/CMakeFiles/lowp_kernels.dir"
RESULTS = ROOT / "benchmarks/results/linear_cpu.csv"
SETS = ("neon", "neondot", "neoni8mm")
PRODUCT = {"neon": "smull", "neondot": "sdot", "neoni8mm": "smmla"}
TILE, TOKENS, ROWS = 512, 5, 16
LINE = re.compile(r"^\s*([0-9a-f]+):\t[0-9a-f]+ \t(\S+)(?:\t(.*))?$")


def functions(instructions: str) -> dict[str, list[tuple[int, str, str]]]:
    """Address, mnemonic and operands of each instruction, by function."""
    if not OBJECTS.is_dir():
        raise SystemExit(f"wants {OBJECTS.relative_to(ROOT)}, got none: run `make cpp-arm` first.")
    text = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-dC", str(OBJECTS / f"product_{instructions}.cpp.o")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found: dict[str, list[tuple[int, str, str]]] = {}
    for block in text.split("\n\n"):
        lines = block.strip().splitlines()
        if lines and lines[0].endswith(">:"):
            code = [match.groups("") for match in map(LINE.match, lines[1:]) if match]
            found[lines[0].split("<", 1)[1][:-2]] = [(int(at, 16), name, what) for at, name, what in code]
    return found


def loops(code: list[tuple[int, str, str]]) -> list[list[str]]:
    """Mnemonics of each innermost loop: from the target of a branch back to the branch, with no other loop inside."""
    spans = []
    for at, name, what in code:
        target = re.match(r"(?:[wx]\d+, )?([0-9a-f]+) <", what)
        if name.startswith(("b.", "cb")) and target and int(target[1], 16) <= at:
            spans.append((int(target[1], 16), at))
    inner = [
        one for one in spans if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in spans)
    ]
    return [[name for at, name, _ in code if first <= at <= last] for first, last in inner]


def the_loop(found: dict[str, list[tuple[int, str, str]]], function: str, product: str) -> list[str]:
    """The loop of a function that multiplies most."""
    (code,) = (code for name, code in found.items() if function in name.replace("(anonymous namespace)::", ""))
    return max(loops(code), key=lambda loop: sum(name.startswith(product) for name in loop))


def products_of(loop: list[str], product: str, instructions: str) -> int:
    """Multiplications of a weight and a token's number in a loop: 16 or 8 or (of two tokens, 2 x 2 x 8) 32 an instruction."""
    return sum(name.startswith(product) for name in loop) * {"neon": 8, "neondot": 16, "neoni8mm": 32}[instructions]


def main() -> None:
    rows, before = [], {}
    for instructions in SETS:
        found, product = functions(instructions), PRODUCT[instructions]
        counted = {}
        if instructions != "neoni8mm":  # which decodes as neondot does
            for bits in range(1, 9):
                loop = the_loop(found, f"few_in_registers<OfBytes, UnpackU8<{bits}>, 1>", product)
                if products_of(loop, product, instructions) != TILE:
                    raise SystemExit(
                        f"{instructions}, {bits} bits: the loop is not that of a tile: {len(loop)} instructions"
                    )
                counted[f"int{bits}@int8 decode 1 token"] = len(loop) / TILE
        loop = the_loop(found, "block_times_lines<OfBytes, 5, 1>", product)
        used = products_of(loop, product, instructions) * (
            5 / 6 if instructions == "neoni8mm" else 1
        )  # 5 tokens as 3 pairs
        counted[f"int8 lines times {TOKENS} tokens"] = len(loop) * TOKENS / used
        for what, value in counted.items():
            one = row(f"{what} {instructions}", value, "instructions a weight", before.get(what))
            empty = dict.fromkeys(("M", "N", "K", "threads", "gbytes", "gflops", "load"), "")
            rows.append(one | {"device": "aarch64, counted"} | empty)
            print(f"{instructions:9} {what:28} {value:.3f}")
        before |= counted
    append(RESULTS, rows)


if __name__ == "__main__":
    main()
