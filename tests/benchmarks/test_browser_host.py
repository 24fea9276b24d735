"""The browser as a host: samples of the page's clock, and reasons where it cannot run."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browsing import need_browser
from tiny import tiny_clip

from benchmarks import bundles, latency
from benchmarks.hosts import browser
from benchmarks.timing import Artifact, Config
from compress.errors import PocketclipError
from export import Unavailable
from export import onnx as portable


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifact]:
    need_browser()
    folder = tmp_path_factory.mktemp("bundles") / "onnx"
    portable.write(tiny_clip(), portable.Config(), folder)
    yield Artifact(
        "onnx", folder, "image", 1, bundles.read(folder).queries("image"), host="browser"
    )


def test_the_protocol_times_a_bundle_in_the_browser(artifact: Artifact) -> None:
    """The whole way that `pocketclip bench --set hosts=[browser]` goes, raw samples included."""
    cfg = Config(
        processes=1,
        rounds=2,
        round_seconds=0.05,
        min_queries=10,
        patience_seconds=0,
        roofline=False,
    )
    text = replace(artifact, tower="text", inputs=bundles.read(artifact.folder).queries("text"))
    [image, words], hosts = latency.measure([artifact, text], cfg, progress=False)
    for timing in (image, words):
        assert timing.unavailable is None
        assert timing.num_queries >= 10
        assert all((samples > 0).all() for samples in timing.rounds)
        assert all(np.isfinite(samples).all() for samples in timing.processor_rounds)
        assert timing.opened[0]["load_ms"] > 0 and timing.opened[0]["first_ms"] > 0
        assert timing.peaks[0] > 0
    assert "Chrome" in hosts["browser"]["machine"]["browser"]


def test_pictures_and_sentences_can_be_timed_whole(artifact: Artifact) -> None:
    worker = browser.Worker(replace(artifact, scope="preprocess"), [0], 120)
    try:
        samples = worker.run(3, 5.0)
    finally:
        worker.close()
    assert samples.shape == (3, 2) and (samples[:, 0] > 0).all()


def test_webgpu_runs_or_says_why_not(artifact: Artifact) -> None:
    try:
        worker = browser.Worker(replace(artifact, host="browser:webgpu"), [0], 120)
    except Unavailable as reason:
        assert "WebGPU" in str(reason)
    else:
        assert (worker.run(2, 5.0)[:, 0] > 0).all()
        worker.close()


def test_files_of_another_kind_are_a_reason(tmp_path: Path) -> None:
    about = {"target": "openvino", "image": {"file": "image.xml"}}
    (tmp_path / "bundle.json").write_text(json.dumps(about))
    other = Artifact("openvino", tmp_path, "image", 1, np.zeros((1, 3, 32, 32), np.float32))
    with pytest.raises(Unavailable, match="browsers run ONNX files, not those of openvino"):
        browser.Worker(other, [0], 60)


def test_an_unknown_place_is_named() -> None:
    with pytest.raises(PocketclipError, match="browser:firefox"):
        browser.describe("firefox")
