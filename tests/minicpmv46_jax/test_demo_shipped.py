"""The demo model of the package: its files, its answers, and its scores by the engine and transformers."""

import collections
import dataclasses

import pytest
import torch
from transformers import MiniCPMV4_6ForConditionalGeneration

from minicpmv46_jax import MiniCPMV, demo
from minicpmv46_jax.evaluate import evaluate, model_answerer, read_questions, report, score
from minicpmv46_jax.scenes.__main__ import write
from serve.offline import Offline
from tests.oracle import Oracle

LIMIT = 12_000_000  # bytes of the folder
NUM_QUESTIONS = 1200  # held-out questions of the scores
MAX_ANSWER = 96  # tokens of an answer
EXACT = {"what": 0.95, "where": 0.95, "count": 0.95, "colour": 0.95, "read": 0.9, "slices": 0.9, "two images": 0.9, "video": 0.9}


@pytest.fixture(scope="module")
def model():
    return MiniCPMV.from_pretrained(demo.FOLDER, dtype="float32")


def test_folder_is_small_and_has_a_model_card():
    assert sum(file.stat().st_size for file in demo.FOLDER.iterdir()) <= LIMIT
    card = (demo.FOLDER / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "## Limits" in card


def test_transformers_loads_every_weight():
    model, faults = MiniCPMV4_6ForConditionalGeneration.from_pretrained(demo.FOLDER, output_loading_info=True)
    assert not any(faults.values()), faults
    assert model.dtype == torch.bfloat16


def test_answers_held_out_scenes(model, tmp_path):
    """Twelve questions about held-out shapes and text; greedy float32 answers do not vary."""
    questions = read_questions(write(tmp_path, 12, held_out=True, kinds=("shapes", "lines"), first=10**6))
    scored = list(evaluate(questions, model_answerer(model, MAX_ANSWER)))
    assert sum(one.exact for one in scored) >= 10, report(scored)


@pytest.mark.full
def test_scores_of_engine_and_transformers(model, tmp_path):
    """The card's numbers: every group meets its bar, and 99 of 100 greedy answers equal transformers'."""
    questions = read_questions(write(tmp_path, NUM_QUESTIONS, held_out=True, first=2 * 10**6))
    oracle = Oracle(demo.FOLDER)
    by_engine, equal = [], 0
    with Offline(model) as offline:
        for question in questions:
            options = dict(question.options) | ({"tools": list(question.tools)} if question.tools else {})
            (said,) = offline.chat([question.messages], False, temperature=0.0, max_new_tokens=MAX_ANSWER, **options)
            by_engine.append(score(question, said))
            equal += said == _by_transformers(oracle, model, question, options)
    print("\n" + report(by_engine), f"\nequal to transformers': {equal} of {len(questions)}")
    groups = collections.defaultdict(list)
    for one in by_engine:
        groups[one.question.group].append(one.exact)
    assert equal >= 0.99 * len(questions)
    assert {group: sum(groups[group]) / len(groups[group]) >= bar for group, bar in EXACT.items()} == dict.fromkeys(EXACT, True)


@pytest.mark.full
def test_scores_in_16x_mode(model, tmp_path):
    """The model card's "16x" column, by the plain generator."""
    questions = read_questions(write(tmp_path, 600, held_out=True, first=3 * 10**6))
    coarse = [dataclasses.replace(one, options={**one.options, "downsample_mode": "16x"}) for one in questions]
    scored = list(evaluate(coarse, model_answerer(model, MAX_ANSWER)))
    print("\n" + report(scored))
    assert sum(one.exact for one in scored) >= 0.95 * len(scored)


def _by_transformers(oracle, model, question, options):
    """Returns transformers' greedy answer to the same prompt."""
    inputs = model.process(question.messages, **options)
    out = oracle.model.generate(**oracle.arguments(inputs), max_new_tokens=MAX_ANSWER, do_sample=False)
    return model.processor.tokenizer.decode(out[0, len(inputs.token_ids) :], skip_special_tokens=True)
