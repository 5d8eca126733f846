"""A request as the engine runs it: tokens, pictures laid out for the tower, and the keys that both are known by.

Made off the event loop and off the engine's thread: a 1280 x 720 picture is 4 MB to put in order and to hash.
"""

import dataclasses
import hashlib
import secrets

import numpy as np

from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.model import packing
from minicpmv46_jax.processing import Inputs, View
from minicpmv46_jax.processing.threads import pixel_pool
from serve.engine.page_pool import PAGE

KEY_BYTES = 16  # of a hash; two of 2^40 pictures are alike by chance once in 2^48


@dataclasses.dataclass(frozen=True, eq=False)
class MultimodalItem:
    """A view: the tokens from `start` on are its features. Two with the same key have the same features."""

    key: bytes
    laid: packing.PackedView
    start: int

    @property
    def end(self) -> int:
        """The first token behind it."""
        return self.start + self.laid.num_tokens


@dataclasses.dataclass(frozen=True, eq=False)
class EngineRequest:
    """A request.

    Attributes:
      ids: int32, the prompt.
      pictures: in the order of the prompt.
      keys: of the prompt's whole pages; a key stands for all tokens and pictures up to the end of its page.
      options: how to decode.
      seed: the options', or one drawn now: an answer that is interrupted goes on with the same.
      mask: which token it may begin with, uint32, see `options.Constraint`; None for any.
    """

    ids: np.ndarray
    pictures: tuple[MultimodalItem, ...]
    keys: tuple[bytes, ...]
    options: GenerationOptions
    seed: int
    mask: np.ndarray | None = None


def prepare(inputs: Inputs, options: GenerationOptions, positions_per_side: int) -> EngineRequest:
    """Lays out and hashes; takes some milliseconds a picture. Raises what a constraint does that cannot be kept."""

    def laid(view: View) -> MultimodalItem:
        return MultimodalItem(mm_hash(view), packing.pack_view(view, positions_per_side), view.start)

    pictures = tuple(pixel_pool().map(laid, inputs.views))
    seed = secrets.randbits(63) if options.seed is None else options.seed
    mask = None if options.constraint is None else options.constraint.mask()
    return EngineRequest(inputs.token_ids, pictures, block_hashes(inputs.token_ids, pictures), options, seed, mask)


def mm_hash(view: View) -> bytes:
    """Of all that decides a view's features."""
    digest = hashlib.blake2b(repr((view.grid, view.downsample_mode)).encode(), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(view.pixels))
    digest.update(np.ascontiguousarray(view.table))
    return digest.digest()


def block_hashes(ids: np.ndarray, pictures: tuple[MultimodalItem, ...]) -> tuple[bytes, ...]:
    """Of each whole page of a prompt, given the one before."""
    keys, key, left = [], b"", list(pictures)
    for start in range(0, len(ids) - PAGE + 1, PAGE):
        digest = hashlib.blake2b(key + ids[start : start + PAGE].tobytes(), digest_size=KEY_BYTES)
        while left and left[0].start < start + PAGE:
            digest.update(left[0].key + repr(left[0].start).encode())
            left.pop(0)
        key = digest.digest()
        keys.append(key)
    return tuple(keys)
