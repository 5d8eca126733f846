"""The real workloads of the vision tower, one table for tests, benchmarks and tuning."""

from typing import NamedTuple

from kernels_pallas.tuning import TuningSpace

HEADS, WIDTH = 16, 72  # of the vision tower


class PackedShape(NamedTuple):
    """Views of these lengths, one after the other in a row.

    `longest` is the bound that the packer gives for them.
    """

    name: str
    lengths: tuple[int, ...]
    longest: int


PHOTO = (24 * 44, *[28 * 36] * 6)  # 1280 x 720: the whole image and six slices, 7,104 patches

PACKED = (
    PackedShape("1 photo", PHOTO, 1088),
    PackedShape("1 photo, merged", tuple(n // 4 for n in PHOTO), 272),  # after the tower's window merger
    PackedShape("16 photos", PHOTO * 16, 1088),
    PackedShape("1 view of 4,900", (4900,), 4928),
    # A fixed draw of 8,192 patches: small images and thin slices beside large ones.
    PackedShape("ragged 8,192", (1, 16, 1056, 64, 4, 256, 1024, 144, 2116, 400, 32, 784, 1, 1089, 100, 1105), 2304),
)

PHOTOS = tuple(f"{{}}, {name}" for name in ("1 photo", "16 photos", "ragged 8,192"))
# The size of the work is its number of patches.
TUNING_SPACES = (
    TuningSpace(
        "hopper",
        "packed_attention",
        tuple({"groups": groups, "tile": tile, "stages": 3} for groups in (2, 3) for tile in (96, 128)),
        {None: tuple(line.format("packed attention") for line in PHOTOS)},
    ),
    TuningSpace(
        "hopper",
        "packed_attention_backward",
        tuple({"groups": 2, "tile": tile, "stages": stages} for tile in (64, 96) for stages in (2, 3)),
        {None: tuple(line.format("packed attention backward") for line in PHOTOS)},
    ),
    TuningSpace(
        "tpu",
        "packed_attention",
        tuple({"block_bytes": 1024, "window_bytes": 2304, "together": together} for together in (2, 4, 8)),
        {None: tuple(line.format("packed attention") for line in PHOTOS)},
    ),
)
