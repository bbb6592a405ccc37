"""Rollouts: no score depends on its neighbours, only what is looked at is rendered, and videos decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from rollouts import TA, NoisyPolicy, assert_same, run
from trouble import ChaoticEnv

from action_diffusion.envs import make
from action_diffusion.envs.rollout import replay, rollout
from action_diffusion.envs.video import write_video
from action_diffusion.errors import InputError


@pytest.mark.parametrize("n_envs", [1, 3, 10, 17])
def test_scores_do_not_depend_on_the_number_of_environments(n_envs: int) -> None:
    seeds = range(100, 130)
    reference = run(NoisyPolicy(), ChaoticEnv, seeds, n_envs=30)
    policy = NoisyPolicy()
    assert_same(run(policy, ChaoticEnv, seeds, n_envs=n_envs), reference)
    assert set(policy.batches) == {10}


def test_scores_do_not_depend_on_the_other_starts() -> None:
    reference = {episode.seed: episode for episode in run(NoisyPolicy(), ChaoticEnv, range(100, 130))}
    chosen = [117, 103, 127, 113]  # 117 and 127 share a row, so do 103 and 113
    assert_same(run(NoisyPolicy(), ChaoticEnv, chosen), [reference[seed] for seed in chosen])


@pytest.mark.slow
def test_pusht_scores_do_not_depend_on_the_number_of_environments() -> None:
    pytest.importorskip("gym_pusht", reason="PushT needs gym-pusht")
    policy = NoisyPolicy(scale=15.0, offset=256.0)
    results = [
        rollout(
            policy=policy,
            make_env=lambda: make("pusht", max_steps=60),
            seeds=range(100_000, 100_012),
            keys=["agent_pos"],
            n_envs=n_envs,
        )
        for n_envs in (1, 3, 10)
    ]
    assert len({episode.score for episode in results[0]}) > 1
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_one_call_serves_all_environments() -> None:
    policy = NoisyPolicy()
    longest = max(5 + seed * 7 % 30 for seed in range(10))
    run(policy, ChaoticEnv, range(10))
    assert len(policy.batches) == -(-longest // TA)


def test_only_what_the_policy_looks_at_is_observed() -> None:
    envs: list[ChaoticEnv] = []

    def make_env() -> ChaoticEnv:
        envs.append(ChaoticEnv())
        return envs[-1]

    (episode,) = run(NoisyPolicy(), make_env, [4])
    assert episode.n_steps == 33
    # Chunks are asked for at 0, 4, 8, ...: each looks at "now" and at the step before it.
    assert envs[0].observed == [t for t in range(33) if t % TA in (0, TA - 1)]
    assert envs[0].closed


def test_progress_ends_with_everything() -> None:
    reports: list[tuple[float, int]] = []
    run(
        NoisyPolicy(),
        ChaoticEnv,
        range(12),
        n_envs=3,
        progress=lambda share, scores: reports.append((share, len(scores))),
    )
    assert reports[-1] == (1.0, 12)
    assert [share for share, _ in reports] == sorted(share for share, _ in reports)


def test_a_diverged_policy_names_the_seed() -> None:
    class Diverging(NoisyPolicy):
        def predict(self, obs: Any, **generators: Any) -> dict[str, np.ndarray]:
            chunks = super().predict(obs, **generators)
            if len(self.batches) == 3:
                chunks["action_pred"][2] = np.nan
            return chunks

    envs: list[ChaoticEnv] = []

    def make_env() -> ChaoticEnv:
        envs.append(ChaoticEnv())
        return envs[-1]

    with pytest.raises(InputError, match="seed 102, episode step 8: the chunk holds NaN or infinity"):
        run(Diverging(), make_env, range(100, 110))
    assert all(env.closed for env in envs)


def test_actions_of_another_shape_name_both_sides() -> None:
    class OneArm(ChaoticEnv):
        action_shape = (7,)

    with pytest.raises(InputError, match=r"actions have shape \[2\], the simulator takes \[7\]"):
        run(NoisyPolicy(), OneArm, [1])


@pytest.mark.parametrize("settings", [{"n_envs": 0}, {"policy_batch": 0}, {"seeds": []}, {"seeds": [-1]}])
def test_bad_numbers(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        run(NoisyPolicy(), ChaoticEnv, settings.pop("seeds", [1]), **settings)


def test_a_replay_shows_the_episode_again() -> None:
    (episode,) = run(NoisyPolicy(), ChaoticEnv, [3])
    frames = np.stack(list(replay(env=ChaoticEnv(), episode=episode, size=8)))
    assert frames.shape == (episode.n_steps + 1, 8, 8, 3)
    assert frames[1:, 0, 0, 0].tolist() == (255 * episode.rewards).astype(int).tolist()
    fewer = np.stack(list(replay(env=ChaoticEnv(), episode=episode, size=8, every=3)))
    np.testing.assert_array_equal(fewer, frames[::3])


def test_a_replay_that_differs_is_not_shown() -> None:
    class Forgetful(ChaoticEnv):
        def reset(self, seed: int) -> None:
            super().reset(seed + 1)

    (episode,) = run(NoisyPolicy(), ChaoticEnv, [3])
    with pytest.raises(RuntimeError, match="not deterministic: seed 3"):
        list(replay(env=Forgetful(), episode=episode))


def moving_square() -> np.ndarray:
    frames = np.full((12, 48, 64, 3), 30, np.uint8)
    for t, frame in enumerate(frames):
        frame[8:24, 4 * t : 4 * t + 16] = (220, 60, 40)
    return frames


def test_a_video_decodes_to_its_frames(tmp_path: Path) -> None:
    frames = moving_square()
    path = tmp_path / "videos" / "square.mp4"
    write_video(path, iter(frames), fps=10)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 10
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 4
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before all of it has arrived
    assert [file.name for file in path.parent.iterdir()] == ["square.mp4"]


def test_a_failed_video_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "square.mp4"
    path.write_bytes(b"old")

    def broken() -> Any:
        yield from moving_square()[:3]
        raise RuntimeError("the simulator crashed")

    with pytest.raises(RuntimeError, match="crashed"):
        write_video(path, broken(), fps=10)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["square.mp4"]


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        ([], 10, "no frames"),
        (np.zeros((2, 48, 63, 3), np.uint8), 10, "even H and W"),
        (np.zeros((2, 48, 64), np.uint8), 10, "even H and W"),
        (np.zeros((2, 48, 64, 3), np.float32), 10, "float32"),
        ([np.zeros((48, 64, 3), np.uint8), np.zeros((48, 32, 3), np.uint8)], 10, r"uint8 \[48, 32, 3\]"),
        (np.zeros((2, 48, 64, 3), np.uint8), 0, "must be positive"),
    ],
)
def test_bad_frames(tmp_path: Path, frames: Any, fps: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_video(tmp_path / "video.mp4", frames, fps=fps)
    assert not list(tmp_path.iterdir())
