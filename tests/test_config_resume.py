"""The configuration of a resumed run: read from its folder, with checked changes."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from magpo import config
from magpo.errors import ConfigError
from magpo.systems import magpo

SMALL = ("env=coordsum/3x10-30", "num_envs=8", "env.time_limit=7", "system.delta=1.2")


def read(file):
    return config.from_values(magpo, config.plain_values(file), file)


@pytest.fixture
def saved(tmp_path):
    """Make a run's folder that holds nothing but its config."""
    run = config.load("magpo", [*SMALL, "seeds=[3,1]", "budget=quick", "tuned=false"])
    text = yaml.safe_dump(config.dump(run))
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path, run


def test_a_dumped_config_is_read_back(saved):
    folder, run = saved
    assert read(folder / "config.yaml") == run


def test_resume_uses_the_configuration_of_the_run(saved):
    folder, run = saved
    assert config.load("magpo", [f"resume={folder}"]) == replace(run, resume=str(folder))
    changed = config.load(
        "magpo", [f"resume={folder}", "system.delta=1.3", "allow_changes=[system.delta]"]
    )
    assert changed.algorithm.hyper.delta == 1.3 and changed.allow_changes == ("system.delta",)
    assert config.differences(config.dump(run), config.dump(changed)) == {
        "system.delta": "1.2, now 1.3"
    }
    whole = [*SMALL, "seeds=[3,1]", "budget=quick", "tuned=false", f"resume={folder}"]
    assert config.load("magpo", whole) == replace(run, resume=str(folder))


def test_a_run_from_before_a_tracker_was_added_can_be_resumed(saved):
    folder, run = saved
    values = yaml.safe_load((folder / "config.yaml").read_text())
    del values["logger"]["wandb"], values["logger"]["mlflow"]
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    assert config.load("magpo", [f"resume={folder}"]) == replace(run, resume=str(folder))


def test_resume_expands_a_tilde(saved, monkeypatch):
    folder, run = saved
    monkeypatch.setenv("HOME", str(folder.parent))
    loaded = config.load("magpo", [f"resume='~/{folder.name}'"])
    assert loaded == replace(run, resume=str(folder))


def test_resume_may_change_logging(saved):
    folder, run = saved
    kept = "keep=5", "checkpoint_share=0.5"
    changed = config.load("magpo", [f"resume={folder}", "logger=tensorboard", *kept])
    assert changed.logger.tensorboard and (changed.keep, changed.checkpoint_share) == (5, 0.5)
    assert not config.differences(config.dump(run), config.dump(changed))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("system.delte=2", "unknown key 'system.delte': did you mean 'system.delta'"),
        ("env.time=3", "unknown key 'env.time'"),
        ("seeds.x=1", "unknown key 'seeds.x'"),
        ("num_envs=3", "num_minibatches must divide num_envs = 3"),
        ("system.delta=0.5", "system.delta must be greater than 1, not 0.5"),
        ("env=lbf/8x8-2p-2f-coop", "is a run on coordsum/3x10-30, not on lbf/8x8-2p-2f-coop"),
        (
            "allow_changes=[total_step]",
            "allow_changes: unknown key 'total_step': did you mean 'total_steps'",
        ),
        ("allow_changes=[with]", "allow_changes: unknown key 'with'"),
        ("+system.new=1", "unknown key 'system.new'"),
    ],
)
def test_resume_checks_changes(saved, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.load("magpo", [f"resume={saved[0]}", override])


def test_resume_from_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run there"):
        config.load("magpo", [f"resume={tmp_path}"])


def test_mutated_configs_are_refused_or_read_as_written(saved):
    """Read 200 files with odd values, lost lines or garbled lines, without a traceback."""
    folder, run = saved
    file, rng = folder / "config.yaml", random.Random(0)
    text, before = file.read_text(), config.dump(run)
    odd = ["null", "[]", "{}", "-1", "1e400", ".nan", "'${oc.env:HOME}'", "2020-01-01", "x: y"]
    odd += ["!!python/object/apply:os.system ['touch owned']", "*unknown", "'\\0'", "true", "''"]
    refused = 0
    for i in range(200):
        lines = text.splitlines()
        at = rng.randrange(len(lines))
        if i % 3 == 0:
            lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(odd)
        elif i % 3 == 1:
            del lines[at]
        else:
            middle = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:middle] + rng.choice("\t:-{[&*!%@\x00z9") + lines[at][middle:]
        file.write_text("\n".join(lines))
        try:
            found = read(file)
        except ConfigError:
            refused += 1
            continue
        shown_only = ("logger", "results_dir", "keep", "checkpoint_share")
        changed = {key for key in before if config.dump(found)[key] != before[key]}
        assert bool(config.differences(before, config.dump(found))) == bool(changed - {*shown_only})
    assert refused > 100
    assert not Path("owned").exists()
