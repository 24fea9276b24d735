"""Which part of a runtime executes an artifact's operators: what was asked for is not what runs.

A runtime that lists an accelerator as active may still run most of a graph elsewhere; only the
executed plan tells. Each function opens a file of its format and returns `requested` (the provider,
delegate or precision asked for), `operators` ({who: {operator: count}}) and `fallback`, those of
`operators` that nobody asked for.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from export import Unavailable, _verify

Placement = dict[str, Any]


def of(folder: Path, tower: str, device: str = "cpu") -> Placement | None:
    """The placement of one tower of a bundle; None for a format that we cannot look into."""
    about = _verify.read(folder)
    path = folder / about[tower]["file"]
    if path.suffix == ".onnx":
        return of_onnx(path, device)
    if path.suffix == ".xml":
        return of_openvino(path, about.get("runtime", {}).get("inference_precision"))
    if path.suffix == ".pte":
        return of_executorch(path)
    return None


def warning(placement: Placement | None) -> str | None:
    """One sentence where operators run elsewhere than asked for."""
    if not placement or not placement["fallback"]:
        return None
    operators = placement["operators"]
    total = sum(sum(found.values()) for found in operators.values())
    parts = []
    for who in placement["fallback"]:
        kinds = ", ".join(
            f"{count} {name}" for name, count in Counter(operators[who]).most_common(3)
        )
        parts.append(f"{sum(operators[who].values())} of {total} operators ran on {who} ({kinds})")
    return f"{placement['requested']} was asked for, but {'; '.join(parts)}"


def of_onnx(path: Path, device: str = "cpu") -> Placement | None:
    """Operators by execution provider, from ONNX Runtime's own profile of one run."""
    import onnxruntime

    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if wanted not in onnxruntime.get_available_providers():
        raise Unavailable(f"this onnxruntime has no {device} provider")
    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
        feed = {spec.name: _zeros(spec) for spec in session.get_inputs()}
        if any(value is None for value in feed.values()):
            return None
        session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = [e["args"] for e in events if e.get("cat") == "Node" and "provider" in e.get("args", {})]
    return _placed(wanted, ((entry["provider"], entry["op_name"]) for entry in ran))


def of_openvino(path: Path, precision: str | None = None) -> Placement:
    """Operators by the precision that the CPU plugin executes them in."""
    import openvino

    core = openvino.Core()
    hints = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    plan = core.compile_model(core.read_model(str(path)), "CPU", hints).get_runtime_model()
    ran = []
    for node in plan.get_ordered_ops():
        about = {key: str(node.rt_info[key].value) for key in node.rt_info}
        if about.get("layerType") not in ("Const", "Input", "Output", None):
            ran.append((f"CPU {about.get('runtimePrecision', '?')}", about["layerType"]))
    placed = _placed("CPU", ran)
    placed["fallback"] = []  # a precision of its own is a choice, not a fallback
    return placed


def of_executorch(path: Path) -> Placement:
    """Calls of delegates, and operators that run in portable kernels instead."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    program: Any = deserialize_pte_binary(path.read_bytes())
    plan = getattr(program, "program", program).execution_plan[0]
    ran = []
    for instruction in (i for chain in plan.chains for i in chain.instructions):
        call = instruction.instr_args
        if hasattr(call, "delegate_index"):
            ran.append((plan.delegates[call.delegate_index].id, "delegate"))
        elif hasattr(call, "op_index"):
            ran.append(("portable kernels", plan.operators[call.op_index].name))
    wanted = plan.delegates[0].id if plan.delegates else "portable kernels"
    return _placed(wanted, ran)


def _placed(requested: str, ran: Iterable[tuple[str, str]]) -> Placement:
    operators: dict[str, dict[str, int]] = {}
    for who, name in ran:
        counts = operators.setdefault(who, {})
        counts[name] = counts.get(name, 0) + 1
    return {
        "requested": requested,
        "operators": operators,
        "fallback": [who for who in operators if who != requested],
    }


def _zeros(spec: Any) -> np.ndarray | None:
    """An input of zeros; None for one that is no plain tensor of numbers."""
    kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
    kinds |= {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
    if spec.type not in kinds:
        return None
    shape = [side if isinstance(side, int) else 1 for side in spec.shape]
    return np.zeros(shape, kinds[spec.type])
