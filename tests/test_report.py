"""The HTML page about runs: what it says, and how a browser draws it."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from magpo.plot import interactive, page
from magpo.runs import listing

TASK = "lbf/2s-8x8-2p-2f-coop"
STEPS = (0, 1280, 2560)
FINALS = {0: 0.5, 1: 0.75, 2: 1.0, 3: 0.25, 4: 0.0}
EVIL = "<script>document.title='attacked'</script>"
GIF = bytes.fromhex("47494638396101000100800000ffffff00000021f90401000000002c00000000010001000002")
GIF += bytes.fromhex("02440100" + "3b")


def write(root, system, finals, *, name, task=TASK, absolute=None, status="finished", **changes):
    """Write a run whose curves rise linearly to `finals`, by seed."""
    folder = root / system / task / name
    folder.mkdir(parents=True)
    published = changes.pop("published", False)
    config = {
        "run": {"system": system, "env": task, "published": published, "imports": {}},
        "seeds": list(finals),
        "num_envs": 4,
        "rollout_length": 16,
        "num_evaluations": 2,
        "total_steps": 2600,
        "eval_episodes": 8,
        "results_dir": str(root),
        "system": {"actor_lr": 0.5} | changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"id": "x", "name": name, "status": status}))
    suite, _, short = task.partition("/")
    head = {"run": name, "system": system, "env": suite, "task": short}
    records = [
        {"seed": seed, "env_steps": step, "name": "eval/episode_return", "value": final * step}
        for step in STEPS
        for seed, final in finals.items()
    ]
    records = [record | {"value": record["value"] / STEPS[-1]} for record in records]
    records += [
        {"seed": seed, "env_steps": 2560, "name": "absolute/episode_return", "value": value}
        for seed, value in (absolute or {}).items()
    ]
    lines = (json.dumps(head | {"wall_s": 3725.0} | record) for record in records)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def add_checkpoint(folder):
    (folder / "checkpoints" / "00000001").mkdir(parents=True)
    versions = {"magpo": "0.1.0", "jax": "0.10.2", "devices": "2 x cpu"}
    meta = folder / "checkpoints" / "00000001" / "meta.json"
    meta.write_text(json.dumps({"with": versions}))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("report") / "results"
    absolute = {seed: final / 2 for seed, final in FINALS.items()}
    best = write(root, "mappo", FINALS, name="five", published=True, absolute=absolute)
    add_checkpoint(best)
    (best / "episode.gif").write_bytes(GIF)
    (best / "secret.gif").symlink_to(best / "config.yaml")
    write(root, "ctds", {0: 0.5, 3: 0.25}, name="two", status="interrupted")
    live = write(root, "ctds", {0: 0.125}, name="one", actor_lr=0.1, status="failed")
    with (live / "metrics.jsonl").open("a") as file:
        file.write('{"run": "one", "name": "eval/epi')  # still being written
    other = write(root, "mappo", {0: 0.5}, name="other", task="lbf/8x8-2p-2f-coop", own=EVIL)
    with (other / "metrics.jsonl").open("a") as file:
        file.write('\0\0"eval/\n')
    ring = write(root, "mappo", {0: 0.5}, name="ring", task="lbf/8x8-2p-2f-coop") / "config.yaml"
    ring.write_text(ring.read_text() + "list: &a [*a]\n")
    write(root, "happo", {0: 0.5}, name="evil", task=f"lbf/{EVIL.replace('/', '|')}", own=EVIL)
    write(root, f"m{EVIL.replace('/', '|')}", {0: 0.5, 1: 1}, name="evil2", task="lbf/x", own=1)
    write(root, f"m{EVIL.replace('/', '|')}", {0: 0.5}, name="evil3", task="lbf/x", own=EVIL)
    (write(root, "mat", {0: 0.5}, name="begun") / "metrics.jsonl").unlink()
    (write(root, "mat", {0: 0.5}, name="torn") / "run.json").write_text('{"status": "\\ud800"}')
    (write(root, "mat", {0: 0.5}, name="lost") / "config.yaml").write_text("run: [")
    return root


@pytest.fixture(scope="module")
def written(results):
    file = results.parent / "report.html"
    page.main(str(results), out=str(file))
    return file


class Tables(HTMLParser):
    """The rows of all tables, as lists of their cells' text."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.cell = [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def rows(file):
    """Return the page's rows, by their first cell and their number of cells."""
    text = re.sub(r"<script>.*?</script>", "", file.read_text(), flags=re.S)
    return {(row[0], len(row)): row for row in Tables(text).rows}


