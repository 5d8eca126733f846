"""Pictures as lists of marks, and their rendering with numpy and Pillow.

A scene is a list of marks first and is rendered later, so it can be hashed and compared without pixels. The
repr of media is hashed for the held-out split: names and order of the fields here must not change. Text is
drawn in Pillow's own scalable font, so no font file is needed.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (214, 30, 34),
    "green": (24, 150, 50),
    "blue": (34, 70, 220),
    "yellow": (240, 205, 0),
    "orange": (245, 125, 10),
    "purple": (130, 40, 170),
    "pink": (245, 130, 190),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
INK: Colour = COLOURS["black"]


class Shape(NamedTuple):
    """A filled shape: names of its kind and colour, its centre and its radius in pixels."""

    kind: str
    colour: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        """Colour and kind, for example "red circle"."""
        return f"{self.colour} {self.kind}"


class Text(NamedTuple):
    """A line of text centred on (x, y); `size` is the font size, about 1.4 times the height of a capital."""

    text: str
    colour: Colour
    x: int
    y: int
    size: int


class Rule(NamedTuple):
    """A straight line from (x, y) to (right, bottom)."""

    x: int
    y: int
    right: int
    bottom: int
    colour: Colour


Mark = Shape | Text | Rule


@dataclass(frozen=True)
class Picture:
    """Marks on a plain background (`ground`); later marks lie on top."""

    width: int
    height: int
    ground: Colour
    marks: tuple[Mark, ...]

    def zoomed(self, factor: float) -> "Picture":
        """Returns the picture scaled by `factor`."""
        marks = (
            mark._replace(**{k: round(v * factor) for k, v in mark._asdict().items() if isinstance(v, int)})
            for mark in self.marks
        )
        return Picture(round(self.width * factor), round(self.height * factor), self.ground, tuple(marks))

    def render(self) -> np.ndarray:
        """Returns the pixels, uint8 [height, width, 3]."""
        image = Image.new("RGB", (self.width, self.height), self.ground)
        draw = ImageDraw.Draw(image)
        for mark in self.marks:
            _DRAW[type(mark)](draw, mark)
        return np.asarray(image)


@dataclass(frozen=True)
class Clip:
    """A video of one picture a second, all of one size."""

    pictures: tuple[Picture, ...]

    def render(self) -> np.ndarray:
        """Returns the frames, uint8 [frames, height, width, 3]."""
        return np.stack([picture.render() for picture in self.pictures])


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Returns Pillow's own font in a size."""
    default = ImageFont.load_default(size)
    assert isinstance(default, ImageFont.FreeTypeFont)  # given a size, Pillow returns no other kind
    return default


def text_width(text: str, size: int) -> int:
    """Returns the width of a line of text in pixels."""
    return math.ceil(font(size).getlength(text))


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape) -> None:
    fill, r = COLOURS[shape.colour], shape.radius
    if shape.kind == "circle":
        draw.ellipse((shape.x - r, shape.y - r, shape.x + r, shape.y + r), fill=fill)
    else:
        draw.polygon([(shape.x + r * x, shape.y + r * y) for x, y in _OUTLINES[shape.kind]], fill=fill)


def _draw_text(draw: ImageDraw.ImageDraw, text: Text) -> None:
    draw.text((text.x, text.y), text.text, fill=text.colour, font=font(text.size), anchor="mm")


def _draw_rule(draw: ImageDraw.ImageDraw, rule: Rule) -> None:
    draw.line((rule.x, rule.y, rule.right, rule.bottom), fill=rule.colour, width=2)


def _star() -> list[tuple[float, float]]:
    turns = [(math.pi * (i / 5 - 0.5), 1.1 if i % 2 == 0 else 0.45) for i in range(10)]
    return [(r * math.cos(turn), r * math.sin(turn)) for turn, r in turns]


def _cross() -> list[tuple[float, float]]:
    a = 0.33
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


_OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)],
    "star": _star(),
    "cross": _cross(),
}
_DRAW = {Shape: _draw_shape, Text: _draw_text, Rule: _draw_rule}
