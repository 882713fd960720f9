"""The evaluation curves of one task as an interactive figure in HTML."""

from collections.abc import Iterator, Sequence
from html import escape
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from numpy.typing import ArrayLike

from magpo import published
from magpo.plot import draw
from magpo.plot.draw import Colours
from magpo.plot.read import Line
from magpo.report import curve
from magpo.report.measurements import printed_name

GRID = "rgba(128,128,128,0.25)"  # visible on light and dark pages; page.html colours the text


def figure(lines: Sequence[Line], colours: Colours, name: str) -> str:
    """Return the curves of one task, for a page with plotly's script. `name` is an HTML id."""
    import plotly.io  # optional, and slow to import

    traces = [*_traces(lines, colours), *_references(lines, colours)]
    steps = {"title": {"text": "environment steps (per seed)"}, "tickformat": "~s"}
    metric = {"title": {"text": f"evaluation {draw.shown(lines[0].metric)}"}}
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "automargin": True}
    layout = {
        "template": "none",
        "height": 380 + 30 * sum("name" in trace for trace in traces),  # the legend is below
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 10, "r": 10, "t": 30, "b": 10},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
        "xaxis": axis | steps,
        "yaxis": axis | metric,
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    }
    return str(
        plotly.io.to_html(
            {"data": traces, "layout": layout},
            config={"displaylogo": False, "showSendToCloud": False},
            include_plotlyjs=False,
            full_html=False,
            div_id=name,
        )
    )


def _traces(lines: Sequence[Line], colours: Colours) -> Iterator[dict[str, Any]]:
    """Yield each line's band, seeds and mean, which the legend shows and hides together.

    A seed's curve ends at its own last evaluation; mean and band end at the last common one.
    """
    for line in lines:
        colour, label = to_hex(colours[line.label]), _text(line.label)
        low, high, meaning = curve.band(line.values)
        group = {"legendgroup": line.label, "showlegend": False}
        if meaning:
            around = np.concatenate([line.steps, line.steps[::-1]])
            yield (
                _trace(around, np.concatenate([low, high[::-1]]), colour, 0)
                | group
                | {
                    "fill": "toself",
                    "fillcolor": "rgba({},{},{},0.16)".format(*bytes.fromhex(colour[1:])),
                    "hoverinfo": "skip",
                }
            )
            for seed, of_seed in line.curves.items():
                x, y = zip(*sorted(of_seed.items()), strict=True)
                about = {"opacity": 0.5, "hovertemplate": _hover(label, f"seed {seed}")}
                yield _trace(x, y, colour, 1) | group | about
        seeds = draw.counted(len(line.curves), "seed")
        shown = f"mean of {seeds}" if meaning else f"seed {next(iter(line.curves))}"
        yield _trace(line.steps, line.values.mean(1), colour, 2.5 if meaning else 1.5) | {
            "mode": "lines" if len(line.steps) > 2 else "lines+markers",
            "legendgroup": line.label,
            "name": f"{label}, {seeds}",
            "hovertemplate": _hover(label, shown),
        }


def _references(lines: Sequence[Line], colours: Colours) -> Iterator[dict[str, Any]]:
    """Yield a dashed line for each published result."""
    last = max(step for line in lines for of_seed in line.curves.values() for step in of_seed)
    rows: dict[published.Row, Line] = {}
    for line in lines:
        if line.reference:
            rows.setdefault(line.reference, line)  # settings of one system share a row
    for row, line in rows.items():
        system = printed_name(row.system)
        text = _text(f"published {system} ({row.source}, {row.steps})")
        yield _trace([0, last], [row.mean] * 2, to_hex(colours[line.label]), 1.5, "dash") | {
            "name": text,
            "hovertemplate": f"{text}<br>%{{y:.4g}}<extra></extra>",
        }


def _trace(
    x: ArrayLike, y: ArrayLike, colour: str, width: float, dash: str = "solid"
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": np.asarray(x),
        "y": np.asarray(y, np.float32),
        "line": {"color": colour, "width": width, "dash": dash},
    }


def _hover(label: str, seeds: str) -> str:
    return f"{label}<br>{seeds}<br>%{{x:,}} steps: <b>%{{y:.4g}}</b><extra></extra>"


def _text(words: str) -> str:
    """Return words escaped for plotly, which interprets HTML, in lines that fit a phone."""
    return "<br>".join(map(escape, wrap(words, 44)))
