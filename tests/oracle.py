"""transformers' own model as the truth: random checkpoints in its format, its logits and every named intermediate result."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, MiniCPMV4_6ForConditionalGeneration

from minicpmv46_jax import packing
from minicpmv46_jax.processing import Inputs

SIDE_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
)


def write_checkpoint(folder: Path, config: dict, side_files: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A Hugging Face folder whose weights transformers drew, with norms and biases moved off 0 and 1."""
    torch.manual_seed(seed)
    model = MiniCPMV4_6ForConditionalGeneration(AutoConfig.for_model(**config))
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
        """The forward's keyword arguments: images and videos apart, patches in transformers' NaViT layout."""
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
        """float32 [T, V]."""
        return self.model(**self.arguments(inputs), use_cache=False).logits[0].float().numpy()

    @torch.no_grad()
    def greedy(self, inputs: Inputs, new_tokens: int) -> tuple[list[int], np.ndarray]:
        """Greedy tokens through its own cache, and the logits [new_tokens, V] each was chosen from."""
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
        """Every intermediate result by our names, rows in transformers' order; images only (one pass through the tower)."""
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
    """A view's patches as transformers packs them: float32 [channels, patch, patches * patch]."""
    patch = round((view.pixel_values.shape[1] // 3) ** 0.5)
    return view.pixel_values.reshape(-1, 3, patch, patch).transpose(1, 2, 0, 3).reshape(3, patch, -1)


def row_major(x: np.ndarray, inputs: Inputs, merged: int) -> np.ndarray:
    """Rows from the packer's block order back to each view's row-major order; `merged` counts the 2x2 merges behind them."""
    out, at = [], 0
    for view in inputs.views:
        h, w = (side >> merged for side in view.grid)
        order = packing.block_order(h, w, packing.MERGES[view.downsample_mode] - merged)
        rows = np.empty((h * w, x.shape[1]), x.dtype)
        rows[order] = x[at : at + h * w]
        out.append(rows)
        at += h * w
    return np.concatenate(out)
