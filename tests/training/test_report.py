"""Reports: well-formed, self-contained, escaped, honest about what is missing; figures in the page's colours."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from web_pages import HOSTILE, Page

from action_diffusion.envs.video import write_video
from action_diffusion.errors import InputError
from action_diffusion.training.evaluation import plots
from action_diffusion.training.evaluation.report import (
    EMBED_LIMIT,
    Clip,
    read_metrics,
    write_offline_report,
    write_report,
)


def results(**changes: Any) -> dict[str, Any]:
    return {
        "task": "pusht_state",
        "n_episodes": 4,
        "mean_score": 0.875,
        "success_rate": 0.5,
        "success_interval": [0.15, 0.85],
        "mean_interval": [0.7, 1.0],
        "scores": [1.0, 0.6, 1.0, 0.9],
        "seeds": [5, 6, 7, 8],
        "settings": {"bundle": "outputs/bundle", "sampler": {"n_steps": 16}},
        "versions": {"torch": "2.15.0"},
        "seconds": 12.3,
        "score_definition": "Success is a score that reaches 1.",
    } | changes


def write(folder: Path, *, metrics: Any = (), clips: Any = (), **changes: Any) -> Page:
    write_report(folder / "report.html", results=results(**changes), metrics=metrics, clips=clips)
    return Page(folder / "report.html")


def test_the_headline_numbers_with_their_intervals(tmp_path: Path) -> None:
    page = write(tmp_path)
    for text in ("0.875", "0.700 to 1.000", "50.0\N{NO-BREAK SPACE}%", "Wilson", "sampler.n_steps", "2.15.0"):
        assert text in page.text
    assert "They do not cover training" in page.text
    assert "Learning curves" not in page.text
    assert "video" not in page.tags


def test_nothing_is_requested_from_anywhere(tmp_path: Path) -> None:
    metrics = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    page = write(tmp_path, metrics=metrics)
    assert page.tags.count("svg") == 2
    assert all(link.startswith(("#", "data:")) for link in page.links)
    names = set(re.findall(r"https?://[^\"'\s<)]+", page.source))
    assert names == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names of formats, never fetched
    assert "default-src 'none'" in page.source
    assert not re.search(r"@import|url\((?!#)", page.source)


def test_text_is_escaped(tmp_path: Path) -> None:
    clips = [Clip(HOSTILE, 5, 1.0, tmp_path / "a.mp4")]
    clips[0].path.write_bytes(b"video")
    page = write(tmp_path, clips=clips, task=HOSTILE, settings={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE})
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 6


def test_small_videos_are_inside_and_large_ones_beside(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "seed_5.mp4").write_bytes(b"0" * (EMBED_LIMIT - 1))
    (folder / "seed_6.mp4").write_bytes(b"0" * EMBED_LIMIT)
    clips = [Clip("Best", 5, 1.0, folder / "seed_5.mp4"), Clip("Worst", 6, 0.6, folder / "seed_6.mp4")]
    page = write(tmp_path, clips=clips)
    sources = [link for link in page.links if not link.startswith("#")]
    assert sources[0].startswith("data:video/mp4;base64,MDAw")
    assert sources[1] == "videos/seed_6.mp4"
    assert "Best" in page.text
    assert "score 0.600, seed 6" in page.text


def poster_of(page: Page) -> str:
    encoded = re.findall(r'poster="data:image/svg\+xml;base64,([^"]+)"', page.source)
    return base64.b64decode(encoded[0]).decode()


@pytest.mark.parametrize(("score", "outcome"), [(1.0, "success"), (0.6, "no success")])
def test_a_video_shows_its_outcome_before_it_is_played(tmp_path: Path, score: float, outcome: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"video")
    last = np.zeros((48, 96, 3), np.uint8)
    page = write(tmp_path, clips=[Clip("Best", 5, score, tmp_path / "a.mp4", last)])
    poster = poster_of(page)
    drawn = ElementTree.fromstring(poster)
    assert "".join(drawn.itertext()) == f"{outcome}, score {score:.3f}, seed 5"
    assert "data:image/jpeg;base64," in poster
    assert 'style="aspect-ratio:96/48"' in page.source


@pytest.mark.slow
def test_a_page_fits_a_telephone_and_videos_have_their_controls_below(tmp_path: Path, browser: Any) -> None:
    (tmp_path / "videos").mkdir()
    last, clips = np.full((48, 96, 3), 200, np.uint8), []
    for seed in (5, 6):
        clips.append(Clip("Best", seed, 1.0, tmp_path / "videos" / f"seed_{seed}.mp4", last))
        write_video(clips[-1].path, [last] * 4, fps=10)
    write(tmp_path, clips=clips, task="a-task-of-a-name-that-is-longer-than-the-screen-of-a-telephone-is-wide-" * 2)
    for width in (1200, 400):
        shown = browser.new_page(viewport={"width": width, "height": 800})
        asked: list[str] = []
        shown.on("request", lambda request, asked=asked: asked.append(request.url))
        shown.goto((tmp_path / "report.html").as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        film, video = (shown.locator(what).first.bounding_box() for what in (".film", "video"))
        assert film["height"] == pytest.approx(film["width"] / 2, abs=1)  # the picture, and beneath it
        assert video["height"] - film["height"] >= 70  # room for chromium's two rows of controls
        below = shown.locator("figcaption").first.bounding_box()
        assert below["y"] >= video["y"] + video["height"]
        assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
        assert [url for url in asked if url.startswith("file:")] == [(tmp_path / "report.html").as_uri()]
        shown.close()


@pytest.mark.slow
def test_learning_curves_that_there_are(tmp_path: Path) -> None:
    metrics: list[dict[str, Any]] = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in range(1, 2000)]
    metrics += [
        {"step": 100, "validation_loss": 0.5, "action_error": None},
        {"step": 50, "loss": 9.0},  # a resumed training wrote step 50 again, and its last step is still 1999
        {"step": 2000, "rollout_score": 0.25},
    ]
    page = write(tmp_path, metrics=metrics)
    assert page.tags.count("svg") == 3
    assert "Last: training 0.0005003, validation 0.5" in page.text
    assert "Score of rollouts" in page.text
    assert "Action error" not in page.text
    assert len(page.source) < 200_000  # long curves are thinned


@pytest.mark.slow
def test_offline_report(tmp_path: Path) -> None:
    error = {"mae": 0.1, "rmse": 0.2, "range": 2.0, "relative_mae": 0.05, "relative_rmse": 0.1}
    still = {"mae": 0.0, "rmse": 0.0, "range": 0.0, "relative_mae": None, "relative_rmse": None}
    found = {
        "task": "custom",
        "n_windows": 9,
        "n_steps": 72,
        "n_action_steps": 2,
        "names": [HOSTILE, "grip"],
        "action_error_relative": 0.05,
        "errors": {HOSTILE: error, "grip": still},
        "steps_ahead": [-1, 0, 1, 2],
        "relative_ahead": [0.04, 0.05, 0.06, None],
        "settings": {},
        "versions": {},
        "seconds": 1.0,
    }
    chunks = plots.plot_scores([1.0])
    write_offline_report(tmp_path / "report.html", results=found, metrics=[], chunks=chunks)
    page = Page(tmp_path / "report.html")
    assert "no success rate" in page.text
    assert "5.0\N{NO-BREAK SPACE}%" in page.text
    assert "constant" in page.text
    assert HOSTILE in page.text
    assert page.tags.count("svg") == 2
    still_results = found | {"action_error_relative": None, "relative_ahead": [None] * 4}
    write_offline_report(tmp_path / "report.html", results=still_results, metrics=[], chunks=chunks)
    assert Page(tmp_path / "report.html").tags.count("svg") == 1


def test_an_offline_report_says_first_what_was_measured_on(tmp_path: Path) -> None:
    one = {"mae": 0.1, "rmse": 0.2, "range": 2.0, "relative_mae": 0.05, "relative_rmse": 0.1}
    baseline = {"action_error_relative": 0.5, "verdict": HOSTILE, "made_of": {HOSTILE: "state[0]"}}
    found = {
        "task": "custom",
        "n_windows": 9,
        "n_steps": 72,
        "n_action_steps": 2,
        "names": [HOSTILE],
        "units": ["<deg>"],
        "action_error_relative": 0.05,
        "action_error_relative_interval": [0.04, 0.0625],
        "errors": {HOSTILE: one},
        "steps_ahead": [0],
        "relative_ahead": [0.05],
        "origin": HOSTILE,
        "origin_kind": "trained",
        "n_episodes": 3,
        "baselines": {"hold_still": baseline, "repeat_last_action": baseline},
        "settings": {},
        "versions": {},
        "seconds": 1.0,
    }
    episode = plots.plot_episode(
        predicted=np.zeros((5, 1)), demonstrated=np.ones((5, 1)), names=[HOSTILE], control_rate=10.0, n_action_steps=2
    )
    chunks = plots.plot_scores([1.0])
    write_offline_report(tmp_path / "report.html", results=found, metrics=[], chunks=chunks, episode=episode)
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags
    assert page.text.index(f"Measured on {HOSTILE}.") < page.text.index("no success rate")
    assert 'class="verdict warning"' in page.source
    assert f"{HOSTILE} [<deg>]" in page.text
    assert "95 % interval 4.0\N{NO-BREAK SPACE}% to 6.2\N{NO-BREAK SPACE}%" in page.text
    assert f"({HOSTILE}: state[0])" in page.text
    assert "Along an episode" in page.text
    assert page.tags.count("svg") == 3


def test_metrics_survive_a_killed_training(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo\n{"step": 10, "loss": 2.0}\n{"step": 2')
    assert [entry["loss"] for entry in read_metrics(path)] == [1.0, 2.0]
    path.write_text("")
    assert read_metrics(path) == []


@pytest.mark.parametrize("content", [b"hello\n", b'{"loss": 1}\n', b"[1]\n", b'{"step": "a"}\n', b"\xff\xfe\n"])
def test_metrics_that_are_not(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl"):
        read_metrics(path)


def chunk_arguments(n: int = 2, horizon: int = 8, size: int = 3) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "predicted": random.normal(size=(n, horizon, size)),
        "demonstrated": random.normal(size=(n, horizon, size)),
        "mask": np.ones((n, horizon), bool),
        "now": 1,
        "names": [HOSTILE, *(f"joint {index}" for index in range(1, size))],
        "n_action_steps": 4,
    }


def texts(svg: bytes) -> list[str]:
    return [
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")
    ]


@pytest.mark.slow
def test_figures_are_svg_in_the_colours_of_the_page() -> None:
    before = dict(mpl.rcParams)
    figures = [
        plots.plot_chunks(**chunk_arguments(), titles=["A", HOSTILE]),
        plots.plot_scores([0.2, 1.0]),
        plots.plot_error_ahead([-1, 0, 1], [0.1, 0.2, 0.3], n_action_steps=2),
        plots.plot_curves({"training": (np.arange(3), np.array([3.0, 2.0, 1.0]))}, logarithmic=True),
        plots.plot_curves({"training": (np.arange(3), np.array([3.0, 0.0, 1.0]))}, logarithmic=True),
    ]
    for svg in figures:
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert set(re.findall(rb"#[0-9a-f]{6}", svg)) <= {b"#24292f", b"#d0d7de", b"#0969da", b"#bc4c00"}
        assert b"var(--ink, #24292f)" in svg
        assert not any("mathdefault" in text for text in texts(svg))
    assert texts(figures[0]).count(HOSTILE) == 2
    assert dict(mpl.rcParams) == before


@pytest.mark.slow
def test_what_the_cameras_saw_stands_above_the_chunks() -> None:
    frames = {camera: np.zeros((2, 24, 32, 3), np.uint8) for camera in ("front", HOSTILE)}
    svg = plots.plot_chunks(**chunk_arguments(), frames=frames)
    images = [element for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}image")]
    assert len(images) == 4
    assert all(value.startswith("data:image/png") for image in images for key, value in image.items() if "href" in key)
    assert {"front", HOSTILE} <= set(texts(svg))


def test_an_episode_is_drawn_in_seconds() -> None:
    """Twenty steps at 2 Hz end at 9.5 s."""
    walk = np.arange(20.0)[:, None] * [0.01, -0.01]
    svg = plots.plot_episode(
        predicted=walk, demonstrated=walk, names=["x [m]", HOSTILE], control_rate=2.0, n_action_steps=8
    )
    shown = texts(svg)
    assert {"x [m]", HOSTILE, "seconds", "predicted", "demonstrated"} <= set(shown)
    assert "8" in shown
    assert "10" not in shown


def test_padding_is_left_out_of_the_demonstration() -> None:
    arguments = chunk_arguments(n=1, size=1)
    arguments["mask"][0, 5:] = False
    arguments["demonstrated"][0, 5:] = 1e6
    assert not any("1000000" in text or "1e6" in text for text in texts(plots.plot_chunks(**arguments)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predicted": np.zeros((2, 8, 4))}, r"\[2, 8, 4\] and demonstrated chunks \[2, 8, 3\]"),
        ({"predicted": np.zeros((0, 8, 3)), "demonstrated": np.zeros((0, 8, 3))}, "N >= 1"),
        ({"mask": np.ones((2, 7), bool)}, r"\[2, 7\], the chunks need \[2, 8\]"),
        ({"names": ["x"]}, "1 names for 3"),
        ({"titles": ["x"]}, "1 titles for 2"),
    ],
)
def test_chunks_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plots.plot_chunks(**(chunk_arguments() | changes))
