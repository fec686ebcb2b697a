"""The plots of the HTML page, as SVG text that goes into it, and the picture of the result table.

An inline SVG takes the page's colours: whatever is drawn in the sentinel colour `_INK` becomes `currentColor`, so that axes and
words are dark on a light page and light on a dark one. Series have middle tones that are legible on both.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LowpError
from ..numerics import Scheme
from ..quantize import ReportRow
from .bench import Timing
from .bench import lines as lines_of
from .layers import Evaluation

_INK = "#010203"  # becomes currentColor
_FAMILIES = {"int": "#3b82c4", "float": "#e07b39", "codebook": "#3a9d6a", "identity": "#8a8f98"}
_WORDS = {"int": "integers", "float": "small floats", "codebook": "codebook", "identity": "original"}
_KINDS = ("#3b82c4", "#e07b39", "#3a9d6a", "#b765b0", "#c9a227", "#5aa9b8", "#d1576b", "#7d86d1", "#8f7a5f", "#8a8f98")
_LEAST = 0.01  # percent: what is below is drawn here, since a logarithm has no zero


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise LowpError("plots want the package matplotlib: pip install 'lowp[cli]'.") from None
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _style(salt: str) -> dict[str, Any]:
    ink = {f"{name}.color": _INK for name in ("text", "xtick", "ytick")}
    return ink | {
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "grid.color": _INK,
        "grid.alpha": 0.12,
        "font.size": 9.5,
        "font.family": "sans-serif",
        "legend.frameon": False,
        "svg.fonttype": "none",  # words stay words: searchable, in the page's font
        "svg.hashsalt": salt,  # the same page twice is the same bytes, and no two plots share an id
    }


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )
    _pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _family(one: Evaluation) -> str:
    return Scheme.parse(one.scheme).weight.element.kind if one.scheme else "identity"


# -- quality against size ---------------------------------------------------------------------------------------------


def perplexity_by_size(evaluations: Sequence[Evaluation]) -> str:
    """How far each model's perplexity lies above the original's, in percent, against its size."""
    points = [(one, 100 * (one.quality.ratio - 1)) for one in evaluations]
    original = f"{evaluations[0].quality.original_perplexity:.3f}" if evaluations else ""
    return _by_size(points, f"Perplexity above the original's {original}", "%", "perplexity")


def kl_by_size(evaluations: Sequence[Evaluation]) -> str:
    """KL divergence from the original, in nats a token, against size."""
    points = [(one, one.quality.kl) for one in evaluations]
    return _by_size(points, "KL divergence from the original", "nats a token", "kl")


def _by_size(points: Sequence[tuple[Evaluation, float]], title: str, unit: str, salt: str) -> str:
    plt = _pyplot()
    with plt.rc_context(_style(salt)):
        figure, axes = plt.subplots(figsize=(5.6, 4.3))
        axes.set_yscale("log")
        drawn = []
        for one, value in points:
            if not math.isfinite(value):
                continue
            x, y = one.bytes_after / 1e6, max(value, _LEAST if unit == "%" else 1e-6)
            axes.plot(x, y, "o", color=_FAMILIES[_family(one)], markersize=7, markeredgewidth=0)
            drawn.append((x, y, one.name if value >= y else f"{one.name} ({value:+.2g}{' %' if unit == '%' else ''})"))
        _legend(axes, [one for one, _ in points])
        axes.set(title=title, xlabel="size of all parameters, MB", ylabel=unit)
        axes.margins(0.14, 0.1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.canvas.draw()
        _label(axes, drawn)
        return _svg(figure)


def _legend(axes: Any, evaluations: Sequence[Evaluation]) -> None:
    families = dict.fromkeys(_family(one) for one in evaluations)
    for family in families:
        axes.plot([], [], "o", color=_FAMILIES[family], markeredgewidth=0, label=_WORDS[family])
    if len(families) > 1:
        axes.legend(loc="upper right", fontsize=8.5, handletextpad=0.1)


_PLACES = [(8, 0), (8, 9), (8, -9), (-8, 0), (-8, 9), (-8, -9), (14, 17), (14, -17), (-14, 17), (-14, -17)] + [
    (sign * 18, up * step) for step in (25, 33, 41, 49) for up in (1, -1) for sign in (1, -1)
]


def _label(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Put a name beside each point, where it covers no other point or name."""
    scale = 72 / axes.figure.dpi
    at = [tuple(value * scale for value in axes.transData.transform((x, y))) for x, y, _ in points]
    first, last = axes.bbox.x0 * scale + 2, axes.bbox.x1 * scale + 16
    top = axes.bbox.y1 * scale
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in at]
    for (px, py), (x, y, name) in zip(at, points, strict=True):
        boxes = [_box(px + dx, py + dy, dx < 0, name) for dx, dy in _PLACES]
        free = (
            i
            for i, box in enumerate(boxes)
            if first < box[0] and box[2] < last and box[3] < top and not any(_overlap(box, other) for other in taken)
        )
        index = next(free, 0)
        (dx, dy), box = _PLACES[index], boxes[index]
        taken.append(box)
        arrow = (
            dict(arrowstyle="-", color=_INK, alpha=0.35, linewidth=0.6, shrinkA=0, shrinkB=3) if abs(dy) > 9 else None
        )
        side = "right" if dx < 0 else "left"
        axes.annotate(
            name, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=8.5, arrowprops=arrow
        )


