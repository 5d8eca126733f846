"""The programs that an engine compiles, and the padded example arguments that each is compiled for.

A call is padded to the smallest compiled shape that holds it. Padding rows have slot -1, page -1 or token
count 0. Glossary: T tokens, Q prompts of a prefill step, B rows of a decode step, M pages of a block table, W
words of a grammar mask, R rows of the encoder cache, D hidden size, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from minicpmv46_jax import model
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.generation.decoding import (
    NUM_DEVICE_STOPS,
    DecodeState,
    FirstTokenInput,
    bias_row,
    decode,
    new_decode_state,
    sample_first,
    sample_held,
    sampling_params,
    set_bias,
)
from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.generation.sampling import SamplingMode, record_prompt
from minicpmv46_jax.generation.stop_texts import StopTexts
from minicpmv46_jax.model import Params, PrefillInput, packing
from minicpmv46_jax.model.batch import PrefillBatch
from minicpmv46_jax.model.packing import PackedView, PackedViews
from minicpmv46_jax.model.state import empty_state, offload_pages, offload_slot
from serve.engine import offload
from serve.engine.memory_plan import EncoderShape, MemoryPlan
from serve.engine.page_pool import num_pages
from serve.runtime.program_cache import ProgramCache

SNAPSHOTS_PER_PROMPT = 2  # per prefill step: at the end of the shared prefix, and near the prompt's end
HISTORY_TOKENS = 2048  # tokens recorded into a history per call
ALL_ALLOWED = 0xFFFFFFFF  # a word of a grammar mask that allows all of its 32 tokens
MODES: tuple[SamplingMode, ...] = ("greedy", "sampled", "filtered", "full")
_GREEDY = GenerationOptions(None, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, (), StopTexts(), False, None)


class DeviceArrays(NamedTuple):
    """Example arguments of the programs that are on the device; shapes will do for `params`.

    `all_allowed`: for each number of prompts of a prefill step, grammar masks that allow every token.
    """

    params: Params
    decode_state: DecodeState
    encoder_cache: Float[Array, "R D"]
    all_allowed: Mapping[int, UInt32[Array, "Q W"]]


class DecodeRows(NamedTuple):
    """Rows of a decode step: slots, (index in the block table, page) of a new page, and rows that await a
    grammar mask.
    """

    slots: Int32[np.ndarray, " B"]
    new_pages: Int32[np.ndarray, "B 2"]
    awaiting_mask: Bool[np.ndarray, " B"]

    def arguments(self, steps: int, mode: SamplingMode) -> tuple[np.ndarray, ...]:
        """Returns the arrays that the program of these steps and mode takes: only some programs can hold
        logits.
        """
        return tuple(self) if steps == 1 and mode != "greedy" else tuple(self[:2])


@dataclasses.dataclass(frozen=True)
class ProgramShapes:
    """The compiled shapes of an engine.

    Attributes:
      config: the model.
      plan: sizes of the state, and the buckets.
      dtype: of keys, values, conv state and encoder cache.
      backend: implementation of sampling's kernels, see `model.schema`.
    """

    config: ModelConfig
    plan: MemoryPlan
    dtype: jnp.dtype
    backend: str | None = None

    @property
    def max_pages(self) -> int:
        """Length M of a block table."""
        return num_pages(self.plan.max_model_len)

    @property
    def mask_words(self) -> int:
        """Words W of a grammar mask."""
        return -(-self.config.text.vocab_size // 32)

    def modes(self, rows: int) -> tuple[SamplingMode, ...]:
        """Returns the sampling modes compiled for this number of rows; rare combinations use a larger
        program.
        """
        if rows == self.plan.decode_rows[-1]:
            return MODES
        return MODES[:2] if rows == 1 else MODES[:3]

    def decode_rows(self, rows: int, mode: SamplingMode) -> int:
        """Returns the rows of the smallest program that decodes `rows` rows in this mode."""
        return next(size for size in self.plan.decode_rows if size >= rows and mode in self.modes(size))

    def prefill_shape(self, tokens: int, prompts: int) -> tuple[int, int]:
        """Returns (T, Q) of the smallest prefill program that holds these numbers."""
        return next((T, Q) for T, Q in self.plan.buckets.prefill_shapes if tokens <= T and prompts <= Q)

    def encoder_shape(self, patches: Sequence[int]) -> EncoderShape | None:
        """Returns the smallest encoder shape for views with these numbers of patches;

        None if none holds them.
        """
        total, views, longest = sum(patches), len(patches), max(patches)
        shapes = self.plan.buckets.encoder_shapes
        fitting = (p for p in shapes if p.patches >= total and p.views >= views and p.longest_view >= longest)
        return next(fitting, None)

    def empty_prefill(self, T: int, Q: int) -> PrefillInput:
        """Returns a prefill input of padding alone."""
        starts, lengths, computed, slots, sources = full_columns(Q, T, 0, 0, -1, -1)
        tables = np.full((Q, self.max_pages), -1, np.int32)
        snapshots = np.zeros((SNAPSHOTS_PER_PROMPT * Q, 2), np.int32)
        snapshot_slots = np.full(SNAPSHOTS_PER_PROMPT * Q, -1, np.int32)
        batch = PrefillBatch(starts, lengths, computed, slots, sources, tables, snapshots, snapshot_slots)
        return PrefillInput(np.zeros(T, np.int32), np.full(T, -1, np.int32), batch)

    def empty_decode(self, rows: int) -> DecodeRows:
        """Returns decode rows of padding alone."""
        return DecodeRows(np.full(rows, -1, np.int32), np.full((rows, 2), -1, np.int32), np.zeros(rows, bool))

    def all_allowed(self) -> dict[int, UInt32[Array, "Q W"]]:
        """Returns masks on the device that allow every token, for each number of prompts of a prefill."""
        prompts = {Q for _, Q in self.plan.buckets.prefill_shapes}
        return {Q: jax.device_put(np.full((Q, self.mask_words), ALL_ALLOWED, np.uint32)) for Q in prompts}

    def add_empty_state(self, programs: ProgramCache) -> None:
        """Adds the program "empty state", which returns an empty decode state and encoder cache."""
        plan, text = self.plan, self.config.text

        def new() -> tuple[DecodeState, Float[Array, "R D"]]:
            state = empty_state(
                text, plan.max_running, plan.num_pages, self.dtype, max_pages=self.max_pages, snapshots=plan.num_snapshots
            )
            cache = jnp.zeros((plan.encoder_cache_rows, text.hidden_size), self.dtype)
            return new_decode_state(state, text.vocab_size), cache

        programs.add("empty state", new)

    def add_steps(self, programs: ProgramCache, schema: model.Schema, arrays: DeviceArrays) -> None:
        """Adds all other programs."""
        self._add_prefill(programs, schema, arrays)
        self._add_decode(programs, schema, arrays)
        self._add_encode(programs, schema, arrays)
        self._add_sampling_state(programs, arrays)
        self._add_sample_held(programs, arrays)
        if self.plan.num_snapshots:
            self._add_offload(programs, arrays)

    def _add_prefill(self, programs: ProgramCache, schema: model.Schema, arrays: DeviceArrays) -> None:
        # Sampling the first token is a program of its own, so the prefill program need not be compiled for
        # each mode.
        for T, Q in self.plan.buckets.prefill_shapes:
            arguments = arrays.params["text"], arrays.decode_state, arrays.encoder_cache, self.empty_prefill(T, Q)
            programs.add(("prefill", T, Q), functools.partial(prefill, schema.text), *arguments, donate=(1,))
        for Q, all_allowed in arrays.all_allowed.items():
            logits, begin = np.zeros((Q, self.config.text.vocab_size), np.float32), empty_first_tokens(Q)
            for mode in ("greedy", "full"):
                allowed = () if mode == "greedy" else (all_allowed,)
                run = functools.partial(sample_first, mode=mode, backend=self.backend)
                programs.add(("sample first", Q, mode), run, arrays.decode_state, logits, begin, *allowed, donate=(0,))

    def _add_decode(self, programs: ProgramCache, schema: model.Schema, arrays: DeviceArrays) -> None:
        for rows in self.plan.decode_rows:
            for steps in {1, self.plan.buckets.decode_steps}:
                for mode in self.modes(rows):
                    run = functools.partial(decode, schema.text, steps=steps, mode=mode, backend=self.backend)
                    numbers = self.empty_decode(rows).arguments(steps, mode)
                    arguments = (arrays.params["text"], arrays.decode_state, *numbers)
                    programs.add(("decode", rows, steps, mode), run, *arguments, donate=(1,), autotune_group=("decode", rows))

    def _add_encode(self, programs: ProgramCache, schema: model.Schema, arrays: DeviceArrays) -> None:
        vision = self.config.vision
        for shape in self.plan.buckets.encoder_shapes:
            for mode, merges in packing.MERGES.items():
                patches, channels = np.zeros((4**merges, vision.patch_dim), np.uint8), np.zeros(vision.num_channels, np.float32)
                view = PackedView(patches, channels, channels, np.zeros(4**merges, np.int32), mode, 1)
                packed = packing.pack_views([view], shape.patches, shape.views, shape.longest_view)
                rows = np.zeros(shape.patches // 4**merges, np.int32)
                arguments = arrays.params["vision"], arrays.encoder_cache, packed, rows
                run = functools.partial(encode, schema.vision)
                programs.add(("encode", shape, mode), run, *arguments, donate=(1,), autotune_group=("encode", shape))

    def _add_sampling_state(self, programs: ProgramCache, arrays: DeviceArrays) -> None:
        numbers = np.int32(0), np.zeros(HISTORY_TOKENS, np.int32), np.int32(0), np.int32(0), np.bool_(False)
        history, bias = arrays.decode_state.history, arrays.decode_state.bias
        programs.add("record prompt", functools.partial(record_prompt), history, *numbers, donate=(0,))
        programs.add("set bias", functools.partial(set_bias), bias, np.int32(0), *bias_row(_GREEDY), donate=(0,))

    def _add_sample_held(self, programs: ProgramCache, arrays: DeviceArrays) -> None:
        for rows in self.plan.decode_rows:
            arguments = np.full(rows, -1, np.int32), np.zeros((rows, self.mask_words), np.uint32)
            for mode in self.modes(rows)[1:]:
                run = functools.partial(sample_held, mode=mode, backend=self.backend)
                programs.add(("sample held", rows, mode), run, arrays.decode_state, *arguments, donate=(0,))

    def _add_offload(self, programs: ProgramCache, arrays: DeviceArrays) -> None:
        state, slot = arrays.decode_state, np.int32(0)
        layers = state.state.layers
        for size in offload.GROUP_SIZES:
            group = np.full(size, -1, np.int32)
            pages = jax.eval_shape(offload_pages, layers, group)
            programs.add(("offload pages", size), functools.partial(offload_pages), layers, group)
            programs.add(("restore pages", size), functools.partial(offload.restore_pages), state, group, pages, donate=(0,))
        values = jax.eval_shape(offload_slot, layers, slot)
        programs.add("offload state", functools.partial(offload_slot), layers, slot)
        programs.add("restore state", functools.partial(offload.restore_slot), state, slot, values, donate=(0,))


def empty_first_tokens(rows: int) -> FirstTokenInput:
    """Returns rows of which none starts."""
    none, zero = full_columns(rows, -1, 0)
    greedy = sampling_params([_GREEDY] * rows, [0] * rows)
    return FirstTokenInput(none, greedy, np.full((rows, NUM_DEVICE_STOPS), -1, np.int32), zero, zero)


def full_columns(size: int, *fill: int) -> list[Int32[np.ndarray, " Q"]]:
    """Returns one array per value, filled with it."""
    return [np.full(size, value, np.int32) for value in fill]


def prefill(
    graph, params: Params, decode_state: DecodeState, encoder_cache: Float[Array, "R D"], chunks: PrefillInput
) -> tuple[DecodeState, Float32[Array, "Q V"]]:
    """Prefills chunks of prompts and returns the new state and the logits after each chunk's last token.

    `decode_state` is donated.
    """
    logits, state = model.prefill(graph, params, decode_state.state, chunks, encoder_cache)
    return dataclasses.replace(decode_state, state=state), logits


def encode(
    graph, params: Params, encoder_cache: Float[Array, "R D"], views: PackedViews, rows: Int32[Array, " r"]
) -> Float[Array, "R D"]:
    """Encodes views into rows of the encoder cache, which is donated; rows past the last are dropped."""
    return encoder_cache.at[rows].set(model.encode(graph, params, views).astype(encoder_cache.dtype), mode="drop")
