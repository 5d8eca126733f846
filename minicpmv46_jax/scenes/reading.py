"""Scenes with text: letters, lines, coloured words and signs, tables, and small print in large pictures."""

import random
import string

from minicpmv46_jax.scenes.picture import COLOURS, INK, SHAPES, Colour, Mark, Picture, Rule, Shape, Text, text_width
from minicpmv46_jax.scenes.scene import Scene, Turn, article, sentence
from minicpmv46_jax.scenes.shapes import CELLS, SIZES, light_ground, sometimes_larger
from minicpmv46_jax.scenes.words import number, word

READABLE = (28, 56)  # font sizes that are legible in a picture of one view
LARGE = ((448, 336), (336, 448), (448, 448), (672, 448), (448, 672))  # (width, height); each is cut into four to six slices
SMALL_PRINT = (26, 40)  # font sizes in a large picture; the overview halves them at least, the slices do not
Box = tuple[int, int, int, int]  # left, top, right, bottom
PLACES = ("top", "middle", "bottom")
DARK = ("red", "green", "blue", "purple", "black")  # text colours with contrast on a light background
FILLED = ("red", "green", "blue", "purple", "black")  # shape colours with contrast to white text


def letters_scene(rng: random.Random, held_out: bool) -> Scene:
    """Returns three to nine letters and digits, each in its own cell of the grid."""
    del held_out  # letters are in both splits
    width, height = rng.choice(SIZES)
    cells = sorted(rng.sample(range(9), rng.randint(3, 9)))
    signs = rng.choices(string.ascii_uppercase + string.digits, k=len(cells))
    size = rng.randint(26, 52)
    marks = tuple(
        _placed_text(rng, sign, COLOURS[rng.choice(DARK)], _cell_box(cell, 3, 3, width, height), size)
        for cell, sign in zip(cells, signs, strict=True)
    )
    turns = [Turn("letters", "Read the letters.", " ".join(signs))]
    for cell, sign in rng.sample(list(zip(cells, signs, strict=True)), min(4, len(cells))):
        turns.append(Turn("letters", f"Which letter is at the {CELLS[cell]}?", sign))
    cell, sign = rng.choice(list(zip(cells, signs, strict=True)))
    if signs.count(sign) == 1:
        turns.append(Turn("letters", f"Where is the letter {sign}?", sentence(CELLS[cell])))
    turns.append(Turn("count", "How many letters are there?", str(len(signs))))
    return Scene("letters", (Picture(width, height, light_ground(rng), marks),), tuple(turns))


