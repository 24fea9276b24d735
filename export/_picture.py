"""A contract's resize, crop and normalisation as ONNX nodes that follow Pillow to the grey level.

ONNX's own Resize with antialiasing differs from Pillow by up to 21 of 255 levels. Pillow resizes in
two passes, each a weighted mean over neighbours that is rounded to 8 bits; a pass is a product with
a matrix of those weights, which the graph computes from the picture's size. The products are dense:
a photo of 12 megapixels costs about 50 times what Pillow's sparse loops do.

Shapes: H, W of the picture, h, w of the model's input.
"""

from typing import Any

from compress.errors import PocketclipError
from compress.preprocess import Preprocess
from export import _graph

PREFIX = "picture"
NAME = "picture"
# Reach of a filter, in output pixels where the picture shrinks.
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
CUBIC = -0.5
"""Pillow's coefficient of the bicubic filter."""


def check(preprocess: Preprocess) -> None:
    """PocketclipError for a contract that the nodes cannot follow."""
    height, width = preprocess.size
    if preprocess.interpolation not in SUPPORT:
        raise PocketclipError(
            f"pictures: {preprocess.interpolation} is not in the graph; only "
            f"{', '.join(SUPPORT)} are"
        )
    if preprocess.resize_mode == "longest" or (
        preprocess.resize_mode == "shortest" and height != width
    ):
        raise PocketclipError(
            f"pictures: resize_mode {preprocess.resize_mode} to {preprocess.size} is not in the "
            "graph; squash, and shortest to a square, are"
        )


def attach_(model: Any, preprocess: Preprocess, pixels: str) -> None:
    """Let an image tower take uint8 RGB pictures [H, W, 3] of any size, in place."""
    from onnx import TensorProto

    check(preprocess)
    part = _graph.Part(PREFIX)
    _pixels(part, preprocess, pixels)
    _graph.attach_(model, part, NAME, TensorProto.UINT8, [None, None, 3])


def _pixels(part: _graph.Part, preprocess: Preprocess, out: str) -> None:
    from onnx import TensorProto

    add, constant = part.add, part.constant
    channels = add("Transpose", NAME, perm=[2, 0, 1])  # [3, H, W]
    channels = add("Cast", channels, to=TensorProto.FLOAT)
    sides = {"height": _length(part, 0), "width": _length(part, 1)}
    (height, width), crop = preprocess.size, preprocess.resize_mode == "shortest"
    shortest = add("Min", sides["height"], sides["width"]) if crop else None
    rows = _weights(part, sides["height"], height, shortest, preprocess.interpolation)  # [h, H]
    columns = _weights(part, sides["width"], width, shortest, preprocess.interpolation)  # [w, W]
    columns = add("Transpose", columns, perm=[1, 0])
    narrow = _rounded(part, add("MatMul", channels, columns))  # [3, H, w]
    small = _rounded(part, add("MatMul", rows, narrow))  # [3, h, w]
    unit = add("Div", small, constant(255, "float32"))
    mean, std = (constant([[[v]] for v in c], "float32") for c in (preprocess.mean, preprocess.std))
    normal = add("Div", add("Sub", unit, mean), std)
    add("Unsqueeze", normal, constant([0], "int64"), out=out)


def _length(part: _graph.Part, axis: int) -> str:
    """The picture's height or width, an int64 number."""
    shape = part.add("Shape", NAME, start=axis, end=axis + 1)
    return part.add("Squeeze", shape)


def _weights(part: _graph.Part, length: str, wanted: int, shortest: str | None, kind: str) -> str:
    """Weights [wanted, length] of every pixel along one side for each pixel that goes on.

    shortest: the picture's shortest side, which becomes `wanted`; the middle of the longer one is
    kept. None scales the side itself to `wanted`. Doubles, as Pillow computes them.
    """
    from onnx import TensorProto

    def double(name: str) -> str:
        return add("Cast", name, to=TensorProto.DOUBLE)

    add, constant = part.add, part.constant
    places = constant([[i] for i in range(wanted)])  # [wanted, 1]
    if shortest is None:
        scaled, first = constant(wanted), constant(0)
    else:
        # Whole numbers: the longer side times `wanted` over the shorter, rounded down.
        longer = add("Mul", length, constant(wanted, "int64"))
        scaled = double(add("Div", longer, shortest))
        excess = add("Sub", scaled, constant(wanted))
        first = add("Round", add("Mul", excess, constant(0.5)))  # half to even, as torchvision
    scale = add("Div", double(length), scaled)
    stretch = add("Max", scale, constant(1))
    middle = add("Mul", add("Add", add("Add", places, first), constant(0.5)), scale)
    ends = [add("Mul", stretch, constant(sign * SUPPORT[kind])) for sign in (-1, 1)]
    ends = [
        add("Floor", add("Add", add("Add", middle, end), constant(0.5))) for end in ends
    ]  # [wanted, 1]
    pixels = add("Range", constant(0), double(length), constant(1))  # [length]
    inside = add(
        "And", add("GreaterOrEqual", pixels, ends[0]), add("Less", pixels, ends[1])
    )  # [wanted, length]
    distance = add("Sub", add("Add", pixels, constant(0.5)), middle)
    weight = _filter(part, add("Abs", add("Div", distance, stretch)), kind)
    weight = add("Where", inside, weight, constant(0))
    total = add("ReduceSum", weight, constant([1], "int64"), keepdims=1)
    return add("Cast", add("Div", weight, total), to=TensorProto.FLOAT)


def _filter(part: _graph.Part, x: str, kind: str) -> str:
    """The filter at distances x >= 0 (Keys 1981 for bicubic)."""
    add, constant = part.add, part.constant
    if kind == "bilinear":
        return add("Max", add("Sub", constant(1), x), constant(0))

    def polynomial(*coefficients: float) -> str:
        """Horner's rule, the highest power first."""
        value = constant(coefficients[0])
        for coefficient in coefficients[1:]:
            value = add("Add", add("Mul", value, x), constant(coefficient))
        return value

    near = polynomial(CUBIC + 2, -(CUBIC + 3), 0, 1)
    far = polynomial(CUBIC, -5 * CUBIC, 8 * CUBIC, -4 * CUBIC)
    outer = add("Where", add("Less", x, constant(2)), far, constant(0))
    return add("Where", add("Less", x, constant(1)), near, outer)


def _rounded(part: _graph.Part, x: str) -> str:
    """To 8 bits as Pillow does between its passes: halves go up."""
    low, high = (part.constant(value, "float32") for value in (0, 255))
    up = part.add("Floor", part.add("Add", x, part.constant(0.5, "float32")))
    return part.add("Clip", up, low, high)
