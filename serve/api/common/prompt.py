"""Prompts as tokens: whether one opens reasoning, and how to append generated tokens."""

import numpy as np

from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.processing import Inputs
from serve.parsers.reasoning import CLOSE, OPEN

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # around each message in the released template
MAX_TAIL_TOKENS = 2048  # inspected at the end of a prompt; a continued message may be long


def opens_thinking(model: MiniCPMV, token_ids: np.ndarray) -> bool:
    """Returns whether a prompt ends inside `<think>`. Templates open it, close an empty one, or write
    neither."""
    text = model.detokenizer.decode(token_ids[-MAX_TAIL_TOKENS:].tolist(), skip_special_tokens=False)
    turn = text.rpartition(TURN_START)[2]
    return turn.startswith("assistant") and TURN_END not in turn and turn.rfind(OPEN) > turn.rfind(CLOSE)


def append_tokens(inputs: Inputs, token_ids: list[int]) -> Inputs:
    """Returns the prompt followed by more tokens."""
    ids = np.concatenate([inputs.token_ids, np.array(token_ids, np.int32)])
    return Inputs(ids, inputs.views, inputs.image_grids, inputs.video_grids)