def _box(x: float, y: float, left: bool, name: str) -> tuple[float, float, float, float]:
    width = 4.7 * len(name)  # points a letter at 8.5 pt
    return (x - width if left else x, y - 5, x if left else x + width, y + 5)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# -- layers -----------------------------------------------------------------------------------------------------------


def bytes_by_layer(evaluations: Sequence[Evaluation]) -> str:
    """What the bytes of each model are spent on, the layers of one kind together; the original first."""
    plt = _pyplot()
    bars = [("original", _bytes_of_kinds(evaluations[0], before=True))] if evaluations else []
    bars += [(one.name, _bytes_of_kinds(one)) for one in evaluations]
    kinds = list(dict.fromkeys(kind for _, parts in bars for kind in parts))
    with plt.rc_context(_style("bytes")):
        figure, axes = plt.subplots(figsize=(11.6, 0.26 * len(bars) + 1.1))
        left = [0.0] * len(bars)
        for index, kind in enumerate(kinds):
            widths = [parts.get(kind, 0) / 1e6 for _, parts in bars]
            names, color = [name for name, _ in bars], _KINDS[min(index, len(_KINDS) - 1)]
            axes.barh(names, widths, left=left, color=color, height=0.72, label=kind)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            axes.text(total, row, f" {total:.2f}", va="center", fontsize=8.5)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.1, y=0.02)
        axes.set(title="Bytes by kind of layer", xlabel="MB")
        axes.legend(fontsize=8.5, loc="lower right", handlelength=0.9, handleheight=0.9, labelspacing=0.3)
        return _svg(figure)


def _bytes_of_kinds(one: Evaluation, *, before: bool = False) -> dict[str, int]:
    parts: dict[str, int] = {}
    for row in one.rows:
        kind = kind_of(row)
        parts[kind] = parts.get(kind, 0) + (row.bytes_before if before else row.bytes_after)
    rest = (one.bytes_before if before else one.bytes_after) - sum(parts.values())
    return parts | ({"norms and others": rest} if rest > 0 else {})


def kind_of(row: ReportRow) -> str:
    """The last name of a layer, without its number: "q_proj" of "model.layers.3.self_attn.q_proj.weight"."""
    names = [name for name in row.fqn.split(".") if not name.isdigit()]
    return names[-2] if len(names) > 1 and names[-1] == "weight" else names[-1]


