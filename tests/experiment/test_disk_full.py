"""A real file system that fills up while a run writes to it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import small

from magpo.runs import checkpoint

SHORT = [
    *small.MAPPO,
    *("total_steps=1280", "num_evaluations=20", "eval_episodes=2", "absolute_metric=false"),
]
TRAIN = (
    "from magpo import experiment; from magpo.runs import checkpoint; "
    "from magpo.systems import mappo; {}experiment.main(mappo)"
)
SCRIPT = """
mount -t tmpfs -o size=440k tmpfs {disk} || exit 99
"$@" > {out}/full.txt 2>&1
echo $? > {out}/full.code
cp -a {disk}/mappo {out}/full
mount -o remount,size=50M {disk}
"$@" > {out}/again.txt 2>&1
echo $? > {out}/again.code
cp -a {disk}/mappo {out}/again
"""


@pytest.fixture(
    params=["", "checkpoint._check_room = lambda *_: None; "], ids=["checked", "unchecked"]
)
def skip_check(request):
    """Return code that turns off the check for room before a checkpoint, or no code."""
    return request.param


@pytest.fixture
def results(skip_check, tmp_path):
    """Run on a disk with room for one checkpoint, enlarge the disk and resume the run."""
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    own = [] if os.geteuid() == 0 else ["--map-root-user", "--user"]
    train = [sys.executable, "-c", TRAIN.format(skip_check), *SHORT]
    train += [f"results_dir={disk}", "keep=9", "checkpoint_share=1", "resume=auto"]
    script = ["sh", "-c", SCRIPT.format(disk=disk, out=out), "-", *train]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    done = subprocess.run(["unshare", "--mount", *own, *script], capture_output=True, check=False)
    if not (out / "full.code").exists():
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode()}")
    return out


def output_and_code(out, name):
    return (out / f"{name}.txt").read_text(), int((out / f"{name}.code").read_text())


def test_a_full_disk_is_reported_and_leaves_intact_checkpoints(results, skip_check):
    printed, code = output_and_code(results, "full")
    assert code == 1
    assert printed.count("No space left on device; training continues") >= 1
    assert "1,280 of 1,280 steps" in printed
    assert "error: not everything could be written: " in printed
    assert skip_check or "Traceback" not in printed  # tensorstore prints some when cut short
    (folder,) = (results / "full").glob("*/*/*")
    found = checkpoint.checkpoints(folder / "checkpoints")
    assert found
    for path in found:
        checkpoint.read_meta(path)
    assert not list((folder / "checkpoints").glob(".*"))

    printed, code = output_and_code(results, "again")
    assert code == 0, printed
    (folder,) = (results / "again").glob("*/*/*")
    assert checkpoint.checkpoints(folder / "checkpoints")[0].name == "00000020"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r["env_steps"] for r in records if r["name"] == "eval/episode_return"]
    assert steps == [64 * chunk for chunk in range(21)]
