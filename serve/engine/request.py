"""A request as the engine runs it: token ids, packed views, and the hashes that identify both.

Made off the event loop and off the engine's thread, because a 1280 x 720 picture is 4 MB to pack and to hash.
"""

import dataclasses
import hashlib
import secrets

import numpy as np

from kernels_pallas.page_size import PAGE
from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.model import packing
from minicpmv46_jax.processing import Inputs, View
from minicpmv46_jax.processing.threads import pixel_pool

HASH_BYTES = 16  # among 2^40 pictures two hashes collide with a probability of 2^-48


@dataclasses.dataclass(frozen=True, eq=False)
class MultimodalItem:
    """A packed view whose features replace the prompt's tokens from `start` on.

    Equal hashes mean equal features.
    """

    mm_hash: bytes
    packed_view: packing.PackedView
    start: int

    @property
    def end(self) -> int:
        """The first token after it."""
        return self.start + self.packed_view.num_tokens


@dataclasses.dataclass(frozen=True, eq=False)
class EngineRequest:
    """A request, hashed and packed.

    Attributes:
      token_ids: int32, the prompt.
      mm_items: views in the order of the prompt.
      block_hashes: one per whole page of the prompt; it stands for all tokens and views up to the end of the
        page.
      options: of decoding.
      seed: from the options, else drawn once, so that a preempted request resumes with the same seed.
      mask: grammar mask of the first output token, uint32, see `options.Constraint`; None allows all.
    """

    token_ids: np.ndarray
    mm_items: tuple[MultimodalItem, ...]
    block_hashes: tuple[bytes, ...]
    options: GenerationOptions
    seed: int
    mask: np.ndarray | None = None


def prepare_request(inputs: Inputs, options: GenerationOptions, positions_per_side: int, cache_salt: str = "") -> EngineRequest:
    """Packs and hashes a request, some milliseconds per picture.

    Args:
      inputs: the prompt.
      options: of generation.
      positions_per_side: of the vision tower.
      cache_salt: requests with different salts share no hash, and so nothing that is cached.

    Raises:
      Exception: any error of the constraint's first mask.
    """

    key = salt_key(cache_salt)

    def item(view: View) -> MultimodalItem:
        return MultimodalItem(mm_hash(view, key), packing.pack_view(view, positions_per_side), view.start)

    items = tuple(pixel_pool().map(item, inputs.views))
    seed = secrets.randbits(63) if options.seed is None else options.seed
    mask = None if options.constraint is None else options.constraint.mask()
    return EngineRequest(inputs.token_ids, items, block_hashes(inputs.token_ids, items, key), options, seed, mask)


def salt_key(cache_salt: str) -> bytes:
    """Returns the key of a salt's hashes; b"" without a salt."""
    return hashlib.blake2b(cache_salt.encode(errors="surrogatepass")).digest() if cache_salt else b""


def mm_hash(view: View, key: bytes = b"") -> bytes:
    """Returns a hash of the salt's key and of everything that determines a view's features."""
    digest = hashlib.blake2b(repr((view.grid, view.downsample_mode)).encode(), digest_size=HASH_BYTES, key=key)
    digest.update(np.ascontiguousarray(view.pixels))
    digest.update(np.ascontiguousarray(view.table))
    return digest.digest()


def block_hashes(token_ids: np.ndarray, items: tuple[MultimodalItem, ...], key: bytes = b"") -> tuple[bytes, ...]:
    """Returns a hash for each whole page of a prompt, chained to the page before, or to the salt's key."""
    hashes, block_hash, pending = [], key, list(items)
    for start in range(0, len(token_ids) - PAGE + 1, PAGE):
        digest = hashlib.blake2b(block_hash + token_ids[start : start + PAGE].tobytes(), digest_size=HASH_BYTES)
        while pending and pending[0].start < start + PAGE:
            digest.update(pending[0].mm_hash + repr(pending[0].start).encode())
            pending.pop(0)
        block_hash = digest.digest()
        hashes.append(block_hash)
    return tuple(hashes)
