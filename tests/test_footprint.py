"""What is said of a run's memory."""

from experiment.test_devices import SMALL

from magpo import config
from magpo.report.console import Console
from magpo.report.measurements import Run


def test_too_much_is_said(tmp_path, capsys):
    run = config.load("magpo", SMALL)
    info = Run(tmp_path, "magpo", "a", "b", run.members, "episode_return", 1, "x")
    Console(info, run, 0).footprint(needed=3_000_000_000, available=2_000_000_000)
    printed = capsys.readouterr().out
    assert printed.startswith("memory: 3.00G of 2.00G bytes on each device\nwarning: that is too")
    Console(info, run, 0).footprint(needed=1, available=2)
    assert "warning" not in capsys.readouterr().out
