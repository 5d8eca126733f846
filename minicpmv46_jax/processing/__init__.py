"""Chat messages with images and videos -> token ids and the pictures the vision tower sees. numpy, Pillow and PyAV only.

    processor = Processor.from_folder("MiniCPM-V-4.6")
    inputs = processor([{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "?"}]}])

- chat.py: messages -> prompt -> `Inputs`; the one entry point.
- options.py: what a checkpoint fixes (`MediaConfig`) and what a request may choose (`MediaOptions`).
- slicing.py: the sizes and grids into which a picture is cut. Arithmetic only.
- cutting.py: one image or video. images.py, video.py: sources -> pictures -> patches. resize.py: torch's uint8 bicubic kernel.
- sources.py: paths, bytes, data and http URLs.
"""

from minicpmv46_jax.processing.chat import Processor
from minicpmv46_jax.processing.inputs import Inputs, View
from minicpmv46_jax.processing.options import MediaConfig, MediaOptions
from minicpmv46_jax.processing.sources import FetchMedia, fetch
from minicpmv46_jax.processing.video import Video

__all__ = ["FetchMedia", "Inputs", "MediaConfig", "MediaOptions", "Processor", "Video", "View", "fetch"]
