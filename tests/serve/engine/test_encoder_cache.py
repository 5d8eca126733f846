"""Rows of the encoder cache, and the hashes of views and prompts."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.page_size import PAGE
from minicpmv46_jax.config import GenerationConfig
from minicpmv46_jax.generation.options import generation_options
from minicpmv46_jax.processing import Inputs
from serve.engine.encoder_cache import EncoderCache
from serve.engine.request import mm_hash, prepare_request
from tests.minicpmv46_jax.model.test_packing import view


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=60))
def test_rows_are_never_shared_and_pinned_entries_stay(lookups):
    """Slice i has 2 i + 1 rows of 40."""
    cache, pinned = EncoderCache(40), []
    for i, keep in lookups:
        key, rows = bytes([i]), 2 * i + 1
        entry = cache.find(key) or cache.reserve(key, rows)
        if entry is None:
            assert sum(len(e.rows) for e in {id(e): e for e in pinned}.values()) > 40 - rows
            continue
        assert len(entry.rows) == rows
        if keep:
            pinned.append(entry)
        else:
            cache.unpin(entry)
        used = np.concatenate([e.rows for e in cache._entries.values()])
        assert len(set(used.tolist())) == len(used) == cache.num_used
        assert all(any(e is p for e in cache._entries.values()) for p in pinned)


def test_least_recently_used_entry_is_evicted_first():
    cache = EncoderCache(10)
    for key in (b"a", b"b"):
        cache.unpin(cache.reserve(key, 5))
    cache.unpin(cache.find(b"a"))
    cache.unpin(cache.reserve(b"c", 5))
    assert cache.find(b"b") is None and cache.find(b"a") is not None
    assert (cache.hits, cache.misses) == (2, 3)


def test_mm_hash_covers_everything_that_determines_the_features():
    one = view(8, 8, value=1)
    others = [view(8, 8, value=2), view(4, 16, value=1), dataclasses.replace(one, downsample_mode="4x")]
    others.append(dataclasses.replace(one, table=one.table * 2))
    assert len({mm_hash(v) for v in (one, *others)}) == 5
    assert mm_hash(dataclasses.replace(one, start=77)) == mm_hash(one)


def block_hashes(ids, views=()):
    return prepare_request(Inputs(np.array(ids, np.int32), tuple(views)), OPTIONS, 70).block_hashes


OPTIONS = generation_options(GenerationConfig(), seed=0)


def test_block_hashes_cover_all_tokens_before():
    base = list(range(200))
    assert len(block_hashes(base)) == 3
    assert block_hashes(base)[:2] == block_hashes([*base[:128], *base[:72]])[:2]
    changed = [99, *base[1:]]
    assert not set(block_hashes(changed)) & set(block_hashes(base))


def test_block_hashes_cover_images_and_their_positions():
    ids, image = [7] * 200, view(8, 8, value=1)
    at = dataclasses.replace(image, start=70)
    other = dataclasses.replace(view(8, 8, value=2), start=70)
    shifted = dataclasses.replace(image, start=71)
    found = [block_hashes(ids, [v]) for v in (at, other, shifted)] + [block_hashes(ids)]
    assert len({k[0] for k in found}) == 1  # the first page ends before the image
    assert len({k[1] for k in found}) == len({k[2] for k in found}) == 4
    assert 70 // PAGE == 1


def test_seed_is_drawn_once():
    inputs = Inputs(np.arange(3, dtype=np.int32), ())
    drawn = {prepare_request(inputs, dataclasses.replace(OPTIONS, seed=None), 70).seed for _ in range(4)}
    assert len(drawn) == 4 and prepare_request(inputs, OPTIONS, 70).seed == 0
