"""The members of a run, each a seed with one setting of the varied hyperparameters."""

from collections.abc import Mapping, Sequence
from itertools import groupby, product
from typing import NamedTuple

Setting = dict[str, float | None]  # by dotted key: {"system.delta": 1.2}


class Member(NamedTuple):
    """One of the trainings that run side by side."""

    seed: int
    setting: Setting  # empty if nothing varies

    @property
    def name(self) -> str:
        """The member's name, such as "seed 0" or "seed 0 delta=1.2"."""
        return f"seed {self.seed} {label(self.setting)}".strip()


def settings(
    vary: Mapping[str, Sequence[float | None]], in_step: bool = False
) -> tuple[Setting, ...]:
    """Return all combinations of the varied values; the last key's values change fastest.

    If `in_step`, return the first value of every key, then the second, and so on.
    """
    combined = zip(*vary.values(), strict=True) if vary and in_step else product(*vary.values())
    return tuple(dict(zip(vary, values, strict=True)) for values in combined)


def members(seeds: Sequence[int], settings: Sequence[Setting]) -> tuple[Member, ...]:
    """Return all members; the seeds change fastest."""
    return tuple(Member(seed, setting) for setting in settings for seed in seeds)


def by_setting(members: Sequence[Member]) -> list[tuple[Setting, list[int]]]:
    """Return each setting with the indices of its members, one per seed."""
    groups = groupby(range(len(members)), key=lambda place: members[place].setting)
    return [(setting, list(places)) for setting, places in groups]


def short_key(key: str) -> str:
    """Return the last part of a dotted key."""
    return key.rpartition(".")[2]


def text(value: float | None) -> str:
    """Return a value in the form that the command line takes."""
    return "null" if value is None else f"{value:.15g}"


def label(setting: Setting, separator: str = " ") -> str:
    """Return a setting's name, such as "delta=1.2 actor_lr=0.0001"."""
    return separator.join(f"{short_key(key)}={text(value)}" for key, value in setting.items())
