"""The estimate of a run's memory: exact if counted by hand, near XLA's for a real system."""

import jax
import jax.numpy as jnp
import pytest

from magpo import config, contract, envs, experiment
from magpo.hardware import devices, footprint
from magpo.report.console import Console
from magpo.report.measurements import Run
from magpo.systems import magpo as system_module

ROW = 4 * 1000  # bytes
SMALL = [
    *("env=coordsum/3x10-30", "env.time_limit=5", "tuned=false", "seeds=[0,1]", "num_envs=8"),
    *("rollout_length=16", "total_steps=512", "num_evaluations=2", "eval_episodes=4"),
    *("network.guider.embed_dim=8", "network.learner.hidden_dim=8"),
]


def peak(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return footprint.peak_bytes(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_a_value_lives_until_its_last_use():
    assert peak(lambda x: jnp.sin(jnp.cos(jnp.exp(x))), (1000,)) == 2 * ROW
    assert peak(lambda x: (y := jnp.exp(x)) + jnp.sin(jnp.cos(y)), (1000,)) == 3 * ROW


def test_a_loop_keeps_what_it_stacks_and_one_body():
    def loop(x):
        return jax.lax.scan(lambda c, _: (jnp.exp(c), jnp.sin(jnp.cos(c))), x, length=50)

    last, stacked, body = ROW, 50 * ROW, 3 * ROW
    assert peak(loop, (1000,)) == last + stacked + body


def test_a_called_functions_results_are_counted_once():
    assert peak(jax.jit(lambda x: jnp.exp(x)), (1000,)) == ROW


@pytest.fixture(scope="module")
def programs():
    def build(*overrides):
        run = config.load("magpo", [*SMALL, *overrides])
        algorithm = contract.algorithm(system_module)
        env = envs.make(run.env.name, **run.env.options)
        setup = experiment.make_setup(algorithm, env, run)
        built = experiment.build_programs(algorithm, setup, env, run)
        shapes = experiment.shapes_of(algorithm, built, run)
        traced = built.train_chunk.trace(shapes.state)
        return traced, footprint.estimate(traced, shapes.state, devices.layout(run).mesh)

    return build


def test_it_is_near_what_xla_allocates(programs):
    traced, estimate = programs()
    analysis = traced.lower().compile().memory_analysis()
    allocated = analysis.temp_size_in_bytes + 2 * analysis.argument_size_in_bytes
    assert 0.5 < estimate / allocated < 2


def test_seeds_in_batches_and_fewer_environments_need_less(programs):
    _, estimate = programs()
    assert programs("seeds_per_batch=1")[1] < 0.8 * estimate
    assert programs("num_envs=4")[1] < 0.8 * estimate


def test_too_much_is_said(tmp_path, capsys):
    run = config.load("magpo", SMALL)
    info = Run(tmp_path, "magpo", "a", "b", run.members, "episode_return", 1, "x")
    Console(info, run, 0).footprint(needed=3_000_000_000, available=2_000_000_000)
    printed = capsys.readouterr().out
    assert printed.startswith(
        "memory: about 3.00G of 2.00G bytes on each device\nwarning: that is too"
    )
    Console(info, run, 0).footprint(needed=1, available=2)
    assert "warning" not in capsys.readouterr().out
