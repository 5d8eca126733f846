"""Messages -> prompt -> token ids and views.

Source: transformers' models/minicpmv4_6/processing_minicpmv4_6.py.

1. The chat template writes one placeholder token for each image or video.
2. A block with one placeholder per view replaces that token.
3. The whole text is tokenised.
4. Each placeholder's id is repeated once per feature of its view. The reference repeats the string before it
   tokenises; the ids are the same, because special tokens split the text.

Quirks of a block:
- A newline separates rows of slices.
- A video has one block; its frames follow each other without a separator.
- Image ids and video ids are counted separately, from 0 in each prompt. A video has one id for all its
  frames.
"""

import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from minicpmv46_jax.processing.images import MAX_PIXELS, SlicedImage, image_lookup_table
from minicpmv46_jax.processing.inputs import Inputs, View
from minicpmv46_jax.processing.media_job import MediaJob, MediaWorker, process_media
from minicpmv46_jax.processing.messages import MediaPart, check_overrides, normalise_messages
from minicpmv46_jax.processing.options import MediaConfig, MediaOptions, read_configs
from minicpmv46_jax.processing.sources import FetchMedia, describe, fetch, is_data_url, read
from minicpmv46_jax.processing.video import NO_VIDEO_LIMITS, VideoLimits, video_lookup_table

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


class _LoadedMedia(NamedTuple):
    """A media part, opened and sliced.

    Attributes:
        kind: "image" or "video".
        images: one sliced image, or for a video one per frame or composite.
        options: the options that it was sliced with.
    """

    kind: str
    images: tuple[SlicedImage, ...]
    options: MediaOptions


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
        media_worker: opens and slices images and videos; a server's runs in other processes.
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
        media_worker: MediaWorker = process_media,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_config = image_config
        self.video_config = video_config
        self.fetch = fetch
        self.max_pixels = max_pixels
        self.video_limits = video_limits
        self.media_worker = media_worker
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; expected chat_template.jinja in the checkpoint folder")
        if missing := [role for role in _ROLES if not getattr(tokenizer, role, None)]:
            raise ValueError(f"the tokenizer has no {missing[0]}; expected it in tokenizer_config.json")
        self.tokens = SpecialTokens(*(getattr(tokenizer, role) for role in _ROLES))
        self._placeholder_ids = tokenizer.convert_tokens_to_ids([self.tokens.image, self.tokens.video])
        self._tables = {"image": image_lookup_table(image_config), "video": video_lookup_table(video_config)}
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

    def __call__(
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
    ) -> Inputs:
        """Returns the model's inputs for one conversation.

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
            None
                takes the checkpoint's value.
        Returns:
            `Inputs`: the prompt's text tokens, and one token for every 16 (or 4) patches.
        Raises:
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
        return self._build_inputs(prompt, [self._load(part, overrides) for part in media])

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

    def _load(self, part: MediaPart, overrides: Mapping[str, Any]) -> _LoadedMedia:
        config = self.image_config if part.kind == "image" else self.video_config
        options = config.options.with_overrides(overrides, "options").with_overrides(part.overrides, part.where)
        source, name = part.source, describe(part.source)
        try:
            if isinstance(source, str) and not is_data_url(source):
                source = read(source, self.fetch)
            job = MediaJob(part.kind, source, name, config, options, self.max_pixels, self.video_limits)
            return _LoadedMedia(part.kind, self.media_worker(job), options)
        except ValueError as error:
            raise ValueError(f"{part.where}: {error}") from error

    def _build_inputs(self, prompt: str, media: list[_LoadedMedia]) -> Inputs:
        blocks = iter(_number_blocks(media, self._placeholder_block))
        pattern = f"{re.escape(self.tokens.image)}|{re.escape(self.tokens.video)}"
        text = re.sub(pattern, lambda _: next(blocks), prompt)
        ids = np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

        slices = [(item, image_slice) for item in media for frame in item.images for image_slice in frame.slices]
        num_tokens = [image_slice.grid[0] * image_slice.grid[1] // item.options.merge_factor**2 for item, image_slice in slices]
        positions = np.flatnonzero(np.isin(ids, self._placeholder_ids))
        assert len(positions) == len(slices), (len(positions), len(slices))
        repeats = np.ones(len(ids), np.int64)
        repeats[positions] = num_tokens
        starts = (np.cumsum(repeats) - repeats)[positions]
        views = (
            View(image_slice.pixels, image_slice.grid, self._tables[item.kind], int(start), number, item.options.downsample_mode)
            for (item, image_slice), start, number in zip(slices, starts, num_tokens, strict=True)
        )
        return Inputs(
            token_ids=np.repeat(ids, repeats),
            views=tuple(views),
            image_grids=tuple(item.images[0].grid for item in media if item.kind == "image"),
            video_grids=tuple(tuple(frame.grid for frame in item.images) for item in media if item.kind == "video"),
        )

    def _placeholder_block(self, item: _LoadedMedia, number: int) -> str:
        """Returns the text that replaces an image's or video's placeholder, with one placeholder per view."""
        tokens = self.tokens
        pad = tokens.image if item.kind == "image" else tokens.video
        text = f"{tokens.image_id_start}{number}{tokens.image_id_end}" if item.options.use_image_id else ""
        for frame in item.images:
            rows, columns = frame.grid
            row = f"{tokens.slice_start}{pad}{tokens.slice_end}" * columns
            text += f"{tokens.image_start}{pad}{tokens.image_end}" + "\n".join([row] * rows)
        return text


def _number_blocks(media: Iterable[_LoadedMedia], block: Callable[[_LoadedMedia, int], str]) -> Iterable[str]:
    """Yields each media part's block; images and videos are numbered separately."""
    counts = {"image": 0, "video": 0}
    for item in media:
        yield block(item, counts[item.kind])
        counts[item.kind] += 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
