"""torch's bicubic resize of uint8 images, in numpy, bit for bit.

The reference resizes video frames with `torchvision.resize(antialias=True)` on uint8 tensors, which is ATen's
own integer kernel (ATen/native/cpu/UpSampleKernel.cpp): Pillow's filter and support, but

- weights are rounded to int16, at the highest precision at which the largest weight of the axis still fits;
- the width is resized first and rounded to uint8, then the height.

Pillow keeps more bits, so its results differ by 1 in some pixels. Still images are resized by Pillow itself
(images.py).
"""

import math

import numpy as np

_CUBIC_A = -0.5
_CUBIC_RADIUS = 2.0
_MAX_PRECISION = 22
# Working memory of one pass in float64 values (16 MiB): a 4K frame as float64 would take 200 MB.
_CHUNK_VALUES = 2**21


def _cubic(x: np.ndarray) -> np.ndarray:
    """Returns Keys' cubic at distance x. The order of operations is the kernel's, so rounding is the same."""
    a, x = _CUBIC_A, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def bicubic_weights(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns the antialiased bicubic filter of one axis, rounded like torch's uint8 kernel.

    Args:
        size: source samples along the axis.
        new_size: output samples along the axis.
    Returns:
        first: int64 [new_size], the first source sample of each output sample.
        weights: int64 [new_size, taps] in units of 2**-precision; zero beyond the source's end.
        precision: bits after the binary point, at most 22.
    """
    scale = size / new_size
    support = _CUBIC_RADIUS * max(scale, 1.0)
    taps = math.ceil(support) * 2 + 1
    centre = scale * (np.arange(new_size) + 0.5)
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)  # the cast truncates, like C's
    count = np.minimum((centre + support + 0.5).astype(np.int64), size) - first
    tap = np.arange(taps)
    distance = (tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / scale if scale >= 1.0 else 1.0)
    weights = np.where(tap < count[:, None], _cubic(distance), 0.0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]  # cumsum adds left to right, like the kernel; np.sum does not
    precision = _precision(weights.max())
    scaled = weights * (1 << precision)
    return first, np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int64), precision


def _precision(largest: float) -> int:
    """Returns the largest number of fractional bits at which `largest` still fits int16."""
    bits = 0
    while bits < _MAX_PRECISION and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return bits


def _resize_rows(image: np.ndarray, new_size: int) -> np.ndarray:
    """Resizes the first axis of uint8 [n, m] to uint8 [new_size, m].

    The sums are computed in float64 by BLAS. float64 holds them exactly: |weight| < 2**15, a sum is at most
    2**31.
    """
    first, weights, precision = bicubic_weights(len(image), new_size)
    weights = weights.astype(np.float64) / (1 << precision)  # a division by a power of two: still exact
    taps = weights.shape[1]
    out = np.empty((new_size, image.shape[1]), np.uint8)
    step = max(1, _CHUNK_VALUES // (len(image) + new_size))
    for left in range(0, image.shape[1], step):
        columns = image[:, left : left + step].astype(np.float64)
        sums = np.empty((new_size, columns.shape[1]))
        for i, start in enumerate(first):
            rows = columns[start : start + taps]
            np.matmul(weights[i, : len(rows)], rows, out=sums[i])
        np.floor(np.add(sums, 0.5, out=sums), out=sums)
        out[:, left : left + step] = np.clip(sums, 0, 255, out=sums)
    return out


def resize_bicubic(image: np.ndarray, new_height: int, new_width: int) -> np.ndarray:
    """Resizes uint8 [height, width, 3] to uint8 [new_height, new_width, 3] with torch's uint8 kernel.

    The result equals, bit for bit, `torch.nn.functional.interpolate(mode="bicubic", antialias=True)` on a
    uint8 tensor.
    """
    height, width, channels = image.shape
    if width != new_width:
        by_column = np.ascontiguousarray(image.transpose(1, 0, 2)).reshape(width, -1)
        by_column = _resize_rows(by_column, new_width).reshape(new_width, height, channels)
        image = by_column.transpose(1, 0, 2)
    if height != new_height:
        rows = np.ascontiguousarray(image).reshape(height, -1)
        image = _resize_rows(rows, new_height).reshape(new_height, -1, channels)
    return image
