"""Hyperparameter search: many trials side by side in one program.

usage: python -m magpo.sweep <system> env=<suite>/<task> [trials=40] [key=value ...]     search
       python -m magpo.sweep --report <folder> [storage=...]       print the table, draw the plots

Trials that differ only in floats of system.* train in one program. So the trials of a batch share
the counts, choices and sizes that the first of them draws. A trial's value is the headline
metric of its run, averaged over seeds: the absolute metric, or the last evaluation if
absolute_metric=false. The same command continues a sweep that was stopped or killed; a higher
number of trials extends it.

  trials=40            all trials of the study, including failed and pruned ones
  parallel=8           trials that are drawn and trained at once
  sampler=tpe          tpe | random | grid | cmaes
  space.<key>=...      a key's values instead of those in configs/sweep/<system>.yaml:
                       [1.1,1.5,2] a list | 0.9..1 a range | log:1e-5..1e-3 a logarithmic range
  prune=false          true: once five trials have finished, end trials whose best evaluation so far
                       is below their median; a run stops once all of its trials are pruned
  study=<folder>       default: results/sweep/<system>_<suite>_<task>; its name is the study's name
  storage=<place>      an Optuna storage: a database's URL or a journal's file; default: study.db in
                       the folder
  worker=0             a different number for each process that works on the same study

All other keys are those of the runs. A key set to one value is not searched. The folder contains
the runs, best.yaml (for configs/tuned_values), history.png and importances.png.
Needs Optuna: pip install 'magpo[sweep]'
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jax

from magpo import commands, experiment, plugins
from magpo import config as configuration
from magpo.config import compose
from magpo.config.schema import RunConfig
from magpo.contract import float_names
from magpo.errors import ConfigError
from magpo.runs import folders
from magpo.sweep import report as reports
from magpo.sweep import space as spaces
from magpo.sweep import study as studies
from magpo.sweep import training
from magpo.sweep.training import Search
from magpo.values import NonNegativeInt, PositiveInt, UserPath

# The keys that may differ between the workers of a study.
FREE = ("logger", "results_dir", "keep", "checkpoint_share", "platform", "seeds_per_batch")
OWN = ("results_dir", "resume", "allow_changes", "vary", "vary_in_step", "distributed")


def read_space(system: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the search space and the other overrides. Raises ConfigError."""
    _, found = compose.locate(plugins.system(system), None)
    space = (
        compose.read_option(found, "sweep", system)
        if compose.find(found, f"sweep/{system}")
        else {}
    )
    others = list[str]()
    for text in overrides:
        key, value = compose.parse(text)
        if key.partition(".")[0] in OWN:
            raise ConfigError(f"{key}: the sweep sets this key itself")
        if key.startswith("space."):
            space[key.removeprefix("space.")] = value
        elif text.startswith("import="):
            others.append(text)
        else:
            space.pop(key, None)
            others.append(text)
    if not space:
        raise ConfigError("nothing to search: write space.<key>=[a,b], low..high or log:low..high")
    return space, others


def facts(config: RunConfig, space: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that identify a study; a study with other facts is refused."""
    values = configuration.dump(config)
    return {k: v for k, v in values.items() if k not in FREE} | {"space": space}


def make_search(
    system: str, overrides: Sequence[str], config: RunConfig, study: str | None
) -> Search:
    """Return the `Search` that all trials share. Raises ConfigError."""
    module, task = plugins.system(system), config.env.name.replace("/", "_")
    return Search(
        module=module,
        system=system,
        overrides=tuple(overrides),
        data=frozenset(f"system.{k}" for k in float_names(get_type_hints(module.Config)["hyper"])),
        folder=Path(study or f"results/sweep/{system}_{task}"),
        env=experiment.make_env(config),
    )


@contextmanager
def at_work(folder: Path, worker: int) -> Iterator[None]:
    """Keep other processes from being this worker of the study. Raises ConfigError."""
    own = folder / f"worker-{worker}"
    with ExitStack() as stack:
        try:
            own.mkdir(exist_ok=True)
            stack.enter_context(folders.working(own))
        except (ConfigError, OSError) as error:
            raise ConfigError(f"{folder}: another process is its worker={worker}") from error
        yield


def main(
    *arguments: str,
    trials: PositiveInt = 40,
    parallel: PositiveInt = 8,
    sampler: Literal["tpe", "random", "grid", "cmaes"] = "tpe",
    prune: bool = False,
    study: UserPath | None = None,
    storage: str | None = None,
    worker: NonNegativeInt = 0,
    report: bool = False,
) -> None:
    """Search hyperparameters, or report on a study."""
    words = [text for text in arguments if "=" not in text]
    if len(words) != 1:
        what = "one study's folder" if report else "one system"
        raise ConfigError(f"needs {what}, not {' '.join(words) or 'none'}: see --help")
    if report:
        folder = Path(words[0]).expanduser()
        found = studies.load(folder, storage)
        reports.show(found, folder, found.user_attrs.get("headline", "value"))
        return
    jax.config.update("jax_platforms", "cpu")  # the accelerator is for the runs
    (system,) = words
    space, overrides = read_space(system, [text for text in arguments if "=" in text])
    config = configuration.load(system, overrides)
    distributions = spaces.distributions(space, config)
    studies.check_sampler(sampler, distributions)
    spaces.check_values(system, overrides, distributions)
    if sampler == "grid":
        trials = int(min(trials, studies.combinations(distributions)))
    search = make_search(system, overrides, config, study)
    found = studies.load(search.folder, storage, facts(config, space))
    found.set_user_attr("headline", search.env.headline)
    draw = partial(studies.batch, found, sampler, distributions, search.data)
    ask = partial(draw, worker=worker, size=parallel, trials=trials)
    with at_work(search.folder, worker), reports.Display(found, trials) as display:
        while batch := ask():
            if code := training.train_all(search, found, batch, parallel, prune, display.update):
                sys.exit(code)
            reports.write_best(found, search.folder, search.env.headline)
    reports.show(found, search.folder, search.env.headline)


if __name__ == "__main__":
    commands.run(__doc__, main)
