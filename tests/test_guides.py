"""The guides against the code: their commands, messages and programs."""

import re
import shlex
from pathlib import Path

import pytest

from magpo import config
from magpo.errors import ConfigError
from magpo.sweep import __main__ as sweep
from magpo.sweep import space

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("guides/runs", "guides/members", "guides/sweeps", "guides/logger", "faq")
PLACEHOLDERS = re.compile(r"<|import=|--help")  # a folder's name, a file of the reader's own


def commands(page, program):
    """Return the complete commands of a page, split into words."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(rf"^(?:\w+=\S+ )*python -m ({program} .*)$", text, re.M)
    return [shlex.split(line, comments=True) for line in found if not PLACEHOLDERS.search(line)]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_are_accepted(page):
    found = commands(DOCS / f"{page}.md", r"magpo\.systems\.\w+")
    assert found
    for module, *overrides in found:
        if "--multirun" in overrides:  # check the first job of the sweep
            chosen = [o for o in overrides if not re.match("--|hydra", o)]
            overrides = [re.sub(r",(?![^[]*\]).*", "", text) for text in chosen]
        config.load(module.rpartition(".")[2], [o for o in overrides if o not in ("--cfg", "job")])


def test_the_searches_are_accepted():
    found = commands(DOCS / "guides/sweeps.md", r"magpo\.sweep")
    searches = [words for words in found if "--report" not in words]
    assert len(searches) >= 4
    for _, system, *arguments in searches:
        own = ("trials=", "parallel=", "worker=")
        searched, overrides = sweep.read_space(
            system, [text for text in arguments if not text.startswith(own)]
        )
        assert space.distributions(searched, config.load(system, overrides))


def test_overrides_from_other_libraries_give_the_quoted_errors():
    page = (DOCS / "migrating.md").read_text()
    rows = re.findall(r"^\| `(\S+)` \| `error: (.*)` \|$", page, re.M)
    assert len(rows) == 3
    for typed, answer in rows:
        with pytest.raises(ConfigError) as refused:
            config.load("mappo", ["env=lbf/2s-8x8-2p-2f-coop", typed])
        assert str(refused.value) == answer
