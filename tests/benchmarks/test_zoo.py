"""Models x runtimes x precisions: what is kept, what is left out, and what is claimed."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny import tiny_clip, tiny_data

from benchmarks import machine, results_tables
from benchmarks.experiments import zoo
from benchmarks.timing import Config
from compress.errors import PocketclipError
from export import Unavailable

ROUND = Config(processes=1, rounds=2, round_seconds=0.01, min_queries=2, patience_seconds=0)


def test_the_models_are_the_seven_of_every_target():
    assert len(zoo.MODELS) == 7 and "ViT-B/16" not in zoo.MODELS


def test_models_not_run_are_rows_with_a_reason_and_count_against_the_claim(tmp_path):
    kept = zoo.kept("ViT-B/32", tmp_path)
    kept.parent.mkdir()
    rows = zoo.cells("ViT-B/32")
    for row in rows[:8]:
        row |= {"unavailable": None, "p50_ms": 1.0}
    kept.write_text(json.dumps([*rows, {"task": "peaks", "model": "ViT-B/32"}]))
    found = zoo.gathered(tmp_path)
    towers = 2 * len(zoo.CELLS)
    assert len(found) == 7 * towers + 1
    [claim] = zoo.claims(found)
    assert claim["value"] == pytest.approx(8 / (7 * towers)) and not claim["holds"]
    assert len(claim["rows"]) == 7 * towers
    assert {row["unavailable"] for row in found if row["model"] == "SigLIP B/16"} == {"not run"}


@pytest.mark.parametrize("error", [Unavailable, PocketclipError])
def test_a_file_that_cannot_be_written_is_a_reason(tmp_path, monkeypatch, error):
    def write(clip, cfg, out):
        raise error("no such operator")

    config = SimpleNamespace(model_validate=lambda settings: settings)
    exporter = SimpleNamespace(Config=config, write=write)
    monkeypatch.setattr(zoo.plugin, "find", lambda place, name: exporter)
    assert zoo.exported(tiny_clip(), "onnx", "fp32", tmp_path / "x") == "no such operator"


@pytest.mark.parametrize(("honours", "kept"), [(True, True), (False, False)])
def test_an_exporter_gets_a_scheme_only_if_it_knows_schemes(tmp_path, monkeypatch, honours, kept):
    got = []
    exporter = SimpleNamespace(
        Config=SimpleNamespace(model_validate=lambda settings: settings),
        HONOURS_SCHEME=honours,
        write=lambda clip, cfg, out: got.append(clip),
    )
    monkeypatch.setattr(zoo.plugin, "find", lambda place, name: exporter)
    monkeypatch.setattr(zoo, "float_twin", lambda clip: "without its scheme")
    clip = tiny_clip()
    zoo.exported(clip, "web", "fp32", tmp_path / "x")
    assert got == [clip if kept else "without its scheme"]


def test_one_model_gives_rows_with_latency_size_share_of_the_peaks_and_accuracy(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(zoo, "CELLS", (("onnxruntime", "fp32", "local"),))
    clip = tiny_clip(layers=1)
    rows = zoo.measured("tiny", clip, tmp_path, ROUND)
    *towers, peaks = rows
    assert [row["tower"] for row in towers] == ["image", "text"]
    assert all(row["p50_ms"] > 0 and row["size_bytes"] > 0 for row in towers)
    assert peaks["task"] == "peaks" and peaks["fp32_gflops"] > 0
    assert {row["cpu"] for row in rows} == {machine.short()}
    path = zoo.kept(zoo.MODELS[0], tmp_path)
    path.parent.mkdir()
    path.write_text(json.dumps(rows))
    image = zoo.gathered(tmp_path)[0]
    gflops = 2 * image["num_macs"] / image["processor_p50_ms"] / 1e6
    assert image["roofline"]["gflops"] == pytest.approx(gflops)
    assert image["roofline"]["of_compute"] == pytest.approx(gflops / peaks["fp32_gflops"])
    for row in towers:
        row["accuracy_note"] = zoo.UNJUDGED
    saved = []
    clip = replace(clip, data=tiny_data(tmp_path / "data"))
    zoo.judge_(rows, clip, tmp_path, lambda: saved.append(json.dumps(rows)))
    assert len({row["top1"] for row in towers}) == 1 and "top1" not in peaks
    assert 0 <= towers[0]["top1"] <= 1 and len(saved) == 1
    zoo.judge_(rows, clip, tmp_path, lambda: saved.append("again"))
    assert len(saved) == 1  # what is judged is not judged again
    assert " % |" in "\n".join(results_tables.zoo(rows)).splitlines()[2]


def test_a_model_is_finished_when_its_files_are_judged(tmp_path):
    path = zoo.kept("ViT-B/32", tmp_path)
    assert not zoo.finished("ViT-B/32", tmp_path)
    path.parent.mkdir()
    for note, finished in ((zoo.UNJUDGED, False), (None, True)):
        path.write_text(json.dumps([{"accuracy_note": note}, {"task": "peaks"}]))
        assert zoo.finished("ViT-B/32", tmp_path) == finished
