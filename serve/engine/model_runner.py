"""The device's side of the engine: all state, and the few compiled steps over it. Nothing here waits for the device.

Every call sends one program and gives back what the device will have sampled, on its way to the host. Programs run in the order
they were sent, so that a page, a slot or a row of features may be given to another as soon as its last use has been sent.
Glossary: T tokens, Q prompts of a reading step, B rows of a decoding step, M pages a sequence may have.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt32

from minicpmv46_jax import model
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.generation.decoding import (
    NUM_DEVICE_STOPS,
    DecodeState,
    FirstTokenInput,
    bias_row,
    decode,
    device_stop_ids,
    new_decode_state,
    sample_first,
    sample_held,
    sampling_params,
    set_bias,
)
from minicpmv46_jax.generation.options import GenerationOptions
from minicpmv46_jax.generation.sampling import Sampled, SamplingMode, record_prompt
from minicpmv46_jax.model import Params, PrefillInput, packing
from minicpmv46_jax.model.batch import PrefillBatch, scatter_index
from minicpmv46_jax.model.packing import PackedView, PackedViews
from minicpmv46_jax.model.state import GatedDeltaState, KeyValues, Layers, empty_state
from serve.engine.memory_plan import EncoderShape, MemoryPlan
from serve.engine.page_pool import pages_of
from serve.engine.request import EngineRequest
from serve.engine.scheduler import PrefillChunk, SchedulerOutput
from serve.runtime.program_cache import ProgramCache, ProgramStore

SNAPSHOTS_A_PROMPT = 2  # of a reading step: where the prompt parts from others, and its last page
NOTE_TOKENS = 2048  # entered into a history at once
EVERYTHING = 0xFFFFFFFF  # a mask's word in which all may come
COPY_PAGES = (8, 32)  # copied to or from the host at once: 6 and 24 MB of the released model
Tree = TypeVar("Tree")
MODES: tuple[SamplingMode, ...] = ("greedy", "sampled", "filtered", "full")


@dataclasses.dataclass(frozen=True)
class PrefillRow:
    """A piece of a request's prompt with what the device needs of it.

    `answered` counts tokens that it reads again; `mask` says which token may come behind it, None for any.
    """

    piece: PrefillChunk
    work: EngineRequest
    ids: Int32[np.ndarray, " t"]
    feature_rows: Int32[np.ndarray, " t"]
    answered: int
    mask: UInt32[np.ndarray, " W"] | None = None


@dataclasses.dataclass(eq=False)
class Copy:
    """A prefix on its way to the host, or there: for each group of pages the keys and values, and the memory; a layer each."""

    pages: list[list[KeyValues]]
    recurrent_state: list[GatedDeltaState]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(x.nbytes for x in jax.tree.leaves((self.pages, self.recurrent_state)))

    def land(self) -> None:
        """Waits until it is on the host, and lets go of the device's memory."""
        jax.block_until_ready((self.pages, self.recurrent_state))
        self.pages, self.recurrent_state = jax.tree.map(_landed, (self.pages, self.recurrent_state))


