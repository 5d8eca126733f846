"""The real workloads of the text layers, one table for tests, benchmarks and tuning."""

from typing import NamedTuple

from kernels_pallas.tuning import TuningSpace

HEADS, KEY_HEADS, WIDTH = 8, 2, 256  # query heads, key-value heads, width of both


class PagedShape(NamedTuple):
    """Sequences with these numbers of queries, which are the last of their contexts.

    `max_query_len` bounds the queries of one sequence.
    """

    name: str
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    max_query_len: int


PAGED = (
    PagedShape("decode 1 x 1,024", (1,), (1024,), 1),
    PagedShape("decode 100 x 1,024", (1,) * 100, (1024,) * 100, 1),
    PagedShape("decode 4 x 131,072", (1,) * 4, (131072,) * 4, 1),
    PagedShape("decode 1 x 262,144", (1,), (262144,), 1),
    PagedShape("prefill 2,048 from nothing", (2048,), (2048,), 2048),
    PagedShape("prefill 2,048 on 30,000", (2048,), (32048,), 2048),
    # A prefill step of a busy server: chunks of sixteen prompts, 2,048 tokens in all.
    PagedShape(
        "prefill 16 pieces",
        (512, 4, 64, 1, 200, 17, 448, 130, 65, 96, 5, 255, 128, 31, 60, 32),
        (512, 4099, 64, 1, 1200, 9000, 448, 2178, 65, 96, 70, 255, 30000, 31, 316, 32),
        2048,
    ),
)

DECODE = tuple(f"paged attention, {shape.name}" for shape in PAGED if shape.max_query_len == 1)
TUNING_SPACES = (
    TuningSpace(
        "hopper",
        "paged_attention_decode",
        tuple({"stages": stages, "at_once": at_once} for stages in (2, 3) for at_once in (4, 8)),
        {None: DECODE},
    ),
    TuningSpace(  # the size of the work is the number of queries of a sequence
        "tpu",
        "paged_attention",
        tuple({"queries": 128, "pages": pages} for pages in (4, 8, 16)),
        {8: DECODE, None: ("paged attention, prefill 2,048 on 30,000",)},
    ),
)
