"""Write the pages that follow from the tables: docs/formats.md, docs/kernels.md and docs/torchao.md.

python docs/generate.py            a test checks that they are up to date
"""

from __future__ import annotations

from pathlib import Path

from lowp.layouts import LAYOUTS
from lowp.numerics import ELEMENTS, RULES, Scheme, known_formats
from lowp.ops import Case, kernels_of
from lowp.quantize import METHODS
from lowp.torchao import names as torchao_names
from lowp.torchao.config import CONFIG_ROWS, CONFIGS, scheme_of

HERE = Path(__file__).parent
SHAPE = (4096, 4096)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def formats_page() -> str:
    """Elements, known formats, rules and methods."""
    elements = [
        (f"`{e.name}`", str(e.bits), _values(e), _special(e), e.source)
        for e in sorted(ELEMENTS.values(), key=lambda e: (e.kind == "identity", e.kind, e.bits, e.name))
    ]
    known = [
        (
            f"`{k.spelling}`",
            f"`lowp.{k.preset}`" if k.preset else "",
            f"{Scheme.parse(k.spelling).weight.bits(SHAPE):.3f}",
            k.about,
            k.source,
        )
        for k in known_formats()
    ]
    return f"""# Formats

Made by `docs/generate.py` from the tables in `src/lowp/numerics`. The spelling is explained in the [guide](guide.md#spelling).

## Known schemes

Bits for each weight of a {SHAPE[0]} x {SHAPE[1]} matrix, scales and zero points included.

{table(("scheme", "preset", "bits", "for", "source"), known)}

## Elements

{table(("element", "bits", "values", "codes that are no number", "source"), elements)}

## Rules: how a scale is chosen

Spelled after a `~` where it is not the format's default: `e4m3/1x32*e8m0~floor`.

{table(("rule", "what it does"), [(f"`{rule.name}`", rule.about) for rule in RULES.values()])}

## Methods: how the numbers of a weight are chosen

{table(("method", "what it does"), [(f"`{method.name}`", method.about) for method in METHODS.values()])}
"""


def _values(element) -> str:
    if element.kind == "identity":
        return "the float itself"
    if element.bits <= 4:
        shown = [0.0 + value for value in dict.fromkeys(sorted(value for value in element.values if value == value))]
        return " ".join(f"{value:.4g}" for value in dict.fromkeys(shown))
    return f"{element.min:g} to {element.max:g}"


def _special(element) -> str:
    if element.kind == "identity":
        return ""
    numbers = sum(value == value and abs(value) != float("inf") for value in element.values)
    return str(2**element.bits - numbers) if numbers != 2**element.bits else "none"


def kernels_page() -> str:
    """Kernels by op, and layouts."""
    parts = [
        "# Kernels and layouts",
        "Made by `docs/generate.py` from the kernel table. `lowp explain linear int4` says which can run where you are.",
    ]
    for op in ("linear", "matmul", "grouped", "embedding", "cast", "fake_cast", "cast_codes_as", "cast_interleaved",
               "fake_quantize", "fake_quantize_grad"):  # fmt: skip
        rows = [
            (
                f"`{k.name}`",
                str(k.rank),
                f"`{k.layout}`" if k.layout else "any",
                "yes" if k.fallback else "",
                " ".join(f"`{c}`" for c in k.cases) or "every scheme",
                k.about,
            )
            for k in kernels_of(op)
        ]
        parts += [
            f"## {op}",
            "Tried in order of rank; a fallback is correct everywhere and never the fast way.",
            table(("kernel", "rank", "layout", "fallback", "meant for", "what it is"), rows),
        ]
    parts += [
        "## Native and emulated on Hopper",
        "Schemes that quantize the activation too, in bf16 on sm90: the first kernel meant for each, and what it multiplies.",
        table(("scheme", "kernel", "how"), _on_hopper()),
        "## Layouts",
        table(
            ("layout", "device", "what it is"), [(f"`{x.name}`", x.device or "any", x.about) for x in LAYOUTS.values()]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _on_hopper() -> list[tuple[str, ...]]:
    rows = []
    for scheme in (known.spelling for known in known_formats() if "@" in known.spelling):
        kernel = next(k for k in kernels_of("linear") if k.how and (scheme in k.cases or not k.cases))
        case = Case(op="linear", scheme=scheme, layout=kernel.layout, device="cuda", sm=90, shape=SHAPE)
        rows.append((f"`{scheme}`", f"`{kernel.name}`", kernel.how(case)))
    return rows


def torchao_page() -> str:
    """What each configuration is here, then every name of torchao's."""
    rows = torchao_names.table()
    works = sum(row.works for row in rows)
    configs = [
        (f"`{row.name}`", f"`{scheme_of(CONFIGS[row.name]())}`", f"`{row.tensor(CONFIGS[row.name]())}`", row.about)
        for row in CONFIG_ROWS
    ]
    named = sorted(rows, key=lambda row: (not row.works, row.modules[0], row.name))
    cells = [
        (
            f"`{row.name}`",
            _places(row),
            f"`{row.ours.replace(':', '.')}`" if row.works else "",
            "works" if row.works else "later",
            row.note if row.works else f"lacks {row.note}",
        )
        for row in named
    ]
    return f"""# torchao's names

Made by `docs/generate.py` from `src/lowp/torchao/names` and the rows of `src/lowp/torchao/config.py`.
How to use them: [guide](guide.md#torchao).

Of {len(rows)} public names of torchao 0.18 and before, {works} work. The others are answered by an ImportError that says
what is missing.

## Configurations

By default, for a weight in bf16. Every scheme runs on every device, by a kernel of its own or by the reference; the report of
`quantize_` says which.

{table(("configuration", "scheme", "shown as", "for"), configs)}

## Names

`ours` is a file and an object in `src/lowp/torchao`.

{table(("name", "in torchao.", "ours", "state", "differences"), cells)}
"""


def _places(row: torchao_names.Name) -> str:
    first = "itself" if row.modules[0] == "." else f"`{row.modules[0]}`"
    return first if len(row.modules) == 1 else f"{first} and {len(row.modules) - 1} more"


PAGES = {"formats.md": formats_page, "kernels.md": kernels_page, "torchao.md": torchao_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
