"""Scenes that the project draws itself, with questions whose answers are known: what the demo model is trained and tested on.

    scene = draw(7)                       # of training; the same seed, the same scene
    scene = draw(7, held_out=True)        # of the split that training never sees
    dialogue = messages(scene, scene.turns[:1])   # for `processing.Processor`

- picture.py: marks, and how they are drawn. scene.py: scenes, turns, the split, messages.
- shapes.py, reading.py, several.py, calls.py: the kinds. words.py: what is printed.

The split is by hash: a held-out scene, and every word printed in one, is in no scene of training whatever the seeds.
"""

import random
from collections.abc import Callable, Mapping

from minicpmv46_jax.scenes.calls import call_scene, talk_scene
from minicpmv46_jax.scenes.picture import Clip, Picture
from minicpmv46_jax.scenes.reading import letters_scene, lines_scene, signs_scene, small_print_scene, table_scene, word_scene
from minicpmv46_jax.scenes.scene import Scene, Turn, exam_turn, messages
from minicpmv46_jax.scenes.several import clip_scene, pair_scene
from minicpmv46_jax.scenes.shapes import shape_scene

__all__ = ["EASY", "KINDS", "MIX", "Clip", "Picture", "Scene", "Turn", "draw", "exam_turn", "messages"]

KINDS: dict[str, Callable[[random.Random, bool], Scene]] = {
    "shapes": lambda rng, held_out: shape_scene(rng),
    "shape": lambda rng, held_out: shape_scene(rng, (1, 1, 2)),
    "word": word_scene,
    "letters": letters_scene,
    "lines": lines_scene,
    "signs": signs_scene,
    "table": table_scene,
    "small print": small_print_scene,
    "pair": pair_scene,
    "clip": clip_scene,
    "calls": call_scene,
    "talk": talk_scene,
}
# How often each kind is drawn. Reading is the hard part; a large picture or a video costs as much as four to seven small ones.
MIX: dict[str, float] = {
    "shapes": 0.24,
    "letters": 0.07,
    "lines": 0.2,
    "signs": 0.08,
    "table": 0.07,
    "small print": 0.09,
    "pair": 0.11,
    "clip": 0.09,
    "calls": 0.04,
    "talk": 0.01,
}
EASY: dict[str, float] = {"shape": 0.35, "word": 0.45, "letters": 0.2}  # what training begins with


def draw(seed: int | str, held_out: bool = False, mix: Mapping[str, float] = MIX) -> Scene:
    """Plans a scene; its pictures are drawn by `messages` or their own `render`.

    Args:
      seed: the same gives the same scene, on any machine.
      held_out: of the split for tests, which training never sees.
      mix: kinds and how often each is drawn.
    """
    rng = random.Random(f"{'held out' if held_out else 'training'} {seed}")
    kind = rng.choices(list(mix), list(mix.values()))[0]
    while True:
        scene = KINDS[kind](rng, held_out)
        if scene.held_out == held_out or not scene.media:
            return scene
