"""Theorem 4.1 of the MAGPO paper, exact and tabular: the learners' value never falls.

Each iteration consists of data collection, guider training (policy mirror descent, Eq. 3), learner
training (projection onto decentralised policies) and backtracking, in small cooperative Markov
games; a matrix game has a single state. The theorem is about the projection that minimises
KL(pi || mu); the other direction, which the released code computes, does not always improve.
"""

import numpy as np
import pytest

A, GAMMA, STEP_SIZE = 3, 0.9, 3.0


def random_game(rng, num_states):
    """Draw rewards (S, A, A) and transitions (S, A, A, S) of a two-agent game."""
    transition = rng.dirichlet(np.ones(num_states), size=(num_states, A, A))
    return rng.normal(size=(num_states, A, A)), transition


def evaluate(game, pi):
    """Return the exact Q (S, A, A) and V (S,) of decentralised policies pi (2, S, A)."""
    reward, transition = game
    joint = np.einsum("sa,sb->sab", *pi)
    kernel = np.einsum("sab,sabz->sz", joint, transition)
    value = np.linalg.solve(np.eye(len(reward)) - GAMMA * kernel, (joint * reward).sum((1, 2)))
    return reward + GAMMA * transition @ value, value


def normalised(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def mirror_descent(q, pi):
    """Return the guider (S, A, A): the closed form of Eq. 3 from mu_k = pi_k."""
    logits = np.log(np.einsum("sa,sb->sab", *pi)) + STEP_SIZE * q
    return normalised(logits.reshape(len(q), -1)).reshape(q.shape)


def project_learner_to_guider(mu, pi):
    """Return argmin KL(pi || mu) by coordinate descent over the agents, from pi_k."""
    first, second = pi
    for _ in range(20):
        first = normalised(np.einsum("sb,sab->sa", second, np.log(mu)))
        second = normalised(np.einsum("sa,sab->sb", first, np.log(mu)))
    return np.stack([first, second])


def project_guider_to_learner(mu, pi):
    """Return argmin KL(mu || pi): the guider's marginals."""
    return np.stack([mu.sum(2), mu.sum(1)])


def games_that_got_worse(project, num_states, num_games):
    rng = np.random.default_rng(0)
    worse = 0
    for _ in range(num_games):
        game = random_game(rng, num_states)
        pi = rng.dirichlet(np.ones(A), size=(2, num_states))
        q, value = evaluate(game, pi)
        fell = False
        for _ in range(5):
            pi = np.maximum(project(mirror_descent(q, pi), pi), 1e-12)
            q, after = evaluate(game, pi)
            fell |= bool((after < value - 1e-8).any())
            value = after
        worse += fell
    return worse


@pytest.mark.parametrize("num_states", [1, 4])
def test_the_papers_projection_never_makes_the_learners_worse(num_states):
    assert games_that_got_worse(project_learner_to_guider, num_states, 300) == 0


@pytest.mark.parametrize("num_states", [1, 4])
def test_the_other_direction_sometimes_makes_the_learners_worse(num_states):
    worse = games_that_got_worse(project_guider_to_learner, num_states, 300)
    assert 0 < worse < 300
    print(f"KL(mu || pi): {worse} of 300 games with {num_states} states")