def curves(file):
    """Return the names of each figure's traces, if they have one."""
    found = re.findall(r'Plotly.newPlot\(\s*"curves-\d+",\s*(\[.*?\}\]),\s+\{', file.read_text())
    return [[trace["name"] for trace in json.loads(data) if "name" in trace] for data in found]


def test_every_run_is_listed_whatever_its_state(written):
    found = {name: row for (name, number), row in rows(written).items() if number == 10}
    shown = {name: (row[3], row[4], row[5], row[6], row[7]) for name, row in found.items()}
    assert shown.pop("run")
    assert shown == {
        "five": ("finished", "0, 1, 2, 3, 4", "2,560", "2,560", "1:02:05"),
        "two": ("interrupted", "0, 3", "2,560", "2,560", "1:02:05"),
        "one": ("failed", "0", "2,560", "2,560", "1:02:05"),
        "other": ("finished", "0", "2,560", "2,560", "1:02:05"),
        "ring": ("finished", "0", "2,560", "2,560", "1:02:05"),
        "evil": ("finished", "0", "2,560", "2,560", "1:02:05"),
        "evil2": ("finished", "0, 1", "2,560", "2,560", "1:02:05"),
        "evil3": ("finished", "0", "2,560", "2,560", "1:02:05"),
        "begun": ("finished", "0", "0", "2,560", "0:00:00"),
        "torn": ("?", "0", "2,560", "2,560", "1:02:05"),
        "lost": ("unknown", "-", "0", "0", "0:00:00"),
    }
    assert found["five"][8:] == ["2 x cpu", "magpo 0.1.0, jax 0.10.2"]
    assert found["two"][1:3] == ["ctds", TASK] and found["two"][8:] == ["-", "-"]


def test_scores_match_the_records_and_stand_beside_the_published_ones(written):
    found = rows(written)
    absolute = np.array([*FINALS.values()]) / 2
    system, score, interval, published, seeds, steps = found["MAPPO", 6]
    assert (system, seeds, steps) == ("MAPPO", "5", "2,560")
    assert score == f"{absolute.mean():.2f} ± {absolute.std(ddof=1):.2f}"
    low, high = map(float, interval.split(" to "))
    assert 0 <= low < 0.2 < absolute.mean() < 0.3 < high <= 0.5  # the bootstrap's
    assert published == "1.00 ± 0.00MAGPO, Table 1, 20M steps"
    assert found["CTDS (actor_lr=0.5)*", 6][1:] == [
        *("0.38 ± 0.18", "0.25 to 0.50 (range)"),  # the last evaluation: 0.5 and 0.25
        *("-", "2", "2,560"),
    ]
    assert found["CTDS (actor_lr=0.1)*", 6][1:4] == ["0.12", "-", "-"]
    assert found[TASK, 5][2] == "MAT"  # the highest, in the overview


def test_published_lines_are_drawn_only_for_the_published_game(written):
    (names,) = [names for names in curves(written) if any("published" in name for name in names)]
    assert names == [
        "CTDS (actor_lr=0.1), 1 seed",
        "CTDS (actor_lr=0.5), 2 seeds",
        "MAPPO, 5 seeds",
        "MAT, 1 seed",
        "published MAPPO (MAGPO, Table 1, 20M steps)",
    ]


def test_settings_in_which_runs_differ_are_listed(written):
    text, found = written.read_text(), rows(written)
    # Runs are in the order of their ids, which sort by time.
    assert found["setting", 6] == [
        "setting",
        "matbegun",
        "mappofive",
        "ctdsone",
        "mattorn",
        "ctdstwo",
    ]
    assert found["system.actor_lr", 6][1:] == ["0.5", "0.5", "0.1", "0.5", "0.5"]
    assert found["seeds", 6][1:] == ["[0]", "[0,1,2,3,4]", "[0]", "[0]", "[0,3]"]
    assert "results_dir" not in text and ("system.actor_lr", 3) not in found
    assert re.search(r"^num_envs = 4$", text, re.M)
    assert found["list", 3] == ["list", "-", "?"]


def test_problems_are_reported(written):
    text = written.read_text()
    assert "begun: no evaluation yet" in text
    assert "other/metrics.jsonl: line 4 is not a record" in text
    assert "lost: config.yaml is missing or cannot be read" in text


def test_names_are_escaped(written):
    text = written.read_text()
    assert EVIL not in text and EVIL.replace("/", "|") not in text
    assert "&lt;script&gt;document.title=" in text


