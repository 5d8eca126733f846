"""transformers' model as the oracle: random checkpoints, logits, and intermediate results by name."""

import copy
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, MiniCPMV4_6ForConditionalGeneration

from minicpmv46_jax import MiniCPMV, model
from minicpmv46_jax.generation.generate import token_block
from minicpmv46_jax.model import packing
from minicpmv46_jax.processing import Inputs
from tests.tolerances import rms

SIDE_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
)


def write_checkpoint(folder: Path, config: dict, side_files: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a Hugging Face folder with random weights; norms and biases differ from 0 and 1."""
    torch.manual_seed(seed)
    # A copy, because some versions remove model_type from the given dicts.
    model = MiniCPMV4_6ForConditionalGeneration(AutoConfig.for_model(**copy.deepcopy(config)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
                p.add_(torch.randn_like(p) * 0.05)
    model.to(dtype).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for name in SIDE_FILES:
        shutil.copy(side_files / name, folder / name)
    return folder


class Oracle:
    """transformers' model on our processed inputs."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.model = MiniCPMV4_6ForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
        self.image_token_id = self.model.config.image_token_id

    def arguments(self, inputs: Inputs) -> dict:
        """Returns the forward's keyword arguments: images and videos apart, patches in NaViT layout."""
        out = {"input_ids": torch.tensor(inputs.token_ids[None].astype(np.int64))}
        views = {"": [], "_videos": []}
        for view in inputs.views:
            views["" if inputs.token_ids[view.start] == self.image_token_id else "_videos"].append(view)
        for suffix, group in views.items():
            if group:
                out["pixel_values" + suffix] = torch.tensor(np.concatenate([navit(v) for v in group], axis=-1)[None])
                out["target_sizes" + suffix] = torch.tensor([v.grid for v in group], dtype=torch.int32)
                out["downsample_mode"] = group[0].downsample_mode
        return out

    @torch.no_grad()
    def logits(self, inputs: Inputs) -> np.ndarray:
        """Returns logits, float32 [T, V]."""
        return self.model(**self.arguments(inputs), use_cache=False).logits[0].float().numpy()

    @torch.no_grad()
    def greedy(self, inputs: Inputs, new_tokens: int) -> tuple[list[int], np.ndarray]:
        """Returns greedy tokens, decoded with transformers' cache, and their logits [new_tokens, V]."""
        out = self.model.generate(
            **self.arguments(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids = out.sequences[0, len(inputs.token_ids) :].tolist()
        return ids, torch.stack(out.logits)[:, 0].float().numpy()

    @torch.no_grad()
    def taps(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Returns intermediate results by our names, rows in transformers' order; images in one pass only."""
        taps, hooks = {}, []

        def keep(module, name):
            def hook(_, __, output):
                x = output[0] if isinstance(output, tuple) else output
                x = torch.cat(x) if isinstance(x, list) else x
                taps[name] = x.float().numpy().reshape(-1, x.shape[-1])

            hooks.append(module.register_forward_hook(hook))

        tower, text = self.model.model.vision_tower, self.model.model.language_model
        keep(tower.embeddings, "vision.embeddings")
        keep(tower.vit_merger, "vision.window_merger")
        keep(self.model.model.merger, "vision.merger")
        keep(text.norm, "text.norm")
        for i, layer in enumerate(tower.encoder.layers):
            keep(layer, f"vision.layers.{i}")
        for i, layer in enumerate(text.layers):
            keep(layer, f"text.layers.{i}")
        taps["logits"] = self.logits(inputs)
        for hook in hooks:
            hook.remove()
        return taps


def navit(view) -> np.ndarray:
    """Returns a view's patches in NaViT layout: float32 [channels, patch, patches * patch]."""
    patch = round((view.pixel_values.shape[1] // 3) ** 0.5)
    return view.pixel_values.reshape(-1, 3, patch, patch).transpose(1, 2, 0, 3).reshape(3, patch, -1)


def row_major(x: np.ndarray, inputs: Inputs, merged: int) -> np.ndarray:
    """Reorders rows from block order to each view's row-major order, after `merged` 2x2 merges."""
    out, at = [], 0
    for view in inputs.views:
        h, w = (side >> merged for side in view.grid)
        order = packing.block_order(h, w, packing.MERGES[view.downsample_mode] - merged)
        rows = np.empty((h * w, x.shape[1]), x.dtype)
        rows[order] = x[at : at + h * w]
        out.append(rows)
        at += h * w
    return np.concatenate(out)


def our_taps(ours: MiniCPMV, inputs: Inputs) -> dict[str, np.ndarray]:
    """Returns our intermediate results in transformers' row order; images must fit into one pass."""
    graph = model.schema(ours.config)
    passes = [packed for _, packed in packing.pack(inputs.views, ours.config.vision.positions_per_side)]
    assert len(passes) <= 1
    total = len(inputs.token_ids)
    rows = ours.generator.feature_rows(inputs, np.cumsum([0] + [v.num_tokens for v in inputs.views])[:-1].tolist())

    @jax.jit
    def run(params, passes, block):
        taps = {}
        features = jnp.zeros((1, ours.config.text.hidden_size), ours.generator.dtype)
        for packed in passes:
            features = model.encode(graph.vision, params["vision"], packed, taps)
        taps["logits"] = model.forward(graph, params, block, features, taps)[0]
        return taps

    taps = run(ours.params, passes, token_block(inputs.token_ids, rows, total))
    patches = sum(h * w for h, w in (v.grid for v in inputs.views))
    out = {}
    for name, x in taps.items():
        x = np.asarray(x).reshape(-1, x.shape[-1])
        if name.startswith("vision."):
            merged = {len(passes[0].patches) >> 2 * m: m for m in range(3)}[len(x)]
            x = row_major(x[: patches >> 2 * merged], inputs, merged)
        out[name] = x
    return out


def assert_same_greedy(found: list[int], expected: list[int], logits: np.ndarray, error: float) -> int:
    """Compares greedy tokens up to the first near-tie and returns the number of compared tokens.

    A near-tie is a step where the reference's two largest logits differ by less than the error.
    """
    assert len(found) == len(expected)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        second, best = np.sort(logits[step])[-2:]
        if best - second <= 2 * error * rms(logits[step]):
            assert step > 0, "the very first choice was a tie: the test proves nothing"
            return step
        assert a == b, f"token {step}: {a}, expected {b}"
    return len(expected)
