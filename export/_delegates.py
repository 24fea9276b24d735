"""Who runs an ExecuTorch program: XNNPACK on CPUs, Core ML on Apple's chips, QNN on Snapdragons."""

import ctypes.util
import importlib.util
from typing import Any, Literal

import torch

from export import Unavailable

Backend = Literal["xnnpack", "coreml", "qnn"]
NAMES = {"xnnpack": "XnnpackBackend", "coreml": "CoreMLBackend", "qnn": "QnnBackend"}
WHERE = {
    "xnnpack": "install executorch",
    "coreml": "Core ML predicts on macOS only",
    "qnn": "it runs on Qualcomm's devices",
}


def require(backend: Backend) -> None:
    """Raise Unavailable where programs for a backend cannot be written and proved."""
    if backend == "qnn" and ctypes.util.find_library("QnnHtp") is None:
        raise Unavailable(
            "Qualcomm's AI Engine Direct SDK is not installed: libQnnHtp is on no library path"
        )
    if backend == "coreml" and importlib.util.find_spec("coremltools") is None:
        raise Unavailable("coremltools is not installed: pip install 'pocketclip[coreml]'")
    from executorch.runtime import Runtime

    if not Runtime.get().backend_registry.is_available(NAMES[backend]):
        raise Unavailable(f"this ExecuTorch has no {NAMES[backend]}: {WHERE[backend]}")


def lower(program: torch.export.ExportedProgram, backend: Backend, soc: str) -> Any:
    """A program of torch operators -> one whose pieces a backend runs, an EdgeProgramManager."""
    if backend == "qnn":
        return _qnn(program, soc)
    from executorch.exir import to_edge_transform_and_lower

    partitioner, passes = _coreml() if backend == "coreml" else _xnnpack()
    return to_edge_transform_and_lower(program, partitioner=[partitioner], transform_passes=passes)


def _xnnpack() -> tuple[Any, Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes

    return XnnpackPartitioner(), get_transform_passes()


def _coreml() -> tuple[Any, None]:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS18,
        compute_precision=coremltools.precision.FLOAT16,
    )
    return CoreMLPartitioner(compile_specs=specs), None


def _qnn(program: torch.export.ExportedProgram, soc: str) -> Any:
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils import utils

    if soc not in QcomChipset.__members__:
        raise Unavailable(f"QNN knows no chip {soc!r}: one of {', '.join(QcomChipset.__members__)}")
    options = utils.generate_htp_compiler_spec(use_fp16=True)
    specs = utils.generate_qnn_executorch_compiler_spec(QcomChipset[soc], options)
    inputs, _ = program.example_inputs
    return utils.to_edge_transform_and_lower_to_qnn(program.module(), inputs, specs)
