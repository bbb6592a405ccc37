"""The benchmark beside lerobot, without lerobot: its weights by a U-Net written here, its worker by a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from processes import Forked
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from action_diffusion.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
command = import_module("benchmarks.__main__")
compare = import_module("benchmarks.peer.compare")
episodes = import_module("benchmarks.peer.episodes")
ours = import_module("benchmarks.peer.ours")
peer_environment = import_module("benchmarks.peer.peer_environment")
plain = import_module("action_diffusion.policy.interchange.plain")
reference = import_module("benchmarks.peer.reference")
report = import_module("benchmarks.report")
rows = import_module("benchmarks.peer.rows")
runtimes = import_module("benchmarks.peer.runtimes")
runtime_worker = import_module("benchmarks.peer.runtime_worker")
serving = import_module("benchmarks.peer.peers.serving")
session = import_module("benchmarks.peer.session")
weights = import_module("action_diffusion.policy.interchange.lerobot.weights")
workers = import_module("benchmarks.peer.workers")

CHANNELS = (8, 16, 32)
POLICY = {"image": False, "channels": CHANNELS, "steps": 5, "batch": 3}
BOUNDS = {
    "gather_reference": 10,
    "gather_lerobot": 50,
    "chunk_paper": 2.5,
    "chunk_paper_reduced": 4,
    "chunk_small": 3,
    "train_state": 1.5,
    "train_image": 1.3,
    "evaluate": 3,
}


# -- lerobot's networks in plain torch, under its names ------------------------------


class Block(nn.Module):
    """Two convolutions with group normalisation and Mish, FiLM between them, [B, C_in, T] → [B, C_out, T]."""

    def __init__(self, n_in: int, n_out: int, condition: int):
        super().__init__()
        self.conv1, self.conv2 = _conv(n_in, n_out), _conv(n_out, n_out)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * n_out))
        self.residual_conv = nn.Conv1d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x, condition):
        scale, shift = self.cond_encoder(condition).unsqueeze(-1).chunk(2, dim=1)
        return self.conv2.block(scale * self.conv1.block(x) + shift) + self.residual_conv(x)


def _conv(n_in: int, n_out: int) -> Any:
    conv: Any = nn.Module()
    conv.block = nn.Sequential(nn.Conv1d(n_in, n_out, 5, padding=2), nn.GroupNorm(8, n_out), nn.Mish())
    return conv


class Sinusoids(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.n = dim // 2

    def forward(self, times):
        angles = times[:, None] * 10000.0 ** -(torch.arange(self.n) / (self.n - 1))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Unet(nn.Module):
    def __init__(self, condition: int, time_dim: int = 128, action_dim: int = 2):
        super().__init__()
        self.diffusion_step_encoder = nn.Sequential(
            Sinusoids(time_dim), nn.Linear(time_dim, 4 * time_dim), nn.Mish(), nn.Linear(4 * time_dim, time_dim)
        )
        size, (a, b, c) = condition + time_dim, CHANNELS
        down, up = nn.Conv1d, nn.ConvTranspose1d
        self.down_modules: Any = nn.ModuleList(
            nn.ModuleList([Block(n_in, n_out, size), Block(n_out, n_out, size), resize])
            for n_in, n_out, resize in (
                (action_dim, a, down(a, a, 3, 2, 1)),
                (a, b, down(b, b, 3, 2, 1)),
                (b, c, nn.Identity()),
            )
        )
        self.mid_modules = nn.ModuleList([Block(c, c, size), Block(c, c, size)])
        self.up_modules: Any = nn.ModuleList(
            nn.ModuleList([Block(2 * n_in, n_out, size), Block(n_out, n_out, size), up(n_out, n_out, 4, 2, 1)])
            for n_in, n_out in ((c, b), (b, a))
        )
        self.final_conv: Any = nn.Sequential(_conv(a, a), nn.Conv1d(a, action_dim, 1))

    def forward(self, x, times, condition):
        condition = torch.cat([self.diffusion_step_encoder(times), condition], dim=1)
        x, skips = x.mT, []
        for first, second, resize in self.down_modules:
            skips.append(second(first(x, condition), condition))
            x = resize(skips[-1])
        for block in self.mid_modules:
            x = block(x, condition)
        for first, second, resize in self.up_modules:
            x = resize(second(first(torch.cat([x, skips.pop()], dim=1), condition), condition))
        return self.final_conv[1](self.final_conv[0].block(x)).mT


class Encoder(nn.Module):
    """Images [N, 3, 84, 84] → [N, 64]."""

    def __init__(self):
        super().__init__()
        trunk = torchvision.models.resnet18(norm_layer=lambda channels: nn.GroupNorm(channels // 16, channels))
        self.backbone = nn.Sequential(*list(trunk.children())[:-2])
        self.pool: Any = nn.Module()
        self.pool.nets = nn.Conv2d(512, 32, 1)
        x, y = torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 3), indexing="xy")
        self.pool.register_buffer("pos_grid", torch.stack([x.flatten(), y.flatten()], dim=1))
        self.out = nn.Linear(64, 64)

    def forward(self, images):
        attention = self.pool.nets(self.backbone(images)).flatten(2).softmax(-1)
        return self.out((attention @ self.pool.pos_grid).flatten(1)).relu()


class Model(nn.Module):
    """lerobot's policy, as far as its weights go."""

    def __init__(self, *, image: bool):
        super().__init__()
        self.diffusion = nn.Module()
        if image:
            self.diffusion.rgb_encoder = Encoder()
        self.diffusion.unet = Unet(2 * (2 + (64 if image else 16)))
        for parameter in self.parameters():
            if parameter.ndim == 1:  # else scales are 1 and shifts 0, whichever layer has them
                parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.fixture
