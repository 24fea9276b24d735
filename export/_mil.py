"""Runs a Core ML program without Core ML, operator by operator in torch.

Core ML predicts on macOS only; this says elsewhere what the converted file computes: from the
weights that are in it, decompressed, with every result rounded to the type the program gives it.
Sums are float32 inside an operator, where hardware may round too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.preprocess import Preprocess
from export import Unavailable, _bundle
from export._mil_operators import OPERATORS

MACOS = "Core ML predicts on macOS only"
WEIGHTS = Path("Data") / "com.apple.CoreML" / "weights"


class Program:
    """The main function of an .mlpackage."""

    def __init__(self, package: Path) -> None:
        from coremltools.converters.mil.frontend.milproto.load import load
        from coremltools.models.utils import load_spec

        self.spec = load_spec(str(package))
        weights = str(package / WEIGHTS)
        self.program = load(self.spec, self.spec.specificationVersion, weights)
        main = self.program.functions["main"]
        # Variables are told apart by identity: constants that loading adds may repeat a name.
        self.inputs = {name: id(var) for name, var in main.inputs.items()}
        self.outputs = {var.name: id(var) for var in main.outputs}
        self.constants: dict[int, Any] = {}
        self.steps = []
        for op in main.operations:
            if op.op_type == "const":
                self.constants[id(op.outputs[0])] = _value(op.outputs[0].val)
            elif op.op_type.startswith("constexpr_"):
                self.constants[id(op.outputs[0])] = _value(op.materialized_val_inference())
            else:
                self.steps.append(_step(op))

    def run(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Inputs by name -> outputs by name."""
        values: dict[int, Any] = dict(self.constants)
        values |= {self.inputs[name]: tensor for name, tensor in inputs.items()}
        for function, arguments, outputs in self.steps:
            given = {
                key: [values[n] for n in read] if isinstance(read, list) else values[read]
                for key, read in arguments.items()
            }
            found = function(**given)
            for (written, half), tensor in zip(outputs, found if len(outputs) > 1 else [found]):
                values[written] = tensor.half().float() if half else tensor
        return {name: values[written] for name, written in self.outputs.items()}


class SimulatedEncoder:
    """Both towers of a bundle as `Program` computes them, in place of Core ML."""

    def __init__(self, folder: Path, preprocess: Preprocess | None) -> None:
        self.preprocess = preprocess
        self.image, self.text = (Program(folder / f"{t}.mlpackage") for t in _bundle.TOWERS)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] float32, normalised -> [B, E] float32, unit length."""
        if self.preprocess:
            pixels = raw(pixels, self.preprocess)
        rows = [self.image.run(pixels=row)["image_embedding"] for row in pixels.split(1)]
        return torch.cat(rows)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, E] float32, unit length."""
        rows = [self.text.run(tokens=row)["text_embedding"] for row in tokens.int().split(1)]
        return torch.cat(rows)


def raw(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Normalised pixels [B, 3, H, W] -> 0 to 255, not rounded."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocess.mean, preprocess.std))
    return (pixels * std + mean) * 255


def _step(op: Any) -> tuple[Callable[..., Any], dict[str, Any], list[tuple[int, bool]]]:
    """One operation: its function, what it reads, what it writes and if that is half precision."""
    from coremltools.converters.mil.mil import types

    if op.op_type not in OPERATORS:
        raise Unavailable(f"no simulation of Core ML's {op.op_type}, and {MACOS}")
    arguments = {
        key: [id(v) for v in var] if isinstance(var, list | tuple) else id(var)
        for key, var in op.inputs.items()
        if var is not None and key not in ("name", "validate_indices")
    }
    outputs = [(id(var), var.dtype == types.fp16) for var in op.outputs]
    return OPERATORS[op.op_type], arguments, outputs


def _value(value: Any) -> Any:
    """A constant: arrays as tensors, float32 for any float; strings, numbers and flags as such."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, np.float32 if value.dtype.kind == "f" else None))
    return value.item() if isinstance(value, np.generic) else value
