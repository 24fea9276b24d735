"""An iPhone through Xcode: we write what it needs, it measures, and its figures are imported.

Nothing on an iPhone can be started from here, so the host's rows say where the prepared folder is,
until a report lies in it. `prepare` writes a Swift test beside the bundle's models; it prints one
line of JSON with every sample, which is found again in whatever log Xcode saves.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import Artifact
from compress import atomic
from compress.errors import PocketclipError
from export import Unavailable, _verify

MARK = "POCKETCLIP-SAMPLES "
REPORT = "ios-report.log"
TEST = """\
import CoreML
import XCTest

/// Times both towers of one bundle. Add this file and the .mlpackage folders to a test target, run
/// it on the device (Release, no debugger), save the log beside the bundle as ios-report.log.
final class PocketClipLatency: XCTestCase {{
    func testImage() throws {{ try time(tower: "image", model: "{image}") }}
    func testText() throws {{ try time(tower: "text", model: "{text}") }}

    private func time(tower: String, model name: String) throws {{
        let settings = MLModelConfiguration()
        settings.computeUnits = .all
        let place = Bundle(for: Self.self).url(forResource: name, withExtension: "mlmodelc")
        let url = try XCTUnwrap(place)
        let clock = ContinuousClock()
        var model: MLModel!
        let load = try clock.measure {{
            model = try MLModel(contentsOf: url, configuration: settings)
        }}
        let features = try zeros(for: model)
        let first = try clock.measure {{ _ = try model.prediction(from: features) }}
        for _ in 0..<20 {{ _ = try model.prediction(from: features) }}
        var samples: [Double] = []
        for _ in 0..<1000 {{
            let time = try clock.measure {{ _ = try model.prediction(from: features) }}
            samples.append(milliseconds(time))
        }}
        let row: [String: Any] = [
            "tower": tower, "sha256": "{sha256}", "load_ms": milliseconds(load),
            "first_ms": milliseconds(first), "ms": samples,
            "system": ProcessInfo.processInfo.operatingSystemVersionString,
            "thermal_state": ProcessInfo.processInfo.thermalState.rawValue,
        ]
        let line = try JSONSerialization.data(withJSONObject: row)
        print("{mark}" + String(decoding: line, as: UTF8.self))
    }}

    private func zeros(for model: MLModel) throws -> MLFeatureProvider {{
        var values: [String: MLFeatureValue] = [:]
        for (name, about) in model.modelDescription.inputDescriptionsByName {{
            let constraint = try XCTUnwrap(about.multiArrayConstraint)
            let array = try MLMultiArray(shape: constraint.shape, dataType: constraint.dataType)
            values[name] = MLFeatureValue(multiArray: array)
        }}
        return try MLDictionaryFeatureProvider(dictionary: values)
    }}

    private func milliseconds(_ time: Duration) -> Double {{
        Double(time.components.seconds) * 1e3 + Double(time.components.attoseconds) / 1e15
    }}
}}
"""


def prepare(bundle: Path, out: Path) -> Path:
    """Write the test and the models of a Core ML bundle into `out`, ready for Xcode."""
    about = _verify.read(bundle)
    if about["target"] != "coreml":
        raise Unavailable(f"an iPhone runs Core ML bundles; this one is for {about['target']}")
    with atomic.folder(out) as folder:
        for tower in ("image", "text"):
            name = Path(about[tower]["file"]).parts[0]
            source = bundle / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
        stems = {
            tower: Path(about[tower]["file"]).parts[0].split(".")[0] for tower in ("image", "text")
        }
        digest = _verify.read(bundle)["model"]["embedding_space"]
        (folder / "PocketClipLatency.swift").write_text(
            TEST.format(**stems, sha256=digest, mark=MARK), encoding="utf-8"
        )
    return out


def import_report(path: Path, tower: str, identity: str) -> dict[str, Any]:
    """The samples of one tower from a log; the last run in it counts.

    `identity` is the bundle's embedding space: a log of another model is refused.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = [json.loads(found) for found in re.findall(re.escape(MARK) + r"(\{.*\})", text)]
    own = [row for row in rows if row["tower"] == tower]
    if not own:
        raise PocketclipError(f"{path}: no samples of the {tower} tower; run the Swift test again")
    if own[-1]["sha256"] != identity:
        raise PocketclipError(f"{path}: these samples are of another model; run the test again")
    return dict(own[-1])


def describe(place: str = "") -> dict[str, Any]:
    """Known only from the reports that were imported."""
    return {"device": place or "an iPhone, as named in its report"}


def pick_cores(threads: int) -> list[int]:
    return []


class Worker:
    """Plays back what was measured on the device."""

    def __init__(self, artifact: Artifact, cores: list[int], timeout_seconds: float) -> None:
        report = artifact.folder / REPORT
        if not report.exists():
            ready = prepare(
                artifact.folder, artifact.folder.parent / f"{artifact.folder.name}-xcode"
            )
            raise Unavailable(f"run {ready} in Xcode on the device, save its log as {report}")
        space = _verify.read(artifact.folder)["model"]["embedding_space"]
        self._row = import_report(report, artifact.tower, space)
        self._next = 0
        self.opened: dict[str, Any] = {key: self._row[key] for key in ("load_ms", "first_ms")}

    def run(self, queries: int, seconds: float) -> NDArray[np.float64]:
        """The next samples of the report, from its start again where it ends."""
        wall = np.take(self._row["ms"], range(self._next, self._next + queries), mode="wrap")
        self._next += queries
        return np.stack([wall, np.full(len(wall), np.nan)], axis=1)

    def peak_memory_bytes(self) -> int | None:
        return None

    def placement(self) -> dict[str, Any] | None:
        return None

    def close(self) -> None:
        """Nothing was opened."""
