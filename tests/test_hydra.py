"""Independence of `config.load` and a user's own Hydra application from each other."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import hydra
from hydra.core.global_hydra import GlobalHydra

from magpo import config

OVERRIDES = ["env=coordsum/3x10-30", "system.delta=1.2", "budget=quick"]
APPLICATION = """
import hydra
from hydra.core.hydra_config import HydraConfig
from magpo import config

@hydra.main(config_path=None, version_base="1.3")
def main(own):
    run = config.load("magpo", ["env=coordsum/3x10-30", f"system.delta={own.delta}"])
    print(run.algorithm.hyper.delta, HydraConfig.get().runtime.cwd)

main()
"""
SESSION = """
from magpo import config
print(config.load("magpo", ["env=coordsum/3x10-30", "system.delta=1.2"]).algorithm.hyper.delta)
"""


def test_config_loads_after_hydra_was_initialised(tmp_path):
    (tmp_path / "own.yaml").write_text("delta: 3\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        mine = GlobalHydra.instance().hydra
        run = config.load("magpo", OVERRIDES)
        assert GlobalHydra.instance().hydra is mine
        assert hydra.compose("own").delta == 3
    assert run == config.load("magpo", OVERRIDES)
    assert not GlobalHydra.instance().is_initialized()


def test_config_loads_in_several_threads():
    expected = [config.load("magpo", [*OVERRIDES, f"seeds=[{seed}]"]) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(
            lambda seed: config.load("magpo", [*OVERRIDES, f"seeds=[{seed}]"]), range(16)
        )
    assert list(found) == expected


def test_config_loads_inside_a_users_hydra_application(tmp_path):
    (tmp_path / "own.py").write_text(APPLICATION)
    command = [sys.executable, "own.py", "+delta=1.25"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"1.25 {tmp_path}\n"


def test_config_loads_without_a_main_file(tmp_path):
    """Run from standard input, where there is no file, as in a notebook."""
    done = subprocess.run(
        [sys.executable, "-"], cwd=tmp_path, input=SESSION, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "1.2\n"), done.stderr
    assert list(tmp_path.iterdir()) == []
