"""The matrix of targets: claims of hand-made rows, the page, and that the page is up to date."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory, target_claims, target_matrix
from benchmarks.experiments import (
    _forked,
    model_families,
    small_networks,
    target_sources,
    targets,
)
from benchmarks.experiments.target_sources import TEACHER


def row(source: str, target: str, tower: str, **figures: Any) -> dict[str, Any]:
    about = {"source": source, "target": target, "precision": "fp32", "tower": tower}
    passed = {"passed": True, "kind": "executed", "reason": None, "worst_cosine": 0.99991}
    return about | passed | {"seconds": 10.0} | figures


FAILED = {"passed": False, "kind": "refused", "reason": "litert fp32, text tower: too far"}
ROWS = [
    row(targets.STUDENT, "litert", "image"),
    row(targets.STUDENT, "litert", "text", **FAILED),
    row(
        targets.STUDENT,
        "openvino",
        "image",
        seconds=25.0,
        processor_seconds=9.0,
        runtime={"delegates": 3},
    ),
    row(targets.STUDENT, "openvino", "text"),
    row("ViT-B/16", "openvino", "image", weights_bytes=600, peak_memory_bytes=1500),
    row("ViT-B/16", "litert", "image", passed=False, kind="no source", reason="none"),
]


def test_claims_count_towers_seconds_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_claims, "LARGE_BYTES", 500)
    more = row("SigLIP B/16", "mnn", "image", weights_bytes=700, peak_memory_bytes=2100)
    found = {claim["name"]: claim for claim in targets.claims([*ROWS, more])}
    assert found["litert: towers shown to pass"]["value"] == 0.5
    assert not found["litert: towers shown to pass"]["holds"]
    assert found["openvino: towers shown to pass"]["value"] == 1
    time = found["embedded student to all installed targets, one precision each"]
    assert (time["value"], time["holds"]) == (35.0, True)
    for of, value, place in (("ViT-B/16", 2.5, 4), ("all large models", 3.0, 6)):
        memory = found[f"memory an export adds, over the weights, worst case of {of}"]
        assert (memory["value"], memory["rows"][-1]) == (value, place)


def test_siglip_opens_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small towers of SigLIP's kind in the place of the named ones, the tokenizer of bytes."""
    import open_clip

    small_networks.register()
    small = {"embed_dim": 64, **model_families.OPEN_CLIP["SigLIP, SigLIP2"]}
    vision = {"image_size": 32, **small["vision_cfg"]}
    small |= {"vision_cfg": vision, "text_cfg": {**small["text_cfg"], "vocab_size": 300}}
    built = open_clip.CustomTextCLIP(**small)
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {**small, "custom_text": True})
    monkeypatch.setattr(open_clip, "create_model", lambda name: built)
    found = target_sources.siglip("small SigLIP")
    assert found.name == "small SigLIP" and found.license == "none: random weights"
    assert found.preprocess.mean == (0.5,) * 3 and not target_sources.trained(found)
    assert found.tokenizer(["A cat!"])[0].tolist() == found.tokenizer(["a cat"])[0].tolist()
    assert torch.isfinite(found.model.encode_text(found.tokenizer(["a cat"]))).all()


def test_what_was_not_run_shows_nothing() -> None:
    left = targets.not_run(targets.STUDENT, "onnx", "fp32")
    found = {claim["name"]: claim for claim in targets.claims(ROWS + left)}
    assert found["onnx: towers shown to pass"]["value"] == 0
    assert "embedded student to all installed targets, one precision each" not in found


def test_left_out_cases_are_rows_with_their_reason(tmp_path: Any) -> None:
    kept = targets.kept_rows(TEACHER, "onnx", None, tmp_path)
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps([{"target": "onnx", "precision": None, "passed": True}]))
    rows = targets._gathered(quick=False, folder=tmp_path)
    assert [row["source"] for row in rows if row["passed"]] == [TEACHER]
    assert {row["reason"] for row in rows if not row["passed"]} == {"not run yet"}
    assert {row["source"] for row in rows} == set(targets.SOURCES)


def test_committed_cases_stand_where_all_towers_passed(tmp_path: Path) -> None:
    committed = {"rows": ROWS, "machine": {"cpu": "X"}}
    (tmp_path / "results.json").write_text(json.dumps(committed))
    here = targets.kept_rows(targets.STUDENT, "openvino", "fp32", tmp_path)
    here.parent.mkdir(parents=True)
    here.write_text("[]")
    targets.take_committed(tmp_path, tmp_path / "results.json")
    found = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.glob("*/*/rows.json")}
    assert found == {("embedded-student", "openvino-fp32"), ("ViT-B-16", "openvino-fp32")}
    assert here.read_text() == "[]"
    assert targets.run("ViT-B/16", "openvino", "fp32", tmp_path) == [{**ROWS[4], "cpu": "X"}]


def test_first_precisions_come_before_second_ones() -> None:
    turns = targets._in_turn([TEACHER, targets.STUDENT], quick=False)
    cases = targets._contract.cases()
    count = len({target for target, _ in cases})
    assert len({target for _, target, _ in turns[:count]}) == count
    assert {source for source, *_ in turns[count : 2 * count]} == {targets.STUDENT}
    assert [target for _, target, _ in turns[:3]] == ["onnx", "onnxruntime", "openvino"]
    assert len(turns) == len(set(turns)) == 2 * len(cases)


