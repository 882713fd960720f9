"""Sinks that send a run's metrics to a tracking service: Neptune, Weights & Biases, MLflow."""

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from magpo.config.schema import LoggerConfig, flat
from magpo.files import UNREADABLE, write_aside
from magpo.report.measurements import Measurement, Run, scalars

PATIENCE_S = 60  # how long the end of a run waits without an answer
Rows = dict[int, dict[str, float]]  # values, by environment steps and name
T = TypeVar("T")


class Tracked(NamedTuple):
    """A member, as a tracker shows it."""

    id: str  # the same in a resumed run
    name: str  # "mappo rware/tiny-4ag seed 0"
    config: dict[str, Any]


class Tracker:
    """A sink that logs each member as a run of a service, in a group with this run's name.

    The client works in a thread of its own, so a server that does not answer delays neither
    training nor the files. `sent.json`, in a folder with the service's name, records up to which
    environment steps values were handed to the client; a resumed run sends only later ones. After a
    kill the service may lack some values, but has none twice.
    """

    def __init__(
        self,
        run: Run,
        run_id: str,
        logger: LoggerConfig,
        configs: Sequence[dict[str, Any]],
        earlier: Sequence[Measurement] = (),
    ) -> None:
        """Take the configuration of each member, and a resumed run's earlier measurements."""
        self.run, self.logger = run, logger
        task = f"{run.system} {run.suite}/{run.task}"
        self.members = [
            Tracked(f"{run_id}-{place}", f"{task} {member.name}", {**config, "seed": member.seed})
            for place, (member, config) in enumerate(zip(run.members, configs, strict=True))
        ]
        self.path = run.folder / type(self).__name__.lower() / "sent.json"
        self.queue: queue.SimpleQueue[Measurement | None] = queue.SimpleQueue()
        for measurement in earlier:
            self.queue.put(measurement)
        self.progress = 0  # the number of answers from the service
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._work, name="magpo-tracker", daemon=True)

    def begin(self) -> Iterator[Any]:
        """Begin or continue the service's run for each of `members`."""
        raise NotImplementedError

    def log(self, one: Any, rows: Rows) -> None:
        """Send values to one of the service's runs."""
        raise NotImplementedError

    def end(self, one: Any) -> None:
        """End one of the service's runs."""
        raise NotImplementedError

    def write(self, measurement: Measurement) -> None:
        if self.thread.ident is None:
            self.thread.start()
        if self.thread.is_alive():
            self.queue.put(measurement)
        self._raise_failure()

    def save(self) -> None:
        """Do nothing, because the client sends on its own."""

    def close(self) -> None:
        if self.thread.ident is not None:
            self.queue.put(None)
            before = None
            while self.thread.is_alive():
                if before == self.progress:
                    raise TimeoutError(f"the service did not answer for {PATIENCE_S} s")
                before = self.progress
                self.thread.join(PATIENCE_S)
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def _work(self) -> None:
        runs = []
        try:
            for one in self.begin():
                runs.append(one)
                self.progress += 1
        except Exception as error:  # no second try: a refusal can take minutes
            self.failure = error
            return
        while (measurement := self.queue.get()) is not None:
            try:
                self._send(runs, measurement)
            except Exception as error:
                self.failure = error
        try:
            for one in runs:
                self.end(one)
                self.progress += 1
        except Exception as error:
            self.failure = error

    def _send(self, runs: Sequence[Any], measurement: Measurement) -> None:
        """Send what was not sent yet; note it as sent first, so that a kill duplicates nothing."""
        steps, absolute = self._sent()
        if measurement.chunk is None:
            if absolute:
                return
            note, steps = (steps, True), -1  # the best policies are older
        else:
            note = (max(measurement.env_steps), False)
        if note[0] <= steps:
            return
        rows: list[Rows] = [{} for _ in runs]
        for place, env_steps, name, value in scalars(self.run, measurement):
            if value is not None and env_steps > steps:
                rows[place].setdefault(env_steps, {})[name] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_aside(self.path, lambda aside: aside.write_text(json.dumps(note)))
        for one, its_rows in zip(runs, rows, strict=True):
            self.log(one, its_rows)
            self.progress += 1

    def _sent(self) -> tuple[int, bool]:
        """Return the environment steps up to which values were sent, and whether the absolute
        metric was sent since."""
        try:
            steps, absolute = json.loads(self.path.read_bytes())
            return int(steps), bool(absolute)
        except UNREADABLE:
            return -1, False


