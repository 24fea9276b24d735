"""A tiny run, measured: what stands in bench.json and summary.json, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from tiny import tiny_clip, tiny_data

import compress.clip
import export.onnx
from benchmarks import run, summary
from benchmarks.timing import Config
from compress import atomic
from compress.embeddings import Config as EvaluateConfig
from compress.errors import PocketclipError
from compress.work import Work

QUICK = Config(
    processes=1,
    rounds=3,
    round_seconds=0.02,
    min_queries=10,
    warmup_seconds=0.05,
    patience_seconds=0,
    roofline=False,
)


def small_run(folder):
    """A run folder as the runner leaves it before the benchmark, and what `bench` is given."""
    teacher, student = tiny_clip(0), replace(tiny_clip(1, layers=1), name="small")
    out = folder / "run"
    stages = {"00-inherit": tiny_clip(2, layers=1), "01-distill": student}
    for name, clip in stages.items():
        compress.clip.save(clip, out / name)
    export.onnx.write(teacher, export.onnx.Config(), out / run.BASELINE)
    export.onnx.write(student, export.onnx.Config(), out / "export" / "onnx")
    about = {"target": "coreml", "precision": "fp16", "reason": "Core ML predicts on macOS only"}
    atomic.write_json(out / "export" / "coreml-fp16" / "unavailable.json", about)
    steps = [{"folder": "01-distill", "seconds": 12.5}]
    atomic.write_json(out / "manifest.json", {"schema_version": 1, "steps": steps})
    data = tiny_data(folder)
    recipe = SimpleNamespace(
        name="tiny",
        sha256="0" * 64,
        model="teacher",
        stages=("inherit", "distill"),
        data=SimpleNamespace(templates=data.templates),
        evaluate=EvaluateConfig(resamples=100),
        bench=QUICK,
    )
    return out, recipe, Work(clip=student, teacher=teacher, data=data)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("small"))


def copied(small, folder):
    out, recipe, work = small
    return shutil.copytree(out, folder / "run"), recipe, work


@pytest.fixture(scope="module")
def measured(small, tmp_path_factory):
    out, recipe, work = copied(small, tmp_path_factory.mktemp("measured"))
    run.bench(out, recipe, work)
    return out, json.loads((out / "bench.json").read_text())


def rows_of(out, **wanted):
    rows = json.loads((out / "summary.json").read_text())["rows"]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_every_artifact_has_a_row_for_each_tower(measured):
    out, _ = measured
    found = {(r["artifact"], r["target"], r["tower"]) for r in rows_of(out)}
    artifacts = [("teacher", "torch"), ("student", "torch"), ("teacher", "onnx")]
    artifacts += [("student", "onnx"), ("student", "coreml")]
    assert found == {(*a, tower) for a in artifacts for tower in ("image", "text")}


def test_exported_files_are_as_accurate_as_the_torch_model(measured):
    out, _ = measured
    for artifact in ("teacher", "student"):
        torch_row = rows_of(out, artifact=artifact, target="torch", tower="image")[0]
        onnx_row = rows_of(out, artifact=artifact, target="onnx", tower="image")[0]
        for metric in ("top1", "top5", "image_to_text_r1", "text_to_image_r10"):
            # One of 8 pictures may change sides when fp32 sums are ordered differently.
            assert onnx_row[metric] == pytest.approx(torch_row[metric], abs=0.126)
        assert onnx_row["parity_worst_cosine"] > 0.9999
        assert onnx_row["num_params"] == torch_row["num_params"]


def test_speedup_refers_to_the_teacher_in_the_same_run(measured):
    out, bench = measured
    teacher, student = (
        rows_of(out, artifact=a, target="onnx", tower="image")[0] for a in ("teacher", "student")
    )
    assert teacher["speedup"] == 1.0 and teacher["speedup_ci95"] == [1.0, 1.0]
    assert student["speedup"] == pytest.approx(teacher["p50_ms"] / student["p50_ms"])
    assert student["threads"] == 1 and student["num_queries"] >= 10
    timing = next(t for t in bench["timings"] if t["path"] == "export/onnx")
    assert sum(len(samples) for samples in timing["rounds_ms"]) == timing["num_queries"]


def test_sizes_and_hashes_are_those_of_the_files(measured):
    out, _ = measured
    for row in rows_of(out, target="onnx"):
        path = out / row["path"] / f"{row['tower']}.onnx"
        assert row["size_bytes"] == path.stat().st_size
        assert row["sha256"] == atomic.sha256(path)


def test_target_that_could_not_be_written_is_a_row_with_its_reason(measured):
    out, _ = measured
    row = rows_of(out, target="coreml", tower="image")[0]
    assert row["unavailable"] == "Core ML predicts on macOS only"
    assert (row["executed"], row["top1"], row["p50_ms"]) == (False, None, None)


def test_stages_on_the_way_and_examples_are_recorded(measured):
    _, bench = measured
    assert [row["folder"] for row in bench["stages"]] == ["00-inherit"]
    assert 0 <= bench["stages"][0]["accuracy"]["top1"] <= 1
    examples = bench["examples"]
    assert examples["path"] == "export/onnx" and len(examples["pictures"]) == 8
    assert sum(examples["counts"].values()) == 8
    assert len(examples["pictures"][0]["teacher"]) == 3


def test_seconds_hold_the_stages_and_the_bench(measured):
    out, _ = measured
    seconds = json.loads((out / "summary.json").read_text())["seconds"]
    assert seconds["01-distill"] == 12.5 and seconds["bench: latency"] > 0


def test_latency_without_accuracy_of_the_same_file_is_refused(measured):
    _, bench = measured
    bench["timings"][0]["sha256"] = "f" * 64
    with pytest.raises(PocketclipError, match="accuracy was not measured on sha256 ffffffffffff"):
        summary.summarise(bench, [])


def test_changed_file_is_refused_before_anything_is_measured(small, tmp_path):
    out, recipe, work = copied(small, tmp_path)
    with (out / "export/onnx/image.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(PocketclipError, match="has changed"):
        run.bench(out, recipe, work)
    assert not (out / "bench.json").exists()


def test_run_without_evaluation_data_times_nothing(small, tmp_path):
    out, recipe, work = copied(small, tmp_path)
    run.bench(out, recipe, replace(work, data=replace(work.data, evaluate={})))
    assert all(row["p50_ms"] is None for row in rows_of(out))
    assert {row["parity_worst_cosine"] is None for row in rows_of(out, target="onnx")} == {False}


def test_bundles_alone_are_timed_against_the_first(measured):
    out, _ = measured
    rows = run.bench_bundles([out / run.BASELINE, out / "export"], QUICK)["timings"]
    assert [row["tower"] for row in rows] == ["image", "text"] * 2
    assert rows[0]["speedup"] == 1.0 and rows[2]["speedup"] > 0


def test_summary_follows_its_published_schema(measured):
    schema = json.loads((Path(run.__file__).parent / "summary.schema.json").read_text())
    table = json.loads((measured[0] / "summary.json").read_text())
    errors = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(table)]
    assert table["rows"] and errors == []
