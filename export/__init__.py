"""Where a model goes: one file a target, `Config`, `write(clip, cfg, out)` and `load(folder)`."""

import sys

# OpenVINO and NNCF report each conversion to a web service, in a process that an offline machine
# waits for. Where this package is missing they take stubs of their own, which report nothing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class Unavailable(Exception):
    """A runtime that cannot run here, with the reason: a row in every report, never a skip."""
