"""`magpo.envs.check`: its errors name every rule that a user's environment breaks."""

import dataclasses

import jax.numpy as jnp
import pytest

from magpo import envs
from magpo.types import Observation, StepType, TimeStep, restart

N, A, F, LIMIT = 3, 4, 2, 5


@dataclasses.dataclass(frozen=True)
class Walk:
    """A correct environment, unless `wrong` names the rule that it breaks."""

    wrong: str = ""
    name: str = "own/walk"
    num_agents: int = N
    action_dim: int = A
    action_kind: str = "discrete"
    time_limit: int = LIMIT
    truncates: bool = False
    headline: str = "distance"

    def observe(self, state):
        view = jnp.concatenate([jnp.eye(N), jnp.zeros((N, F))], axis=1)
        mask = jnp.ones((N, A), bool)
        if self.wrong == "one_agents_mask":
            mask = mask[0]
        if self.wrong == "no_legal_action":
            mask = mask & (state["steps"] < 2)
        count = jnp.int32(0) if self.wrong == "stopped_clock" else state["steps"]
        return Observation(view, mask, count)

    def reset(self, key):
        state = {"steps": jnp.int32(0), "place": jnp.zeros(N)}
        first = restart(N, self.observe(state), {"distance": jnp.float32(0)})
        if self.wrong == "starts_mid_episode":
            first = first._replace(step_type=jnp.int8(StepType.MID))
        return state, first

    def step(self, state, action):
        state = {"steps": state["steps"] + 1, "place": state["place"] + action}
        last = state["steps"] == LIMIT + (self.wrong == "too_long")
        reward = (action > 0).astype(jnp.float32)
        metrics = {"distance": state["place"].sum()}
        step_type = jnp.where(last, StepType.LAST, StepType.MID).astype(jnp.int8)
        discount = 1.0 - last.astype(jnp.float32)
        if self.wrong == "team_reward":
            reward = reward.mean()
        if self.wrong == "integer_reward":
            reward = (action > 0).astype(jnp.int32)
        if self.wrong == "bool_discount":
            discount = ~last
        if self.wrong == "wide_step_type":
            step_type = step_type.astype(jnp.int32)
        if self.wrong == "metric_only_in_step":
            metrics["steps"] = state["steps"]
        if self.wrong == "state_dtype_changes":
            state["place"] = state["place"].astype(jnp.int32)
        if self.wrong == "no_timestep":
            return state
        return state, TimeStep(step_type, reward, discount, self.observe(state), metrics)


WRONG = {
    "team_reward": r"step: reward must be float32\[3\], .* not float32\[\]",
    "integer_reward": r"step: reward must be float32\[3\], .* not int32\[3\]",
    "bool_discount": r"step: discount must be float32\[\], .* not bool\[\]",
    "wide_step_type": r"step: step_type must be int8\[\], .* not int32\[\]",
    "one_agents_mask": r"reset: observation.action_mask must be bool\[3, 4\], .* not bool\[4\]",
    "metric_only_in_step": r"step: metrics\['steps'\] must be nothing, .*, not int32\[\]",
    "state_dtype_changes": r"step: state\['place'\] must be float32\[3\], .* not int32\[3\]",
    "no_timestep": "step must return a state and a TimeStep",
    "too_long": "no episode may be longer than time_limit = 5",
    "no_legal_action": "action_mask must leave every agent a legal action",
    "stopped_clock": "step_count must be the number of steps since reset",
    "starts_mid_episode": r"reset: step_type must be 0 \(FIRST\)",
}


def test_a_correct_environment_passes():
    envs.check(Walk())


@pytest.mark.parametrize("wrong", WRONG)
def test_each_broken_rule_is_reported(wrong):
    with pytest.raises(ValueError, match=rf"^Walk: .*{WRONG[wrong]}") as error:
        envs.check(Walk(wrong))
    lines = str(error.value).split("\n")
    assert len(lines) <= 2  # one for reset, one for step


def test_wrong_attributes_are_reported():
    with pytest.raises(ValueError, match=r"headline must be one of .*distance, not 'win_rate'"):
        envs.check(Walk(headline="win_rate"))
    with pytest.raises(ValueError, match=r"time_limit must be a whole number, at least 1, not 2.5"):
        envs.check(Walk(time_limit=2.5))
    with pytest.raises(ValueError, match="int: has no name\nint: has no num_agents\n"):
        envs.check(3)


@pytest.mark.parametrize(
    "task", ["coordsum/3x10-30", "lbf/8x8-2p-2f-coop", "mpe/simple_spread_3ag"]
)
def test_library_environments_pass(task):
    envs.check(envs.make(task, global_state=True))