def lines_scene(rng: random.Random, held_out: bool) -> Scene:
    """Returns one to three lines of one or two words or numbers."""
    width, height = rng.choice(SIZES)
    size = rng.randint(*READABLE)
    lines: list[str] = []
    for _ in range(rng.randint(1, min(3, height * 2 // (size * 3)))):
        line = _line(rng, held_out, width - 16, size)
        lines += [line] if line else []
    lines = lines or [word(rng, held_out, 2, 4)]
    ground, ink = _contrast(rng)
    step = height // len(lines)
    marks = tuple(_placed_text(rng, line, ink, (8, i * step, width - 8, (i + 1) * step), size) for i, line in enumerate(lines))
    picture = Picture(width, height, ground, marks)
    return Scene("lines", (sometimes_larger(rng, picture),), tuple(_line_questions(rng, lines)))


def _line(rng: random.Random, held_out: bool, width: int, size: int) -> str:
    """Returns one or two words or numbers that fit the width; "" if none fits."""
    line = ""
    for _ in range(rng.choice((1, 1, 1, 2))):
        longer = f"{line} {_word_or_number(rng, held_out)}".strip()
        line = longer if text_width(longer, size) <= width else line
    return line


def _word_or_number(rng: random.Random, held_out: bool) -> str:
    return number(rng, held_out) if rng.random() < 0.2 else word(rng, held_out)


def _line_questions(rng: random.Random, lines: list[str]) -> list[Turn]:
    asked = ("What does it say?", "Read the text.", "What is written here?", "Which words are in the picture?")
    turns = [Turn("read", rng.choice(asked), "\n".join(lines))]
    words = " ".join(lines).split()
    if len(words) > 1:
        which, found = rng.choice((("first", words[0]), ("last", words[-1])))
        turns.append(Turn("read", f"What is the {which} word?", found))
    if len(lines) > 1:
        which, found = rng.choice((("first", lines[0]), ("last", lines[-1]), ("second", lines[1])))
        turns.append(Turn("read", f"Read the {which} line.", found))
        turns.append(Turn("count", "How many lines are there?", str(len(lines))))
    return turns


def word_scene(rng: random.Random, held_out: bool) -> Scene:
    """Returns one large word of one to four letters."""
    width, height = rng.choice(SIZES)
    text = rng.choice(string.ascii_uppercase + string.digits) if rng.random() < 0.3 else word(rng, held_out, 2, 4)
    mark = _placed_text(rng, text, COLOURS[rng.choice(DARK)], (4, 4, width - 4, height - 4), rng.randint(36, 64))
    question = "Which letter is this?" if len(text) == 1 else "What does it say?"
    return Scene("word", (Picture(width, height, light_ground(rng), (mark,)),), (Turn("read", question, text),))


def signs_scene(rng: random.Random, held_out: bool) -> Scene:
    """Returns two or three words, each in its own colour or on a sign of its own colour."""
    width, height = 224, 224
    number_of = rng.choice((2, 2, 3))
    colours, on_shapes = rng.sample(DARK, number_of), rng.random() < 0.5
    marks: list[Mark] = []
    turns, seen = [], []
    for band, colour in zip(sorted(rng.sample(range(3), number_of)), colours, strict=True):
        text, size = word(rng, held_out, 2, 4 if on_shapes else 6), rng.randint(24, 34)
        box = (8, band * 74, width - 8, band * 74 + 74)
        if on_shapes:
            mark = _placed_text(rng, text, (255, 255, 255), (30, *box[1:2], width - 30, box[3]), min(size, 26))
            marks += _sign(mark, colour)
            question = f"What is written on the {colour} sign?"
        else:
            mark = _placed_text(rng, text, COLOURS[colour], box, size)
            question = f"What does the {colour} word say?"
        marks.append(mark)
        seen.append(text)
        turns.append(Turn("read", question, text))
        turns.append(
            Turn("colour", f"What colour is the {'sign' if on_shapes else 'word'} at the {PLACES[band]}?", sentence(colour))
        )
        turns.append(Turn("read", f"What is written at the {PLACES[band]}?", text))
    turns.insert(0, Turn("read", "What does it say?", "\n".join(seen)))
    return Scene("signs", (Picture(width, height, light_ground(rng), tuple(marks)),), tuple(turns))


def _sign(text: Text, colour: str) -> list[Rule]:
    """Returns a filled bar behind a line of text, as horizontal rules."""
    half = text_width(text.text, text.size) // 2 + 8
    rows = range(text.y - text.size * 2 // 3, text.y + text.size * 2 // 3, 2)
    return [Rule(text.x - half, y, text.x + half, y, COLOURS[colour]) for y in rows]


def table_scene(rng: random.Random, held_out: bool) -> Scene:
    """Returns a ruled table of two to four rows, each with a name and a number."""
    width, height, size = 224, 224, rng.randint(24, 30)
    rows = rng.randint(2, 4)
    names = _distinct(lambda: word(rng, held_out, 2, 5), rows)
    values = _distinct(lambda: str(rng.randint(1, 999)), rows)
    step, top = height // rows, rng.randint(0, 8)
    ground = light_ground(rng)
    marks: list[Mark] = [Rule(140, 4, 140, height - 4, INK)]
    marks += [Rule(4, i * step, width - 4, i * step, INK) for i in range(1, rows)]
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        y = i * step + step // 2 + top - 4
        marks += [Text(name, "", 72, y, size)._replace(colour=INK), Text(value, "", 182, y, size)._replace(colour=INK)]
    pick = rng.randrange(rows)
    most = max(range(rows), key=lambda i: int(values[i]))
    turns = [
        Turn("table", "Read the table.", "\n".join(f"{n}: {v}" for n, v in zip(names, values, strict=True))),
        Turn("table", rng.choice((f"How much is {names[pick]}?", f"What is the number of {names[pick]}?")), values[pick]),
        Turn("table", f"Which name has the number {values[pick]}?", names[pick]),
        Turn("table", "How many rows does the table have?", str(rows)),
        Turn(
            "table",
            "Which name has the largest number?",
            names[most],
            ", ".join(f"{n} has {v}" for n, v in zip(names, values, strict=True)) + ".",
        ),
    ]
    return Scene("table", (Picture(width, height, ground, tuple(marks)),), tuple(turns))


def small_print_scene(rng: random.Random, held_out: bool) -> Scene:
    """Returns a large picture with words in some slices and shapes in others.

    The words are too small to be legible in the overview.
    """
    width, height = rng.choice(LARGE)
    columns, rows = (3 if side > 448 else 2 for side in (width, height))
    cells = rng.sample(range(columns * rows), rng.randint(2, 4))
    words = {cell: word(rng, held_out, 2, 6) for cell in sorted(cells[: rng.randint(1, min(3, len(cells) - 1))])}
    names = {cell: _slice_name(cell, columns, rows) for cell in cells}
    boxes = {cell: _cell_box(cell, columns, rows, width, height) for cell in cells}
    shapes = {cell: _shape_in(rng, boxes[cell]) for cell in sorted(set(cells) - set(words))}
    marks: list[Shape | Text] = list(shapes.values())
    for cell, text in words.items():
        marks.append(_placed_text(rng, text, COLOURS[rng.choice(DARK)], boxes[cell], rng.randint(*SMALL_PRINT)))
    asked = ("What does it say?", "Read the small print.", "What is written here?")
    turns = [Turn("slices", rng.choice(asked), "\n".join(words.values()))]
    turns += [Turn("slices", f"What is written at the {names[cell]}?", text) for cell, text in words.items()]
    cell = rng.choice(list(shapes))
    turns.append(Turn("where", f"What is at the {names[cell]}?", sentence(article(shapes[cell].name))))
    turns.append(Turn("count", "How many shapes are there?", str(len(shapes))))
    return Scene("small print", (Picture(width, height, light_ground(rng), tuple(marks)),), tuple(turns))


def _slice_name(cell: int, columns: int, rows: int) -> str:
    """Returns the name of the grid cell that holds the slice's middle, for example "bottom left"."""
    row, column = divmod(cell, columns)
    return CELLS[(2 * row + 1) * 3 // (2 * rows) * 3 + (2 * column + 1) * 3 // (2 * columns)]


def _shape_in(rng: random.Random, box: Box) -> Shape:
    left, top, right, bottom = box
    radius = min(right - left, bottom - top) * rng.randint(16, 34) // 100
    colour, kind = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    return Shape(kind, colour, (left + right) // 2, (top + bottom) // 2, radius)


def _cell_box(cell: int, columns: int, rows: int, width: int, height: int) -> Box:
    """Returns (left, top, right, bottom) of a cell of a picture's grid."""
    row, column = divmod(cell, columns)
    return column * width // columns, row * height // rows, (column + 1) * width // columns, (row + 1) * height // rows


def _placed_text(rng: random.Random, text: str, ink: Colour, box: Box, size: int) -> Text:
    """Returns a line of text at a random place in the box, in a smaller size if it would not fit."""
    left, top, right, bottom = box
    while text_width(text, size) > right - left - 4 and size > 12:
        size -= 1
    half_width, half_height = text_width(text, size) // 2 + 2, size // 2 + 2
    x = rng.randint(left + half_width, max(right - half_width, left + half_width))
    y = rng.randint(top + half_height, max(bottom - half_height, top + half_height))
    return Text(text, ink, x, y, size)


def _contrast(rng: random.Random) -> tuple[Colour, Colour]:
    """Returns (background, ink): dark on light, or light on dark."""
    if rng.random() < 0.2:
        return COLOURS[rng.choice(DARK)], (255, 255, 255)
    return light_ground(rng), COLOURS[rng.choice(DARK)]


def _distinct(draw, number_of: int) -> list[str]:
    found: list[str] = []
    while len(found) < number_of:
        text = draw()
        found += [text] if text not in found else []
    return found