class ModelRunner:
    """State and steps: made for a model's shapes, `compile`d, and then given the parameters themselves by `load`.

    Args:
      config: the model.
      shapes: of its parameters; arrays will do.
      sizes: how much of everything there is.
      backend: as in `model.schema`.
      store: where compiled steps are kept, if anywhere.
    """

    def __init__(
        self,
        config: ModelConfig,
        shapes: Params,
        sizes: MemoryPlan,
        backend: str | None = None,
        store: ProgramStore | None = None,
    ):
        self.config, self.params, self.sizes = config, shapes, sizes
        self.dtype = shapes["text"]["embed"]["weight"].dtype
        self._graph = model.schema(config, backend)
        self._pages = pages_of(sizes.longest)
        self._everything: dict[int, UInt32[Array, "Q W"]] = {}  # a mask for each number of prompts that are read
        self._programs = ProgramCache(store)

    @property
    def programs(self) -> int:
        """How many there are."""
        return len(self._programs)

    def load(self, params: Params) -> None:
        """Takes the parameters, and is ready."""
        self.params = params
        self._warm_up()

    def compile(self, show: bool = False, check: Callable[[], None] = lambda: None) -> None:
        """Compiles every step for every bucket, and makes the state; `show` and `check` as for `ProgramCache.compile`."""
        self._add_new()
        self._programs.compile(show=False)
        self.reset()
        self._add_reads()
        self._add_decodes()
        self._add_encodes()
        self._add_requests_own()
        self._add_chooses()
        if self.sizes.snapshots:
            self._add_copies()
        self._programs.compile(show, check)

    def reset(self) -> None:
        """Empty state, whatever became of the one before."""
        self._decoding = self._bank = None  # first let go: there is no room for both
        self._decoding, self._bank = self._programs["new"]()

    def encode(self, views: Sequence[PackedView], rows: Sequence[Int32[np.ndarray, " r"]]) -> None:
        """Puts the features of views of one mode into these rows of the bank."""
        bucket = self.pass_for([len(view.patches) for view in views])
        assert bucket is not None
        packed = packing.pack_views(views, bucket.patches, bucket.views, bucket.longest)
        merged = 4 ** packing.MERGES[packed.downsample_mode]
        to = np.full(bucket.patches // merged, self.sizes.features, np.int32)  # past the last: dropped
        taken = np.concatenate(rows)
        to[: len(taken)] = taken
        self._bank = self._programs["encode", bucket, packed.downsample_mode](self.params["vision"], self._bank, packed, to)

    def pass_for(self, patches: Sequence[int]) -> EncoderShape | None:
        """The smallest pass of the tower for views of so many patches; None if there is none."""
        total, views, longest = sum(patches), len(patches), max(patches)
        fits = (p for p in self.sizes.buckets.passes if p.patches >= total and p.views >= views and p.longest >= longest)
        return next(fits, None)

    def note(self, slot: int, ids: Int32[np.ndarray, " T"], prompt: int) -> None:
        """Enters a sequence into the history that penalties look at: its prompt, and its answer so far."""
        for at in range(0, len(ids), NOTE_TOKENS):
            part = np.zeros(NOTE_TOKENS, np.int32)
            size = min(NOTE_TOKENS, len(ids) - at)
            part[:size] = ids[at : at + size]
            numbers = np.int32(slot), part, np.int32(min(max(prompt - at, 0), size)), np.int32(size), np.bool_(at == 0)
            history = self._programs["note"](self._decoding.history, *numbers)
            self._decoding = dataclasses.replace(self._decoding, history=history)

    def set_bias(self, slot: int, options: GenerationOptions) -> None:
        """Enters what a request adds to the scores."""
        bias = self._programs["bias"](self._decoding.bias, np.int32(slot), *bias_row(options))
        self._decoding = dataclasses.replace(self._decoding, bias=bias)

    def read(self, readings: Sequence[PrefillRow], mode: SamplingMode) -> Sampled | None:
        """Reads pieces of prompts; row i of what is sampled counts where piece i is its request's last. None if no piece is."""
        tokens = sum(len(reading.ids) for reading in readings)
        T, Q = next((T, Q) for T, Q in self.sizes.buckets.prompts if tokens <= T and len(readings) <= Q)
        pieces = self._pieces(readings, T, Q)
        self._decoding, logits = self._programs["read", T, Q](self.params["text"], self._decoding, self._bank, pieces)
        if not any(reading.piece.last for reading in readings):
            return None
        mode = "greedy" if mode == "greedy" else "full"
        allowed = () if mode == "greedy" else (self._allowed([reading.mask for reading in readings], Q),)
        self._decoding, sampled = self._programs["start", Q, mode](self._decoding, logits, self._begin(readings, Q), *allowed)
        return _sent(sampled)

    def decode(self, plan: SchedulerOutput, mode: SamplingMode) -> Sampled:
        """The plan's tokens for its rows, [B, N]; those of held rows are to be chosen."""
        size, rows = len(plan.rows), self._rows(len(plan.rows), mode)
        slots, grown, held = self._nobodys_rows(rows)
        slots[:size], grown[:size], held[:size] = plan.slots, plan.grown, plan.held
        steps = self._programs["decode", rows, plan.steps, mode]
        arguments = (slots, grown, held) if _holds(plan.steps, mode) else (slots, grown)
        self._decoding, sampled = steps(self.params["text"], self._decoding, *arguments)
        return _sent(sampled)

    def choose(self, slots: Sequence[int], masks: Sequence[UInt32[np.ndarray, " W"]], mode: SamplingMode) -> Sampled:
        """A token for each of these held rows, of those that its mask allows; [C]."""
        rows = self._rows(len(slots), mode)
        padded = np.full(rows, -1, np.int32)
        padded[: len(slots)] = slots
        self._decoding, sampled = self._programs["choose", rows, mode](self._decoding, padded, self._allowed(masks, rows))
        return _sent(sampled)

    def _rows(self, rows: int, mode: SamplingMode) -> int:
        """Rows of the program for so many."""
        return next(size for size in self.sizes.rows if size >= rows and mode in self._modes(size))

    def _allowed(self, masks: Sequence[UInt32[np.ndarray, " W"] | None], rows: int) -> UInt32[Array | np.ndarray, "B W"]:
        """Masks as a batch; where there is none, everything may come."""
        if all(mask is None for mask in masks):
            return self._everything[rows]
        allowed = np.full((rows, -(-self.config.text.vocab_size // 32)), EVERYTHING, np.uint32)
        for i, mask in enumerate(masks):
            if mask is not None:
                allowed[i] = mask
        return allowed

    def _nobodys_rows(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots, pages and which are held, of rows of which none takes part."""
        return np.full(rows, -1, np.int32), np.full((rows, 2), -1, np.int32), np.zeros(rows, bool)

    def fetch(self, pages: Sequence[int], slot: int) -> Copy:
        """A prefix apart from the state, to be copied to the host by `Copy.land`."""
        layers = self._decoding.state.layers
        groups = [self._programs["fetch pages", len(group)](layers, group) for group in _groups(pages)]
        return Copy(groups, self._programs["offload state"](layers, np.int32(slot)))

    def store(self, copy: Copy, first: int, pages: Sequence[int], slot: int) -> None:
        """Puts a prefix back: its memory into `slot`, its pages from `first` on into these."""
        for group, values in zip(_groups([-1] * first + list(pages)), copy.pages, strict=True):
            if (group >= 0).any():
                self._decoding = self._programs["store pages", len(group)](self._decoding, group, values)
        self._decoding = self._programs["restore state"](self._decoding, np.int32(slot), copy.recurrent_state)

    def wait(self) -> None:
        """Until the device has done all that it was sent."""
        jax.block_until_ready((self._decoding, self._bank))

    def _pieces(self, readings: Sequence[PrefillRow], T: int, Q: int) -> PrefillInput:
        ids, rows = np.zeros(T, np.int32), np.full(T, -1, np.int32)
        starts, lengths, before, slots, sources = _columns(Q, T, 0, 0, -1, -1)
        tables = np.full((Q, self._pages), -1, np.int32)
        snapshots, kept = np.zeros((SNAPSHOTS_A_PROMPT * Q, 2), np.int32), np.full(SNAPSHOTS_A_PROMPT * Q, -1, np.int32)
        at = count = 0
        for i, reading in enumerate(readings):
            piece, size = reading.piece, len(reading.ids)
            ids[at : at + size], rows[at : at + size] = reading.ids, reading.feature_rows
            starts[i], lengths[i], before[i], slots[i], sources[i] = at, size, piece.start, piece.request.slot, piece.source
            tables[i, : len(piece.request.pages)] = piece.request.pages
            for chunks, slot in piece.snapshots:
                snapshots[count], kept[count] = (i, chunks), slot
                count += 1
            at += size
        return PrefillInput(ids, rows, PrefillBatch(starts, lengths, before, slots, sources, tables, snapshots, kept))

    def _begin(self, readings: Sequence[PrefillRow], Q: int) -> FirstTokenInput:
        slots, answered, left = _columns(Q, -1, 0, 0)
        stops = np.full((Q, NUM_DEVICE_STOPS), -1, np.int32)
        works = [reading.work for reading in readings] + [readings[0].work] * (Q - len(readings))  # the last rows are for nothing
        for i, reading in enumerate(readings):
            if reading.piece.last:
                request = reading.piece.request
                slots[i], answered[i], left[i] = request.slot, reading.answered, request.most - request.total
                stops[i] = device_stop_ids(reading.work.options.stop_token_ids)
        params = sampling_params([work.options for work in works], [work.seed for work in works])
        return FirstTokenInput(slots, params, stops, answered, left)

    def _add_new(self) -> None:
        sizes, text = self.sizes, self.config.text

        def new() -> tuple[DecodeState, Float[Array, "R D"]]:
            state = empty_state(text, sizes.running, sizes.pages, self.dtype, max_pages=self._pages, snapshots=sizes.snapshots)
            return new_decode_state(state, text.vocab_size), jnp.zeros((sizes.features, text.hidden_size), self.dtype)

        self._programs.add("new", new)

    def _add_reads(self) -> None:
        """What a prompt's end samples is apart from the reading, so that one program of that serves all ways to sample."""
        for T, Q in self.sizes.buckets.prompts:
            run = functools.partial(_read, self._graph.text)
            arguments = self.params["text"], self._decoding, self._bank, self._pieces([], T, Q)
            self._programs.add(("read", T, Q), run, *arguments, donate=(1,))
        vocabulary = self.config.text.vocab_size
        for Q in {Q for _, Q in self.sizes.buckets.prompts}:
            logits, begin = np.zeros((Q, vocabulary), np.float32), _nobody(Q)
            self._everything[Q] = jax.device_put(np.full((Q, -(-vocabulary // 32)), EVERYTHING, np.uint32))
            for mode in ("greedy", "full"):
                allowed = () if mode == "greedy" else (self._everything[Q],)
                run = functools.partial(sample_first, mode=mode)
                self._programs.add(("start", Q, mode), run, self._decoding, logits, begin, *allowed, donate=(0,))

    def _add_decodes(self) -> None:
        for rows in self.sizes.rows:
            slots, grown, held = self._nobodys_rows(rows)
            for steps in {1, self.sizes.buckets.steps}:
                for mode in self._modes(rows):
                    run = functools.partial(decode, self._graph.text, steps=steps, mode=mode)
                    numbers = (slots, grown, held) if _holds(steps, mode) else (slots, grown)
                    arguments = (self.params["text"], self._decoding, *numbers)
                    self._programs.add(
                        ("decode", rows, steps, mode), run, *arguments, donate=(1,), autotune_group=("decode", rows)
                    )

    def _add_chooses(self) -> None:
        words = -(-self.config.text.vocab_size // 32)
        for rows in self.sizes.rows:
            arguments = np.full(rows, -1, np.int32), np.zeros((rows, words), np.uint32)
            for mode in self._modes(rows)[1:]:
                run = functools.partial(sample_held, mode=mode)
                self._programs.add(("choose", rows, mode), run, self._decoding, *arguments, donate=(0,))

    def _modes(self, rows: int) -> tuple[SamplingMode, ...]:
        """Of the programs for so many rows: not all are worth their compilation."""
        if rows == self.sizes.rows[-1]:
            return MODES
        return MODES[:2] if rows == 1 else MODES[:3]

    def _add_encodes(self) -> None:
        vision = self.config.vision
        for bucket in self.sizes.buckets.passes:
            for mode, merges in packing.MERGES.items():
                row = PackedView(
                    np.zeros((4**merges, vision.patch_dim), np.uint8),
                    *np.zeros((2, vision.num_channels), np.float32),
                    np.zeros(4**merges, np.int32),
                    mode,
                    1,
                )
                packed = packing.pack_views([row], bucket.patches, bucket.views, bucket.longest)
                to = np.zeros(bucket.patches // 4**merges, np.int32)
                run = functools.partial(_encode, self._graph.vision)
                arguments = self.params["vision"], self._bank, packed, to
                self._programs.add(("encode", bucket, mode), run, *arguments, donate=(1,), autotune_group=("encode", bucket))

    def _add_copies(self) -> None:
        layers, slot = self._decoding.state.layers, np.int32(0)
        for size in COPY_PAGES:
            group = np.full(size, -1, np.int32)
            pages = jax.eval_shape(fetch_pages, layers, group)
            self._programs.add(("fetch pages", size), functools.partial(fetch_pages), layers, group)
            self._programs.add(("store pages", size), functools.partial(store_pages), self._decoding, group, pages, donate=(0,))
        recurrent_state = jax.eval_shape(offload_recurrent_state, layers, slot)
        self._programs.add("offload state", functools.partial(offload_recurrent_state), layers, slot)
        self._programs.add(
            "restore state", functools.partial(restore_recurrent_state), self._decoding, slot, recurrent_state, donate=(0,)
        )

    def _warm_up(self) -> None:
        """Runs the smallest steps for nobody: a device's libraries start with the first program, in up to a second."""
        (T, Q), rows = self.sizes.buckets.prompts[0], self.sizes.rows[0]
        arguments = self._bank, self._pieces([], T, Q)
        self._decoding, logits = self._programs["read", T, Q](self.params["text"], self._decoding, *arguments)
        self._decoding, _ = self._programs["start", Q, "greedy"](self._decoding, logits, _nobody(Q))
        slots, grown, _ = self._nobodys_rows(rows)
        self._decoding, _ = self._programs["decode", rows, 1, "greedy"](self.params["text"], self._decoding, slots, grown)
        self.wait()

    def _add_requests_own(self) -> None:
        """What is entered of some requests before they are read."""
        numbers = np.int32(0), np.zeros(NOTE_TOKENS, np.int32), np.int32(0), np.int32(0), np.bool_(False)
        self._programs.add("note", functools.partial(record_prompt), self._decoding.history, *numbers, donate=(0,))
        row = np.int32(0), *bias_row(_GREEDY)
        self._programs.add("bias", functools.partial(set_bias), self._decoding.bias, *row, donate=(0,))


def _holds(steps: int, mode: SamplingMode) -> bool:
    """Whether a decoding program can hold rows."""
    return steps == 1 and mode != "greedy"


def _read(
    graph, params: Params, decoding: DecodeState, bank: Float[Array, "R D"], pieces: PrefillInput
) -> tuple[DecodeState, Float32[Array, "Q V"]]:
    """Reads pieces of prompts; `decoding` is donated. The scores after each piece's last token."""
    logits, state = model.prefill(graph, params, decoding.state, pieces, bank)
    return dataclasses.replace(decoding, state=state), logits


def _encode(graph, params: Params, bank: Float[Array, "R D"], views: PackedViews, to: Int32[Array, " r"]) -> Float[Array, "R D"]:
    """The bank, which is donated, with the views' features in rows `to`."""
    return bank.at[to].set(model.encode(graph, params, views).astype(bank.dtype), mode="drop")


def fetch_pages(layers: Layers, pages: Int32[Array, " P"]) -> list[KeyValues]:
    """Keys and values of some pages, a layer each; of page -1 those of some other."""
    here = jnp.maximum(pages, 0)
    return [KeyValues(layer.keys[here], layer.values[here]) for layer in layers if isinstance(layer, KeyValues)]


def offload_recurrent_state(layers: Layers, slot: Int32[Array, ""]) -> list[GatedDeltaState]:
    """A slot's memory, a layer each."""
    return [
        GatedDeltaState(layer.recurrent_state[slot], layer.conv_state[slot])
        for layer in layers
        if isinstance(layer, GatedDeltaState)
    ]


def store_pages(decoding: DecodeState, pages: Int32[Array, " P"], values: list[KeyValues]) -> DecodeState:
    """The inverse of `fetch_pages`; page -1 is left out."""
    layers = _of(decoding, KeyValues)
    to = scatter_index(pages, layers[0].keys.shape[0])
    return _with(decoding, KeyValues, jax.tree.map(lambda x, new: x.at[to].set(new, mode="drop"), layers, values))


def restore_recurrent_state(decoding: DecodeState, slot: Int32[Array, ""], values: list[GatedDeltaState]) -> DecodeState:
    """The inverse of `offload_recurrent_state`."""
    return _with(
        decoding, GatedDeltaState, jax.tree.map(lambda x, new: x.at[slot].set(new), _of(decoding, GatedDeltaState), values)
    )


def _of(decoding: DecodeState, kind: type) -> list:
    return [layer for layer in decoding.state.layers if isinstance(layer, kind)]


def _with(decoding: DecodeState, kind: type, new: list) -> DecodeState:
    """With the layers of a kind replaced."""
    rest = iter(new)
    layers = tuple(next(rest) if isinstance(layer, kind) else layer for layer in decoding.state.layers)
    return dataclasses.replace(decoding, state=dataclasses.replace(decoding.state, layers=layers))


def _groups(pages: Sequence[int]) -> list[Int32[np.ndarray, " P"]]:
    """Pages in groups of the largest size and a last one of the least that does, filled up with -1."""
    largest = COPY_PAGES[-1]
    parts = [pages[at : at + largest] for at in range(0, len(pages), largest)]
    sizes = (next(size for size in COPY_PAGES if size >= len(part)) for part in parts)
    return [np.array([*part, *[-1] * (size - len(part))], np.int32) for part, size in zip(parts, sizes, strict=True)]


def _columns(size: int, *fill: int) -> list[Int32[np.ndarray, " Q"]]:
    return [np.full(size, value, np.int32) for value in fill]


def _nobody(rows: int) -> FirstTokenInput:
    """Rows of which none starts."""
    none, zero = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
    greedy = sampling_params([_GREEDY] * rows, [0] * rows)
    return FirstTokenInput(none, greedy, np.full((rows, NUM_DEVICE_STOPS), -1, np.int32), zero, zero)


_GREEDY = GenerationOptions(None, 0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, (), (), False, None)


def _sent(tree: Tree) -> Tree:
    """What was given, on its way to the host."""
    for x in jax.tree.leaves(tree):
        x.copy_to_host_async()
    return tree


def _landed(x: Array) -> np.ndarray:
    """On the host. On a GPU that holds the GIL, 1 MB for 0.1 to 0.8 ms; then others have a turn."""
    there = np.asarray(x)
    time.sleep(0)
    return there
