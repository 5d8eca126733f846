"""Scenes with functions to call, and dialogues without pictures."""

import json
import random
from typing import Any

from minicpmv46_jax.scenes.picture import SHAPES, Picture, Text
from minicpmv46_jax.scenes.scene import Scene, Turn
from minicpmv46_jax.scenes.several import SIDE, printed_word
from minicpmv46_jax.scenes.shapes import CELLS, PLURALS, cell_of, light_ground, scatter
from minicpmv46_jax.scenes.words import word


def _function(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


FUNCTIONS = {
    "report_count": _function("report_count", "Report how many there are.", shape="string", count="integer"),
    "pick_up": _function("pick_up", "Pick up a shape.", colour="string", shape="string"),
    "move_to": _function("move_to", "Move to a place.", place="string"),
    "save_text": _function("save_text", "Save a text.", text="string"),
}


def call_scene(rng: random.Random, held_out: bool) -> Scene:
    """Returns a picture, one or two functions on offer, and questions that need a call or an answer."""
    name = rng.choice(list(FUNCTIONS))
    picture, turns = (_to_save if name == "save_text" else _to_handle)(rng, held_out, name)
    others = rng.sample([other for other in FUNCTIONS if other != name], rng.choice((0, 0, 1)))
    offered = rng.sample([name, *others], len(others) + 1)
    return Scene("calls", (picture,), tuple(turns), tools=tuple(json.dumps(FUNCTIONS[offer]) for offer in offered))


def _to_save(rng: random.Random, held_out: bool, name: str) -> tuple[Picture, list[Turn]]:
    mark: Text = printed_word(rng, word(rng, held_out, 2, 6))
    turns = [
        Turn("calls", rng.choice(("Save the word.", "Save what it says.")), "", call=(name, (("text", mark.text),))),
        Turn("calls", "What does it say?", mark.text),
    ]
    return Picture(SIDE, SIDE, light_ground(rng), (mark,)), turns


def _to_handle(rng: random.Random, held_out: bool, name: str) -> tuple[Picture, list[Turn]]:
    del held_out
    shapes = scatter(rng, rng.randint(1, 4), SIDE, SIDE)
    kind = rng.choice([*(shape.kind for shape in shapes), rng.choice(SHAPES)])
    target = rng.choice([s for s in shapes if [o.kind for o in shapes].count(s.kind) == 1] or shapes[:1])
    at = CELLS[cell_of(target, SIDE, SIDE)]
    sole = [s for s in shapes if s.name == target.name] == [target]
    if name == "report_count":
        number = sum(shape.kind == kind for shape in shapes)
        question, arguments = f"Report the number of {PLURALS.get(kind, kind + 's')}.", (("shape", kind), ("count", number))
    elif name == "move_to":
        question, arguments = f"Move to the {target.name}.", (("place", at),)
    else:
        question, arguments = f"Pick up the shape at the {at}.", (("colour", target.colour), ("shape", target.kind))
    turns = [Turn("calls", "How many shapes are there?", str(len(shapes)))]
    if sole or name != "move_to":
        turns.append(Turn("calls", question, "", call=(name, arguments)))
    return Picture(SIDE, SIDE, light_ground(rng), tuple(shapes)), turns


DIALOGUES = (
    ("Hi", "Hello! Show me a picture and ask about it."),
    ("Hello", "Hello! Show me a picture and ask about it."),
    ("Hi!", "Hello! Show me a picture and ask about it."),
    ("Hello!", "Hello! Show me a picture and ask about it."),
    ("Who are you?", "I am a small demo model. I see shapes and read printed capitals."),
    ("What can you do?", "I see shapes and read printed capitals in pictures and short videos."),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Bye", "Goodbye!"),
)


def talk_scene(rng: random.Random, held_out: bool) -> Scene:
    """Returns a short dialogue without pictures, which is in no split."""
    del held_out
    return Scene("talk", (), tuple(Turn("talk", *pair) for pair in rng.sample(DIALOGUES, 2)))
