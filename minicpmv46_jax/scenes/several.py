"""Scenes with two pictures, and videos: what differs, and what moves."""

import random

from minicpmv46_jax.scenes.picture import COLOURS, SHAPES, Clip, Picture, Shape, Text, text_width
from minicpmv46_jax.scenes.scene import Scene, Turn, article, listed, sentence
from minicpmv46_jax.scenes.shapes import light_ground, place_shape, scatter
from minicpmv46_jax.scenes.words import word

ORDINALS = ("first", "second")
SIDE = 224
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # steps over (rows, columns) of the 3 x 3 grid


def pair_scene(rng: random.Random, held_out: bool) -> Scene:
    """Returns two pictures of shapes, or of one word each."""
    return rng.choice((_changed, _changed, _unlike, _worded))(rng, held_out)


def _changed(rng: random.Random, held_out: bool) -> Scene:
    """Returns a picture and a changed copy: a shape added, removed or recoloured, or no change."""
    del held_out  # no words
    shapes = scatter(rng, rng.randint(1, 4), SIDE, SIDE)
    change = rng.choice(("added", "removed", "recoloured", "same"))
    after, what = list(shapes), "Nothing."
    if change == "added":
        new = place_shape(rng, _free_cell(rng, shapes), SIDE, SIDE)
        after, what = [*shapes, new], f"{sentence(article(new.name))[:-1]} was added."
    elif change == "removed" and len(shapes) > 1:
        gone = rng.choice(shapes)
        after, what = [s for s in shapes if s is not gone], f"{sentence(article(gone.name))[:-1]} is gone."
    elif change == "recoloured":
        i = rng.randrange(len(shapes))
        colour = rng.choice([c for c in COLOURS if c != shapes[i].colour])
        after[i], what = shapes[i]._replace(colour=colour), f"The {shapes[i].name} became {colour}."
    turns = [
        Turn("two images", rng.choice(("What changed?", "What is different in the second picture?")), what),
        Turn("two images", "Are the two pictures the same?", "Yes." if after == shapes else "No."),
    ]
    return Scene("pair", _pictures(rng, shapes, after), (*turns, *_comparing(rng, shapes, after)))


def _unlike(rng: random.Random, held_out: bool) -> Scene:
    del held_out
    a, b = (scatter(rng, rng.randint(1, 4), SIDE, SIDE) for _ in range(2))
    turns = _comparing(rng, a, b)
    for which, shapes in zip(ORDINALS, (a, b), strict=True):
        names = listed(shape.name for shape in shapes)
        turns.append(Turn("two images", f"What is in the {which} picture?", sentence(names)))
    return Scene("pair", _pictures(rng, a, b), tuple(turns))


def _comparing(rng: random.Random, a: list[Shape], b: list[Shape]) -> list[Turn]:
    turns = []
    if len(a) != len(b):
        more = rng.choice(("more", "fewer"))
        which = ORDINALS[(len(b) > len(a)) == (more == "more")]
        thought = f"The first has {len(a)}, the second has {len(b)}."
        turns.append(Turn("two images", f"Which picture has {more} shapes?", f"The {which}.", thought))
    only = [
        (shape.name, i)
        for i, (own, other) in enumerate(((a, b), (b, a)))
        for shape in own
        if shape.name not in {s.name for s in other}
    ]
    if only:
        name, i = rng.choice(only)
        turns.append(Turn("two images", f"Which picture shows {article(name)}?", f"The {ORDINALS[i]}."))
    return turns


def _worded(rng: random.Random, held_out: bool) -> Scene:
    words = [word(rng, held_out, 2, 6) for _ in range(2)]
    if rng.random() < 0.25:
        words[1] = words[0]
    same = Turn("two images", "Do both pictures say the same?", "Yes." if words[0] == words[1] else "No.")
    turns = [Turn("two images", f"What does the {which} picture say?", text) for which, text in zip(ORDINALS, words, strict=True)]
    if words[0] != words[1]:
        i = rng.randrange(2)
        turns.append(Turn("two images", f"Which picture says {words[i]}?", f"The {ORDINALS[i]}."))
    pictures = tuple(Picture(SIDE, SIDE, light_ground(rng), (printed_word(rng, text),)) for text in words)
    return Scene("pair", pictures, (*turns, same))


