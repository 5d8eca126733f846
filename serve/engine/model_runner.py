"""The device's side of the engine: all state, and the calls that run compiled programs over it.

No call of a step waits for the device: it sends programs and returns samples that are still on their way to
the host. Programs run in the order they were sent, so a page, a slot or a row of the encoder cache may be
reused as soon as its last use has been sent.
Glossary: T tokens, Q prompts of a prefill step, B rows of a decode step, C rows of held logits, W words of a
grammar mask.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from minicpmv46_jax import model
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.generation.decoding import (
    NUM_DEVICE_STOPS,
    DecodeState,
    FirstTokenInput,
    bias_row,
    device_stop_ids,
    sampling_params,
)
from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.generation.sampling import Sampled, SamplingMode
from minicpmv46_jax.model import Params, PrefillInput, packing
from minicpmv46_jax.model.packing import PackedView
from serve.engine.memory_plan import MemoryPlan
from serve.engine.offload import OffloadedPrefix, page_groups
from serve.engine.program_shapes import ALL_ALLOWED, HISTORY_TOKENS, DeviceArrays, ProgramShapes, empty_first_tokens, full_columns
from serve.engine.request import EngineRequest
from serve.engine.scheduler import PrefillChunk, SchedulerOutput
from serve.runtime.program_cache import ProgramCache, ProgramStore

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class PrefillRow:
    """A chunk of a request's prompt with the inputs of its prefill.

    Attributes:
      chunk: the tokens' range and its state slots.
      request: the sampling options.
      token_ids: of the chunk.
      encoder_rows: for each token the row of the encoder cache that replaces it, or -1.
      num_output_tokens: output tokens that are prefilled again after a preemption.
      mask: grammar mask of the next token; None allows all.
    """

    chunk: PrefillChunk
    request: EngineRequest
    token_ids: Int32[np.ndarray, " t"]
    encoder_rows: Int32[np.ndarray, " t"]
    num_output_tokens: int
    mask: UInt32[np.ndarray, " W"] | None = None


class ModelRunner:
    """Device state and compiled programs.

    Made from a model's shapes, then `compile`d, then given the parameters by `load`.

    Args:
      config: the model.
      params: shapes of its parameters, or the parameters.
      plan: sizes of the state.
      backend: see `model.schema`.
      store: where compiled programs are kept; None keeps none.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        plan: MemoryPlan,
        backend: str | None = None,
        store: ProgramStore | None = None,
    ):
        self.params, self.plan = params, plan
        self.shapes = ProgramShapes(config, plan, params["text"]["embed"]["weight"].dtype, backend)
        self._schema = model.schema(config, backend)
        self._all_allowed: dict[int, UInt32[Array, "Q W"]] = {}
        self._programs = ProgramCache(store)
        self._decode_state: DecodeState  # both made by `reset`
        self._encoder_cache: Float[Array, "R D"]

    @property
    def num_programs(self) -> int:
        """Number of compiled programs."""
        return len(self._programs)

    def load(self, params: Params) -> None:
        """Takes the parameters and warms up."""
        self.params = params
        self._warm_up()

    def compile(self, show: bool = False, check: Callable[[], None] = lambda: None) -> None:
        """Compiles every program for every bucket and makes the state;

        `show` and `check` as in `ProgramCache.compile`.
        """
        self.shapes.add_empty_state(self._programs)
        self._programs.compile(show=False)
        self.reset()
        self._all_allowed = self.shapes.all_allowed()
        arrays = DeviceArrays(self.params, self._decode_state, self._encoder_cache, self._all_allowed)
        self.shapes.add_steps(self._programs, self._schema, arrays)
        self._programs.compile(show, check)

    def reset(self) -> None:
        """Replaces the state with an empty one."""
        if hasattr(self, "_decode_state"):
            # Freed first, because the device has no room for two. An error's traceback may still refer to the
            # arrays, so they are deleted explicitly.
            for array in jax.tree.leaves((self._decode_state, self._encoder_cache)):
                if not array.is_deleted():  # else a call that failed had taken it
                    array.delete()
            del self._decode_state, self._encoder_cache
        self._decode_state, self._encoder_cache = self._programs["empty state"]()

    def encode(self, views: Sequence[PackedView], rows: Sequence[Int32[np.ndarray, " _"]]) -> None:
        """Encodes views of one downsample mode into these rows of the encoder cache."""
        shape = self.shapes.encoder_shape([len(view.patches) for view in views])
        assert shape is not None
        packed = packing.pack_views(views, shape.patches, shape.views, shape.longest_view)
        num_features = shape.patches // 4 ** packing.MERGES[packed.downsample_mode]
        targets = np.full(num_features, self.plan.encoder_cache_rows, np.int32)  # past the last row: dropped
        used = np.concatenate(rows)
        targets[: len(used)] = used
        program = self._programs["encode", shape, packed.downsample_mode]
        self._encoder_cache = program(self.params["vision"], self._encoder_cache, packed, targets)

    def record_prompt(self, slot: int, token_ids: Int32[np.ndarray, " T"], num_prompt_tokens: int) -> None:
        """Records a sequence, prompt and output so far, in the history that penalties use."""
        for at in range(0, len(token_ids), HISTORY_TOKENS):
            part = np.zeros(HISTORY_TOKENS, np.int32)
            size = min(HISTORY_TOKENS, len(token_ids) - at)
            part[:size] = token_ids[at : at + size]
            prompt = min(max(num_prompt_tokens - at, 0), size)
            numbers = np.int32(slot), part, np.int32(prompt), np.int32(size), np.bool_(at == 0)
            history = self._programs["record prompt"](self._decode_state.history, *numbers)
            self._decode_state = dataclasses.replace(self._decode_state, history=history)

    def set_bias(self, slot: int, options: GenerationOptions) -> None:
        """Sets the logit biases of a slot."""
        bias = self._programs["set bias"](self._decode_state.bias, np.int32(slot), *bias_row(options))
        self._decode_state = dataclasses.replace(self._decode_state, bias=bias)

    def prefill(self, rows: Sequence[PrefillRow], mode: SamplingMode) -> Sampled | None:
        """Prefills chunks of prompts and samples the first token of each prompt that is complete.

        Returns:
          One sample a row; valid for rows whose chunk is its prompt's last. None if no chunk is.
        """
        T, Q = self.shapes.prefill_shape(sum(len(row.token_ids) for row in rows), len(rows))
        chunks = self._prefill_input(rows, T, Q)
        program = self._programs["prefill", T, Q]
        self._decode_state, logits = program(self.params["text"], self._decode_state, self._encoder_cache, chunks)
        if not any(row.chunk.is_last for row in rows):
            return None
        mode = "greedy" if mode == "greedy" else "full"
        allowed = () if mode == "greedy" else (self._allowed([row.mask for row in rows], Q),)
        program = self._programs["sample first", Q, mode]
        self._decode_state, sampled = program(self._decode_state, logits, self._first_token_input(rows, Q), *allowed)
        return _copy_async(sampled)

    def decode(self, step: SchedulerOutput, mode: SamplingMode) -> Sampled:
        """Decodes the step's rows and returns their tokens, [B, N]; undefined for rows that await a mask."""
        size = len(step.rows)
        rows = self.shapes.decode_rows(size, mode)
        padded = self.shapes.empty_decode(rows)
        for array, values in zip(padded, (step.slots, step.new_pages, step.awaiting_mask), strict=True):
            array[:size] = values
        program = self._programs["decode", rows, step.num_steps, mode]
        arguments = padded.arguments(step.num_steps, mode)
        self._decode_state, sampled = program(self.params["text"], self._decode_state, *arguments)
        return _copy_async(sampled)

    def sample_held(self, slots: Sequence[int], masks: Sequence[UInt32[np.ndarray, " W"]], mode: SamplingMode) -> Sampled:
        """Samples the held logits of these slots, each under its grammar mask; [C]."""
        rows = self.shapes.decode_rows(len(slots), mode)
        padded = np.full(rows, -1, np.int32)
        padded[: len(slots)] = slots
        program = self._programs["sample held", rows, mode]
        self._decode_state, sampled = program(self._decode_state, padded, self._allowed(masks, rows))
        return _copy_async(sampled)

    def offload(self, pages: Sequence[int], slot: int) -> OffloadedPrefix:
        """Starts the copy of a prefix, its pages and the state in `slot`, to the host;

        `OffloadedPrefix.finish` completes it.
        """
        layers = self._decode_state.state.layers
        groups = [self._programs["offload pages", len(group)](layers, group) for group in page_groups(pages)]
        return OffloadedPrefix(groups, self._programs["offload state"](layers, np.int32(slot)))

    def restore(self, prefix: OffloadedPrefix, first_page: int, pages: Sequence[int], slot: int) -> None:
        """Writes a prefix back: its state into `slot`, its pages from number `first_page` on into `pages`."""
        for group, values in zip(page_groups([-1] * first_page + list(pages)), prefix.pages, strict=True):
            if (group >= 0).any():
                self._decode_state = self._programs["restore pages", len(group)](self._decode_state, group, values)
        self._decode_state = self._programs["restore state"](self._decode_state, np.int32(slot), prefix.slot)

    def block_until_ready(self) -> None:
        """Waits until the device has run all programs sent so far."""
        jax.block_until_ready((self._decode_state, self._encoder_cache))

    def _allowed(self, masks: Sequence[UInt32[np.ndarray, " W"] | None], rows: int) -> UInt32[Array | np.ndarray, "B W"]:
        """Stacks masks to a batch; a row without one allows every token."""
        if all(mask is None for mask in masks):
            return self._all_allowed[rows]
        allowed = np.full((rows, self.shapes.mask_words), ALL_ALLOWED, np.uint32)
        for i, mask in enumerate(masks):
            if mask is not None:
                allowed[i] = mask
        return allowed

    def _prefill_input(self, rows: Sequence[PrefillRow], T: int, Q: int) -> PrefillInput:
        chunks = self.shapes.empty_prefill(T, Q)
        batch = chunks.batch
        at = num_snapshots = 0
        for i, row in enumerate(rows):
            chunk, end = row.chunk, at + len(row.token_ids)
            chunks.ids[at:end], chunks.feature_rows[at:end] = row.token_ids, row.encoder_rows
            batch.query_starts[i], batch.query_lens[i], batch.num_computed[i] = at, end - at, chunk.start
            batch.slots[i], batch.source_slots[i] = chunk.request.slot, chunk.source_slot
            batch.block_tables[i, : len(chunk.request.pages)] = chunk.request.pages
            for pages, slot in chunk.snapshots:
                batch.snapshots[num_snapshots], batch.snapshot_slots[num_snapshots] = (i, pages), slot
                num_snapshots += 1
            at = end
        return chunks

    def _first_token_input(self, rows: Sequence[PrefillRow], Q: int) -> FirstTokenInput:
        slots, num_output_tokens, tokens_left = full_columns(Q, -1, 0, 0)
        stops = np.full((Q, NUM_DEVICE_STOPS), -1, np.int32)
        requests = [row.request for row in rows] + [rows[0].request] * (Q - len(rows))  # padding rows repeat the first
        for i, row in enumerate(rows):
            if row.chunk.is_last:
                request = row.chunk.request
                slots[i], num_output_tokens[i] = request.slot, row.num_output_tokens
                tokens_left[i] = request.max_total_tokens - request.num_tokens
                stops[i] = device_stop_ids(row.request.options.stop_token_ids)
        params = sampling_params([request.options for request in requests], [request.seed for request in requests])
        return FirstTokenInput(slots, params, stops, num_output_tokens, tokens_left)

    def _warm_up(self) -> None:
        """Runs the smallest programs on dummy input, because first use initialises device libraries (up to 1
        s).
        """
        (T, Q), rows = self.plan.buckets.prefill_shapes[0], self.plan.decode_rows[0]
        arguments = self._encoder_cache, self.shapes.empty_prefill(T, Q)
        self._decode_state, logits = self._programs["prefill", T, Q](self.params["text"], self._decode_state, *arguments)
        self._decode_state, _ = self._programs["sample first", Q, "greedy"](self._decode_state, logits, empty_first_tokens(Q))
        arguments = self.shapes.empty_decode(rows).arguments(1, "greedy")
        program = self._programs["decode", rows, 1, "greedy"]
        self._decode_state, _ = program(self.params["text"], self._decode_state, *arguments)
        self.block_until_ready()


def _copy_async(tree: Tree) -> Tree:
    """Starts copying arrays to the host and returns them."""
    for x in jax.tree.leaves(tree):
        x.copy_to_host_async()
    return tree
