"""Messages -> prompt -> token ids and views.

Source: transformers' models/minicpmv4_6/processing_minicpmv4_6.py.

1. The chat template writes one placeholder token for each image or video (`Processor.plan`).
2. The text is tokenised.
3. A block with one placeholder per view replaces that token (`Processor.assemble`).
4. Each placeholder's id is repeated once per feature of its view. The reference inserts blocks and repeats
   strings before it tokenises; the ids are the same, because special tokens split the text.

So the tokens of a prompt are counted before any of its media is decoded: sizes decide the blocks.

Quirks of a block:
- A newline separates rows of slices.
- A video has one block; its frames follow each other without a separator.
- Image ids and video ids are counted separately, from 0 in each prompt. A video has one id for all its
  frames.
"""

import functools
import inspect
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from minicpmv46_jax.processing.images import MAX_PIXELS, SlicedImage, SliceLayout, image_lookup_table
from minicpmv46_jax.processing.inputs import Inputs, View
from minicpmv46_jax.processing.media_job import MediaJob, process_media
from minicpmv46_jax.processing.messages import MediaPart, check_overrides, normalise_messages
from minicpmv46_jax.processing.options import MediaConfig, MediaOptions, read_configs
from minicpmv46_jax.processing.sources import FetchMedia, describe, fetch, is_data_url, read
from minicpmv46_jax.processing.video import NO_VIDEO_LIMITS, VideoLimits, video_lookup_table

MAX_CHARS_PER_TOKEN = 16  # on average over a prompt; English has four to five
MAX_CACHED_GRIDS = 1024  # whose token ids are kept; all frames of a video have one
MIN_CHARS = 2**20  # that are tokenised in any case, in about a second

Grid = tuple[int, int]

_ROLES = (
    "image_token",
    "video_token",
    "image_start_token",
    "image_end_token",
    "slice_start_token",
    "slice_end_token",
    "image_id_start_token",
    "image_id_end_token",
)


class SpecialTokens(NamedTuple):
    """Strings of the special tokens, by their roles in tokenizer_config.json."""

    image: str
    video: str
    image_start: str
    image_end: str
    slice_start: str
    slice_end: str
    image_id_start: str
    image_id_end: str


@dataclass(frozen=True)
class PlannedMedia:
    """An image or video of a planned prompt.

    Attributes:
        kind: "image" or "video".
        source: unchecked, as in the message.
        options: to slice it with.
        where: its position in the messages, for error messages.
    """

    kind: str
    source: Any
    options: MediaOptions
    where: str


@dataclass(frozen=True, eq=False)
class PromptPlan:
    """A rendered and tokenised conversation whose media have not been opened.

    Attributes:
        token_ids: int32; one placeholder stands for each image or video.
        media: images and videos in prompt order.
    """

    token_ids: np.ndarray
    media: tuple[PlannedMedia, ...] = ()


class PromptTooLong(ValueError):
    """A text has more characters or tokens than the prompt may have."""


