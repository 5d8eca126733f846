"""Reference answers about scenes, computed from the marks of a picture and the words of a question."""

import re

from minicpmv46_jax.scenes import Clip, Picture, Scene
from minicpmv46_jax.scenes.picture import COLOURS, SHAPES, Shape, Text

ROWS, COLUMNS = ("top", "", "bottom"), ("left", "", "right")


def pictures(scene: Scene) -> list[Picture]:
    """Returns all pictures, those of clips included."""
    return [picture for medium in scene.media for picture in (medium.pictures if isinstance(medium, Clip) else [medium])]


def printed(scene: Scene) -> list[str]:
    """Returns all words in the order of the marks."""
    return [word for picture in pictures(scene) for mark in picture.marks if isinstance(mark, Text) for word in mark.text.split()]


def cell(picture: Picture, shape: Shape) -> str:
    """Returns the name of the grid cell that holds the shape."""
    row, column = ROWS[int(3 * shape.y / picture.height)], COLUMNS[int(3 * shape.x / picture.width)]
    return f"{row} {column}".strip() or "centre"


def expected_answer(picture: Picture, question: str) -> str | None:
    """Returns the answer, or None for a question that is not supported here."""
    shapes = [mark for mark in picture.marks if isinstance(mark, Shape)]
    words = re.findall(r"[a-z]+", question.lower())
    colours = [word for word in words if word in COLOURS]
    kinds = [kind for word in words for kind in SHAPES if word in (kind, f"{kind}s", f"{kind}es")]
    named = [s for s in shapes if s.colour in (colours or COLOURS) and s.kind in (kinds or SHAPES)]
    if words[:2] == ["how", "many"] or words[0] == "count":
        return str(len(named))
    if words[:2] in (["is", "there"], ["do", "you"]):
        return "Yes." if named else "No."
    if words[0] == "where" or words[:2] == ["in", "which"]:
        return f"{cell(picture, named[0])}.".capitalize()
    if words[:2] in (["what", "colour"], ["which", "colour"]):
        return f"{named[0].colour}.".capitalize()
    if (words[:2] == ["which", "shape"] and colours) or words[:2] == ["what", "shape"]:
        return f"A {named[0].kind}."
    if "at" in words and " at the " in question:
        place = question.split(" at the ")[1].rstrip("?")
        found = [s for s in shapes if cell(picture, s) == place]
        return f"A{'n' * (found[0].name[0] in 'aeio')} {found[0].name}." if found else "Nothing."
    return None
