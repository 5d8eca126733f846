"""Turns chat messages with images and videos into token ids and image patches. Does not import jax.

    processor = Processor.from_folder("MiniCPM-V-4.6")
    parts = [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]
    inputs = processor([{"role": "user", "content": parts}])

- chat.py: messages -> `PromptPlan` -> `Inputs`. `Processor` is the one entry point.
- messages.py: checks messages and collects their media parts.
- options.py: settings of a checkpoint (`MediaConfig`) and options of a request (`MediaOptions`).
- media_job.py: `MediaJob`, one image or video to measure and to slice.
- images.py, video.py: sources -> RGB pixels -> `SlicedImage`s of patches. resize.py: torch's uint8 bicubic
  kernel.
- slicing.py: sizes and slice grids. Arithmetic only.
- sources.py: paths, bytes, data URLs and http URLs.

Glossary:
  media part: an image or a video in a message's content.
  view: the patches of one image slice, with the position of its placeholders in the prompt. The vision tower
    encodes views.
  source view: the whole image, resized to about scale_resolution**2 pixels.
  slice grid: (rows, columns) into which a large image is sliced beside its source view; (0, 0) without
    slices.
  placeholder: a token that one feature of the vision tower replaces.
"""

from minicpmv46_jax.processing.chat import Processor, PromptPlan, PromptTooLong
from minicpmv46_jax.processing.inputs import Inputs, View
from minicpmv46_jax.processing.options import MediaConfig, MediaOptions
from minicpmv46_jax.processing.sources import FetchMedia, fetch
from minicpmv46_jax.processing.video import Video

__all__ = [
    "FetchMedia",
    "Inputs",
    "MediaConfig",
    "MediaOptions",
    "Processor",
    "PromptPlan",
    "PromptTooLong",
    "Video",
    "View",
    "fetch",
]
