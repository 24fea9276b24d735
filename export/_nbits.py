"""Weight-only matrices as ONNX Runtime's MatMulNBits: 4 or 8 bits, blocks of input columns.

Shapes: D input width, O output width, G groups of input columns, B blocks, S columns of a block.
"""

import numpy as np
import onnx_ir as ir

from export import _int8, _surgery

SMALLEST_BLOCK = 16
LARGEST_BLOCK = 256
# MatMulNBits' accuracy_level: inputs stay float32, or become int8.
FLOAT_COMPUTE, INTEGER_COMPUTE = 1, 4


def node(
    graph: ir.Graph,
    x: ir.Value | None,
    matrix: tuple[np.ndarray, np.ndarray, np.ndarray],
    name: str,
    integers: bool,
) -> ir.Node:
    """x [..., D] times the matrix that (codes [D, O], scale [O, G], zero [O, G]) stand for.

    integers: x is rounded to 8 bits by the kernel, block by block.
    """
    codes, scale, zero = matrix
    width, out = codes.shape
    bits = 4 if _fits(codes) else 8
    size = block_size(width, width // scale.shape[1])
    packed, scales, zeros = pack(codes, scale, zero, bits, size)
    inputs = [
        x,
        _surgery.initializer(graph, packed, f"{name}.weight"),
        _surgery.initializer(graph, scales, f"{name}.weight_scale"),
        _surgery.initializer(graph, zeros, f"{name}.weight_zero"),
    ]
    attributes = {
        "K": width,
        "N": out,
        "bits": bits,
        "block_size": size,
        "accuracy_level": INTEGER_COMPUTE if integers else FLOAT_COMPUTE,
    }
    return ir.node("MatMulNBits", inputs, attributes, domain=_int8.CONTRIB)


def block_size(width: int, group: int) -> int:
    """The largest power of two that divides the group (the last block of a matrix may be short)."""
    size = SMALLEST_BLOCK
    while (
        size < LARGEST_BLOCK and size * 2 <= width and (group == width or group % (size * 2) == 0)
    ):
        size *= 2
    return size


def pack(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes [D, O] -> bytes [O, B, S * bits / 8], scales [O, B], zero points [O, B * bits / 8]."""
    width, out = codes.shape
    shift = 2 ** (bits - 1) if codes.dtype == np.int8 else 0
    blocks = -(-width // size)
    unsigned = np.full((out, blocks * size), shift, dtype=np.int16)
    unsigned[:, :width] = codes.T.astype(np.int16) + shift
    starts = np.minimum(np.arange(blocks) * size, width - 1) * scale.shape[1] // width
    zeros = zero.astype(np.int16)[:, starts] + shift  # [O, B]
    packed = _nibbles(unsigned.reshape(out, blocks, size), bits)
    return packed, np.ascontiguousarray(scale[:, starts], np.float32), _nibbles(zeros, bits)


def _nibbles(values: np.ndarray, bits: int) -> np.ndarray:
    """Along the last axis two 4-bit values share a byte, the first in its lower half."""
    values = values.astype(np.uint8)
    if bits == 8:
        return np.ascontiguousarray(values)
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], axis=-1)
    return np.ascontiguousarray(values[..., ::2] | (values[..., 1::2] << 4))


def _fits(codes: np.ndarray) -> bool:
    """Whether 4 bits hold these codes around the zero point of their type."""
    low = -8 if codes.dtype == np.int8 else 0
    return bool(codes.min() >= low and codes.max() < low + 16)
