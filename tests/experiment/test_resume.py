"""Resumed runs: the same bits and logs, or a one-line error that says why not."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from experiment.counting import HYPER, SEEDS, SYSTEM, K, records, run
from magpo.errors import ConfigError
from magpo.experiment import loop
from magpo.report.console import Console
from magpo.runs import checkpoint, folders, resume


def save_every_chunk(monkeypatch):
    offer = resume.Saver.offer

    def patient(self, *args):
        self.idle.wait()
        offer(self, *args)

    monkeypatch.setattr(resume.Saver, "offer", patient)


@pytest.fixture(autouse=True)
def _save_every_chunk(monkeypatch):
    save_every_chunk(monkeypatch)


def stop_after(monkeypatch, config, chunk):
    """Run until this chunk's evaluation is shown; return the run's folder."""
    update = Console.update

    def stop(self, measurement):
        update(self, measurement)
        if measurement.chunk == chunk:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(Console, "update", stop)
        run(config)
    return max(f.parent for f in Path(config.results_dir).rglob("run.json"))


def arrays(folder, chunk=K):
    path = folder / "checkpoints" / f"{chunk:08d}"
    meta = checkpoint.read_meta(path)
    return {
        f"{part}.{name}": array
        for part in ("state", "record")
        for name, array in checkpoint.load_named(path, meta, part).items()
        if name != "history.wall_s"
    }


def assert_same_logs(folder, other):
    def lines(folder):
        return [
            {k: v for k, v in record.items() if k not in ("run", "wall_s")}
            for record in records(folder)
            if not record["name"].startswith("time/")
        ]

    def episodes(folder):
        text = (folder / "marl_eval.json").read_text()
        return json.loads(text, object_hook=lambda d: {**d, "elapsed_time": 0})

    assert lines(folder) == lines(other)
    assert episodes(folder) == episodes(other)


@pytest.mark.parametrize("chunk", [1, 3, K])
def test_a_resumed_run_equals_the_uninterrupted_one(config, monkeypatch, chunk):
    whole = run(config)
    folder = stop_after(monkeypatch, config, chunk)
    last = checkpoint.checkpoints(folder / "checkpoints")
    assert [path.name for path in last[:1]] == [f"{chunk - 1:08d}"][: chunk > 1]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"half a li')
    resumed = run(config, resume=str(folder))
    assert resumed.folder == folder
    ours, theirs = arrays(folder), arrays(whole.folder)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert_same_logs(folder, whole.folder)
    walls = [measurement.wall_s for measurement in resumed.measurements]
    assert walls == sorted(walls)
    assert folders.status(folder) == "finished"
    np.testing.assert_array_equal(
        resumed.absolute.evaluation["episode_return"], whole.absolute.evaluation["episode_return"]
    )


def test_the_console_says_how_to_continue_and_where_a_run_resumed(config, monkeypatch, capsys):
    folder = stop_after(monkeypatch, config, 3)
    assert f" resume={folder}\n" in capsys.readouterr().out
    for place in ("at 48 steps ", "at 120 steps, where it had finished "):
        run(config, resume=str(folder))
        assert place in capsys.readouterr().out


def test_an_interrupted_run_saves_a_last_checkpoint(config, monkeypatch):
    folder = stop_after(monkeypatch, dataclasses.replace(config, checkpoint_share=1e-9), 4)
    names = [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]
    assert names == ["00000003", "00000001"]  # the first one is always due
    run(config, resume=str(folder))  # the log already had chunk 4
    assert_same_logs(folder, run(config).folder)


def test_a_run_without_a_checkpoint_restarts_with_the_same_config(config, monkeypatch):
    folder = stop_after(monkeypatch, config, 0)
    with pytest.raises(ConfigError, match=r"precision: float32, now bfloat16.*allow_changes=\["):
        run(config, resume=str(folder), precision="bfloat16")
    again = {"resume": str(folder), "precision": "bfloat16", "allow_changes": ("precision",)}
    assert_same_logs(run(config, **again).folder, run(config).folder)
    assert yaml.safe_load((folder / "config.yaml").read_text())["precision"] == "bfloat16"


def test_a_finished_run_without_checkpoints_is_left_alone(config):
    folder = run(config, keep=0).folder
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="finished, and has no checkpoint to continue from"):
        run(config, keep=0, resume=str(folder))
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_lost_records_of_a_log_are_reported(config, monkeypatch, capsys):
    folder = stop_after(monkeypatch, config, 4)
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    cut = b"".join(lines[:7]) + lines[7][:20]
    log.write_bytes(cut)
    stop_after(monkeypatch, dataclasses.replace(config, resume=str(folder)), 4)
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if "damaged" in line)
    newest = checkpoint.checkpoints(folder / "checkpoints")[0]
    missing = checkpoint.read_meta(newest)["log_bytes"] - len(cut)
    assert warning == f"warning: {log}: damaged lines: 1, missing bytes: {missing}"
    assert {record["env_steps"] for record in records(folder)} >= {0, 96}


def test_damaged_lines_of_a_log_are_counted(config, monkeypatch, capsys):
    folder = stop_after(monkeypatch, config, 4)
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for place, other in {2: b"\0", 5: b"[1]", 6: b'"name"', 9: b"{}", 11: b"\xff"}.items():
        lines[place] = other.ljust(len(lines[place]) - 1) + b"\n"
    log.write_bytes(b"".join(lines))
    run(config, resume=str(folder))
    assert f"warning: {log}: damaged lines: 5, missing bytes: 0\n" in capsys.readouterr().out


def test_a_removed_folder_is_recreated(config, monkeypatch, capsys):
    whole = run(config)
    update = Console.update

    def remove(self, measurement):
        update(self, measurement)
        if measurement.chunk == 3:
            self.run.folder.rename(self.run.folder.with_name("gone"))

    with monkeypatch.context() as patch:
        patch.setattr(Console, "update", remove)
        folder = run(config).folder
    assert (
        f"warning: {folder / 'metrics.jsonl'} was changed by another program"
        in capsys.readouterr().out
    )
    assert folders.status(folder) == "finished"
    assert_same_logs(folder, whole.folder)
    run(config, resume=str(folder))
    assert_same_logs(folder, whole.folder)


def test_a_run_resumed_from_inside_its_folder_keeps_its_name(config, monkeypatch):
    folder = stop_after(monkeypatch, config, 2)
    monkeypatch.chdir(folder)
    run(config, resume=".")
    assert {record["run"] for record in records(folder)} == {folder.name}


@pytest.mark.parametrize("named", [True, False])
def test_a_run_in_a_renamed_folder_keeps_its_name(config, monkeypatch, named):
    folder = stop_after(monkeypatch, config, 2)
    renamed = folder.rename(folder.with_name("renamed"))
    about = json.loads((renamed / "run.json").read_text())
    if not named:  # as in runs of earlier versions
        del about["name"]
        (renamed / "run.json").write_text(json.dumps(about))
    run(config, resume=str(renamed))
    names = {record["run"] for record in records(renamed)}
    assert names == ({folder.name} if named else {folder.name, "renamed"})


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "checkpoints", "config.yaml"])
def test_an_unwritable_file_is_refused_before_compiling(config, monkeypatch, name, chunk):
    folder = stop_after(monkeypatch, config, chunk)
    logger = dataclasses.replace(config.logger, tensorboard=True)
    if name == "tensorboard":
        (folder / name).write_text("")
    elif name == "config.yaml":

        def refuse(path, write):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(folders, "write_aside", refuse)
    elif name == "checkpoints":
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).write_text("")
    else:
        (folder / name).unlink()
        (folder / name).mkdir()
    monkeypatch.setattr(loop, "compile_programs", None)
    with pytest.raises(ConfigError, match=rf"{folder}/{name}.*: cannot write there: \w+"):
        run(config, resume=str(folder), logger=logger)


def test_only_the_newest_checkpoints_are_kept(config):
    folder = run(config, keep=3).folder
    names = [path.name for path in checkpoint.checkpoints(folder / "checkpoints")]
    assert names == [f"{chunk:08d}" for chunk in (K, K - 1, K - 2)]
    assert not (run(config, keep=0).folder / "checkpoints").exists()


def test_a_finished_run_can_be_extended(config):
    short = run(config, total_steps=config.steps_per_chunk * 3, num_evaluations=3)
    whole = run(config)
    changes = {"resume": str(short.folder)}
    with pytest.raises(ConfigError, match=r"num_evaluations: 3, now 5.*allow_changes=\["):
        run(config, **changes)
    changes["allow_changes"] = ("total_steps", "num_evaluations")
    with pytest.raises(ConfigError, match="must follow 24 steps, not 36"):
        run(config, **changes, total_steps=config.steps_per_chunk * 9)
    run(config, **changes)
    assert_same_logs(short.folder, whole.folder)
    saved = yaml.safe_load((short.folder / "config.yaml").read_text())
    assert saved["num_evaluations"] == K


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(config, monkeypatch, capsys):
    whole = run(config)
    folder = stop_after(monkeypatch, config, 4)
    newest, _ = checkpoint.checkpoints(folder / "checkpoints")
    (newest / "meta.json").write_bytes(b"{}")
    run(config, resume=str(folder))
    assert f"{newest}: meta.json is missing or damaged" in capsys.readouterr().err
    assert_same_logs(folder, whole.folder)

    for path in checkpoint.checkpoints(folder / "checkpoints"):
        (path / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"no checkpoint can be used: .*cannot be read"):
        run(config, resume=str(folder))


def test_an_unusable_checkpoint_is_never_used_later(config, monkeypatch):
    whole, folder = run(config).folder, stop_after(monkeypatch, config, 4)
    manifest = folder / "checkpoints/00000003/manifest.json"
    manifest.rename(folder / "away")
    again = dataclasses.replace(config, resume=str(folder), keep=1)
    stop_after(monkeypatch, again, 3)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"00000002", "00000003.unusable"}
    (folder / "away").rename(folder / "checkpoints/00000003.unusable/manifest.json")
    assert_same_logs(run(again).folder, whole)


def test_another_runs_checkpoint_is_refused(config, monkeypatch):
    folder, other = run(config).folder, run(config).folder
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(other / "checkpoints", folder / "checkpoints")
    with pytest.raises(ConfigError, match="belongs to another run"):
        run(config, resume=str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"seeds": SEEDS[::-1], "allow_changes": ("seeds",)},
            r"cannot change: seeds: \[3, 11, 4\], now \[4, 11, 3\]$",
        ),
        ({"precision": "bfloat16"}, "precision: float32, now bfloat16"),
        ({"num_envs": 2}, "cannot change: num_envs: 4, now 2$"),
    ],
)
def test_a_changed_config_is_refused_with_the_difference(config, change, message):
    folder = run(config).folder
    with pytest.raises(ConfigError, match=message):
        run(config, resume=str(folder), **change)
    assert folders.status(folder) == "finished"


def test_another_version_is_refused(config, monkeypatch):
    folder = run(config).folder
    monkeypatch.setattr(resume, "__version__", "9.0")
    with pytest.raises(ConfigError, match=r"with.magpo: .*, now 9.0"):
        run(config, resume=str(folder))
    run(config, resume=str(folder), allow_changes=("with.magpo",))


def test_a_setting_that_changes_shapes_cannot_change(config, monkeypatch):
    folder, init = run(config).folder, SYSTEM.init

    def other(setup, env, key):
        return init(setup, env, key)._replace(walked=jnp.zeros((4, setup.hyper.repeats)))

    monkeypatch.setattr(SYSTEM, "init", other)
    twice = dataclasses.replace(config.algorithm, hyper=dataclasses.replace(HYPER, repeats=2))
    message = r"cannot change: system.repeats: 1, now 2, because state has float32\[3, 4\] walked"
    for allowed in ((), ("system.repeats",)):
        with pytest.raises(ConfigError, match=message):
            run(config, resume=str(folder), algorithm=twice, allow_changes=allowed)


def test_a_refused_resume_changes_nothing(config):
    folder = run(config).folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for change in ({"num_envs": 2}, {"num_envs": 2, "allow_changes": ("num_envs",)}):
        with pytest.raises(ConfigError):
            run(config, resume=str(folder), **change)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resume_auto_takes_the_newest_unfinished_run_of_the_same_config(config, monkeypatch):
    finished = run(config, resume="auto").folder
    first, second = (stop_after(monkeypatch, config, 2) for _ in range(2))
    stop_after(monkeypatch, dataclasses.replace(config, precision="bfloat16"), 2)
    assert first != second
    assert run(config, resume="auto").folder == second
    assert run(config, resume="auto").folder == first
    assert run(config, resume="auto").folder not in (finished, first, second)


def test_listing_a_run_does_not_hide_it_from_resume_auto(config, monkeypatch):
    folder = stop_after(monkeypatch, config, 2)
    with folders._try_lock(folder, shared=True):  # as a listing does
        assert folders.status(folder) == "interrupted"
        assert folders.newest_unfinished(config) == folder
    with folders.working(folder), folders._try_lock(folder, shared=True) as free:
        assert not free
    (folder / ".lock").unlink()
    assert folders.status(folder) == "interrupted"
    assert not (folder / ".lock").exists()


def test_only_one_process_works_on_a_run(config, monkeypatch):
    folder = stop_after(monkeypatch, config, 2)
    with folders.working(folder):
        assert folders.status(folder) == "running"
        with pytest.raises(ConfigError, match="another process is at work"):
            run(config, resume=str(folder))
        assert run(config, resume="auto").folder != folder
    assert folders.status(folder) == "interrupted"
