"""The demo model's vocabulary, initial weights, training data and recipe."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from convert.demo import drawing
from convert.demo import train as train_demo
from convert.demo.drawing import DataConfig
from convert.demo.model_shape import DOWNSAMPLE_MODE, IMAGE_MEAN, model_config, model_files
from convert.demo.random_checkpoint import write_files
from convert.demo.vocabulary import BARE_WORDS, merges, scene_words
from minicpmv46_jax import scenes
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.processing import Processor
from minicpmv46_jax.processing.images import patchify
from minicpmv46_jax.train import BatchShape

SMALL = BatchShape(
    rows=2, tokens=640, patches=2048, views=8, longest=train_demo.MAX_VIEW_PATCHES, downsample_mode=DOWNSAMPLE_MODE
)


@pytest.fixture(scope="module")
def words():
    return scene_words()


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    """The model folder without weights."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, model_files(merges(words)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_words_are_single_tokens_and_print_is_bytes(words, tokenizer):
    assert {"Which", " picture", " diamonds", "<parameter"} <= set(words)
    assert [word for word in words if word[-1].isalpha() and len(tokenizer.encode(word)) != 1] == []
    assert set(BARE_WORDS) <= set(words)
    for text in ("QKGDD", "56253", "ROJUFUT 956.33", "IVEBO\nEF"):
        assert [tokenizer.decode(i) for i in tokenizer.encode(text)] == list(text)
    for text in ("Ein Bär, naïve", "unseen words", "red  \n\n\tx", "日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_token_ids_match_the_configs(words, tokenizer):
    config = model_config(merges(words))
    assert len(tokenizer) == config["text_config"]["vocab_size"]
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == config["video_token_id"]
    assert len(words) == len(set(words))


def test_both_configs_have_the_downsample_mode(folder):
    """transformers' model reads config.json; its processor and ours read preprocessor_config.json."""
    read = [json.loads((folder / name).read_text())["downsample_mode"] for name in ("config.json", "preprocessor_config.json")]
    processor = Processor.from_folder(folder)
    assert (
        read == [DOWNSAMPLE_MODE, DOWNSAMPLE_MODE]
        and processor.image_config.options.downsample_mode == processor.video_config.options.downsample_mode == DOWNSAMPLE_MODE
    )


def test_loss_mask_covers_answers_only(folder):
    """For any turns, the loss mask covers the answers and an optional thought, and nothing else."""
    data_config = DataConfig(folder, SMALL, {"shapes": 0.5, "calls": 0.5}, count=12)
    builder = drawing.ConversationBuilder(data_config)
    for seed in range(12):
        scene = scenes.draw(seed, mix=data_config.mix)
        for think in (False, True):
            turns = [turn for turn in scene.turns if turn.call is None][:2] + [turn for turn in scene.turns if turn.call][:1]
            example = builder.conversation(scene, turns, think)
            said = builder.processor.tokenizer.decode(example.inputs.token_ids[example.loss_mask])
            *_, last = turns
            thought = f"{last.thought or drawing.DEFAULT_THOUGHT}\n</think>\n\n" if think else ""
            assert said == "".join(f"{t.reply}<|im_end|>" for t in turns[:-1]) + f"{thought}{last.reply}<|im_end|>"


def test_workers_draw_different_training_scenes(folder):
    data_configs = [DataConfig(folder, SMALL, {"shapes": 1.0}, first=i, step=2, count=4) for i in range(2)]
    drawn = [
        [example.inputs.token_ids.tolist() for example in drawing.training_conversations(data_config)]
        for data_config in data_configs
    ]
    assert [len(part) for part in drawn] == [4, 4] and not any(example in drawn[1] for example in drawn[0])
    eval_set = list(drawing.eval_conversations(DataConfig(folder, SMALL, {"shapes": 1.0}, held_out=True, count=6)))
    assert {group for group, _ in eval_set} <= {"what", "colour", "where", "count", "relation", "thinking"}
    assert len(eval_set) == 6


def test_whitening_embedding_gives_unit_variance(folder):
    """Held-out patches with content have unit variance, or less in directions of noise."""
    vision = ModelConfig.from_folder(folder).vision
    embedding = train_demo.whitening_embedding(vision, IMAGE_MEAN)
    drawn = [scenes.draw(seed, True, {"lines": 1.0}).media[0].render() for seed in range(40)]
    pixels = np.concatenate([patchify(picture, 14).pixels for picture in drawn if picture.shape == (224, 224, 3)])
    values = (pixels.reshape(len(pixels), 3, -1) / 255 - np.array(IMAGE_MEAN)[None, :, None]) / 0.5
    x = values.reshape(len(pixels), -1) @ embedding["weight"].T + embedding["bias"]
    x = x[np.ptp(pixels, axis=1) > train_demo.MIN_PATCH_RANGE]
    assert 0.3 < np.median(x.std(axis=0)) < 1.5 and abs(x.mean()) < 0.1


def test_sincos_positions(folder):
    vision = ModelConfig.from_folder(folder).vision
    table = train_demo.sincos_positions(vision).reshape(24, 24, -1)
    apart = [np.linalg.norm(table[0, 0] - table[0, i]) for i in range(1, 6)]
    assert table.shape[-1] == vision.hidden_size and apart == sorted(apart) and apart[0] > 0.2
    assert np.unique(table.reshape(576, -1).round(4), axis=0).shape[0] == 576


def test_learning_rate_schedule():
    assert train_demo.learning_rate_at(0, 0.0, 1.0) == pytest.approx(1 / train_demo.WARMUP)
    assert train_demo.learning_rate_at(10**6, 0.0, 1.0) == pytest.approx(1.0)
    assert train_demo.learning_rate_at(10**6, 0.5, 1.0) == pytest.approx(0.51) and train_demo.learning_rate_at(
        10**6, 2.0, 1.0
    ) == pytest.approx(0.02)


def test_patch_embedding_learns_slowly():
    updates = {"vision": {"patch_embed": {"weight": jnp.ones((2, 588))}}, "text": {"norm": {"weight": jnp.ones(4)}}}
    slowed = jax.tree.map(lambda x: float(x.ravel()[0]), train_demo.slow_patch_embed(updates, None))
    assert slowed["vision"]["patch_embed"]["weight"] == pytest.approx(train_demo.PATCH_EMBED_RATE)
    assert slowed["text"] == {"norm": {"weight": 1.0}}


def test_initial_state_decay_covers_tens_to_hundreds_of_tokens(folder, monkeypatch):
    """The log decay per token, for a gate input of 0, ranges from slow to fast."""
    config = ModelConfig.from_folder(folder)
    monkeypatch.setattr(train_demo, "WHITENING_SCENES", 5)  # fewer scenes are faster, and this test ignores the embedding
    params = train_demo.initial_params(config, IMAGE_MEAN, 0)
    mixers = [layer["mixer"] for layer in params["text"]["layers"].values() if "A_log" in layer["mixer"]]
    decays = np.concatenate([np.exp(mixer["A_log"]) * np.logaddexp(mixer["dt_bias"], 0) for mixer in mixers])
    assert len(decays) == 3 * config.text.linear_num_value_heads
    assert decays.min() < 0.1 and 0.1 < decays.max() < 1.6


def test_two_workers_cover_both_modes():
    shares = [
        sum(train_demo.mode_index(worker, share) for worker in range(n))
        for n, share in ((1, 8), (2, 8), (8, 8), (12, 8), (12, 2))
    ]
    assert shares == [0, 1, 1, 2, 6]


def test_large_images_leave_room_for_some_questions(folder):
    """A row has room for the slices and a few questions; no scene is left out."""
    training_conversations = list(drawing.training_conversations(DataConfig(folder, SMALL, {"small print": 1.0}, count=20)))
    assert len(training_conversations) == 20 and max(example.num_tokens for example in training_conversations) > 500


def test_training_starts_with_easy_scenes(folder):
    """All scenes are easy at the start of the ramp. After it, or without one, `easy` is their share."""

    def kinds(**fields):
        return [
            example.where
            for example in drawing.training_conversations(DataConfig(folder, SMALL, {"pair": 1.0}, count=30, **fields))
        ]

    assert set(kinds(ramp=10**6, easy=0.1)) <= {"shapes", "word", "letters"}
    assert set(kinds(ramp=10**6, easy=0.1, first=10**6)) == {"pair"} | set(kinds(easy=0.1, first=10**6))
    assert set(kinds()) == {"pair"}


def test_accuracy_counts_whole_answers(folder):
    """One wrong token makes its conversation wrong and no other."""
    eval_set = train_demo.draw_eval_set(DataConfig(folder, SMALL, {"shapes": 1.0}, held_out=True, count=3))
    batch, groups = eval_set[0]
    weights, segments = batch.weights[0, 0], batch.segments[0, 0]
    right = np.ones(weights.shape, bool)
    wrong = np.argwhere((weights > 0) & (segments == 1))[0]
    right[tuple(wrong)] = False
    spoilt = groups[wrong[0]][0]
    scores = train_demo.accuracy_by_group(lambda params, batch: right, {}, eval_set[:1])
    totals = sum(row.count(spoilt) for row in groups)
    assert scores[spoilt] == pytest.approx((totals - 1) / totals)
    assert all(accuracy_by_group == 1.0 for group, accuracy_by_group in scores.items() if group != spoilt)


@pytest.mark.full
def test_run_trains_exports_and_continues(tmp_path):
    """The recipe on two cores overfits a few scenes and exports; a second run continues from the export."""
    settings = train_demo.Settings(3600, 1, {"shapes": 1.0}, {"4x": SMALL}, steps=40, eval_scenes=4, dtype=jnp.float32)
    run = train_demo.Trainer(settings, tmp_path / "a")
    scores = run.train()
    assert scores and (tmp_path / "a" / "model" / "model.safetensors").stat().st_size < 12e6
    log = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert log[-2]["event"] == "trained"
    again = train_demo.Trainer(dataclasses.replace(settings, start=tmp_path / "a" / "model", steps=1), tmp_path / "b")
    again.train()
    assert (tmp_path / "b" / "model" / "config.json").read_text() == (tmp_path / "a" / "model" / "config.json").read_text()
