"""The agent against a plain replay of the receding horizon: histories, actions, and what may stay unseen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from action_diffusion.errors import InputError
from action_diffusion.policy.agent import Agent


def observation(t: int) -> dict[str, np.ndarray]:
    return {"state": np.array([t, -t], np.float32), "camera": np.full((4, 5, 3), t % 256, np.uint8)}


@given(to=st.integers(1, 6), ta=st.integers(1, 6), extra=st.integers(0, 3), lazy=st.booleans())
def test_it_follows_the_receding_horizon(to: int, ta: int, extra: int, lazy: bool) -> None:
    agent = Agent(n_obs_steps=to, n_action_steps=ta)
    horizon = to - 1 + ta + extra
    for t in range(20):
        if not lazy or agent.will_be_seen:
            agent.observe(observation(t))
        assert agent.needs_chunk == (t % ta == 0)
        if agent.needs_chunk:
            wanted = [max(0, t - to + 1 + i) for i in range(to)]
            history = agent.history()
            assert history["state"][:, 0].tolist() == wanted
            assert history["camera"].shape == (to, 4, 5, 3)
            assert history["camera"].dtype == np.uint8
            # Step i of the chunk is the action for control step t - (To-1) + i.
            agent.accept(np.arange(t - to + 1, t - to + 1 + horizon, dtype=np.float32)[:, None] * [1.0, 10.0])
        assert agent.act().tolist() == [t, 10 * t]


@given(to=st.integers(1, 6), ta=st.integers(1, 9))
def test_only_the_last_observations_before_a_chunk_are_seen(to: int, ta: int) -> None:
    agent = Agent(n_obs_steps=to, n_action_steps=ta)
    seen = []
    for t in range(3 * ta):
        seen.append(agent.will_be_seen)
        agent.observe(observation(t))
        if agent.needs_chunk:
            agent.accept(np.zeros((to - 1 + ta, 1)))
        agent.act()
    next_chunk = [-(-t // ta) * ta for t in range(3 * ta)]
    assert seen == [chunk - t < to for t, chunk in enumerate(next_chunk)]


def test_reset_forgets() -> None:
    agent = Agent(n_obs_steps=2, n_action_steps=3)
    agent.observe(observation(7))
    agent.accept(np.zeros((4, 2)))
    agent.reset()
    assert agent.needs_chunk
    assert agent.will_be_seen
    agent.observe({"other": np.ones(3)})
    assert agent.history()["other"].shape == (2, 3)


def test_reused_buffers_do_not_change_the_past() -> None:
    agent = Agent(n_obs_steps=2, n_action_steps=1)
    buffer, chunk = np.zeros(2), np.zeros((2, 2))
    agent.observe({"state": buffer})
    buffer[:] = 1
    agent.observe({"state": buffer})
    agent.accept(chunk)
    chunk[:] = 5
    assert agent.history()["state"].tolist() == [[0, 0], [1, 1]]
    assert agent.act().tolist() == [0, 0]


def test_calls_out_of_order() -> None:
    agent = Agent(n_obs_steps=2, n_action_steps=1)
    with pytest.raises(RuntimeError, match="before the first observe"):
        agent.history()
    with pytest.raises(RuntimeError, match="without a chunk"):
        agent.act()


@pytest.mark.parametrize("shape", [(8,), (1, 8, 2), (8, 2)])
def test_a_chunk_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"need \[H >= 9, A\]"):
        Agent(n_obs_steps=2, n_action_steps=8).accept(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_chunk_that_is_not_finite(value: float) -> None:
    agent = Agent(n_obs_steps=2, n_action_steps=3)
    chunk = np.zeros((6, 2))
    chunk[0] = chunk[4:] = value  # never executed
    agent.accept(chunk)
    chunk[2, 1] = value
    with pytest.raises(InputError, match="NaN or infinity at step 2"):
        agent.accept(chunk)


def test_observations_that_change() -> None:
    agent = Agent(n_obs_steps=2, n_action_steps=1)
    agent.observe({"state": np.zeros(2)})
    with pytest.raises(InputError, match=r"shape \[3\], the one before had \[2\]"):
        agent.observe({"state": np.zeros(3)})
    with pytest.raises(InputError, match=r"keys \['image', 'state'\]"):
        agent.observe({"state": np.zeros(2), "image": np.zeros(1)})


@pytest.mark.parametrize(("to", "ta"), [(0, 1), (1, 0)])
def test_numbers_below_one(to: int, ta: int) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        Agent(n_obs_steps=to, n_action_steps=ta)
