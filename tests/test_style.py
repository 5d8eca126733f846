"""The house style of docstrings and comments: plain verbs, the code as the subject."""

import ast
import io
import re
import tokenize

import pytest

from tests import ROOT

PACKAGES = ("kernels_pallas", "minicpmv46_jax", "convert", "serve")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
READMES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", ".venv-newer"} & set(path.parts))

PERSONS = re.compile(r"\b(who|whoever|whom|nobody|somebody|everybody|anybody|told|tells?|he|him)\b", re.IGNORECASE)
OPENINGS = {"Of", "As", "With", "In", "What", "Which", "Whether", "How", "Who"}
NOUNS = {  # that end as a verb of the third person does
    "Always", "As", "Images", "Is", "Its", "Keys", "Logits", "Names", "Pages", "Requests", "Rows", "Scores", "Settings", "Sizes",
    "Steps", "This", "Tokens", "Views", "Weights",
}  # fmt: skip
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(tree):
    """Yields each definition that has a docstring, and the docstring."""
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and (text := ast.get_docstring(node)):
            yield node, text


def is_property(node):
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def persons(text):
    """Returns the lines of docstrings and comments that have a person in them."""
    lines = [line for _, doc in docstrings(ast.parse(text)) for line in doc.splitlines()]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines += [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [line for line in lines if PERSONS.search(line)]


def fragments(text):
    """Returns first lines of docstrings that begin with a fragment, and of functions' without a verb."""
    found = []
    for node, doc in docstrings(ast.parse(text)):
        first = doc.split()[0].rstrip(".,:;")
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_property(node)
        verb = re.fullmatch(r"[A-Z][a-z]+s", first) and first not in NOUNS
        if first in OPENINGS or (function and not verb):
            found.append(doc.splitlines()[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_and_comments_are_plain(path):
    text = path.read_text()
    assert not persons(text)
    assert not fragments(text)


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_readmes_are_plain(path):
    prose = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    assert not [line for line in prose.splitlines() if PERSONS.search(line)]
    assert not [line for line in prose.splitlines() if len(line) > 110 and not line.startswith("|")]


def test_the_root_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_what_the_checks_find():
    assert persons('"""Whose answer it is, told to nobody."""') and persons("x = 1  # he knows")
    assert not persons('"""Returns the other whole."""\nx = "who"')
    assert fragments('def f():\n    """Of an answer, all it held."""') == ["Of an answer, all it held."]
    assert fragments('def f():\n    """The end."""') and fragments('class C:\n    """As before."""')
    assert not fragments('class C:\n    """Pages."""\n\n    @property\n    def free(self):\n        """Number of free pages."""')
    assert not fragments('def f():\n    """Frees the page."""')
