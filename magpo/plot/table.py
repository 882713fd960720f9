"""Tables of the scores: rows for CSV files, and LaTeX."""

from collections.abc import Iterator, Mapping, Sequence

from magpo.plot.aggregate import AGGREGATES, Interval
from magpo.plot.read import Line
from magpo.report import curve
from magpo.report.console import sample_std

DIGITS = 2  # as the papers print; cells equal to so many are all bold
LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "#$%&_{}"},
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    }
)


def summary(lines: Sequence[Line]) -> list[dict[str, object]]:
    """Return a row for each system and task: its score beside the published one."""
    rows: list[dict[str, object]] = []
    for line in sorted(lines, key=lambda line: (line.suite, line.task)):
        low, high, meaning = curve.band(line.score[None])
        row, std = line.reference, sample_std(line.score)
        rows.append(
            {
                "system": line.label,
                "suite": line.suite,
                "task": line.task,
                "metric": line.metric,
                "scores": "last evaluation" if line.absolute is None else "absolute metric",
                "seeds": len(line.score),
                "env_steps": line.steps[-1],
                "mean": f"{line.score.mean():.6g}",
                "std": "" if std is None else f"{std:.6g}",
                "low": f"{low[0]:.6g}" if meaning else "",
                "high": f"{high[0]:.6g}" if meaning else "",
                "low_to_high": meaning,
                "published_mean": f"{row.mean:.6g}" if row else "",
                "published_std": row.std if row else "",
                "published_in": f"{row.source}, {row.steps}" if row else "",
            }
        )
    return rows


def aggregates(suite: str, found: Mapping[str, Interval]) -> Iterator[dict[str, object]]:
    """Yield a row for each of a suite's systems and aggregates."""
    for label, interval in found.items():
        for name, *numbers in zip(AGGREGATES, *interval, strict=True):
            edges = zip(("point", "low", "high"), numbers, strict=True)
            row = {edge: f"{number:.6g}" for edge, number in edges}
            yield {"suite": suite, "system": label, "aggregate": name, **row}


def latex(lines: Sequence[Line]) -> Iterator[str]:
    """Yield the lines of a booktabs table: a row for each task, with the published results below,
    and a column for each system."""
    labels = list(dict.fromkeys(line.label for line in lines))
    metrics = " or ".join(sorted({line.metric for line in lines}))
    yield f"% {metrics}, mean and sample standard deviation over seeds, the largest mean in bold."
    yield "% Needs \\usepackage{booktabs}."
    yield f"\\begin{{tabular}}{{ll{'r' * len(labels)}}}"
    yield "\\toprule"
    yield cells("Task", "", *(label.translate(LATEX) for label in labels))
    for suite, task in sorted({(line.suite, line.task) for line in lines}):
        yield "\\midrule"
        same = {line.label: line for line in lines if (line.suite, line.task) == (suite, task)}
        sizes = sorted({len(line.score) for line in same.values()})
        seeds = " to ".join(map(str, sizes[:: len(sizes) - 1 or 1]))
        best = max(round(line.score.mean(), DIGITS) for line in same.values())
        ours = (scored(same[label], best) if label in same else "--" for label in labels)
        name, noun = f"{suite}/{task}".translate(LATEX), "seed" if seeds == "1" else "seeds"
        yield cells(name, f"ours, {seeds} {noun}", *ours)
        rows = {label: line.reference for label, line in same.items() if line.reference}
        for source in dict.fromkeys((row.source, row.steps) for row in rows.values()):
            theirs = (
                f"${printed(row.mean, row.std)}$"
                if (row := rows.get(label)) and (row.source, row.steps) == source
                else "--"
                for label in labels
            )
            yield cells("", ", ".join(source), *theirs)
    yield "\\bottomrule"
    if any(line.absolute is None for line in lines):
        note = "\\footnotesize $^*$ last evaluation, without an absolute metric"
        yield f"\\multicolumn{{{2 + len(labels)}}}{{l}}{{{note}}} \\\\"
    yield "\\end{tabular}"


def cells(*texts: str) -> str:
    """Return a row of LaTeX."""
    return " & ".join(texts) + " \\\\"


def scored(line: Line, best: float) -> str:
    """Return a system's cell, bold if its score is `best`."""
    text = printed(line.score.mean(), sample_std(line.score))
    text = f"\\mathbf{{{text}}}" if round(line.score.mean(), DIGITS) == best else text
    return f"${text}{'^*' if line.absolute is None else ''}$"


def printed(mean: float, std: float | None) -> str:
    """Return a mean, and the standard deviation if there is one, for LaTeX's math mode."""
    return f"{mean:.{DIGITS}f}" + ("" if std is None else rf" \pm {std:.{DIGITS}f}")