def printed_word(rng: random.Random, text: str) -> Text:
    size = rng.randint(26, 44)
    while text_width(text, size) > SIDE - 16:
        size -= 2
    half = text_width(text, size) // 2 + 4
    colour = COLOURS[rng.choice(("red", "green", "blue", "purple", "black"))]
    return Text(text, colour, rng.randint(half, SIDE - half), rng.randint(size, SIDE - size), size)


def _pictures(rng: random.Random, *shapes: list[Shape]) -> tuple[Picture, ...]:
    ground = light_ground(rng)
    return tuple(Picture(SIDE, SIDE, ground, tuple(own)) for own in shapes)


def _free_cell(rng: random.Random, shapes: list[Shape]) -> int:
    taken = {s.y * 3 // SIDE * 3 + s.x * 3 // SIDE for s in shapes}
    return rng.choice([cell for cell in range(9) if cell not in taken])


def clip_scene(rng: random.Random, held_out: bool) -> Scene:
    """Returns a video of three or four seconds with one to three shapes.

    One shape moves, appears or vanishes, or nothing happens.
    """
    del held_out
    frames = rng.choice((3, 3, 4))
    direction = rng.choice(list(DIRECTIONS))
    rows, columns = DIRECTIONS[direction]
    lane = rng.randrange(3)
    path = [(1 + rows * step, lane) if rows else (lane, 1 + columns * step) for step in (-1, 0, 1)]
    names = rng.sample([(colour, kind) for colour in COLOURS for kind in SHAPES], rng.randint(1, 3))
    off_path = [cell for cell in range(9) if divmod(cell, 3) not in path]
    still = [
        place_shape(rng, cell, SIDE, SIDE, name)
        for cell, name in zip(rng.sample(off_path, len(names) - 1), names[1:], strict=True)
    ]
    start, end = (place_shape(rng, row * 3 + column, SIDE, SIDE, names[0]) for row, column in (path[0], path[-1]))
    radius = min(start.radius, end.radius)
    moving = [_between(start, end, i / (frames - 1))._replace(radius=radius) for i in range(frames)]
    what = rng.choice(("moves", "moves", "moves", "rests", "comes", "goes"))
    shown = {
        "moves": moving,
        "rests": moving[:1] * frames,
        "comes": [None, *moving[-1:] * (frames - 1)],
        "goes": [*moving[:1] * (frames - 1), None],
    }[what]
    name = moving[0].name
    turns = [Turn("video", rng.choice(("What happens?", "What happens in the video?")), _clip_answer(what, name, direction))]
    if what == "moves":
        turns.append(Turn("video", "What moves?", f"The {name}."))
        turns.append(
            Turn("video", rng.choice((f"Where does the {name} move?", f"Which way does the {name} go?")), _way(direction))
        )
    elif what == "rests":
        turns.append(Turn("video", "What moves?", "Nothing."))
    shapes = [*still, moving[0]]
    if what in ("moves", "rests"):
        turns.append(Turn("video", "How many shapes are there?", str(len(shapes))))
    ground = light_ground(rng)
    pictures = (Picture(SIDE, SIDE, ground, tuple(still + ([shape] if shape else []))) for shape in shown)
    return Scene("clip", (Clip(tuple(pictures)),), tuple(turns))


def _clip_answer(what: str, name: str, direction: str) -> str:
    return {
        "moves": f"The {name} moves {direction}.",
        "rests": "Nothing moves.",
        "comes": f"The {name} appears.",
        "goes": f"The {name} vanishes.",
    }[what]


def _way(direction: str) -> str:
    return f"To the {direction}." if direction in ("left", "right") else sentence(direction)


def _between(a: Shape, b: Shape, part: float) -> Shape:
    return a._replace(x=round(a.x + (b.x - a.x) * part), y=round(a.y + (b.y - a.y) * part))
