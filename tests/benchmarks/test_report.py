"""The report of fabricated figures: what it says, that it stands alone, and that it is escaped."""

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from browsing import need_browser

import benchmarks
from benchmarks import details, licences, machine, report, summary
from benchmarks.statistics import summarise
from benchmarks.timing import Artifact, Config, Timing
from compress.errors import PocketclipError
from export._chromium import Chromium
from export._serve import Server

ARTIFACTS = (  # artifact, target, precision, path, top1, ms of the image tower, bytes of it
    ("teacher", "torch", "fp32", "teacher", 0.6, None, 20_000_000),
    ("student", "torch", "fp32", "01-distill", 0.55, None, 4_000_000),
    ("teacher", "onnxruntime", "fp32", "teacher/onnxruntime-fp32", 0.6, 8.0, 20_000_000),
    ("student", "onnx", "fp32", "export/onnx", 0.55, 2.0, 4_000_000),
    ("student", "onnxruntime", "int8", "export/onnxruntime-int8", 0.54, 1.0, 1_000_000),
)


def accuracy(top1):
    names = [name for name in summary.METRICS if "cosine" not in name]
    figures = dict.fromkeys(names, top1)
    return {**figures, **{f"{name}_ci95": [top1 - 0.03, top1 + 0.03] for name in names}}


def layers(target, precision):
    """Two layers, read from a file; torch models have no file to read."""
    dtype, bits = ("int8", 8) if precision == "int8" else ("float32", 32)
    about = {"dtype": dtype, "bits": bits, "num_weights": 5000}
    found = [{"name": "patch", **about}, {"name": "blocks.0.attention.qkv", **about}]
    return None if target == "torch" else found


def timing(path, tower, milliseconds):
    made = Timing(Artifact("onnx", Path(path), tower, 1, np.zeros(1)), [0])
    made.rounds = made.processor_rounds = [np.full(20, milliseconds)] * 8
    made.placement = {"requested": "CPU", "operators": {"CPU": {"MatMul": 9}}, "fallback": []}
    made.opened, made.warmups, made.peaks = [{"load_ms": 9, "first_ms": 3}], [], [1000]
    return made


