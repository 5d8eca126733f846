"""Writes scenes as files: `python -m minicpmv46_jax.scenes OUT --count 500 --held-out`.

OUT gets a PNG file for each picture and a lossless Matroska file (FFV1) for each video. It also gets
`questions.jsonl` for `python -m minicpmv46_jax.evaluate`, with one question for each scene.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
from PIL import Image

from minicpmv46_jax.scenes import KINDS, MIX, Clip, Picture, Scene, Turn, draw, exam_turn


def write(folder: Path, count: int, held_out: bool, kinds: Sequence[str] = tuple(MIX), first: int = 0) -> Path:
    """Writes `count` scenes, of the seeds from `first` on, and returns the path of questions.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    mix = {kind: MIX[kind] for kind in kinds}
    lines = []
    for seed in range(first, first + count):
        scene = draw(seed, held_out, mix)
        turn, think = exam_turn(seed, scene)
        lines.append(json.dumps(_line(folder, f"{seed:06d}", scene, turn, think)))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _line(folder: Path, name: str, scene: Scene, turn: Turn, think: bool) -> dict[str, Any]:
    images, videos = [], []
    for i, medium in enumerate(scene.media):
        file = f"{name}-{i}.{'mkv' if isinstance(medium, Clip) else 'png'}"
        _save(medium, folder / file)
        (videos if isinstance(medium, Clip) else images).append(file)
    line: dict[str, Any] = {"id": name, "group": "thinking" if think else turn.group, "images": images, "videos": videos}
    line |= {"question": turn.question, "answers": [turn.reply]}
    line |= {"tools": [json.loads(tool) for tool in scene.tools]} if scene.tools else {}
    return line | ({"options": {"enable_thinking": True}} if think else {})


def _save(medium: Picture | Clip, path: Path) -> None:
    if isinstance(medium, Picture):
        Image.fromarray(medium.render()).save(path)
        return
    with av.open(path, "w") as file:
        stream = file.add_stream("ffv1", rate=1, width=medium.pictures[0].width, height=medium.pictures[0].height, pix_fmt="bgr0")
        frames = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in medium.render()]
        for frame in [*frames, None]:
            file.mux(stream.encode(frame))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m minicpmv46_jax.scenes", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for pictures and questions.jsonl")
    parser.add_argument("--count", type=int, default=100, help="number of scenes (default: %(default)s)")
    parser.add_argument("--held-out", action="store_true", help="draw from the held-out split, which training never uses")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only scenes of this kind; may be repeated")
    parser.add_argument("--first", type=int, default=0, help="seed of the first scene (default: %(default)s)")
    args = parser.parse_args(arguments)
    print(write(args.out, args.count, args.held_out, args.kind or tuple(MIX), args.first))
    return 0


if __name__ == "__main__":
    sys.exit(main())
