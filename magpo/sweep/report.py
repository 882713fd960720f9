"""The output of a sweep: a table, best.yaml, history.png and importances.png."""

import sys
import warnings
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from magpo import config as configuration
from magpo import tables
from magpo.config.members import short_key
from magpo.files import write_aside

RUNNING, COMPLETE, FAIL = TrialState.RUNNING, TrialState.COMPLETE, TrialState.FAIL


def best(study: optuna.Study) -> FrozenTrial | None:
    """Return the first complete trial with the highest value, or None."""
    found = study.get_trials(deepcopy=False, states=(COMPLETE,))
    return max(found, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)


def table(study: optuna.Study, trials: list[FrozenTrial]) -> Table:
    """Return a table of these trials of a study; the best one is bold."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    shown = tables.plain(["trial", "state", "value", *map(short_key, names), "run"])
    top = best(study)
    for trial in trials:
        cells = [_text(trial.params[n]) if n in trial.params else "" for n in names]
        style = "bold" if top and trial.number == top.number else ""
        run = trial.user_attrs.get("run", "")
        shown.add_row(str(trial.number), _state(trial), _value(trial), *cells, run, style=style)
    return shown


def _text(value: object) -> str:
    return "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _state(trial: FrozenTrial) -> str:
    word = trial.state.name.lower().replace("fail", "failed")
    return f"{word}: {tables.printable(str(e))}" if (e := trial.user_attrs.get("error")) else word


def _value(trial: FrozenTrial) -> str:
    """Return a trial's value, or its last evaluation while it trains."""
    seen = trial.intermediate_values
    value = trial.value if trial.value is not None else seen[max(seen)] if seen else None
    return "" if value is None else f"{value:.3f}"


class Display:
    """A display of running and best trials on a terminal; elsewhere, a line per ended trial."""

    def __init__(self, study: optuna.Study, total: int, rows: int = 12) -> None:
        self.study, self.total, self.rows = study, total, rows
        self.console = Console(highlight=False, markup=False, emoji=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.ended = {t.number for t in study.trials if t.state.is_finished()}
        if self.ended:
            self.console.print(f"continues after {len(self.ended)} of {total} trials")

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def update(self) -> None:
        """Show the trials as they are now."""
        trials = self.study.get_trials(deepcopy=False)
        ended = [t for t in trials if t.state.is_finished()]
        if self.console.is_terminal:
            running = [t for t in trials if t.state is RUNNING]
            top = sorted(ended, key=lambda t: -inf if t.value is None else t.value, reverse=True)
            shown = table(self.study, [*running, *top[: self.rows]])
            shown.title = f"{len(ended)} of {self.total} trials"
            self.live.update(shown, refresh=True)
            return
        for trial in ended:
            if trial.number not in self.ended:
                values = ", ".join(f"{short_key(k)}={_text(v)}" for k, v in trial.params.items())
                line = f"trial {trial.number}: {_state(trial)} {_value(trial)}; {values}"
                self.console.print(line, soft_wrap=True)
                sys.stdout.flush()
        self.ended |= {t.number for t in ended}


def write_best(study: optuna.Study, folder: Path, headline: str) -> Path | None:
    """Write best.yaml, a file for configs/tuned_values/<system>/<suite>/<task>.yaml."""
    trial = best(study)
    if trial is None:
        return None
    said = f"# Found by python -m magpo.sweep: trial {trial.number} of {len(study.trials)}, "
    said += f"{headline} {trial.value:.6g}, {trial.user_attrs.get('run', '')}\n"
    text = said + yaml.safe_dump(configuration.nested(trial.params), sort_keys=False)
    path = folder / "best.yaml"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return path


def draw(study: optuna.Study, folder: Path, headline: str) -> list[Path]:
    """Draw history.png and, once two trials are complete, importances.png."""
    import matplotlib as mpl  # imported late, because it takes a second

    mpl.use("Agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    complete = study.get_trials(deepcopy=False, states=(COMPLETE,))
    several = len({trial.value for trial in complete}) > 1
    made: dict[str, Any] = {"history.png": plots.plot_optimization_history} if complete else {}
    if several:
        made["importances.png"] = plots.plot_param_importances
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, plot in made.items():
            figure = plot(study, target_name=headline.replace("_", " ")).figure
            save = partial(figure.savefig, format="png", dpi=150, bbox_inches="tight")
            write_aside(folder / name, save)
            pyplot.close(figure)
    return [folder / name for name in made]


def show(study: optuna.Study, folder: Path, headline: str) -> None:
    """Print the table of all trials, and write best.yaml and the plots."""
    tables.show_wide(table(study, study.get_trials(deepcopy=False)))
    written = [*filter(None, [write_best(study, folder, headline)]), *draw(study, folder, headline)]
    for path in written:
        print(path)
