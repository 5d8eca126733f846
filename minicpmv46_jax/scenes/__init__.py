"""Synthetic scenes with questions whose answers are known: the training and test data of the demo model.

    scene = draw(7)                       # a training scene; the same seed gives the same scene
    scene = draw(7, held_out=True)        # a scene of the held-out split
    dialogue = messages(scene, scene.turns[:1])   # for `processing.Processor`

- picture.py: marks and their rendering. scene.py: scenes, turns, the split and messages.
- shapes.py, reading.py, several.py, calls.py: the kinds of scenes. words.py: random words and numbers.

The split is by hash. A held-out scene, and a held-out word in any scene, never occurs in training, whatever
the seed.
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
# Each kind's share. Reading is hard, so its share is large; large pictures and videos are costly, so theirs
# is small.
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
EASY: dict[str, float] = {"shape": 0.35, "word": 0.45, "letters": 0.2}  # for the start of training


def draw(seed: int | str, held_out: bool = False, mix: Mapping[str, float] = MIX) -> Scene:
    """Returns a random scene. `messages` or the `render` of its media draws the pixels.

    Args:
      seed: seed of the scene; it gives the same scene on every machine.
      held_out: True for a scene of the held-out split, which training never uses.
      mix: kinds of scenes and their shares.
    """
    rng = random.Random(f"{'held out' if held_out else 'training'} {seed}")
    kind = rng.choices(list(mix), list(mix.values()))[0]
    while True:
        scene = KINDS[kind](rng, held_out)
        if scene.held_out == held_out or not scene.media:
            return scene
