"""What a prompt says about the answer that follows it."""

import numpy as np

from minicpmv46_jax import MiniCPMV
from minicpmv46_jax.processing import Inputs
from serve.parsers.reasoning import CLOSE, OPEN

TURN, END = "<|im_start|>", "<|im_end|>"  # around each message in the released template
TAIL = 2048  # tokens looked at: a message that is continued may be long


def opens_thinking(model: MiniCPMV, inputs: Inputs) -> bool:
    """Whether a prompt ends inside `<think>`: templates open it, close an empty one, or leave it to the model."""
    text = model.detokenizer.decode(inputs.token_ids[-TAIL:].tolist(), skip_special_tokens=False)
    turn = text.rpartition(TURN)[2]
    return turn.startswith("assistant") and END not in turn and turn.rfind(OPEN) > turn.rfind(CLOSE)


def extended(inputs: Inputs, token_ids: list[int]) -> Inputs:
    """The prompt with some of its answer."""
    ids = np.concatenate([inputs.token_ids, np.array(token_ids, np.int32)])
    return Inputs(ids, inputs.views, inputs.image_grids, inputs.video_grids)
