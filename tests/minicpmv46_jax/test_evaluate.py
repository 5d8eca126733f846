"""Evaluation: question files, scores and reports, through the plain generator and through a server."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv46_jax.evaluate import (
    Question,
    anls,
    evaluate,
    levenshtein,
    main,
    model_answerer,
    read_questions,
    report,
    result_row,
    score,
    server_answerer,
)
from minicpmv46_jax.scenes.__main__ import write
from serve.api.common.service import Service
from tests.serve.support import live

LINE = {"image": "a.png", "question": "What is it?", "answers": ["A cat."], "group": "animals", "id": 7}


@pytest.fixture
def file(tmp_path, photos):
    """Returns a function that writes lines to a file beside a picture a.png and returns the file."""
    photos[0].resize((64, 48)).save(tmp_path / "a.png")

    def write_lines(*lines):
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return path

    return write_lines


def test_reads_questions_of_a_file(file, tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    first, second = read_questions(
        file(LINE, "", {"messages": messages, "answers": ["Hi", "Hello"], "options": {"enable_thinking": True}})
    )
    assert first == Question(
        "7",
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": str(tmp_path / "a.png")}, {"type": "text", "text": "What is it?"}],
            }
        ],
        ["A cat."],
        "animals",
    )
    assert (second.id, second.group, second.messages, second.options) == ("line 3", "all", messages, {"enable_thinking": True})


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected an object, got list"),
        ({**LINE, "answer": "x"}, "line 2: field 'answer' is unknown"),
        ({**LINE, "answers": []}, "line 2: answers must be a list of texts"),
        ({**LINE, "answers": "A cat."}, "line 2: answers must be a list of texts"),
        ({**LINE, "image": "b.png"}, "line 2: .*b.png does not exist"),
        ({**LINE, "image": 3}, "line 2: a picture or video must be a path or URL, got 3"),
        ({"answers": ["x"]}, "line 2: question must be a text, got None"),
    ],
)
def test_errors_name_the_line(file, line, words):
    with pytest.raises(ValueError, match=words):
        read_questions(file(LINE, line))


def test_refuses_an_empty_file(file):
    with pytest.raises(ValueError, match="the file has no questions"):
        read_questions(file(""))


def test_command_line_errors(file, capsys):
    assert main([str(file(LINE))]) == 1
    assert "give either --model or --url" in capsys.readouterr().err
    assert main([str(file(LINE)), "--url", "http://127.0.0.1:9/v1"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_scores():
    """ANLS by hand: "kitten" to "sitting" takes 3 edits for 7 letters; below a half it counts as 0."""
    assert levenshtein("kitten", "sitting") == 3
    assert anls("Kitten", "sitting") == pytest.approx(4 / 7)
    assert anls("abcd", "xyzd") == 0.0 and anls("", "") == 1.0
    question = Question("1", [], ["A red circle.", "A circle."])
    assert score(question, " A  circle.\n").exact == 1.0
    assert score(question, "<think>\nA square?\n</think>\n\nA circle.").exact == 1.0
    near = score(question, "A red circle")
    assert near.exact == 0.0 and near.anls == pytest.approx(12 / 13)


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
def test_edit_distance_is_a_metric(a, b, c):
    assert levenshtein(a, b) == levenshtein(b, a) <= max(len(a), len(b))
    assert (levenshtein(a, b) == 0) == (a == b)
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)


def test_report_by_group():
    questions = [Question("1", [], ["x"], "b"), Question("2", [], ["y"], "a"), Question("3", [], ["z"], "a")]
    said = {"1": "x", "2": "y", "3": "no"}
    scored = list(evaluate(questions, lambda question: said[question.id], concurrency=2))
    lines = [line.replace(" ", "") for line in report(scored).splitlines()]
    assert lines[2:] == ["|a|2|50.0%|0.500|", "|b|1|100.0%|1.000|", "|allquestions|3|66.7%|0.667|"]
    assert result_row(scored[2]) == {"id": "3", "group": "a", "answers": ["z"], "answer": "no", "exact": 0.0, "anls": 0.0}


def test_generator_and_server_give_the_same_answers(demo, demo_engine, tmp_path, capsys):
    """The server's batching engine gives the plain generator's greedy answers."""
    path = write(tmp_path, 2, held_out=True, kinds=("shapes",))
    questions = read_questions(path)
    with live(Service(demo, demo_engine, "small")) as address:
        answerer = server_answerer(f"{address}/v1", max_new_tokens=6)
        by_server = [one.answer for one in evaluate(questions, answerer, concurrency=2)]
        assert (
            main([str(path), "--url", f"{address}/v1", "--limit", "1", "--max-new-tokens", "4", "--out", str(tmp_path / "r")])
            == 0
        )
    by_generator = [one.answer for one in evaluate(questions, model_answerer(demo, max_new_tokens=6))]
    assert by_server == by_generator
    assert json.loads((tmp_path / "r").read_text())["id"] == questions[0].id
    assert "| questions |" in capsys.readouterr().out