def error_by_layer(evaluations: Sequence[Evaluation]) -> str:
    """The weight error of each layer, in the order of the model: a line for each model, over the weights of its main scheme."""
    plt = _pyplot()
    lines = [one for one in evaluations if any(row.scheme for row in one.rows)]
    with plt.rc_context(_style("error")):
        figure, axes = plt.subplots(figsize=(11.6, 4.4))
        axes.set_yscale("log")
        ends = []
        for one in lines:
            rows = [
                (index, row.error) for index, row in enumerate(one.rows) if row.scheme == one.scheme and row.error > 0
            ]
            if not rows:
                continue
            xs, ys = zip(*rows, strict=True)
            axes.plot(xs, ys, color=_FAMILIES[_family(one)], linewidth=1.1, marker=".", markersize=3)
            ends.append((ys[-1], one.name, _FAMILIES[_family(one)], xs[-1]))
        names = [_short(row.fqn) for row in lines[0].rows] if lines else []
        step = max(1, len(names) // 60)
        axes.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=6.5)
        axes.set(title="Error by layer: ||W − W_q|| / ||W||", xlim=(-0.8, len(names) - 0.2))
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.canvas.draw()
        _label_ends(axes, ends)
        return _svg(figure)


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str, int]]) -> None:
    """Name each line at its right end, pushed apart so that no two names overlap."""
    scale = 72 / axes.figure.dpi
    heights = [axes.transData.transform((0, y))[1] * scale for y, *_ in ends]
    places = spread(heights, 10.5)
    for (y, name, color, x), height, place in zip(ends, heights, places, strict=True):
        line = dict(arrowstyle="-", color=color, alpha=0.5, linewidth=0.6, shrinkA=0, shrinkB=1)
        axes.annotate(
            name, (x, y), (22, place - height), textcoords="offset points", va="center", fontsize=8.5, arrowprops=line,
            annotation_clip=False,
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the same order, each as near to where it was as the others allow.

    >>> spread([0.0, 1.0, 30.0], 10.0)
    [-4.5, 5.5, 30.0]
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[tuple[int, float]] = []  # isotonic regression of place - rank * gap: (members, their mean)
    for rank, i in enumerate(order):
        count, mean = 1, places[i] - rank * gap
        while groups and groups[-1][1] > mean:
            more, other = groups.pop()
            count, mean = count + more, (count * mean + more * other) / (count + more)
        groups.append((count, mean))
    levels = [mean for count, mean in groups for _ in range(count)]
    found = {i: level + rank * gap for rank, (i, level) in enumerate(zip(order, levels, strict=True))}
    return [found[i] for i in range(len(places))]


def _short(fqn: str) -> str:
    """ "3 q_proj" of "model.layers.3.self_attn.q_proj.weight"."""
    names = [name for name in fqn.split(".") if name != "weight"]
    numbers = [name for name in names if name.isdigit()]
    return " ".join([*numbers[:1], names[-1]])


# -- the result table as a picture ------------------------------------------------------------------------------------


def picture(evaluations: Sequence[Evaluation], title: str, caption: str, path: str) -> None:
    """Write the result table as a PNG, light on purpose: it is looked at on white pages and dark ones."""
    plt = _pyplot()
    rows = list(evaluations)
    columns = ("", "scheme", "bits", "MB", "smaller", "perplexity", "change", "KL", "same top")
    at = (0.018, 0.117, 0.395, 0.535, 0.61, 0.70, 0.785, 0.915, 0.985)
    first = evaluations[0]
    body = [("bf16", "original", "16.00", first.bytes_before, "1.00×", first.quality.original_perplexity, "", None, "")]
    body += [
        (one.name, one.scheme, f"{one.bits:.2f}", one.bytes_after, f"{one.bytes_before / one.bytes_after:.2f}×",
         one.quality.perplexity, f"{100 * (one.quality.ratio - 1):+.1f} %", one.quality.kl, f"{100 * one.quality.top1:.1f} %")
        for one in rows
    ]  # fmt: skip
    height = 0.36 * (len(body) + 1) + 1.45
    with plt.rc_context({"font.family": "sans-serif", "font.sans-serif": ["Liberation Sans", "Arial", "DejaVu Sans"]}):
        figure = plt.figure(figsize=(10.6, height), facecolor="#ffffff")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(0, height))
        axes.axis("off")
        axes.text(0.018, height - 0.36, title, fontsize=15, weight="bold", color="#1c2128", va="center")
        top = height - 0.82
        for name, x in zip(columns, at, strict=True):
            axes.text(x, top, name, fontsize=9.5, color="#5b6470", va="center", ha="left" if x < 0.2 else "right")
        axes.plot((0.018, 0.985), (top - 0.2, top - 0.2), color="#c9ced6", linewidth=0.8)
        worst = max((one.quality.kl for one in rows), default=1.0)
        for index, cells in enumerate(body):
            _picture_row(axes, top - 0.38 - 0.36 * index, cells, at, first.bytes_before, worst)
        axes.text(0.018, 0.3, textwrap.fill(caption, 150), fontsize=8.5, color="#5b6470", va="center", linespacing=1.4)
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _picture_row(axes: Any, y: float, cells: tuple[Any, ...], at: tuple[float, ...], full: int, worst: float) -> None:
    name, scheme, bits, count, smaller, perplexity, change, kl, top1 = cells
    _picture_bar(axes, at[3], y, count / full, "#a9c8e6")
    if kl:
        _picture_bar(axes, at[7], y, 1 + math.log10(kl / worst) / 4, "#efb998")
    shown = (bits, f"{count / 1e6:.2f}", smaller, f"{perplexity:.2f}", change, "" if kl is None else f"{kl:.4f}", top1)
    axes.text(at[0], y, name, fontsize=11, weight="bold", color="#1c2128", va="center_baseline")
    axes.text(at[1], y, scheme, fontsize=9.5, color="#5b6470", va="center_baseline", family="monospace")
    for text, x in zip(shown, at[2:], strict=True):
        axes.text(x, y, text, fontsize=11, color="#1c2128", va="center_baseline", ha="right")


