"""Write video.json: what transformers' own MiniCPMV4_6VideoProcessor makes of generated videos.

torchvision is too heavy for the test environment, so this runs in one of its own:

    python3 -m venv /tmp/tv
    /tmp/tv/bin/pip install torch==2.14.1 torchvision==0.29.1 transformers==5.23.0 pillow av
    /tmp/tv/bin/python make_video_goldens.py CHECKPOINT_FOLDER

The folder needs the tokenizer and preprocessor_config.json, no weights. Pixels are kept as SHA-256 of the
float32 patches, little-endian, [patches, 3*14*14] in (channel, y, x) order.
"""

import hashlib
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

# name: (frames, height, width, frames a second, options)
CASES = {
    "one view, smaller than 448": (8, 120, 160, 4.0, {}),
    "one view, tiny": (3, 7, 9, 1.0, {}),
    "448 exactly": (4, 448, 448, 2.0, {}),
    "1280x720": (3, 720, 1280, 1.0, {}),
    "portrait 608x1080": (3, 1080, 608, 1.0, {}),
    "portrait in 4x": (2, 1080, 608, 1.0, {"downsample_mode": "4x"}),
    "strip": (2, 97, 1400, 1.0, {}),
    "column": (2, 1100, 61, 1.0, {"max_slice_nums": 4}),
    "4x, cut": (5, 500, 900, 2.0, {"downsample_mode": "4x"}),
    "4x, small": (5, 200, 300, 2.0, {"downsample_mode": "4x"}),
    "not cut": (4, 500, 900, 2.0, {"max_slice_nums": 1}),
    "cut in up to 3": (4, 900, 900, 2.0, {"max_slice_nums": 3}),
    "29.97": (100, 60, 80, 30000 / 1001, {}),
    "less than a second": (7, 60, 80, 10.0, {}),
    "slower than a frame a second": (5, 60, 80, 0.4, {}),
    "stack 2": (22, 200, 300, 4.0, {"stack_frames": 2}),
    "stack 2, portrait": (9, 300, 200, 4.0, {"stack_frames": 2}),
    "stack 2, square": (9, 120, 120, 4.0, {"stack_frames": 2}),
    "stack 3": (22, 240, 320, 8.0, {"stack_frames": 3}),
    "stack 3, portrait": (22, 320, 240, 8.0, {"stack_frames": 3}),
    "stack 4": (40, 240, 320, 12.5, {"stack_frames": 4}),
    "stack 4, strip": (20, 60, 400, 12.5, {"stack_frames": 4}),
    "stack 5": (40, 240, 320, 12.5, {"stack_frames": 5}),
    "stack 5, faster than the frames": (4, 100, 130, 2.0, {"stack_frames": 5}),
    "stack 6": (20, 50, 60, 12.5, {"stack_frames": 6}),
    "stack 3 in 4x": (9, 500, 640, 6.0, {"stack_frames": 3, "downsample_mode": "4x"}),
    "long": (300, 24, 32, 2.0, {}),
    "long, few frames": (300, 24, 32, 10.0, {"max_num_frames": 16}),
    "long, one frame": (60, 24, 32, 10.0, {"max_num_frames": 1}),
    "long, slow": (40, 24, 32, 0.25, {"max_num_frames": 64}),
    "long, stack 3": (300, 24, 32, 10.0, {"max_num_frames": 10, "stack_frames": 3}),
    "long, stack 5": (500, 24, 32, 7.3, {"max_num_frames": 33, "stack_frames": 5}),
    "no id": (3, 60, 80, 1.0, {"use_image_id": False}),
}
PAIR = ("4x, small", "stack 2", {"stack_frames": 2})  # two of the videos in one prompt


def frames(number: int, height: int, width: int) -> np.ndarray:
    """uint8 [number, height, width, 3]: slopes, edges and noise, from integer arithmetic alone."""
    t, y, x, c = np.ogrid[:number, :height, :width, :3]
    mixed = (x * 2654435761 + y * 40503 * 65537 + t * 97911 + c * 3163 * 7919 + x * y * 31) & 0xFFFFFFFF
    mixed ^= mixed >> 15
    noise = ((mixed * 2246822519) & 0xFFFFFFFF) >> 24
    slopes = x * (1 + c) + y * (3 - c) + 11 * t
    edges = ((x // 13 + y // 7 + t) % 2) * 255
    kind = (x // 40 + y // 30 + c) % 3
    return np.choose(kind, [noise, slopes % 256, edges]).astype(np.uint8)


def collapse(text: str) -> str:
    """A prompt with each run of placeholders as a number: `<image>{64}</image>`."""
    return re.sub(r"(?:<\|(?:video|image)_pad\|>)+", lambda m: f"{{{len(m[0]) // len('<|video_pad|>')}}}", text)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def patches(packed: np.ndarray, patch: int = 14) -> np.ndarray:
    """The reference's [1, 3, patch, N * patch] -> [N, 3 * patch * patch]."""
    return packed[0].reshape(3, patch, -1, patch).transpose(2, 0, 1, 3).reshape(-1, 3 * patch * patch)


def run(processor, names: list[str], options: dict) -> dict:
    from transformers.video_utils import VideoMetadata

    cases = [CASES[name] for name in names]
    videos = [frames(*case[:3]) for case in cases]
    metadata = [VideoMetadata(total_num_frames=n, fps=fps, duration=n / fps) for n, _, _, fps, _ in cases]
    text = [processor.video_token * len(videos)]
    inputs = processor(text=text, videos=videos, video_metadata=metadata, return_tensors="np", **options)
    made = processor.video_processor(
        videos, video_metadata=metadata, return_tensors="np", **{k: v for k, v in options.items() if k != "use_image_id"}
    )
    assert np.array_equal(made["pixel_values_videos"], inputs["pixel_values_videos"])
    return {
        "videos": names,
        "options": options,
        "input_sha256": [sha256(video) for video in videos],
        "frames": list(made["num_frames_per_video"]),
        "indices": [list(map(int, data.frames_indices)) for data in metadata],
        "grids": np.asarray(made["grids_videos"]).tolist(),
        "target_sizes": inputs["target_sizes_videos"].tolist(),
        "pixels_sha256": sha256(patches(inputs["pixel_values_videos"])),
        "prompt": collapse(processor.tokenizer.decode(inputs["input_ids"][0])),
    }


def main(folder: str) -> None:
    from transformers import AutoTokenizer
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
    from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor
    from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor

    MiniCPMV4_6Processor.check_argument_for_proper_class = lambda self, name, argument: None
    processor = MiniCPMV4_6Processor(
        image_processor=MiniCPMV4_6ImageProcessorPil.from_pretrained(folder),
        video_processor=MiniCPMV4_6VideoProcessor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )
    made = [run(processor, [name], case[4]) for name, case in CASES.items()]
    made.append(run(processor, list(PAIR[:2]), PAIR[2]))
    versions = {name: version(name) for name in ("torch", "torchvision", "transformers", "numpy")}
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in made)
    out = Path(__file__).with_name("video.json")
    out.write_text(f'{{"versions": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n')
    print(f"wrote {out}: {len(made)} cases, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
