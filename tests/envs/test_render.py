"""Pictures of episodes, and the guide's example of an environment."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from systems import cases

from magpo import commands, config, experiment, render
from magpo.systems import mappo

GUIDE = (Path(__file__).parents[2] / "docs/guides/environment.md").read_text()
TASKS = {
    "coordsum/3x10-30": 3,
    "lbf/2s-8x8-2p-2f-coop": 2,
    "connector/con-5x5x3a": 3,
    "mpe/simple_spread_3ag": 3,
    "rware/tiny-2ag": 2,
    "smax/1s1z": 2,
}


def run_render(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["render", *map(str, arguments)])
    commands.run(render.__doc__, render.main)
    return capsys.readouterr().out


@pytest.mark.parametrize("task", TASKS)
def test_a_gif_has_a_frame_for_each_state(task, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.gif"
    printed = run_render(monkeypatch, capsys, f"env={task}", "steps=3", f"out={out}")
    steps = int(re.search(r"(\d+) steps, return", printed)[1])
    picture = Image.open(out)
    assert 1 <= steps <= 3 and picture.n_frames == steps + 1
    frames = []
    for frame in range(picture.n_frames):
        picture.seek(frame)
        frames.append(picture.convert("RGB").tobytes())
    assert len(set(frames)) == steps + 1  # at least the step number and the reward change


def test_mabrax_is_rendered_as_a_brax_page(tmp_path, monkeypatch, capsys):
    out = tmp_path / "a.html"
    task = ("env=mabrax/hopper-3x1", "env.backend=spring")
    run_render(monkeypatch, capsys, *task, "steps=2", f"out={out}")
    assert "<html" in out.read_text()[:200].lower()


def test_a_trained_policy_is_rendered(tmp_path, monkeypatch, capsys):
    # As in systems/test_runs.py, so that it is compiled once.
    overrides = [*cases.short_run("mappo", "coordsum/3x10-30"), "env.observation=scaled"]
    overrides.append(f"results_dir={tmp_path}")
    folder = experiment.run(mappo, config.load("mappo", overrides)).folder
    out = tmp_path / "a.gif"
    printed = run_render(monkeypatch, capsys, f"run={folder}", "greedy=true", f"out={out}")
    steps = int(re.search(r"a\.gif: (\d+) steps, return", printed)[1])
    assert steps <= 9 and Image.open(out).n_frames == steps + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["env=lbf/8x8"], "did you mean"),
        (["env=lbf/8x8-2p-2f-coop", "run=here"], "give env="),
        (["steps=3"], "give env="),
        (["env=lbf/8x8-2p-2f-coop", "steps=0"], "steps must be greater than 0"),
        (["env=lbf/8x8-2p-2f-coop", "seed=4294967296"], "seed must be less than 4294967296"),
        (["env=lbf/8x8-2p-2f-coop", "env.fov=9"], "fov must be at most 8"),
        (["env=lbf/8x8-2p-2f-coop", "env.time_limit=2147483648"], "must be at most 2147483647"),
        (["env=lbf/8x8-2p-2f-coop", "env.task=x"], "unknown option of lbf/8x8-2p-2f-coop 'task'"),
        (["env=lbf/8x8-2p-2f-coop", "out=a.txt"], "ends in .gif"),
        (["env=mabrax/hopper-3x1", "out=a"], "ends in .html"),
        (["env=lbf/8x8-2p-2f-coop", "steps=1", "out=/proc/a.gif"], "No such file"),
        (["run=nowhere"], "no run there"),
    ],
)
def test_bad_requests_give_a_one_line_error(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["render", *arguments])
    with pytest.raises(SystemExit) as stop:
        commands.run(render.__doc__, render.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err


def test_the_guides_environment_trains(tmp_path):
    (tmp_path / "rendezvous.py").write_text(re.search(r"```python\n(.*?)```", GUIDE, re.S)[1])
    short = [
        *("env=ring/rendezvous", "env.size=3", "budget=quick", "num_envs=4", "rollout_length=16"),
        *("total_steps=192", "num_evaluations=3", "network.guider.embed_dim=16"),
        *("network.learner.hidden_dim=16", "logger.plot=false", "absolute_metric=false"),
    ]
    command = [sys.executable, "-m", "magpo.systems.magpo", "import=rendezvous.py", *short]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "results/magpo/ring/rendezvous").glob("*/metrics.jsonl"))
    wrong = [*command[:4], "env=ring/rendezvous", "env.sise=3"]
    done = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "did you mean 'env.size'" in done.stderr