def model(tmp_path):
    """`model(image)`: lerobot's weights in a row's folder, beside its inputs."""

    def make(image: bool) -> Model:
        torch.manual_seed(0)
        made = Model(image=image).eval()
        save_file(made.state_dict(), tmp_path / "weights.safetensors")
        rows.write_inputs(_row(work="chunk", settings=POLICY | {"image": image}), tmp_path)
        return made

    return make


def _row(**changes):
    settings = {"name": "a", "what": "", "work": "sleep", "unit": "ms", "bound": None, "settings": {}, "checks": {}}
    return rows.Row(**(settings | changes))


def _case(**changes):
    return compare.Case(_row(**changes), "avx2", 1)


@pytest.mark.slow
@pytest.mark.parametrize("image", [False, True])
@torch.no_grad()
def test_policies_with_lerobots_weights_compute_what_it_computes(model, tmp_path, image):
    peer = model(image).diffusion
    policy = ours.build(POLICY | {"image": image}, tmp_path)
    obs, given = ours.load_inputs(policy, tmp_path)
    parts = [obs["agent_pos"] / 256 - 1]
    if image:
        frames = obs["image"][:, :, 6:90, 6:90].permute(0, 1, 4, 2, 3) / 127.5 - 1
        parts.append(peer.rgb_encoder(frames.flatten(0, 1)).unflatten(0, (3, 2)))
    else:
        parts.append(obs["keypoint"] / 256 - 1)
    condition = torch.cat(parts, dim=-1).flatten(1)
    torch.testing.assert_close(policy.encode(obs), condition, atol=1e-5, rtol=1e-5)
    expected = peer.unet(given["noise"], torch.full((3,), 50.0), condition)
    film = policy.denoiser.prepare(condition, torch.tensor([50.0]))
    torch.testing.assert_close(policy.denoiser(given["noise"], film.at(0)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["model.x", "diffusion.unet.side_modules.0.weight", "diffusion.unet.down_modules.0.0.x.weight"]
)
def test_other_weights_are_refused(name):
    with pytest.raises(InputError, match=name):
        weights.from_lerobot({name: torch.zeros(2)})


# -- our side ------------------------------


@pytest.mark.parametrize("part", ["chunk", "denoise", "encode"])
def test_our_chunk_is_sampled_from_the_weights_and_the_noise_in_the_folder(model, tmp_path, part):
    model(False)
    work = ours.Chunk(POLICY | {"part": part, "precisions": ["fp32"]}, tmp_path, print)
    outputs = work.outputs()
    assert set(outputs) == {"embedding", "output", "chunk"}
    assert outputs["chunk"].shape == (3, 16, 2)
    work.call()
    assert work.units == (5 if part == "denoise" else 1)


def test_a_precision_is_the_first_that_the_machine_has(monkeypatch):
    def check(precision, device):
        if precision != "bf16":
            raise InputError(f"no {precision}")

    monkeypatch.setattr(ours, "check_precision", check)
    assert ours.offered(["fp16", "bf16", "fp32"], torch.device("cpu")) == "bf16"
    with pytest.raises(InputError, match="no fp32"):
        ours.offered(["fp16", "fp32"], torch.device("cpu"))


def test_our_training_step_is_the_training_loop_s_own(model, tmp_path):
    model(False)
    work = ours.Train(POLICY, tmp_path, print)
    loss = work.outputs()["loss"]
    before = {name: value.clone() for name, value in work._policy.named_parameters()}
    assert work.time(2) > 0
    assert work._trainer.progress.step == 2
    assert any(not torch.equal(before[name], value) for name, value in work._policy.named_parameters())
    assert loss.shape == (1,)


@pytest.mark.slow
def test_our_evaluation_runs_every_episode(model, tmp_path):
    model(True)
    settings = POLICY | {"image": True, "episodes": 2, "max_steps": 3, "seed": 0}
    work = ours.Evaluate(settings, tmp_path, print)
    assert work.outputs()["chunk"].shape == (3, 16, 2)
    work.call()


def test_both_gather_the_same_batches(tmp_path):
    random = np.random.default_rng(0)
    np.save(tmp_path / "image.npy", random.integers(0, 256, (40, 96, 96, 3), np.uint8))
    np.save(tmp_path / "action.npy", random.standard_normal((40, 2), np.float32))
    np.save(tmp_path / "episode_ends.npy", [9, 40])
    settings = {"batch": 4, "horizon": 16, "n_obs_steps": 2, "crop": [84, 84], "data": str(tmp_path)}
    settings["whole_frames"] = False
    rows.write_inputs(_row(work="gather", settings=settings), tmp_path)
    mine = ours.Gather(settings, tmp_path, print)
    theirs = reference.Gather(settings, tmp_path, print)
    try:
        for name, value in mine.outputs().items():
            torch.testing.assert_close(theirs.outputs()[name], value, atol=1e-6, rtol=0)
        assert mine.time(2) > 0
        assert theirs.time(2) > 0
        assert "workers" in theirs.note
    finally:
        theirs.close()


def test_exported_episodes_are_plain_arrays(tmp_path, buffer, monkeypatch):
    monkeypatch.setattr(episodes, "N_EPISODES", 2)
    images = np.zeros((buffer.n_steps, 8, 8, 3), np.float32)
    episodes.export(buffer.with_column("img", images), tmp_path / "data")
    arrays = {path.stem: np.load(path) for path in (tmp_path / "data").iterdir()}
    assert arrays["image"].dtype == np.uint8
    assert arrays["episode_ends"].tolist() == buffer.episode_ends[:2].tolist()
    assert len(arrays["state"]) == len(arrays["action"]) == len(arrays["image"]) == buffer.episode_ends[1]


@pytest.mark.parametrize("activation", ["silu", "mish", "relu", "gelu"])
@torch.no_grad()
def test_the_network_that_is_exported_computes_what_ours_does(activation):
    torch.manual_seed(0)
    policy = ours.build(POLICY | {"activation": activation}, Path(), weights=False)
    for parameter in policy.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    film = policy.denoiser.prepare(torch.randn(3, policy.denoiser.condition_film.in_features), torch.tensor([50.0]))
    x = torch.randn(3, 16, 2)
    expected = policy.denoiser(x, film.at(0))
    torch.testing.assert_close(plain.PlainUnet(policy.denoiser)(x, film.at(0)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_an_exported_chunk_is_the_one_that_it_is_timed_beside(tmp_path):
    """Rows `chunk_…` of `benchmarks.peer.runtimes`, by ONNX Runtime."""
    settings = {"channels": CHANNELS, "part": "chunk", "image": False, "steps": 10, "models": str(tmp_path)}
    path, inputs = runtime_worker.export(settings, print)
    run, _ = runtime_worker.MAKERS["onnxruntime"](path, inputs, 1)
    expected = ours.Network(settings, Path(), print).outputs()["output"].numpy()
    assert np.abs(run() - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_a_network_alone_is_the_same_prepared_and_as_it_is():
    settings = {"channels": CHANNELS, "part": "step"}
    layers, inputs = ours.network(settings)
    work = ours.Network(settings, Path(), print)
    with torch.no_grad():
        torch.testing.assert_close(work.outputs()["output"], layers(*inputs.values()), atol=1e-5, rtol=1e-5)
    encoder, inputs = ours.network(settings | {"part": "encoder"})
    work = ours.Network(settings | {"part": "encoder"}, Path(), print)
    with torch.no_grad():
        torch.testing.assert_close(work.outputs()["output"], encoder(*inputs.values()), atol=1e-5, rtol=1e-5)
    assert work.time(1) > 0


# -- the harness, with stand-ins ------------------------------

STAND_IN = """
import sys, time
sys.path.insert(0, {folder!r})
import torch
from serving import Work, serve

class Sleep(Work):
    def __init__(self, settings, folder, say):
        say("getting ready")
        self.seconds, self.value = settings["seconds"][{side!r}], settings["values"][{side!r}]
        self.note = "a stand-in"
        if self.seconds < 0:
            raise ValueError("seconds must\\nnot be negative")
    def outputs(self):
        return {{"value": torch.tensor([self.value])}}
    def call(self):
        time.sleep(self.seconds)

class Die(Work):
    def __init__(self, settings, folder, say):
        print("out of luck", file=sys.stderr, flush=True)
        sys.exit(3)

print("this must not end up among the answers")
serve({{"sleep": Sleep, "die": Die}}, lambda: {{"torch": torch.__version__, "instructions": {said!r}}})
"""
UNLIKE = {"ours": 1.0, "lerobot": 1.1}
SLEEP = {"seconds": {"ours": 0.001, "lerobot": 0.004}, "values": {"ours": 1.0, "lerobot": 1.0}}


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Workers that only sleep, in turns of 0.05 s, and say that they keep to AVX2."""

    def _command(self, name):
        script = tmp_path / f"{name}.py"
        script.write_text(STAND_IN.format(folder=str(ROOT / "benchmarks" / "peer" / "peers"), side=name, said="avx2"))
        return [sys.executable, str(script)], {}

    def _started(command, *, text, **options):
        return Forked(*command[1:], **options)

    monkeypatch.setattr(session._Workers, "_command", _command)
    there = {"Popen": _started, "PIPE": subprocess.PIPE, "TimeoutExpired": subprocess.TimeoutExpired}
    monkeypatch.setattr(workers, "subprocess", SimpleNamespace(**there))
    monkeypatch.setattr(compare, "TURN_SECONDS", 0.05)
    monkeypatch.setattr(compare, "PAIRS", (3, 3))
    monkeypatch.setattr(compare, "write_inputs", lambda *_: None)


@pytest.mark.slow
def test_a_run_measures_in_turns_and_writes_json(stand_ins, tmp_path, capsys):
    measured = [
        _case(name="fast", settings=SLEEP, checks={"value": ("largest", 0.0)}, bound=2.0),
        _case(
            name="other", settings=SLEEP | {"values": {"ours": 1.0, "lerobot": 1.1}}, checks={"value": ("mean", 0.01)}
        ),
        _case(name="broken", settings=SLEEP | {"seconds": {"ours": -1, "lerobot": 0.001}}),
        _case(name="dead", work="die"),
        replace(_case(name="wide", settings=SLEEP), instructions="avx512"),
    ]
    path = tmp_path / "out" / "a.json"
    assert session.run(measured, path, Console(stderr=True)) == 1
    content = json.loads(path.read_text())
    assert set(content) == {"machine", "commit", "versions", "rows", "failures"}
    assert content["versions"] == {"ours": {"torch": torch.__version__}, "lerobot": {"torch": torch.__version__}}
    assert content["machine"]["cores"] >= 1
    assert content["machine"]["instructions"] == workers.instruction_sets()[0]
    assert content["commit"]
    (row,) = content["rows"]
    assert {"name", "unit", "ours", "peer", "ratio", "spread", "bound"} <= set(row)
    assert (row["name"], row["unit"], row["bound"], row["pairs"]) == ("fast", "ms", 2.0, 3)
    assert (row["against"], row["instructions"], row["threads"]) == ("lerobot", "avx2", 1)
    assert 2 < row["ratio"] < 6
    assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
    failures = {label.partition(" ")[0]: reason for label, reason in content["failures"].items()}
    assert str(_case(name="other")) == "other beside lerobot (avx2, 1 threads)"
    assert "mean difference 0.1" in failures["other"]
    assert failures["broken"] == "ours: ValueError: seconds must not be negative"
    assert "exit code 3: out of luck" in failures["dead"]
    assert failures["wide"] == "ours does not keep to avx512"
    printed = capsys.readouterr()
    assert "fast" in printed.out
    assert "reached" in printed.out
    assert "getting ready" in printed.err
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_ratios_are_above_one_where_ours_is_ahead():
    pairs = [(0.1, 0.2), (0.1, 0.3), (0.1, 0.4)]
    times = compare.summarise(_case(unit="ms"), pairs, 2, 1)
    assert (times.ours, times.peer, times.ratio) == pytest.approx((50, 300, 6))
    assert times.spread == pytest.approx((5, 7))
    rates = compare.summarise(_case(unit="samples/s"), pairs, 64, 64)
    assert (rates.ours, rates.peer, rates.ratio) == pytest.approx((640, 64 / 0.3, 3))


@pytest.mark.parametrize(
    ("value", "measure", "limit", "passes"),
    [
        (1.5, "largest", 0.5, True),
        (1.5, "largest", 0.4, False),
        (1.5, "relative", 0.2, False),
        (np.nan, "mean", 9, False),
    ],
)
def test_a_difference_beyond_what_a_row_allows_is_refused(tmp_path, value, measure, limit, passes):
    def worker(values):
        return SimpleNamespace(ask=lambda order, file: save_file({"x": torch.tensor(values)}, file))

    row = _row(checks={"x": (measure, limit)})
    mine, theirs = worker([value, 2.0]), worker([1.0, 2.0])
    if passes:
        compare.check(row, mine, theirs, tmp_path)
    else:
        with pytest.raises(compare.Different, match="x differs"):
            compare.check(row, mine, theirs, tmp_path)
    with pytest.raises(compare.Different, match="shape"):
        compare.check(row, worker([1.0]), theirs, tmp_path)


@pytest.mark.slow
def test_a_worker_is_waited_for_until_it_sleeps(tmp_path):
    busy = """
import sys, time
for line in sys.stdin:
    print("{}", flush=True)
    end = time.process_time() + 0.6
    while time.process_time() < end:
        pass
"""
    worker = workers.Worker("busy", [sys.executable, "-c", busy], log=tmp_path / "log")
    try:
        assert worker.ask("anything") == {}
        assert worker._processor_seconds() >= 0
        worker.settle()
        used = worker._processor_seconds()
        worker.settle()
        assert worker._processor_seconds() == pytest.approx(used, abs=0.05)
        assert used > 0.3
    finally:
        worker.close()


# -- names, arguments, the environment ------------------------------


def test_rows_have_the_names_and_bounds_that_others_rely_on():
    assert {row.name: row.bound for row in rows.ROWS if row.bound is not None} == BOUNDS
    assert len({row.name for row in rows.ROWS}) == len(rows.ROWS)
    assert all(row.checks for row in rows.ROWS if row.bound is not None)
    json.dumps([dict(row.settings) for row in rows.ROWS])


@pytest.fixture(params=[["avx512", "avx2"], ["avx2"]], ids=lambda sets: sets[0])
def processor(request, monkeypatch):
    """The instruction sets of a processor."""
    for module in (command, runtimes):
        monkeypatch.setattr(module, "instruction_sets", lambda: request.param)
    return request.param


def test_every_row_is_measured_beside_both_peers_by_all_instructions_of_the_processor(processor):
    cases, path = command.parse([])
    assert path is None
    assert list(dict.fromkeys(case.instructions for case in cases)) == processor
    for row in rows.ROWS:
        beside = {(case.row.peer, case.instructions) for case in cases if case.row.name == row.name}
        peers = ["lerobot==0.4.4", "lerobot==0.6.1"] if row.peer == "lerobot" else [row.peer]
        assert beside == {(peer, instructions) for peer in peers for instructions in processor}
    assert all(case.threads == workers.THREADS for case in cases)


def test_rows_peers_and_instructions_are_chosen_by_name(processor):
    words = ["--only", "evaluate", "chunk_small", "--only", "encoder", "--json", "a.json"]
    cases, path = command.parse([*words, "--peer", "lerobot==0.6.1", "--instructions", "avx2"])
    assert [case.row.name for case in cases] == ["chunk_small", "encoder", "evaluate"]
    assert {(case.row.peer, case.instructions) for case in cases} == {("lerobot==0.6.1", "avx2")}
    assert path == Path("a.json")
    assert command.parse(["--json"])[1] == ROOT / "benchmarks" / "results" / "rows.json"


def test_runtimes_are_compared_on_every_network_as_far_as_they_can_be_restricted(processor):
    cases, path = runtimes.parse(["--json"])
    assert path == ROOT / "benchmarks" / "results" / "runtimes.json"
    assert {case.threads for case in cases} == {1, 2}
    for instructions in processor:
        found = {case.row.settings["runtime"] for case in cases if case.instructions == instructions}
        assert found == ({"onnxruntime", "openvino"} if instructions == processor[0] else {"openvino"})
    chosen, _ = runtimes.parse(["--only", "encoder-openvino", "--threads", "1", "--instructions", "avx2"])
    assert [str(case) for case in chosen] == ["encoder-openvino beside runtimes (avx2, 1 threads)"]


def test_what_cannot_be_restricted_is_said(monkeypatch):
    monkeypatch.setattr(runtimes, "instruction_sets", lambda: ["avx512", "avx2"])
    with pytest.raises(InputError, match="ONNX Runtime has no setting"):
        runtimes.parse(["--only", "encoder-onnxruntime", "--instructions", "avx2"])


@pytest.mark.slow
def test_a_process_that_is_restricted_says_so():
    """What torch and our code in C may use follows the variables; the notes of a row say it of OpenVINO's kernels."""
    if "avx2" not in workers.instruction_sets():
        pytest.skip("no AVX2 here")
    code = "from benchmarks.peer import ours; print(ours.about()['instructions'])"
    variables = {**os.environ, **workers.RESTRICTED["avx2"]}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert said.stdout.strip() == "avx2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "chunk_papr"], "chunk_paper"),
        (["--only"], "expected at least one argument"),
        (["--rows", "a"], "unrecognized"),
        (["--json", "."], "folder"),
        (["--peer", "lerobot==0.5"], "lerobot==0.6.1 or lerobot==0.4.4"),
        (["--instructions", "avx1"], "unknown set of instructions 'avx1'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(words, message, capsys):
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_a_complete_environment_is_kept_and_a_torn_one_made_anew(tmp_path, monkeypatch):
    commands = []

    def _run(words, log, say):
        commands.append(words)
        (tmp_path / "peer" / "lib/python3.11/site-packages/av.libs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "peer" / "pyvenv.cfg").touch()
        (tmp_path / "peer/lib/python3.11/site-packages/av.libs/libavutil-1a2b.so.59.39.100").touch()

    monkeypatch.setattr(peer_environment, "_run", _run)
    monkeypatch.setattr(peer_environment, "require_space", lambda *_: None)
    made = peer_environment.peer_environment("lerobot==0.4.4", tmp_path / "peer", say=lambda _: None)
    assert made.python == tmp_path / "peer" / "bin" / "python"
    assert any("lerobot[pusht]==0.4.4" in words for words in commands)
    assert (tmp_path / "peer/ffmpeg/libavutil.so.59").is_symlink()
    assert str(tmp_path / "peer/ffmpeg") in made.variables["LD_LIBRARY_PATH"]
    count = len(commands)
    monkeypatch.setenv(peer_environment.VARIABLE, str(tmp_path / "peer"))
    peer_environment.peer_environment("lerobot==0.4.4", say=lambda _: None)  # the variable may name it itself
    assert len(commands) == count
    (tmp_path / "peer" / "complete.json").unlink()
    (tmp_path / "peer" / "torn").touch()
    peer_environment.peer_environment("lerobot==0.4.4", tmp_path / "peer", say=lambda _: None)
    assert len(commands) == 2 * count
    assert not (tmp_path / "peer" / "torn").exists()


def test_each_peer_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv(peer_environment.VARIABLE, str(tmp_path))
    folders = [peer_environment.default_folder(name) for name in peer_environment.PEERS]
    assert len(set(folders)) == len(folders)
    assert tmp_path / "lerobot-0.6.1" in folders
    assert all(folder.parent == tmp_path for folder in folders)


def test_a_python_that_is_too_old_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert peer_environment._python((3, 11), "a") == sys.executable
    broken = tmp_path / "python4.0"  # as pyenv's, where that version is not switched on
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    with pytest.raises(InputError, match=r"lerobot needs Python 4\.0, and there is none: .*--peer"):
        peer_environment._python((4, 0), "lerobot")
    working = tmp_path / "python4.1"
    working.write_text("#!/bin/sh\nexit 0\n")
    working.chmod(0o755)
    assert peer_environment._python((4, 0), "lerobot") == str(working)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="no Python environment"):
        peer_environment.peer_environment("lerobot==0.4.4", tmp_path, say=lambda _: None)
    assert (tmp_path / "thesis.txt").exists()


def test_a_failed_installation_is_one_line_that_says_why(tmp_path):
    failing = [sys.executable, "-c", "print('ERROR: no matching distribution'); print('hint'); raise SystemExit(1)"]
    with pytest.raises(InputError, match=r"ERROR: no matching distribution \(all of it: .*log\)$"):
        peer_environment._run(failing, tmp_path / "log", print)
    assert "hint" in (tmp_path / "log").read_text()
    with pytest.raises(InputError, match="cannot be made"):
        peer_environment._run([str(tmp_path / "none")], tmp_path / "log", print)


def test_numbers_have_three_digits_that_mean_something():
    assert [report.number(value) for value in (0.01234, 1.234, 12.34, 123.4, 12345.0)] == [
        "0.0123",
        "1.23",
        "12.3",
        "123",
        "12,345",
    ]


@pytest.mark.slow
def test_outputs_go_to_a_file_that_anything_can_read(model, tmp_path):
    model(False)
    worker = serving._Worker({"chunk": ours.Chunk}, dict, print)
    worker.obey(
        {"order": "prepare", "work": "chunk", "settings": POLICY | {"precisions": ["fp32"]}, "folder": str(tmp_path)}
    )
    worker.obey({"order": "check", "file": str(tmp_path / "ours.safetensors")})
    assert load_file(tmp_path / "ours.safetensors")["chunk"].shape == (3, 16, 2)
    assert worker.obey({"order": "time", "calls": 1})["seconds"] > 0
    assert worker.obey({"order": "release"}) == {}