def test_a_source_there_for_its_time_has_one_precision_a_target(tmp_path: Path) -> None:
    turns = targets._in_turn(["ViT-B/16"], quick=False)
    assert len(turns) == len({target for _, target, _ in turns})
    rows = targets._gathered(quick=False, folder=tmp_path)
    found = [(row["target"], row["precision"]) for row in rows if row["source"] == "ViT-B/16"]
    assert found[::2] == [(t, p) for place, t, p in targets._cases(False) if place == 0]


def test_page_shows_figures_reasons_and_gaps() -> None:
    rows = [{**row, "cpu": "X" if row["source"] == "ViT-B/16" else "Y"} for row in ROWS]
    result = {"rows": rows, "claims": targets.claims(rows), "command": "python -m x"}
    result |= {"date": "2026-11-22", "machine": {"cores": 2, "cpu": "X"}, "versions": {"a": "1"}}
    page = target_matrix.page(result)
    assert "| LiteRT | fp32 | 0.99991 | no model [1] |" in page
    assert "| LiteRT | fp32 | refused [2] |  |" in page
    assert "| OpenVINO | fp32 | 0.99991, 3 delegates | 0.99991 |" in page
    assert "2. litert fp32, text tower: too far" in page
    assert "falls short" in page and "ViT-B/16 on X" in page and "embedded student on Y" in page
    assert "| OpenVINO | 25 s (9 s), 0 MB | 10 s, 0 MB |" in page


def test_one_precision_a_model_is_told_apart_from_every_precision() -> None:
    rows = [
        row("ViT-B/32", "mnn", "image"),
        row("ViT-B/32", "mnn", "image", precision="w8", **FAILED),
        row(targets.STUDENT, "mnn", "image", **FAILED),
        row(targets.STUDENT, "tensorrt", "image", precision="fp16"),
        row(targets.STUDENT, "tensorrt", "image", precision="int8", **FAILED),
    ]
    found = {claim["name"]: (claim["value"], claim["rows"]) for claim in targets.claims(rows)}
    assert found["mnn: towers shown to pass, one precision a model"] == (0.5, [0, 2])
    assert found["mnn: towers shown to pass, every precision"] == (1 / 3, [0, 1, 2])
    assert found["tensorrt: fp16 and int8 engines built, their parity simulated"][0] == 0.5


def test_further_claims_count_only_what_they_name() -> None:
    rows = [
        row("MobileCLIP2-S0", "ncnn", "image", **FAILED),
        row("MobileCLIP2-S0", "ncnn", "text"),
        row(targets.STUDENT, "tensorrt", "image", precision="fp8", **FAILED),
        row(targets.STUDENT, "tensorrt", "image", precision="int8"),
        row(targets.STUDENT, "coreml", "text", **FAILED),
    ]
    found = {claim["name"]: claim["value"] for claim in targets.claims(rows)}
    assert found["ncnn: towers of transformers shown to pass"] == 1
    assert found["tensorrt: fp16 and int8 engines built, their parity simulated"] == 1
    assert found["coreml: towers converted, their parity simulated"] == 0


def test_a_crash_is_told_by_its_last_error_without_places(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    said = _forked.call(crash, (f"no kernel in {_forked.ROOT}/export",), log)
    assert said == "exit code 1: RuntimeError: no kernel in ./export"
    assert _forked.call(print, ("well",), log) is None
    assert log.read_text() == "well\n"


def crash(message: str) -> None:
    """Fail as converters do."""
    raise RuntimeError(message)


@pytest.mark.skipif(not targets.RESULTS.exists(), reason="the experiment has not run yet")
def test_the_page_shows_the_committed_figures() -> None:
    result = json.loads(targets.RESULTS.read_text())
    assert targets.PAGE.read_text() == target_matrix.page(result)


def test_memory_counts_children_and_forgets_what_stood_before() -> None:
    held = bytearray(b"a") * (60 << 20)  # 60 MB, there before
    code = "import time; x = bytes(b'a' * (80 << 20)); time.sleep(1)"
    with memory.watching() as watch:
        subprocess.run([sys.executable, "-c", code], check=True)
        own = bytearray(b"a") * (40 << 20)
        del own
    assert len(held) == 60 << 20
    assert 75 << 20 < watch.added_bytes < 115 << 20


def test_the_peak_of_this_process_counts_too() -> None:
    with memory.watching() as watch:
        own = bytearray(b"a") * (90 << 20)
        del own
    assert 85 << 20 < watch.added_bytes < 115 << 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_counts_only_what_it_has_of_its_own() -> None:
    """Programs start as forks, which for a moment seem to hold all that this process holds."""
    held = bytearray(b"a") * (200 << 20)
    with memory.watching() as watch:
        child = os.fork()
        if child == 0:
            own = bytearray(b"b") * (60 << 20)
            time.sleep(1)
            os._exit(len(own) % 2)
        os.waitpid(child, 0)
    assert len(held) == 200 << 20
    assert 55 << 20 < watch.added_bytes < 90 << 20
