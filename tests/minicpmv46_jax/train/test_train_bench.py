"""The training benchmark's FLOP counts and figures; its times belong to a device."""

import json

import jax
import numpy as np
import pytest

from minicpmv46_jax import model
from minicpmv46_jax.config import ModelConfig
from minicpmv46_jax.model.batch import FullBatch
from minicpmv46_jax.train import bench
from tests.minicpmv46_jax.train.train_compile import QUICK
from tests.released import released_config


@pytest.fixture(scope="module")
def released():
    return ModelConfig.from_dict(released_config())


def test_text_flops_are_close_to_the_compilers_count(released):
    """On 64 tokens attention's square and chunks cost little; the compiler also counts elementwise work."""
    released, tokens = bench.cut(released, 1), 64
    config, params = released.text, model.parameter_shapes(released)["text"]

    def forward(params, x):
        text = model.merge(model.schema(released).text, params)
        return text.logits(text(x, None, FullBatch(np.full(1, tokens, np.int32)))[0])

    x = jax.ShapeDtypeStruct((tokens, config.hidden_size), np.float32)
    counted = jax.jit(forward).lower(params, x).cost_analysis()["flops"]
    ours = bench.text_flops(config, tokens)
    assert ours < counted < 1.1 * ours


def test_batch_flops_count_vision_tower_and_text(released):
    text, both = (bench.make_batch(released, 1, 1024, pictures) for pictures in (False, True))
    assert np.count_nonzero(both.segments) == 1024
    assert np.count_nonzero(both.views.view_lens) == len(bench.PHOTO_GRIDS)  # one picture fits; text fills the rest of the row
    tower = bench.tower_flops(released.vision, 1024, bench.PHOTO_GRIDS)
    apart = sum(bench.text_flops(released.text, length) for length in (572, 452))
    assert bench.batch_flops(released, both) == pytest.approx(3 * (tower + apart))
    assert bench.batch_flops(released, text) == pytest.approx(3 * bench.text_flops(released.text, 1024))


@pytest.mark.full
def test_main_measures_each_case(demo_folder, tmp_path, capsys):
    plans = ["--text", "layer:2:reference", "--pictures"]
    arguments = ["--model", str(demo_folder), "--groups", "1", "--tokens", "64", "--steps", "1", *plans]
    bench.main([*arguments, "--json", str(tmp_path / "found.json")], QUICK)
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert (row["rows"], row["remat"], row["backend"]) == (2, "layer", "reference")
    assert row["tokens_per_second"] == pytest.approx(128 / row["seconds"])
    config = bench.cut(ModelConfig.from_folder(demo_folder), 1)
    state = 12 * sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model.parameter_shapes(config)))
    assert row["bytes"] > state
    assert abs(row["loss"] - np.log(config.text.vocab_size)) < 0.5  # random weights
    assert "MFU" in capsys.readouterr().out


def test_cases_and_rows_are_validated(released):
    assert bench.BenchCase.parse("dots:16") == ("dots", 16, True, None)
    assert bench.BenchCase.parse("none:8:unrolled:gpu") == ("none", 8, False, "gpu")
    assert bench.BenchCase.parse("none:8:gpu") == ("none", 8, True, "gpu")
    for case in ("layers:8", "layer", "layer:0", "layer:8:gpu:1"):
        with pytest.raises(ValueError, match=r"expected REMAT:ROWS\[:unrolled\]\[:BACKEND\], REMAT of none, dots, layer"):
            bench.BenchCase.parse(case)
    with pytest.raises(ValueError, match="rows have 512 tokens, and a picture and its text take 572"):
        bench.make_batch(released, 1, 512, pictures=True)