class Neptune(Tracker):
    """Neptune: the project of the configuration or NEPTUNE_PROJECT; offline without a token."""

    def begin(self) -> Iterator[Any]:
        import neptune

        os.environ.setdefault("NEPTUNE_DATA_DIRECTORY", str(self.run.folder / "neptune"))
        captured = ("stdout", "stderr", "hardware_metrics", "traceback")
        for member in self.members:
            one = neptune.init_run(
                project=self.logger.neptune_project,
                custom_run_id=member.id,
                mode="async" if "NEPTUNE_API_TOKEN" in os.environ else "offline",
                name=member.name,
                tags=self.logger.tags,
                source_files=[],
                git_ref=False,
                **{f"capture_{what}": False for what in captured},
            )
            one["sys/group_tags"].add([self.run.name])
            one["config"] = neptune.utils.stringify_unsupported(member.config)
            yield one

    def log(self, one: Any, rows: Rows) -> None:
        for step, values in rows.items():
            for name, value in values.items():
                one[name].append(value, step=step)

    def end(self, one: Any) -> None:
        one.stop()


class WandB(Tracker):
    """Weights & Biases: the project WANDB_PROJECT, or magpo; offline unless logged in."""

    def begin(self) -> Iterator[Any]:
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        online = wandb.login(prompt=False, verify=False)
        disabled = os.environ.get("WANDB_MODE") == "disabled"
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            finish_timeout=PATIENCE_S,
            x_disable_meta=True,  # it holds the command line
            x_disable_stats=True,
            x_save_requirements=False,
        )
        for member in self.members:
            yield wandb.init(
                project=os.environ.get("WANDB_PROJECT", "magpo"),
                id=member.id,
                name=member.name,
                group=self.run.name,
                tags=self.logger.tags,
                config=member.config,
                dir=self.run.folder,
                mode=None if online or disabled else "offline",
                reinit="create_new",
                resume="allow",
                settings=settings,
            )

    def log(self, one: Any, rows: Rows) -> None:
        for step, values in rows.items():
            if any(name.startswith("absolute/") for name in values):
                one.summary.update(values)  # a history cannot go back to earlier steps
            else:
                one.log(values, step=step)

    def end(self, one: Any) -> None:
        one.finish()


class MLflow(Tracker):
    """MLflow: the store MLFLOW_TRACKING_URI, or `mlflow.db` beside the results of all systems; the
    experiment MLFLOW_EXPERIMENT_NAME, or magpo."""

    def begin(self) -> Iterator[str]:
        import mlflow
        from mlflow.entities import Param

        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        results = [*self.run.folder.resolve().parents][:4][-1]  # of <system>/<suite>/<task>/<run>
        local = f"sqlite:///{quote(str(results))}/mlflow.db"
        self.client = mlflow.MlflowClient(None if mlflow.is_tracking_uri_set() else local)
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "magpo"))
        for member in self.members:
            mine = f"tags.`magpo.member` = '{member.id}'"
            if found := self.client.search_runs([experiment], mine, max_results=1):
                one = found[0].info.run_id
                self.client.update_run(one, status="RUNNING")
            else:
                tags = {"magpo.member": member.id, "magpo.run": self.run.name}
                tags |= dict.fromkeys(self.logger.tags, "")
                one = self.client.create_run(experiment, None, tags, member.name).info.run_id
                values = flat(member.config).items()
                params = [Param(re.sub(r"[^\w./ -]", "_", key), str(v)) for key, v in values]
                for part in _parts(params, 100):
                    self.client.log_batch(one, params=part)
            yield one

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(self.client.create_experiment(name))
        except MlflowException:  # the experiment exists
            if (found := self.client.get_experiment_by_name(name)) is None:
                raise
            return str(found.experiment_id)

    def log(self, one: Any, rows: Rows) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, step)
            for step, values in rows.items()
            for name, value in values.items()
        ]
        for part in _parts(metrics, 1000):
            self.client.log_batch(one, metrics=part)

    def end(self, one: Any) -> None:
        self.client.set_terminated(one)


# By the key of `LoggerConfig`, which also names the client's module and magpo's extra.
TRACKERS = {"neptune": Neptune, "wandb": WandB, "mlflow": MLflow}


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the items in parts of at most `size`, because MLflow limits requests."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
