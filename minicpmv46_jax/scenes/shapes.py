"""Scenes of shapes on a plain background: kinds, colours, places, counts and relations."""

import random
from collections.abc import Sequence

from minicpmv46_jax.scenes.picture import COLOURS, SHAPES, Colour, Picture, Shape
from minicpmv46_jax.scenes.scene import Scene, Turn, article, listed, sentence

CELLS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
SIZES = ((224, 224), (224, 224), (280, 168), (168, 280))  # (width, height); each is one view without resizing
NUMBERS = (1, 1, 2, 2, 3, 3, 4, 5, 6, 7)
LARGER = 0.1  # share of pictures that are resized to a view
PLURALS = {"cross": "crosses"}


def shape_scene(rng: random.Random, numbers: Sequence[int] = NUMBERS) -> Scene:
    """Returns a picture with a number of shapes drawn from `numbers`, and questions about it."""
    width, height = rng.choice(SIZES)
    shapes = scatter(rng, rng.choice(numbers), width, height)
    picture = Picture(width, height, light_ground(rng), tuple(shapes))
    return Scene("shapes", (sometimes_larger(rng, picture),), tuple(questions(rng, shapes, width, height)))


def sometimes_larger(rng: random.Random, picture: Picture) -> Picture:
    """Returns the picture, or now and then a scaled one.

    A scaled picture is resized and often sliced, across whatever lies on the cuts.
    """
    return picture.zoomed(rng.uniform(0.6, 3.5)) if rng.random() < LARGER else picture


def light_ground(rng: random.Random) -> Colour:
    """Returns white or a light colour, on which every colour has contrast."""
    if rng.random() < 0.4:
        return 255, 255, 255
    return rng.randint(222, 255), rng.randint(222, 255), rng.randint(222, 255)


def scatter(rng: random.Random, number: int, width: int, height: int) -> list[Shape]:
    """Returns shapes in different cells of a 3 x 3 grid, in reading order."""
    return [place_shape(rng, cell, width, height) for cell in sorted(rng.sample(range(9), number))]


