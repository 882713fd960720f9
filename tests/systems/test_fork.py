"""A fork of an algorithm: one file and its YAML, copied anywhere under another name."""

import json
import os
import subprocess
import sys
from pathlib import Path

from test_invocation import SMALL

import magpo
from magpo import files


def test_a_copy_outside_the_package_trains(tmp_path):
    source = Path(magpo.__file__).parent / "systems" / "mappo.py"
    fork, settings = tmp_path / "my_mappo.py", tmp_path / "my_mappo.yaml"
    fork.write_text(source.read_text())
    settings.write_text((files.configs() / "mappo.yaml").read_text())
    command = [sys.executable, str(fork), *SMALL, f"results_dir={tmp_path / 'results'}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "results" / "my_mappo" / "coordsum").glob("*/*")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {record["system"] for record in records} == {"my_mappo"}
    assert max(record["env_steps"] for record in records) == 128