def fabricated():
    """What `benchmarks.run` would have measured, figures set by hand."""
    rows, timings, baselines = [], [], {}
    for artifact, target, precision, path, top1, milliseconds, size in ARTIFACTS:
        for tower, scale in (("image", 1.0), ("text", 0.5)):
            row = {"artifact": artifact, "target": target, "precision": precision, "path": path}
            row |= {"tower": tower, "executed": True, "size_bytes": int(size * scale)}
            row |= {"sha256": f"{len(rows):064x}", "num_params": size // 4, "unavailable": None}
            row |= {"num_embedding_params": 0, "parity_worst_cosine": 0.999}
            row |= {"num_macs": size // 2, "layers": layers(target, precision)}
            rows.append({**row, "accuracy": {"styles": accuracy(top1), "val": accuracy(top1)}})
            if milliseconds:
                made = timing(path, tower, milliseconds * scale)
                baseline = baselines.setdefault(tower, made)
                figures = summarise(made, Config(), baseline)
                about = {key: rows[-1][key] for key in ("path", "tower", "sha256")}
                about |= {"threads": 1, "scope": "model", "host": "local"}
                timings.append({**about, **figures})
                if target == "onnxruntime":
                    slower = {key: 3 * figures[key] for key in ("p50_ms", "p90_ms", "min_ms")}
                    slower["p50_ms_ci95"] = [3 * bound for bound in figures["p50_ms_ci95"]]
                    timings.append({**about, **figures, **slower, "scope": "search"})
    return {
        "name": "<b>tiny</b>",
        "date": "2026-11-21T10:00:00+00:00",
        "recipe_sha256": "0" * 64,
        "headline_split": "styles",
        "machine": machine.describe(),
        "versions": machine.versions(),
        "settings": {
            "bench": Config().model_dump(mode="json"),
            "evaluate": {"resamples": 1000},
            "templates": ["{}"],
        },
        "seconds": {"bench: latency": 20.0},
        "artifacts": rows,
        "stages": [
            {
                "folder": "00-inherit",
                "num_macs": {"image": 2_000_000, "text": 1},
                "accuracy": accuracy(0.1),
            }
        ],
        "hosts": {"local": {"energy": "not measured: no counter", "throttled": False}},
        "peaks": [
            {
                "threads": 1,
                "fp32_gflops": 90.0,
                "bf16_gflops": None,
                "int8_gflops": 300.0,
                "memory_gbps": 8.0,
            }
        ],
        "timings": timings,
        "disturbance": {"load_before": [1], "load_after": [1], "cores_busy": 1.1, "stolen": 0.0},
        "examples": {
            "path": "export/onnxruntime-int8",
            "counts": {"both": 5, "teacher_only": 3, "student_only": 1, "neither": 1},
            "pictures": [
                {"png": "AAAA", "name": "sun & moon", "teacher": ["a"] * 3, "student": ["b"] * 3}
            ],
            "num_changed": 4,
            "changed": [
                {"png": "BBBB", "name": "moon", "teacher": ["moon"] * 3, "student": ["cheese"] * 3}
            ],
        },
    }


def reported(folder, bench):
    steps = [{"folder": "01-distill", "seconds": 100}]
    (folder / "summary.json").write_text(json.dumps(summary.summarise(bench, steps)))
    (folder / "bench.json").write_text(json.dumps(bench))
    for name in ("00-inherit", "01-distill"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "metrics.json").write_text('{"num_params": 5000000}')
    lines = [json.dumps({"step": n, "loss": 4 / (n + 1)}) for n in range(50)]
    (folder / "01-distill" / "log.jsonl").write_text("\n".join(lines))
    report.write(folder)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    return reported(tmp_path_factory.mktemp("run"), fabricated())


def test_verdict_says_speed_size_and_accuracy_of_the_fastest_student(pages):
    said = "Student, ONNX Runtime int8: 8.0× faster, 20.0× smaller and keeps 90 % of the teacher"
    assert all(said in page for page in pages)


def test_slower_and_larger_are_called_so(tmp_path):
    bench = fabricated()
    bench["timings"] = [t for t in bench["timings"] if t["path"] != "export/onnx"]
    for row in (r for r in bench["timings"] if r["path"] == "export/onnxruntime-int8"):
        row["speedup"] = 0.5
    for row in (r for r in bench["artifacts"] if r["path"] == "export/onnxruntime-int8"):
        row["size_bytes"] = 60_000_000
    assert "2.0× slower, 4.0× larger and keeps" in reported(tmp_path, bench)[1]


def test_page_asks_for_nothing_from_outside(pages):
    html = pages[0]
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", html)
    assert "@import" not in html and "url(" not in html
    assert "prefers-color-scheme: dark" in html and 'id="theme"' in html


def test_text_from_outside_is_escaped(pages):
    assert "<b>tiny</b>" not in pages[0] and "&lt;b&gt;tiny" in pages[0]
    assert "sun &amp; moon" in pages[0]


def test_every_artifact_split_and_stage_is_shown(pages):
    html, markdown = pages
    for name in ("Teacher · PyTorch fp32", "Student · ONNX fp32", "Student · ONNX Runtime int8"):
        assert name in html and name in markdown
    assert "styles" in html and "val" in html
    assert "1. Teacher" in html and "2. Inherit" in html and "3. Distill" in html
    assert html.count("<polyline") == 3  # two frontiers, one loss curve


def test_quiet_machine_gives_no_warning_and_a_busy_one_does(pages, tmp_path):
    assert "with care" not in pages[0]
    bench = fabricated()
    bench["disturbance"]["cores_busy"] = 1.9
    bench["timings"][-2] |= {"p50_ms_ci95": [0.4, 0.6], "drift": 1.3, "enough_queries": False}
    html = reported(tmp_path, bench)[0]
    for words in ("0.9 cores busy", "±20 %", "drifted by 30 %", "fewer queries than asked"):
        assert words in html


def test_unavailable_target_is_shown_with_its_reason(tmp_path):
    bench = fabricated()
    for row in bench["artifacts"][-2:]:
        row |= {"unavailable": "Core ML predicts on macOS only", "sha256": None, "accuracy": {}}
    bench["timings"] = bench["timings"][:-4]
    html, markdown = reported(tmp_path, bench)
    assert "Not available here: Core ML predicts on macOS only" in html
    assert "not available here: Core ML predicts on macOS only" in markdown


def test_run_without_evaluation_data_still_has_a_report(tmp_path):
    bench = fabricated() | {"timings": [], "examples": {}, "stages": [], "headline_split": None}
    for row in bench["artifacts"]:
        row["accuracy"] = {}
    bench["disturbance"] = {}
    html, _ = reported(tmp_path, bench)
    assert "3 bundles written; nothing was timed, as the run has no evaluation data" in html


def test_run_without_stages_speaks_of_the_exported_model(tmp_path):
    bench = fabricated() | {"stages": [], "examples": {}}
    bench["artifacts"] = [r for r in bench["artifacts"] if r["path"] != "01-distill"]
    for row in bench["artifacts"]:
        row["artifact"] = "teacher"
    html, _ = reported(tmp_path, bench)
    assert "Teacher, ONNX Runtime int8: 8.0× faster" in html


@pytest.mark.parametrize("content, words", [(None, "no such file"), ("{", "damaged")])
def test_missing_or_damaged_figures_are_named(tmp_path, content, words):
    if content:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(PocketclipError, match=rf"summary\.json: {words}"):
        report.write(tmp_path)


def schema():
    return json.loads((Path(benchmarks.__file__).parent / "summary.schema.json").read_text())


def test_summary_follows_its_published_schema(tmp_path):
    reported(tmp_path, fabricated())
    table = json.loads((tmp_path / "summary.json").read_text())
    found = jsonschema.Draft202012Validator(schema()).iter_errors(table)
    assert table["rows"] and [error.message for error in found] == []


def test_schema_refuses_percents_and_unknown_keys(tmp_path):
    table = summary.summarise(fabricated(), [])
    for change in ({"top1": 54.0}, {"latency": 3}):
        broken = {**table, "rows": [{**table["rows"][0], **change}]}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema())


def test_stage_says_what_it_cost_and_bought(pages):
    html = pages[0]
    assert "-50.0 points" in html and "+45.0 points" in html  # 60, 10, 55 %
    assert "2.0× fewer" in html  # parameters: 10 M in the teacher, then 5 M
    assert "5.0× fewer" in html  # multiply-adds of an image: 10 M in the teacher, then 2 M


def test_rows_for_the_filters_are_in_the_page_and_cannot_break_out_of_it(pages):
    text = pages[0].split('id="rows">')[1].split("</script>")[0]
    data = json.loads(text)
    assert {row["scope"] for row in data["rows"]} == {"model", "search"}
    assert len(data["rows"]) == 2 * 3 + 2 * 2
    assert data["filters"]["tower"] == ["image", "text"]
    assert "energy_mj" not in data["x"] and "p50_ms" in data["x"]
    hostile = details.embedded({"name": "</script><script>alert(1)"})
    assert "<" not in hostile and json.loads(hostile)["name"].startswith("</script>")


def test_headline_is_the_model_alone_although_searches_were_timed_too(tmp_path):
    bench = fabricated()
    bench["timings"].reverse()  # searches come first then
    assert "8.0× faster" in reported(tmp_path, bench)[1]


def test_precision_of_each_layer_is_shown(pages):
    html = pages[0]
    assert html.count("blocks.0.attention.qkv: int8, 0.01 M weights") == 2
    assert html.count("<td>8.0</td>") == 2 and html.count("<td>32.0</td>") == 4


def test_changed_labels_placement_and_limits_are_shown(pages):
    html = re.sub(r"</?a\b[^>]*>", "", pages[0])
    assert "call 4 of 10 pictures by different names" in html and "cheese" in html
    assert "9 on CPU" in html and "Peaks with 1 thread: float32 90.0" in html


def test_every_median_leads_to_its_raw_samples(pages):
    links = re.findall(r'href="bench.json#/timings/(\d+)">([\d.]+) ms', pages[0])
    timings = fabricated()["timings"]
    assert len(links) == len(timings)
    for index, shown in links:
        assert timings[int(index)]["p50_ms"] == pytest.approx(float(shown), rel=0.01)


def test_every_figure_leads_to_where_it_stands(pages):
    html = pages[0]
    places = set(re.findall(r'href="bench\.json#/([^"]+)"', html))
    assert len(places) > 50
    for place in places:
        found = fabricated()
        for part in place.split("/"):  # raises where the pointer leads nowhere
            found = found[int(part)] if isinstance(found, list) else found[part]
    bits = r"<table class=\"bits\">.*?</table>"  # its heads lead there
    tables = re.sub(bits, "", html, flags=re.DOTALL)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", tables, flags=re.DOTALL)
    bare = [
        c for c in cells if re.fullmatch(r"[\d.,]+( ?[%×]| [MGk]?B| M| ms| Gflop/s)?", c.strip())
    ]
    assert bare == [] and len(cells) > 100


def test_figures_stand_where_their_links_lead(pages):
    bench = fabricated()
    link = r'href="bench\.json#/artifacts/(\d+)/accuracy/styles/top1">([\d.]+) %'
    links = re.findall(link, pages[0])
    assert len(links) >= 10
    for index, shown in links:
        found = bench["artifacts"][int(index)]["accuracy"]["styles"]["top1"]
        assert 100 * found == pytest.approx(float(shown))


def test_labels_of_the_explorer_keep_apart(tmp_path):
    need_browser(packages=())
    bench = fabricated()
    for row in bench["artifacts"]:  # all at nearly the same place
        row["accuracy"] = {name: accuracy(0.6) for name in ("styles", "val")}
    for row in bench["timings"]:
        row["p50_ms"] = 2.0 + 0.001 * row["p50_ms"]
    reported(tmp_path, bench)
    boxes = (
        "[...document.querySelectorAll('#explorer svg .tag')].map((n) => n.getBoundingClientRect())"
    )
    with Server({"": tmp_path}) as server, Chromium() as chromium:
        chromium.open(f"{server.url}/report.html")
        found = chromium.evaluate(f"{boxes}.map((b) => [b.left, b.right, b.top, b.bottom])")
        assert not chromium.problems
    assert len(found) == 3
    for n, (left, right, top, bottom) in enumerate(found):
        for a, b, c, d in found[n + 1 :]:
            assert a >= right or b <= left or c >= bottom - 3 or d <= top + 3


def test_operators_that_ran_elsewhere_are_a_warning(tmp_path):
    bench = fabricated()
    operators = {"CoreML": {"Conv": 5}, "CPU": {"Gather": 2}}
    bench["timings"][-1]["placement"] = {
        "requested": "CoreML",
        "operators": operators,
        "fallback": ["CPU"],
    }
    assert "2 of 7 operators ran on CPU" in reported(tmp_path, bench)[0]


BUNDLE = {
    "license": "Apache-2.0",
    "target": "onnxruntime",
    "precision": "int8",
    "model": {"name": "tiny", "embed_dim": 16, "embedding_space": "sha256:0123"},
    "image": {"input": {"shape": [1, 3, 32, 32]}},
    "tokenizer": {"context_length": 16, "lowercase": True},
    "provenance": [{"step": "distill"}],
}


def test_model_card_of_a_run_with_a_bundle(tmp_path):
    folder = tmp_path / "export" / "onnxruntime-int8"
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text(json.dumps(BUNDLE))
    html, _ = reported(tmp_path, fabricated())
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert 'href="MODEL_CARD.md"' in html and "license: apache-2.0" in card
    assert "32 x 32 pixels" in card and "distill" in card and "54.0 %" in card


def test_licences_travel_into_the_report(tmp_path, pages):
    terms = "apple-amlr: research purposes only"
    (tmp_path / "teacher").mkdir()
    about = {"name": "S0", "license": terms, "provenance": [{"research_only": True}, {"step": "x"}]}
    (tmp_path / "teacher/model.json").write_text(json.dumps(about))
    (tmp_path / "export/onnx").mkdir(parents=True)
    (tmp_path / "export/onnx/bundle.json").write_text(json.dumps(BUNDLE))
    found = licences.licences(tmp_path)
    assert [(f["license"], f["research_only"]) for f in found] == [
        ("Apache-2.0", False),
        (terms, True),
    ]
    html, markdown = reported(tmp_path, fabricated())
    assert (
        "<b>For research only</b> S0: apple-amlr" in html and "tiny: Apache-2.0; S0: apple" in html
    )
    assert f"- licence of S0: {terms} (research only)\n" in markdown
    assert "For research only" not in pages[0]