def place_shape(rng: random.Random, cell: int, width: int, height: int, name: tuple[str, str] | None = None) -> Shape:
    """Returns a shape inside a cell; `name` is its (colour, kind), random if None."""
    colour, kind = name or (rng.choice(list(COLOURS)), rng.choice(SHAPES))
    row, column = divmod(cell, 3)
    room = min(width, height) // 6
    radius = rng.randint(room // 2, room - 4)
    x, y = (2 * column + 1) * width // 6, (2 * row + 1) * height // 6
    loose_x, loose_y = (side // 6 - radius for side in (width, height))
    return Shape(kind, colour, x + rng.randint(-loose_x, loose_x), y + rng.randint(-loose_y, loose_y), radius)


def cell_of(shape: Shape, width: int, height: int) -> int:
    """Returns the number of the shape's cell in the 3 x 3 grid."""
    return shape.y * 3 // height * 3 + shape.x * 3 // width


def questions(rng: random.Random, shapes: list[Shape], width: int, height: int) -> list[Turn]:
    """Returns questions of every kind, about shapes whose names are unambiguous."""
    cells = {shape: cell_of(shape, width, height) for shape in shapes}
    sole = [shape for shape in shapes if sum(other.name == shape.name for other in shapes) == 1]
    turns = [_describe(rng, shapes), _count_all(rng, shapes), _count_kind(rng, shapes), _count_colour(rng, shapes)]
    turns += [_is_there(rng, shapes), _at(rng, cells)]
    turns += _what(rng, shapes) + _colour(rng, shapes)
    if sole:
        turns.append(_where(rng, rng.choice(sole), cells))
    if len(sole) > 1:
        first, second = rng.sample(sole, 2)
        turns += _relations(rng, first, second, cells)
    return turns


def plural(kind: str) -> str:
    """Returns a kind's plural, for example "crosses"."""
    return PLURALS.get(kind, f"{kind}s")


def _describe(rng: random.Random, shapes: list[Shape]) -> Turn:
    question = rng.choice(("What do you see?", "Describe the picture.", "What is in the picture?"))
    return Turn("what", question, sentence(listed(shape.name for shape in shapes)))


def _what(rng: random.Random, shapes: list[Shape]) -> list[Turn]:
    colour = rng.choice(shapes).colour
    kinds = [shape.kind for shape in shapes if shape.colour == colour]
    if len(kinds) > 1:
        return []
    return [
        Turn("what", rng.choice((f"Which shape is {colour}?", f"What shape is the {colour} one?")), sentence(f"a {kinds[0]}"))
    ]


def _colour(rng: random.Random, shapes: list[Shape]) -> list[Turn]:
    kind = rng.choice(shapes).kind
    colours = [shape.colour for shape in shapes if shape.kind == kind]
    if len(colours) > 1:
        return []
    question = rng.choice((f"What colour is the {kind}?", f"Which colour does the {kind} have?"))
    return [Turn("colour", question, sentence(colours[0]))]


def _where(rng: random.Random, shape: Shape, cells: dict[Shape, int]) -> Turn:
    question = rng.choice((f"Where is the {shape.name}?", f"In which part of the picture is the {shape.name}?"))
    return Turn("where", question, sentence(CELLS[cells[shape]]))


def _at(rng: random.Random, cells: dict[Shape, int]) -> Turn:
    cell = rng.choice([*cells.values(), rng.randrange(9)])
    found = [shape.name for shape, own in cells.items() if own == cell]
    question = rng.choice((f"What is at the {CELLS[cell]}?", f"Which shape is at the {CELLS[cell]}?"))
    return Turn("where", question, sentence(article(found[0]) if found else "nothing"))


def _counted(shapes: list[Shape], number: int) -> str:
    return f"I see {listed(shape.name for shape in shapes)}. That makes {number}." if shapes else "I see none."


def _count_all(rng: random.Random, shapes: list[Shape]) -> Turn:
    question = rng.choice(("How many shapes are there?", "Count the shapes."))
    return Turn("count", question, str(len(shapes)), _counted(shapes, len(shapes)))


def _count_kind(rng: random.Random, shapes: list[Shape]) -> Turn:
    kind = rng.choice([*(shape.kind for shape in shapes), rng.choice(SHAPES)])
    found = [shape for shape in shapes if shape.kind == kind]
    question = rng.choice((f"How many {plural(kind)} are there?", f"Count the {plural(kind)}."))
    return Turn("count", question, str(len(found)), _counted(found, len(found)))


def _count_colour(rng: random.Random, shapes: list[Shape]) -> Turn:
    colour = rng.choice([*(shape.colour for shape in shapes), rng.choice(list(COLOURS))])
    found = [shape for shape in shapes if shape.colour == colour]
    question = rng.choice((f"How many shapes are {colour}?", f"How many {colour} shapes are there?"))
    return Turn("count", question, str(len(found)), _counted(found, len(found)))


def _is_there(rng: random.Random, shapes: list[Shape]) -> Turn:
    names = [shape.name for shape in shapes]
    other = f"{rng.choice(shapes).colour} {rng.choice(shapes).kind}", f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
    name = rng.choice((rng.choice(names), *other))
    question = rng.choice((f"Is there {article(name)}?", f"Do you see {article(name)}?"))
    return Turn("what", question, "Yes." if name in names else "No.")


def _relations(rng: random.Random, a: Shape, b: Shape, cells: dict[Shape, int]) -> list[Turn]:
    """Returns questions about the shapes' positions and sizes, only where the answer is clear."""
    (a_row, a_column), (b_row, b_column) = (divmod(cells[shape], 3) for shape in (a, b))
    lies = f"The {a.name} is at the {CELLS[cells[a]]}, the {b.name} at the {CELLS[cells[b]]}."
    turns = []
    if a_column != b_column:
        side = rng.choice(("left", "right"))
        question = f"Is the {a.name} {side} of the {b.name}?"
        turns.append(Turn("relation", question, "Yes." if (a_column < b_column) == (side == "left") else "No.", lies))
    if a_row != b_row:
        side = rng.choice(("above", "below"))
        question = f"Is the {a.name} {side} the {b.name}?"
        turns.append(Turn("relation", question, "Yes." if (a_row < b_row) == (side == "above") else "No.", lies))
        higher = rng.choice(("higher", "lower"))
        upper = a if (a_row < b_row) == (higher == "higher") else b
        turns.append(Turn("relation", f"Which is {higher}, the {a.name} or the {b.name}?", f"The {upper.name}.", lies))
    if max(a.radius, b.radius) >= 1.3 * min(a.radius, b.radius):
        size = rng.choice(("larger", "smaller"))
        found = a if (a.radius > b.radius) == (size == "larger") else b
        turns.append(Turn("relation", f"Which is {size}, the {a.name} or the {b.name}?", f"The {found.name}."))
    return turns
