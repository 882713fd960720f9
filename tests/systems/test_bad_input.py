"""Invalid combinations of settings: a one-line error before anything compiles."""

import pytest

from magpo.config import load
from magpo.errors import ConfigError


@pytest.mark.parametrize(
    ("system", "overrides", "message"),
    [
        (
            "gpae_mappo",
            ["system.eta=0.9"],
            "system.eta must be greater than or equal to 1, not 0.9",
        ),
        ("gpae_mappo", ["system.reuse=0"], "system.reuse must be greater than 0, not 0"),
        (
            "gpae_mappo",
            ["system.advantage=gae"],
            "system.advantage=gae needs system.reuse=1, not 4",
        ),
        ("gpae_mappo", ["num_envs=2"], "must divide num_envs = 2, not 4"),
        (
            "magpo",
            ["system.delta=null", "system.delta_mode=adaptive"],
            "system.delta_mode=adaptive begins with system.delta, so not with null",
        ),
        ("magpo", ["system.delta=1"], "system.delta must be greater than 1, not 1"),
        ("magpo", ["network.guider.n_head=3"], "2 . n_head must divide embed_dim = 64, not 6"),
        ("mappo", ["num_envs=2", "system.num_minibatches=3"], "divide the number of sequences"),
        ("happo", ["num_envs=2", "system.num_minibatches=3"], "divide the number of sequences"),
        ("sable", ["network.n_head=3"], "2 . n_head must divide embed_dim = 64, not 6"),
        ("vdn", ["system.buffer_size=8"], "system.buffer_size must be at least 32, .* not 8"),
        ("mat", ["network.n_head=3"], "n_head must divide embed_dim = 64, not 3"),
        ("mat", ["network.memory=true"], "'network.memory' is a key of sable, not of mat"),
    ],
)
def test_an_invalid_combination_gives_a_one_line_error(system, overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(system, ["env=coordsum/3x10-30", "tuned=false", *overrides])
    assert "\n" not in str(error.value)
