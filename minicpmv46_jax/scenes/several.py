"""Two pictures side by side, and videos: what is the same, what differs, what moved where."""

import random

from minicpmv46_jax.scenes.picture import COLOURS, SHAPES, Clip, Picture, Shape, Text, text_width
from minicpmv46_jax.scenes.scene import Scene, Turn, article, listed, sentence
from minicpmv46_jax.scenes.shapes import light_ground, place, scatter
from minicpmv46_jax.scenes.words import word

ORDINALS = ("first", "second")
SIDE = 224
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # steps over (rows, columns) of the 3 x 3 grid


def pair_scene(dice: random.Random, held_out: bool) -> Scene:
    """Two pictures of shapes, or of a word each."""
    return dice.choice((_changed, _changed, _unlike, _worded))(dice, held_out)


def _changed(dice: random.Random, held_out: bool) -> Scene:
    """The second is the first with a shape more, a shape less, another colour, or no change at all."""
    del held_out  # no words
    shapes = scatter(dice, dice.randint(1, 4), SIDE, SIDE)
    change = dice.choice(("added", "removed", "recoloured", "same"))
    after, what = list(shapes), "Nothing."
    if change == "added":
        new = place(dice, _free_cell(dice, shapes), SIDE, SIDE)
        after, what = [*shapes, new], f"{sentence(article(new.name))[:-1]} was added."
    elif change == "removed" and len(shapes) > 1:
        gone = dice.choice(shapes)
        after, what = [s for s in shapes if s is not gone], f"{sentence(article(gone.name))[:-1]} is gone."
    elif change == "recoloured":
        i = dice.randrange(len(shapes))
        colour = dice.choice([c for c in COLOURS if c != shapes[i].colour])
        after[i], what = shapes[i]._replace(colour=colour), f"The {shapes[i].name} became {colour}."
    turns = [
        Turn("two images", dice.choice(("What changed?", "What is different in the second picture?")), what),
        Turn("two images", "Are the two pictures the same?", "Yes." if after == shapes else "No."),
    ]
    return Scene("pair", _pictures(dice, shapes, after), (*turns, *_comparing(dice, shapes, after)))


def _unlike(dice: random.Random, held_out: bool) -> Scene:
    del held_out
    a, b = (scatter(dice, dice.randint(1, 4), SIDE, SIDE) for _ in range(2))
    turns = _comparing(dice, a, b)
    for which, shapes in zip(ORDINALS, (a, b), strict=True):
        names = listed(shape.name for shape in shapes)
        turns.append(Turn("two images", f"What is in the {which} picture?", sentence(names)))
    return Scene("pair", _pictures(dice, a, b), tuple(turns))


def _comparing(dice: random.Random, a: list[Shape], b: list[Shape]) -> list[Turn]:
    turns = []
    if len(a) != len(b):
        more = dice.choice(("more", "fewer"))
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
        name, i = dice.choice(only)
        turns.append(Turn("two images", f"Which picture shows {article(name)}?", f"The {ORDINALS[i]}."))
    return turns


def _worded(dice: random.Random, held_out: bool) -> Scene:
    words = [word(dice, held_out, 2, 6) for _ in range(2)]
    if dice.random() < 0.25:
        words[1] = words[0]
    same = Turn("two images", "Do both pictures say the same?", "Yes." if words[0] == words[1] else "No.")
    turns = [Turn("two images", f"What does the {which} picture say?", text) for which, text in zip(ORDINALS, words, strict=True)]
    if words[0] != words[1]:
        i = dice.randrange(2)
        turns.append(Turn("two images", f"Which picture says {words[i]}?", f"The {ORDINALS[i]}."))
    pictures = tuple(Picture(SIDE, SIDE, light_ground(dice), (_printed(dice, text),)) for text in words)
    return Scene("pair", pictures, (*turns, same))


def _printed(dice: random.Random, text: str) -> Text:
    size = dice.randint(26, 44)
    while text_width(text, size) > SIDE - 16:
        size -= 2
    half = text_width(text, size) // 2 + 4
    colour = COLOURS[dice.choice(("red", "green", "blue", "purple", "black"))]
    return Text(text, colour, dice.randint(half, SIDE - half), dice.randint(size, SIDE - size), size)


def _pictures(dice: random.Random, *shapes: list[Shape]) -> tuple[Picture, ...]:
    ground = light_ground(dice)
    return tuple(Picture(SIDE, SIDE, ground, tuple(own)) for own in shapes)


def _free_cell(dice: random.Random, shapes: list[Shape]) -> int:
    taken = {s.y * 3 // SIDE * 3 + s.x * 3 // SIDE for s in shapes}
    return dice.choice([cell for cell in range(9) if cell not in taken])


def clip_scene(dice: random.Random, held_out: bool) -> Scene:
    """Three or four seconds in which one shape of one to three moves a way, or comes, or goes, or nothing happens."""
    del held_out
    frames = dice.choice((3, 3, 4))
    direction = dice.choice(list(DIRECTIONS))
    rows, columns = DIRECTIONS[direction]
    lane = dice.randrange(3)
    path = [(1 + rows * step, lane) if rows else (lane, 1 + columns * step) for step in (-1, 0, 1)]
    names = dice.sample([(colour, kind) for colour in COLOURS for kind in SHAPES], dice.randint(1, 3))
    off_path = [cell for cell in range(9) if divmod(cell, 3) not in path]
    still = [
        place(dice, cell, SIDE, SIDE, name) for cell, name in zip(dice.sample(off_path, len(names) - 1), names[1:], strict=True)
    ]
    ends = [place(dice, row * 3 + column, SIDE, SIDE, names[0]) for row, column in (path[0], path[-1])]
    radius = min(end.radius for end in ends)
    moving = [_between(*ends, i / (frames - 1))._replace(radius=radius) for i in range(frames)]
    what = dice.choice(("moves", "moves", "moves", "rests", "comes", "goes"))
    shown = {
        "moves": moving,
        "rests": moving[:1] * frames,
        "comes": [None, *moving[-1:] * (frames - 1)],
        "goes": [*moving[:1] * (frames - 1), None],
    }[what]
    name = moving[0].name
    turns = [Turn("video", dice.choice(("What happens?", "What happens in the video?")), _told(what, name, direction))]
    if what == "moves":
        turns.append(Turn("video", "What moves?", f"The {name}."))
        turns.append(
            Turn("video", dice.choice((f"Where does the {name} move?", f"Which way does the {name} go?")), _way(direction))
        )
    elif what == "rests":
        turns.append(Turn("video", "What moves?", "Nothing."))
    shapes = [*still, moving[0]]
    if what in ("moves", "rests"):
        turns.append(Turn("video", "How many shapes are there?", str(len(shapes))))
    ground = light_ground(dice)
    pictures = (Picture(SIDE, SIDE, ground, tuple(still + ([shape] if shape else []))) for shape in shown)
    return Scene("clip", (Clip(tuple(pictures)),), tuple(turns))


def _told(what: str, name: str, direction: str) -> str:
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
