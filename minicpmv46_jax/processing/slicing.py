"""Computes the sizes of an image's views and the grid of its slices, from (height, width) alone.

Source: transformers, models/minicpmv4_6/image_processing_pil_minicpmv4_6.py (the video processor computes the
  same).
"""

import math


def _nearest_multiple(length: float | int, divisor: int) -> int:
    """Returns the nearest multiple of `divisor`, at least `divisor`; halves round to the even multiple."""
    return max(round(length / divisor), 1) * divisor


def slice_grid(height: int, width: int, max_slice_nums: int, resolution: int) -> tuple[int, int] | None:
    """Returns the (rows, columns) of an image's slices, or None for an image that one view holds.

    The number of slices n is about the image's area over resolution**2. The candidates are all grids of n -
    1, n and n + 1 slices. The grid whose aspect ratio is nearest to the image's wins; among equals, the one
    with more rows.
    """
    num_slices = min(math.ceil(height * width / resolution**2), max_slice_nums)
    if num_slices <= 1:
        return None
    log_aspect = math.log(width / height)
    best, least = (1, 1), math.inf
    for number in (num_slices - 1, num_slices, num_slices + 1):
        if not 1 < number <= max_slice_nums:
            continue
        for rows in (r for r in range(1, number + 1) if number % r == 0):
            distance = abs(log_aspect - math.log(number // rows / rows))
            if distance < least or (distance == least and rows > best[0]):
                best, least = (rows, number // rows), distance
    return best


def view_size(height: float | int, width: float | int, resolution: int, multiple: int, enlarge: bool) -> tuple[int, int]:
    """Returns the (height, width) in pixels of one view, multiples of `multiple` = patch size x merge factor.

    An image above resolution**2 pixels is scaled to about that area and keeps its aspect ratio. A smaller
    image is scaled up only with `enlarge`.
    """
    if enlarge or height * width > resolution**2:
        ratio = width / height
        height = int(resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _nearest_multiple(height, multiple), _nearest_multiple(width, multiple)


def sliced_size(height: int, width: int, grid: tuple[int, int], resolution: int, multiple: int) -> tuple[int, int]:
    """Returns the (height, width) in pixels of a resized image, which `grid` splits into equal slices."""
    rows, columns = grid
    one = _nearest_multiple(height, rows) / rows, _nearest_multiple(width, columns) / columns
    slice_height, slice_width = view_size(*one, resolution, multiple, enlarge=True)
    return slice_height * rows, slice_width * columns
