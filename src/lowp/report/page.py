"""One HTML page that holds everything: the summary, the plots, each layer's figures, what each model writes.

Nothing is fetched: styles and plots are in the page, fonts are the reader's. It follows the reader's light or dark scheme, and
on paper it is light with every layer shown. The text of the page is `page.html`, a jinja2 template.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import LowpError, MisfitError
from . import plots
from .layers import Evaluation


def page(
    evaluations: Sequence[Evaluation],
    *,
    title: str,
    caption: str = "",
    facts: Mapping[str, str] | None = None,
    texts: Mapping[str, str] | None = None,
    prompt: str = "",
) -> str:
    """The page's HTML.

    Args:
        evaluations: of models that share one original, in the order of the table.
        title, caption: above and below the summary. facts: lines under the title, such as the text and the device.
        texts: what each model wrote after `prompt`, by name.

    Raises:
        MisfitError: nothing to show.
    """
    if not evaluations:
        raise MisfitError("a report wants at least one model, got none.")
    drawings = [
        plots.perplexity_by_size(evaluations),
        plots.kl_by_size(evaluations),
    ]
    return _template().render(
        title=title,
        caption=caption,
        facts={**(facts or {}), "torch": torch.__version__, "date": datetime.date.today().isoformat()},
        rows=evaluations,
        original=evaluations[0],
        drawings=drawings,
        wide=[plots.bytes_by_layer(evaluations), plots.error_by_layer(evaluations)],
        texts=texts or {},
        prompt=prompt,
        largest_kl=max((one.quality.kl for one in evaluations), default=0.0),
    )


def _template() -> Any:
    try:
        import jinja2
    except ImportError:
        raise LowpError("the HTML report wants the package jinja2: pip install 'lowp[cli]'.") from None
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "mb": _mb,
        "figure": _figure,
        "percent": _percent,
        "shape": lambda shape: "×".join(map(str, shape)),
    }
    environment.globals |= {"bar": _bar, "log_bar": _log_bar}
    return environment.get_template("page.html")


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f}" if count >= 1e5 else f"{count / 1e6:.3f}"


def _figure(value: float, digits: int = 3) -> str:
    """A number for a person: fixed digits, or powers of ten where those would show zero."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10**-digits else f"{value:.1e}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _bar(part: float, whole: float) -> str:
    """The width of a bar in a table cell, in percent."""
    return f"{100 * min(max(part / whole, 0.0), 1.0):.1f}%" if whole > 0 and math.isfinite(part) else "0%"


def _log_bar(part: float, whole: float, decades: float = 4.0) -> str:
    """The same on a logarithmic scale that ends `decades` below the whole."""
    if part <= 0 or whole <= 0 or not math.isfinite(part / whole):
        return "0%"
    return _bar(1 + math.log10(part / whole) / decades, 1.0)