def _picture_bar(axes: Any, right: float, y: float, share: float, color: str) -> None:
    """A bar of at most 0.06 of the width, left of a number that ends at `right`."""
    axes.barh(y, 0.06 * max(share, 0.0), left=right - 0.118, height=0.15, color=color)


# -- speed ------------------------------------------------------------------------------------------------------------


def speed_by_batch(timings: Sequence[Timing], title: str, path: str) -> None:
    """Write a figure of speed over bf16 against the number of tokens: a panel for each shape, a line for each scheme.

    Raises:
        LowpError: matplotlib is missing.
    """
    plt = _pyplot()
    shapes = list(dict.fromkeys(one.shape for one in timings))
    lines = lines_of(timings)
    columns = min(len(shapes), 3) or 1
    rows = max(1, -(-len(shapes) // columns))
    with plt.rc_context(_style("speed") | {"savefig.facecolor": "#ffffff"}):
        size = (4.2 * columns + 0.6, 3.0 * rows + 1.2)
        figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axes, shape in zip(grid.flat, shapes, strict=False):
            _speed_panel(axes, {name: [one for one in line if one.shape == shape] for name, line in lines.items()})
            axes.set(title=f"{shape[0]} × {shape[1]}", xlabel="tokens", ylabel="times bf16's speed")
        for axes in list(grid.flat)[len(shapes) :]:
            axes.axis("off")
        handles = [plt.Line2D([], [], color=_line_color(i), marker="o", markersize=3) for i in range(len(lines))]
        figure.legend(handles, list(lines), loc="outside lower center", ncols=min(len(lines), 4) or 1, fontsize=8.5)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _speed_panel(axes: Any, lines: Mapping[str, Sequence[Timing]]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.axhline(1.0, color=_INK, linewidth=0.9, alpha=0.6)
    for index, line in enumerate(lines.values()):
        points = sorted((one.batch, one.speed) for one in line if one.speed is not None)
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, color=_line_color(index), linewidth=1.2, marker="o", markersize=2.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _line_color(index: int) -> str:
    return _KINDS[index % len(_KINDS)]
