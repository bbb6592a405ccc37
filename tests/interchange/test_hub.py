"""Policies and data on a server that speaks the Hub's API."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import lerobot_policy
import numpy as np
import pytest
from hub import Hub

from action_diffusion import cli, hub
from action_diffusion.datasets.batches.sources import open_data
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError
from action_diffusion.options.configuration import load, plain
from action_diffusion.policy import bundle as bundles
from action_diffusion.training.resuming import configured

TOKEN = "hf_for_tests_only"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Reached with a token, and with a cache of its own."""
    server = Hub(TOKEN)
    for name, value in {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


@pytest.fixture
def bundle(policy, tiny_config, buffer, tmp_path: Path) -> Path:
    seen = {"state": buffer["state"][:2]}
    bundles.save(tmp_path / "run" / "bundle", policy, {"policy": tiny_config, "data": "x.zarr"}, golden_obs=seen)
    return tmp_path / "run" / "bundle"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert TOKEN not in error
    return error


def test_what_is_pushed_comes_back(server, bundle, tmp_path, capsys) -> None:
    results = {"n_episodes": 50, "success_rate": 0.9, "success_interval": [0.786, 0.957], "task": "pusht_state"}
    (bundle.parent / "results.json").write_text(json.dumps(results))
    (bundle / "notes.pkl").write_bytes(b"mine")
    assert cli.main(["bundle", "push", str(bundle), "to=hf://me/it"]) == 0
    repository = server.repositories["models/me/it"]
    assert repository.private
    commit = repository.refs["main"]
    out = capsys.readouterr().out
    assert f"pushed: hf://me/it@{commit}" in out
    assert TOKEN not in out
    card = repository.commits[commit]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: action-diffusion\n")
    assert "| success rate | 0.9 | 0.786 to 0.957 |" in card
    assert "| observations | state [5] state, px |" in card
    assert "notes.pkl" not in repository.commits[commit]

    assert cli.main(["bundle", "pull", "hf://me/it", f"out={tmp_path / 'back'}"]) == 0
    assert f"pulled: hf://me/it@{commit}" in capsys.readouterr().out
    (bundle / "notes.pkl").unlink()
    assert json.loads((tmp_path / "back" / "hub.json").read_text()) == {"from": f"hf://me/it@{commit}"}
    (tmp_path / "back" / "hub.json").unlink()
    assert contents(tmp_path / "back") == contents(bundle)


def test_a_second_push_leaves_nothing_stale_and_others_files_alone(server, bundle) -> None:
    server.add("me/it", {"extensions/guard.safetensors": b"old", "LICENSE": b"MIT"})
    server.repositories["models/me/it"].private = False
    assert cli.main(["bundle", "push", str(bundle), "to=hf://me/it", "private=false"]) == 0
    repository = server.repositories["models/me/it"]
    files = repository.commits[repository.refs["main"]]
    assert set(files) == {*contents(bundle), "README.md", "LICENSE"}


def test_commands_take_bundles_from_there_once(server, bundle) -> None:
    commit = server.add("me/it", contents(bundle) | {"run.py": b"import os", "x.pkl": b"no"}, "v1")
    found = load("evaluate", ["bundle=hf://me/it@v1"])["bundle"]
    assert Path(found).name == commit
    assert set(contents(Path(found))) == {*contents(bundle), "hub.json"}
    bundles.load(found, verify=True)
    asked = len(server.asked)
    assert load("serve", [f"bundle=hf://me/it@{commit}"])["bundle"] == found
    assert plain("bundle inspect", [], {"path": f"hf://me/it@{commit}"})["path"] == found
    assert len(server.asked) == asked  # a commit never changes
    assert load("train", ["task=pusht_state", f"init=hf://me/it@{commit}"])["init"] == found
    several = load("evaluate", [f"bundle=[hf://me/it@{commit},{bundle}]", f"compare=hf://me/it@{commit}"])
    assert several["bundle"] == [found, str(bundle)]
    assert several["compare"] == found


def test_nothing_is_fitted_into_the_copy_of_somebodys_policy(capsys) -> None:
    assert cli.main(["fit", "guard", "bundle=hf://me/it"]) == 2
    assert "first action-diffusion bundle pull hf://me/it out=DIR" in capsys.readouterr().err


def test_training_goes_on_from_a_policy_there(server, bundle, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    commit = server.add("me/it", contents(bundle))
    config = configured([f"init=hf://me/it@{commit}", "task=pusht_state"], None)
    assert Path(config["init"]).name == commit
    assert configured([f"init=hf://me/it@{commit}", "output_dir=a"], None)["init"] == config["init"]


def test_a_bundle_may_lie_in_a_folder_of_a_repository(server, bundle) -> None:
    commit = server.add("me/it", {f"best/bundle/{name}": data for name, data in contents(bundle).items()})
    found = Path(load("deploy", [f"bundle=hf://me/it@{commit}/best/bundle"])["bundle"])
    assert set(contents(found)) == {*contents(bundle), "hub.json"}
    assert hub.origin(found) == f"hf://me/it@{commit}/best/bundle"


def test_data_is_pinned_and_read(server, buffer: ReplayBuffer, tmp_path) -> None:
    buffer.save(tmp_path / "demos.zarr")
    files = {f"demos.zarr/{name}": data for name, data in contents(tmp_path / "demos.zarr").items()}
    commit = server.add("me/demos", files | {"load.py": b"raise SystemExit"}, kind="datasets")
    assert load("train", ["task=pusht_state", "data=hf://me/demos"])["data"] == f"hf://me/demos@{commit}"
    found = open_data("hf://me/demos")
    np.testing.assert_array_equal(found["state"][:], buffer["state"][:])
    assert not list((tmp_path / "cache").rglob("load.py"))
    server.add(
        "me/demos", {name.replace("demos", "more"): data for name, data in files.items()} | files, kind="datasets"
    )
    with pytest.raises(
        InputError, match=r"holds demos\.zarr, more\.zarr: say which, such as hf://me/demos@.*/demos\.zarr"
    ):
        open_data("hf://me/demos")
    np.testing.assert_array_equal(open_data("hf://me/demos/more.zarr")["action"][:], buffer["action"][:])
    assert open_data(f"hf://me/demos@{commit}").n_steps == buffer.n_steps


def test_what_is_not_there_gets_one_line(server, bundle, capsys) -> None:
    server.add("me/it", contents(bundle))
    server.add("me/empty", {"README.md": b"# nothing", "policy.pt": b"pickle"})
    for reference, message in (
        ("hf://me/nothing", "hf://me/nothing: not on http://127.0.0.1"),
        ("hf://me/it@v9", "hf://me/it@v9: no such revision"),
        ("hf://me/empty", "holds no file of a policy; there is README.md, policy.pt"),
        ("hf://me/it/folder", "holds no file of a policy"),
    ):
        assert message in refused(["evaluate", f"bundle={reference}"], capsys)
    server.repositories["models/me/it"].private = True
    server.token = "another"
    assert "log in (hf auth login), or set HF_TOKEN" in refused(["evaluate", "bundle=hf://me/it"], capsys)
    assert "log in (hf auth login), or set HF_TOKEN" in refused(
        ["bundle", "push", str(bundle), "to=hf://me/new"], capsys
    )


def test_without_a_network_a_commit_that_is_here_still_works(server, bundle, capsys) -> None:
    commit = server.add("me/it", contents(bundle))
    found = load("evaluate", ["bundle=hf://me/it"])["bundle"]
    server.close()
    assert load("evaluate", [f"bundle=hf://me/it@{commit}"])["bundle"] == found
    error = refused(["evaluate", "bundle=hf://me/it"], capsys)
    assert "cannot be reached, or broke off" in error


@pytest.mark.parametrize(
    "name", ["../config.yaml", "/etc/spec.json", "a/../../spec.json", "extensions\\x", "a//b", "C:/x"]
)
def test_a_name_that_leads_elsewhere_is_refused(name, server, bundle, tmp_path, capsys) -> None:
    server.add("me/it", contents(bundle))
    listed = [{"rfilename": key, "size": len(value)} for key, value in contents(bundle).items()]
    server.listed["me/it"] = [*listed, {"rfilename": name, "size": 2}]
    assert "whose name leads elsewhere: nothing of it is taken" in refused(["evaluate", "bundle=hf://me/it"], capsys)
    assert not list((tmp_path / "cache").rglob("*.yaml"))


def test_sizes_are_bounded_and_have_to_be_true(server, bundle, capsys) -> None:
    server.add("me/it", contents(bundle))
    listed = [{"rfilename": key, "size": len(value)} for key, value in contents(bundle).items()]
    server.listed["me/it"] = [*listed, {"rfilename": "extensions/guard.safetensors", "size": 10**12}]
    assert "at most 1,000,000 and 20 GB are fetched" in refused(["evaluate", "bundle=hf://me/it"], capsys)
    server.listed["me/it"] = [{**one, "size": 1} for one in listed]
    assert "of 1 that are listed" in refused(["evaluate", "bundle=hf://me/it"], capsys)


def test_a_file_that_is_cut_off_is_not_taken_for_all_of_it(server, bundle, capsys, tmp_path) -> None:
    server.add("me/it", contents(bundle))
    server.cut.add("spec.json")
    refused(["evaluate", "bundle=hf://me/it"], capsys)
    assert not [path for path in (tmp_path / "cache").rglob("spec.json") if ".partial" not in str(path)]
    server.cut.clear()
    assert set(contents(Path(load("evaluate", ["bundle=hf://me/it"])["bundle"]))) == {*contents(bundle), "hub.json"}


def test_the_package_that_is_missing_is_named(server, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "action-diffusion[hub]"' in refused(["evaluate", "bundle=hf://me/it"], capsys)


def test_what_others_published_is_imported(server, tmp_path, capsys) -> None:
    config = {**lerobot_policy.CONFIG, **lerobot_policy.features(environment=4)}
    lerobot_policy.write(tmp_path / "theirs", lerobot_policy.made(config), lerobot_policy.statistics(config))
    server.add("them/pusht", contents(tmp_path / "theirs") | {"modeling.py": b"raise SystemExit"})
    words = ["in=hf://them/pusht", f"out={tmp_path / 'bundle'}", "rate=10"]
    assert cli.main(["bundle", "import", *words]) == 0
    bundles.load(tmp_path / "bundle", verify=True)
    assert cli.main(["bundle", "inspect", "hf://them/pusht"]) == 0
    assert "format: lerobot" in capsys.readouterr().out


def test_a_lerobot_data_set_is_read_from_there(server, buffer: ReplayBuffer, tmp_path) -> None:
    pytest.importorskip("pyarrow")
    buffer.save(tmp_path / "demos.zarr")
    words = [f"in={tmp_path / 'demos.zarr'}", f"out={tmp_path / 'set'}", "format=lerobot", "rate=10"]
    assert cli.main(["data", "convert", *words]) == 0
    server.add("me/set", contents(tmp_path / "set") | {"README.md": b"# mine"}, kind="datasets")
    np.testing.assert_allclose(open_data("hf://datasets/me/set")["state"][:], buffer["state"][:])
