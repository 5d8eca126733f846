"""Into what sizes a picture is resized and into what grid of slices it is cut. Arithmetic on (height, width) only.

Source: transformers, models/minicpmv4_6/image_processing_pil_minicpmv4_6.py (the video processor has the same).
"""

import math


def _nearest_multiple(length: float | int, divisor: int) -> int:
    """The multiple of `divisor` nearest to `length`, at least one; halves go to the even multiple."""
    return max(round(length / divisor), 1) * divisor


def slice_grid(height: int, width: int, max_slice_nums: int, resolution: int) -> tuple[int, int] | None:
    """(rows, columns) of the slices, or None for a picture small enough for one view.

    The number of slices is about the picture's area in resolution**2; of the grids with one slice less, as many, or one
    more, that whose shape is nearest to the picture's wins. Of equally near grids the one with more rows does.
    """
    wanted = min(math.ceil(height * width / resolution**2), max_slice_nums)
    if wanted <= 1:
        return None
    shape = math.log(width / height)
    best, least = (1, 1), math.inf
    for number in (wanted - 1, wanted, wanted + 1):
        if not 1 < number <= max_slice_nums:
            continue
        for rows in (r for r in range(1, number + 1) if number % r == 0):
            off = abs(shape - math.log(number // rows / rows))
            if off < least or (off == least and rows > best[0]):
                best, least = (rows, number // rows), off
    return best


def view_size(height: float | int, width: float | int, resolution: int, multiple: int, enlarge: bool) -> tuple[int, int]:
    """(height, width) in pixels to which one view is resized: multiples of `multiple` = patch size x merge factor.

    Pictures above resolution**2 pixels are brought to about that area, keeping their shape; smaller ones only with
    `enlarge`.
    """
    if enlarge or height * width > resolution**2:
        ratio = width / height
        height = int(resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _nearest_multiple(height, multiple), _nearest_multiple(width, multiple)


def sliced_size(height: int, width: int, grid: tuple[int, int], resolution: int, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels to which a picture is resized before it is cut into `grid` equal slices."""
    rows, columns = grid
    one = _nearest_multiple(height, rows) / rows, _nearest_multiple(width, columns) / columns
    slice_height, slice_width = view_size(*one, resolution, multiple, enlarge=True)
    return slice_height * rows, slice_width * columns