def test_episodes_are_embedded_if_they_are_pictures(written, results, monkeypatch):
    text = written.read_text()
    assert len(re.findall(r'<img src="data:image/gif;base64,[\w+/=]+" alt=', text)) == 1
    best = results / "mappo" / TASK / "five"
    assert f"python -m magpo.render run={best} out={best}/episode.gif" in text
    monkeypatch.setattr(page, "LARGEST", 10)
    assert "mappo, five/episode.gif: too large for this page (43 bytes)" in page.render(
        listing.summaries(best), "x"
    )


def test_the_page_gives_commands_to_continue_or_play_a_run(written, results):
    commands = written.read_text().partition("Commands that")[2]
    assert f"python -m magpo.systems.ctds resume={results}/ctds/{TASK}/two\n" in commands
    assert f"python -m magpo.evaluate run={results}/mappo/{TASK}/five\n" in commands


def test_a_plugins_name_is_in_the_command(results):
    (summary,) = listing.summaries(results / "mappo" / TASK)
    run = page.read_run(
        summary._replace(settings={"run.imports.my own.py": "hash"}, folder=summary.folder)
    )
    assert page.command("evaluate", run).endswith("/five 'import=my own.py'")


def test_the_page_can_show_one_run_or_filtered_runs(results, tmp_path):
    out = tmp_path / "report.html"
    page.main(str(results / "mappo" / TASK / "five"), out=str(out))
    assert [name for name, number in rows(out) if number == 10] == ["run", "five"]
    assert "<h1>magpo runs: five</h1>" in out.read_text() and 'id="overview"' not in out.read_text()
    page.main(str(results), out=str(out), system="ctds", state="failed")
    assert [name for name, number in rows(out) if number == 10] == ["run", "one"]


def test_a_browser_draws_the_curves_without_a_network(written, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    arguments = [
        *(chromium, "--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"),
        *(f"--disable-{what}" for what in quiet),
        *(f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=20000", "--dump-dom"),
    ]
    done = subprocess.run(
        [*arguments, written.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"HOME": str(tmp_path)},
        timeout=300,
    )
    # The page's policy forbids requests, so each would be an error on the console.
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    body = done.stdout.partition("<body>")[2]
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', done.stdout)[1]
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert body.count("js-plotly-plot") == 3
    assert body.count('class="trace scatter') == 20
    drawn = re.findall(r'class="js-line"[^>]* d="M[^"h]+[LH][^"h]+"', body)  # h: in the legend
    assert len(drawn) == 20
    assert "published MAPPO" in body and "environment steps (per seed)" in body
    assert "<title>results: 11 runs</title>" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["missing"], "no such folder"),
        (["empty"], "no runs under"),
        (["results", "state=running"], "no running runs under"),
        (["results", "system=mapo"], "did you mean 'mappo'?"),
        (["results", "env=lbf/y"], "unknown task of these runs 'lbf/y'"),
        (["results", "tasks=x"], "unknown key 'tasks'"),
        (["results", "out=no/where.html"], "No such file or directory"),
        (["results", "out=empty"], "out=empty: is a folder"),
    ],
)
def test_bad_input_gives_a_one_line_error(
    arguments, line, results, tmp_path, error_of, monkeypatch
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "results").symlink_to(results / "mappo")
    monkeypatch.chdir(tmp_path)
    assert line in error_of(page, *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "results"}


@pytest.mark.parametrize("name", ["plotly.offline", "jinja2"])
def test_without_a_library_the_command_says_how_to_install_it(
    name, results, tmp_path, error_of, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    line = error_of(page, results)
    assert "is not installed: pip install 'magpo[report]'" in line and name.split(".")[0] in line
    assert list(tmp_path.iterdir()) == []


def test_each_seed_is_drawn_to_its_own_end(tmp_path):
    write(tmp_path, "mappo", {0: 0.5}, name="a")
    running = write(tmp_path, "mappo", {1: 1.0}, name="b") / "metrics.jsonl"
    running.write_text("".join(running.read_text().splitlines(keepends=True)[:2]))
    ((line,), _) = page._lines([page.read_run(run) for run in listing.summaries(tmp_path)])
    band, *seeds, mean = interactive._traces([line], {"MAPPO": "#123456"})
    assert [list(trace["x"]) for trace in seeds] == [[0, 1280, 2560], [0, 1280]]
    assert list(mean["x"]) == [0, 1280] and list(mean["y"]) == [0, 0.375]
    assert list(band["y"]) == [0, 0.25, 0.5, 0]
