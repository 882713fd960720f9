"""The smallest run of MAPPO, for tests of what happens around training."""

# An update takes 64 steps. Equal sizes share compiled programs through the cache.
MAPPO = (
    *("env=coordsum/3x10-30", "env.time_limit=5", "tuned=false", "num_envs=4", "rollout_length=16"),
    *("network.actor.hidden_dim=8", "network.critic.hidden_dim=8", "logger.plot=false"),
)