class Processor:
    """Prepares conversations for the model. Keeps no state between calls, so threads may share it.

    Attributes:
        tokenizer: a transformers tokenizer with a chat template.
        image_config, video_config: the checkpoint's settings.
        fetch: reads a URL or path that is given as a string, data URLs excepted. A server passes its own
            function to restrict the sources. `pathlib.Path` objects come from the program itself and are
            opened without `fetch`.
        max_pixels: most pixels of an image or of a video's frame.
        video_limits: limits of decoding a video.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_config: MediaConfig,
        video_config: MediaConfig,
        *,
        fetch: FetchMedia = fetch,
        max_pixels: int = MAX_PIXELS,
        video_limits: VideoLimits = NO_VIDEO_LIMITS,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_config = image_config
        self.video_config = video_config
        self.fetch = fetch
        self.max_pixels = max_pixels
        self.video_limits = video_limits
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; expected chat_template.jinja in the checkpoint folder")
        if missing := [role for role in _ROLES if not getattr(tokenizer, role, None)]:
            raise ValueError(f"the tokenizer has no {missing[0]}; expected it in tokenizer_config.json")
        self.tokens = SpecialTokens(*(getattr(tokenizer, role) for role in _ROLES))
        self._placeholder_ids = tokenizer.convert_tokens_to_ids([self.tokens.image, self.tokens.video])
        self._tables = {"image": image_lookup_table(image_config), "video": video_lookup_table(video_config)}
        self._frame_ids = functools.lru_cache(MAX_CACHED_GRIDS)(self._tokenize_frame)
        self._template_names = set(inspect.signature(tokenizer.apply_chat_template).parameters)

    @classmethod
    def from_folder(cls, path: str | Path, *, fetch: FetchMedia = fetch, max_pixels: int = MAX_PIXELS) -> "Processor":
        """Reads a checkpoint folder's preprocessor files, tokenizer and chat template.

        Raises:
            ValueError: a file or field is missing or not supported; the message names it.
        """
        # transformers warns on stderr that PyTorch is missing, but a tokenizer does not need it.
        logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
        # Imported here, because the import takes a second and only this method needs it. AutoTokenizer
        # returns the same tokenizer, but imports torch where it is installed: eleven seconds from a cold
        # disk.
        from transformers import PreTrainedTokenizerFast

        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such checkpoint folder")
        images, videos = read_configs(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder}: no tokenizer.json")  # transformers would use an empty vocabulary
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: the tokenizer cannot be read: {_one_line(error)}") from error
        return cls(tokenizer, images, videos, fetch=fetch, max_pixels=max_pixels)

    def __call__(self, messages: Any, **options: Any) -> Inputs:
        """Returns the model's inputs for one conversation.

        Args:
            messages, **options: see `plan`.
        Returns:
            `Inputs`: the prompt's text tokens, and one token for every 16 (or 4) patches.
        Raises:
            ValueError: one line that names the message, part or option, and its fault.
        """
        plan = self.plan(messages, **options)
        return self.assemble(plan, [self._load(item) for item in plan.media])

    def plan(
        self,
        messages: Any,
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Any = None,
        downsample_mode: Any = None,
        max_slice_nums: Any = None,
        use_image_id: Any = None,
        max_num_frames: Any = None,
        stack_frames: Any = None,
        max_tokens: int | None = None,
    ) -> PromptPlan:
        """Renders and tokenises one conversation. Opens none of its images and videos.

        User input is `Any` in the signature, because this method checks its types.

        Args:
            messages: a list of mappings in OpenAI's or transformers' form. Content is a string or a list of
                parts: {"type": "text", "text"}, {"type": "image", "image" | "url" | "path"},
                {"type": "image_url", "image_url": {"url"} or str}, and the same for video. `images.load_rgb`
                lists image sources, `video.load_video` video sources. A message's `mm_processor_kwargs` are
                options for its own media; they override the call's options.
            tools: a list of JSON schemas of functions that the model may call.
            add_generation_prompt: end with the header of an assistant message. Must be False with
                `continue_final_message`.
            continue_final_message: leave the last message open.
            chat_template_kwargs: a mapping of the template's variables, such as {"enable_thinking": True}.
            downsample_mode, max_slice_nums, use_image_id, max_num_frames, stack_frames: see `MediaOptions`;
                None takes the checkpoint's value.
            max_tokens: most tokens of the prompt; None for no limit. See `tokenize`.
        Raises:
            PromptTooLong: the text alone has more than `max_tokens`.
            ValueError: one line that names the message, part or option, and its fault.
        """
        overrides = {
            "downsample_mode": downsample_mode,
            "max_slice_nums": max_slice_nums,
            "use_image_id": use_image_id,
            "max_num_frames": max_num_frames,
            "stack_frames": stack_frames,
        }
        check_overrides(overrides, "options")
        plain, media = normalise_messages(messages, (self.tokens.image, self.tokens.video))
        prompt = self._render(plain, tools, add_generation_prompt, continue_final_message, chat_template_kwargs)
        self._check_placeholders(prompt, media)
        planned = tuple(self._plan_media(part, overrides) for part in media)
        return PromptPlan(np.array(self.tokenize(prompt, max_tokens), np.int32), planned)

    def tokenize(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Returns a text's token ids, without special tokens around it.

        A text that exceeds the limit is refused before it is tokenised whole, which takes seconds and
        hundreds of bytes a character for megabytes of text.

        Args:
            text: the text.
            max_tokens: most tokens; None for no limit.
        Raises:
            PromptTooLong: the text has more tokens, or more than 16 characters for each of them and more than
                a million.
        """
        if max_tokens is not None:
            check_characters(text, max_tokens)
            if len(text) > 2 * (start := 8 * max_tokens + 1024):
                counted = len(self._token_ids(text[:start]))
                if counted > max_tokens + 64:  # the cut may add some tokens
                    raise PromptTooLong(
                        f"the text has more than {max_tokens} tokens: its first {start} characters have {counted}"
                    )
        return self._token_ids(text)

    def _token_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: Any,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Any,
    ) -> str:
        """Returns the prompt with one placeholder for each image and video."""
        variables = {} if variables is None else variables
        if not isinstance(variables, Mapping):
            raise ValueError(f"chat_template_kwargs: expected a mapping, got {type(variables).__name__}")
        if tools is not None and not (isinstance(tools, (list, tuple)) and all(isinstance(t, Mapping) for t in tools)):
            raise ValueError(f"tools: expected a list of JSON schemas, got {type(tools).__name__}")
        if taken := [name for name in variables if name in self._template_names or name == "messages"]:
            raise ValueError(f"chat_template_kwargs: {taken[0]!r} is not a template variable that can be set here")
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=None if tools is None else list(tools),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise ValueError(f"chat template: {_one_line(error)}") from error

    def _check_placeholders(self, prompt: str, media: list[MediaPart]) -> None:
        """Raises ValueError unless the placeholders match the media parts in number and order."""
        found = re.findall(f"{re.escape(self.tokens.image)}|{re.escape(self.tokens.video)}", prompt)
        kinds = ["image" if token == self.tokens.image else "video" for token in found]
        expected = [part.kind for part in media]
        if kinds != expected:
            raise ValueError(
                f"the prompt has placeholders for {kinds.count('image')} images and {kinds.count('video')} videos, the "
                f"messages have {expected.count('image')} and {expected.count('video')}: no text or tool may contain "
                f"{self.tokens.image} or {self.tokens.video}"
            )

    def _plan_media(self, part: MediaPart, overrides: Mapping[str, Any]) -> PlannedMedia:
        options = self._config(part.kind).options.with_overrides(overrides, "options")
        return PlannedMedia(part.kind, part.source, options.with_overrides(part.overrides, part.where), part.where)

    def _config(self, kind: str) -> MediaConfig:
        return self.image_config if kind == "image" else self.video_config

    def media_job(self, item: PlannedMedia, source: Any) -> MediaJob:
        """Returns the job that opens and slices an image or video. `source` is the item's, fetched if it is a
        URL."""
        config, name = self._config(item.kind), describe(item.source)
        return MediaJob(item.kind, source, name, config, item.options, self.max_pixels, self.video_limits)

    def _load(self, item: PlannedMedia) -> tuple[SlicedImage, ...]:
        source = item.source
        try:
            if isinstance(source, str) and not is_data_url(source):
                source = read(source, self.fetch)
            return process_media(self.media_job(item, source))
        except ValueError as error:
            raise ValueError(f"{item.where}: {error}") from error

    def count_tokens(self, plan: PromptPlan, layouts: Sequence[Sequence[SliceLayout]]) -> int:
        """Returns the number of tokens of the assembled prompt.

        Args:
            plan: the prompt.
            layouts: for each of its media, the layouts of its images: see `media_job.measure_media`.
        """
        total = len(plan.token_ids) - len(plan.media)
        grids = [[layout.grid for layout in item] for item in layouts]
        for item, block, images in zip(plan.media, self._blocks(plan, grids), layouts, strict=True):
            multiple = self._config(item.kind).patch_size * item.options.merge_factor
            total += len(block) + sum(image.num_pixels // multiple**2 - image.num_views for image in images)
        return total

    def assemble(self, plan: PromptPlan, media: Sequence[Sequence[SlicedImage]]) -> Inputs:
        """Returns the inputs of a planned prompt.

        Args:
            plan: the prompt.
            media: for each of its media one sliced image, or for a video one per frame or composite.
        """
        ids = self._with_blocks(plan, [[image.grid for image in images] for images in media])
        slices = [
            (item, image_slice)
            for item, images in zip(plan.media, media, strict=True)
            for image in images
            for image_slice in image.slices
        ]
        num_tokens = [image_slice.grid[0] * image_slice.grid[1] // item.options.merge_factor**2 for item, image_slice in slices]
        positions = self._placeholders(ids)
        assert len(positions) == len(slices), (len(positions), len(slices))
        repeats = np.ones(len(ids), np.int64)
        repeats[positions] = num_tokens
        starts = (np.cumsum(repeats) - repeats)[positions]
        views = (
            View(image_slice.pixels, image_slice.grid, self._tables[item.kind], int(start), number, item.options.downsample_mode)
            for (item, image_slice), start, number in zip(slices, starts, num_tokens, strict=True)
        )
        grids = [(item.kind, tuple(image.grid for image in images)) for item, images in zip(plan.media, media, strict=True)]
        return Inputs(
            token_ids=np.repeat(ids, repeats),
            views=tuple(views),
            image_grids=tuple(own[0] for kind, own in grids if kind == "image"),
            video_grids=tuple(own for kind, own in grids if kind == "video"),
        )

    def _with_blocks(self, plan: PromptPlan, grids: Sequence[Sequence[Grid]]) -> np.ndarray:
        """Returns the prompt's token ids with a block in place of each placeholder."""
        texts = np.split(plan.token_ids, positions := self._placeholders(plan.token_ids))
        assert len(positions) == len(plan.media), (len(positions), len(plan.media))
        blocks = (np.array(block, np.int32) for block in self._blocks(plan, grids))
        rest = itertools.chain.from_iterable((block, text[1:]) for block, text in zip(blocks, texts[1:], strict=True))
        return np.concatenate([texts[0], *rest])

    def _placeholders(self, token_ids: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.isin(token_ids, self._placeholder_ids))

    def _blocks(self, plan: PromptPlan, grids: Sequence[Sequence[Grid]]) -> Iterator[list[int]]:
        """Yields the token ids of each block; images and videos are numbered separately."""
        counts: Counter[str] = Counter()
        tokens = self.tokens
        for item, own in zip(plan.media, grids, strict=True):
            number = f"{tokens.image_id_start}{counts[item.kind]}{tokens.image_id_end}" if item.options.use_image_id else ""
            frames = (self._frame_ids(item.kind, *grid) for grid in own)
            yield [*self._token_ids(number), *itertools.chain.from_iterable(frames)]
            counts[item.kind] += 1

    def _tokenize_frame(self, kind: str, rows: int, columns: int) -> list[int]:
        """Returns the token ids of an image or frame, with one placeholder for each view."""
        tokens = self.tokens
        pad = tokens.image if kind == "image" else tokens.video
        row = f"{tokens.slice_start}{pad}{tokens.slice_end}" * columns
        return self._token_ids(f"{tokens.image_start}{pad}{tokens.image_end}" + "\n".join([row] * rows))


def check_characters(text: str, max_tokens: int) -> None:
    """Raises PromptTooLong for a text beyond MIN_CHARS and beyond MAX_CHARS_PER_TOKEN for each token."""
    if len(text) > (limit := max(MAX_CHARS_PER_TOKEN * max_tokens, MIN_CHARS)):
        raise PromptTooLong(f"the text has {len(text)} characters, more than the {limit} allowed for {max_tokens} tokens")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
