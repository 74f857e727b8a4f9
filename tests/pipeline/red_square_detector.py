"""An .onnx file with YuNet's inputs and outputs that finds red squares, written byte by byte.

OpenCV reads, runs and decodes it as it does YuNet; so the real detector is tested without its weights. A red
cell of 16 pixels is a face of 16 pixels, its five points at fixed places in the cell.
"""

import numpy as np
from numpy.typing import NDArray

STRIDE = 16
POINTS = ((0.25, 0.25), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.75, 0.75))
"""x and y in the cell, as shares of it."""
_FLOAT, _INT64 = 1, 7
_INT, _INTS = 2, 7


def red_square_detector() -> bytes:
    """Bytes of the model."""
    parts: list[bytes] = []
    outputs: list[bytes] = []
    for stride in (8, 16, 32):
        red = np.zeros((1, 3, stride, stride), np.float32)
        # OpenCV gives BGR in 0..255.
        red[0] = np.array([-0.2, -0.2, 0.2], np.float32)[:, None, None] / stride**2
        silent = np.zeros_like(red)
        at_home = stride == STRIDE
        points = np.array(POINTS, np.float32).reshape(-1)
        heads = {
            "cls": (red if at_home else silent, np.array([-10.0]), True),
            "obj": (silent, np.array([10.0 if at_home else -10.0]), True),
            "bbox": (np.zeros((4, 3, stride, stride), np.float32), np.array([0.5, 0.5, 0.0, 0.0]), False),
            "kps": (np.zeros((10, 3, stride, stride), np.float32), points, False),
        }
        for name, (weight, bias, squashed) in heads.items():
            parts += _head(f"{name}_{stride}", weight, bias.astype(np.float32), stride, squashed)
            outputs.append(_field(12, _value(f"{name}_{stride}", (1, (320 // stride) ** 2, len(bias)))))
    graph = b"".join([*parts, _field(2, b"red squares"), _field(11, _value("input", (1, 3, 320, 320))), *outputs])
    return _number(1, 8) + _field(8, _field(1, b"") + _number(2, 12)) + _field(7, graph)


def _head(
    name: str, weight: NDArray[np.float32], bias: NDArray[np.float32], stride: int, squashed: bool
) -> list[bytes]:
    shape = np.array([1, -1, len(bias)], np.int64)
    steps = [
        _node(
            "Conv", ["input", f"{name}_w", f"{name}_b"], f"{name}_map", strides=[stride] * 2, kernel_shape=[stride] * 2
        ),
        _node("Transpose", [f"{name}_map"], f"{name}_last", perm=[0, 2, 3, 1]),
        _node("Reshape", [f"{name}_last", f"{name}_s"], f"{name}_raw" if squashed else name),
    ]
    if squashed:
        steps.append(_node("Sigmoid", [f"{name}_raw"], name))
    tensors = [(f"{name}_w", weight, _FLOAT), (f"{name}_b", bias, _FLOAT), (f"{name}_s", shape, _INT64)]
    return [*steps, *(_field(5, _tensor(*tensor)) for tensor in tensors)]


def _node(kind: str, inputs: list[str], output: str, **attributes: list[int]) -> bytes:
    body = b"".join(_field(1, name.encode()) for name in inputs) + _field(2, output.encode())
    body += _field(3, output.encode()) + _field(4, kind.encode())
    for name, values in attributes.items():
        numbers = b"".join(_number(8, value) for value in values)
        body += _field(5, _field(1, name.encode()) + numbers + _number(20, _INTS))
    return _field(1, body)


def _tensor(name: str, values: NDArray[np.float32] | NDArray[np.int64], kind: int) -> bytes:
    dims = b"".join(_number(1, side) for side in values.shape)
    return dims + _number(2, kind) + _field(8, name.encode()) + _field(9, values.tobytes())


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_field(1, _number(1, side)) for side in shape)
    return _field(1, name.encode()) + _field(2, _field(1, _number(1, _FLOAT) + _field(2, dims)))


def _number(tag: int, value: int) -> bytes:
    return _varint(tag << 3) + _varint(value)


def _field(tag: int, content: bytes) -> bytes:
    return _varint(tag << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
