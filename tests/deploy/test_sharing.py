"""A person who owns a part of the action in a deployment, while the policy has the rest."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from deployments import Deployment, save_bundle, until
from websockets.sync.client import connect

from action_diffusion import cli
from action_diffusion.datasets.storage.growing import read_table
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.deploy.ipc.rings import RingReader
from action_diffusion.deploy.loop.operator import EVERYTHING, MODES, Mode, Orders, PageOperator, bits, owned_of
from action_diffusion.deploy.loop.prediction import Guidance, predict
from action_diffusion.envs.rollout import generators
from action_diffusion.errors import InputError
from action_diffusion.policy import bundle as bundles
from action_diffusion.policy.action_queue import Request

FIRST = np.array([True, False])


def test_what_is_owned_as_a_number():
    assert bits(np.array([True, False, True])) == 5
    np.testing.assert_array_equal(owned_of(5, 4), [True, False, True, False])
    assert owned_of(7, 3) is None
    assert owned_of(EVERYTHING, 32) is None
    assert bits(None) == EVERYTHING


def test_orders_say_what_is_owned_and_the_loop_says_so_back(tmp_path):
    orders = Orders(tmp_path)
    operator = PageOperator(tmp_path)
    orders.own(FIRST)
    operator.begin()
    assert (operator.owned, operator.mode) == (1, Mode.POLICY)
    said = RingReader(tmp_path / "modes").latest().values
    assert {name: int(said[name]) for name in MODES} == {"mode": int(Mode.POLICY), "owned": 1}


def chunks(policy, requests):
    obs = {"state": np.full((len(requests), 2, 5), 250.0, np.float32)}
    pairs = [generators(row) for row in range(len(requests))]
    noise = {"noise_generator": [first for first, _ in pairs], "generator": [second for _, second in pairs]}
    return predict(policy, obs, requests, guidance=Guidance(), **noise).chunks


def test_a_request_brings_what_the_person_does_row_by_row(tmp_path):
    """The values of now come out as they are; a row without a person is as it would have been; nothing stays behind."""
    policy = bundles.load(save_bundle(tmp_path))
    person = Request(0, None, 0, owned=FIRST, person=np.array([[270.0, np.nan]]))
    found = chunks(policy, [person, Request(0, None, 0), None])
    plain = chunks(policy, [Request(0, None, 0)] * 3)
    assert found[0, 1, 0] == pytest.approx(270.0, abs=1e-3)
    np.testing.assert_allclose(found[1:], plain[1:], atol=1e-2)
    assert policy.extensions == []


def test_a_policy_elsewhere_shares_nothing():
    with pytest.raises(InputError, match="on this machine"):
        chunks(object(), [Request(0, None, 0, owned=FIRST, person=np.zeros((1, 2)))])


@pytest.mark.slow
def test_a_person_owns_x_and_the_record_replays(tmp_path, capsys):
    bundle = save_bundle(tmp_path / "bundle", env={"name": "pusht", "max_steps": 1000})
    run = Deployment(bundle, tmp_path / "run", "scheduling=naive")
    try:
        until(lambda: run.steps.count > 5)
        with connect(run.url.replace("http", "ws") + "/live", proxy=None) as socket:
            socket.send('{"order": "own", "values": [1, 0]}')
            socket.send('{"order": "take_over"}')
            for index in range(60):
                socket.send(f'{{"order": "point", "values": [{250 + index / 4}, 0]}}')
                time.sleep(0.05)
            socket.send('{"order": "own", "values": [0, 0]}')  # nonsense, which changes nothing
        run.end()
    finally:
        run.process.kill()
        run.process.wait()
    record = Path(tmp_path / "run" / "record.zarr")
    steps, action = read_table(record, "steps"), np.asarray(ReplayBuffer.open(record)["action"][:])
    mixed = (steps["owned"] == 1) & ~steps["held"]
    assert mixed.sum() > 10
    np.testing.assert_array_equal(action[mixed, 0], steps["person"][mixed, 0])
    assert (steps["person"][mixed, 1] == 0).all()
    assert (action[mixed, 1] > 150).all()  # the policy's, within what was demonstrated
    for words in ([], [f"bundle={bundle}", "device=cpu"]):
        capsys.readouterr()
        assert cli.main(["deploy", f"replay={record}", *words]) == 0
        assert "bit for bit" in capsys.readouterr().out
