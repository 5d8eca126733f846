"""The demo checkpoint: complete, reproducible, and accepted by transformers as a released checkpoint."""

import re
import subprocess
import sys
import unicodedata

import jinja2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig, MiniCPMV4_6ForConditionalGeneration

from convert.__main__ import main
from convert.demo.random_checkpoint import ADDED, IDS, ROLES, SPECIAL, VISIBLE, demo_config, write_demo_checkpoint

USER = {"role": "user", "content": "Hi"}
ASKED = "<|im_start|>user\nHi<|im_end|>\n"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(demo_folder):
    return AutoTokenizer.from_pretrained(demo_folder)


@pytest.fixture(scope="module")
def render(tokenizer):
    def render(*messages, **options):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)

    return render


# Weights.


def test_same_seed_gives_the_same_small_files(demo_folder, tmp_path):
    again = write_demo_checkpoint(tmp_path / "again")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {f.name: f.read_bytes() for f in demo_folder.iterdir()}
    assert sum(file.stat().st_size for file in again.iterdir()) < 5e6


def test_another_seed_gives_other_weights(demo_folder, tmp_path):
    other = write_demo_checkpoint(tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (demo_folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("value_heads", [4, 8])
def test_transformers_loads_and_runs_the_demo_model(tmp_path, value_heads):
    config = demo_config()
    config["text_config"]["linear_num_value_heads"] = value_heads
    folder = write_demo_checkpoint(tmp_path / "demo", config=config)
    model, report = MiniCPMV4_6ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(b"hello")])).logits[0]
    assert logits.shape == (5, 306) and torch.isfinite(logits).all()
    assert 0.5 < logits.std() < 20  # neither flat, which would hide errors, nor saturated
    ends = torch.topk(logits, 2).values
    assert (ends[:, 0] - ends[:, 1]).min() > 1e-3  # no near-ties: greedy decoding has one answer


def test_no_weight_is_trivial(demo_folder):
    state = MiniCPMV4_6ForConditionalGeneration.from_pretrained(demo_folder).state_dict()
    assert not [name for name, tensor in state.items() if tensor.unique().numel() < tensor.numel() * 0.9]


def test_dtype_option(tmp_path):
    folder = write_demo_checkpoint(tmp_path / "demo", dtype="bfloat16")
    assert MiniCPMV4_6ForConditionalGeneration.from_pretrained(folder).dtype == torch.bfloat16


def test_command_line(tmp_path, capsys):
    assert main(["--demo", str(tmp_path / "demo")]) == 0
    assert (tmp_path / "demo" / "model.safetensors").exists()
    assert main(["--demo", str(tmp_path / "demo")]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_token_ids_in_the_configs_are_the_tokenizers(demo_folder, tokenizer):
    config, generation = demo_config(), GenerationConfig.from_pretrained(demo_folder)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|video_pad|>") == config["video_token_id"]
    assert generation.eos_token_id == [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")]
    assert len(tokenizer) == config["text_config"]["vocab_size"]


# Tokenizer.


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_tokens_are_its_bytes(tokenizer, text):
    text = unicodedata.normalize("NFC", text)
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_added_tokens_are_single_ids_and_hidden_like_in_the_release(tokenizer):
    assert len(ADDED) == 50 and len(set(ADDED)) == 50
    for token in ADDED:
        assert tokenizer.encode(token) == [IDS[token]]
    hidden = tokenizer.decode([IDS[token] for token in ADDED], skip_special_tokens=True)
    assert hidden.split() == list(VISIBLE) or hidden == "".join(VISIBLE)
    assert not set(VISIBLE) & set(SPECIAL)


def test_token_roles(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
    for role, token in ROLES.items():
        assert getattr(tokenizer, role) == token and getattr(tokenizer, f"{role}_id") == IDS[token]


def test_tokenizer_and_template_need_no_torch(demo_folder):
    script = f"""
import sys
sys.modules["torch"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(demo_folder)!r})
print(tokenizer.apply_chat_template([{USER!r}], tokenize=False), end="")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == ASKED, done.stderr


# Chat template. Each expected text is the release's template's result, except for the words that introduce
# tools.


def test_template_turns(render):
    said = {"role": "assistant", "content": " Hello. \n"}
    assert render({"role": "system", "content": "Be brief. "}, USER, said, USER) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + ASKED + "<|im_start|>assistant\nHello.<|im_end|>\n" + ASKED
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "<think>\n\n</think>\n\n"),
        ({"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ({"enable_thinking": True}, "<think>\n"),
    ],
)
def test_template_generation_prompt(render, options, expected):
    assert render(USER, add_generation_prompt=True, **options) == ASKED + "<|im_start|>assistant\n" + expected


@pytest.mark.parametrize(
    "part, expected",
    [
        ({"type": "image"}, "<|image_pad|>"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "<|image_pad|>"),
        ({"image": "x"}, "<|image_pad|>"),
        ({"type": "video"}, "<|video_pad|>"),
        ({"video": "x"}, "<|video_pad|>"),
        ({"type": "text", "text": "one"}, "one"),
    ],
)
def test_template_content_parts(render, part, expected):
    message = {"role": "user", "content": [part, {"type": "text", "text": "two"}]}
    assert render(message) == f"<|im_start|>user\n{expected}\ntwo<|im_end|>\n"


def test_template_keeps_only_thoughts_of_the_current_question(render):
    thought = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm.\n"}
    inline = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    for message in (thought, inline):
        assert render(USER, message, USER) == ASKED + "<|im_start|>assistant\nYes.<|im_end|>\n" + ASKED
        assert render(USER, message) == ASKED + "<|im_start|>assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|>\n"


def test_template_tool_calls_and_results(render):
    arguments = {"a": 1, "text": "two\nlines", "list": [1, {"é": None}], "flag": True}
    calls = [{"type": "function", "function": {"name": "add", "arguments": arguments}}, {"name": "now", "arguments": {}}]
    answers = [{"role": "tool", "content": "3"}, {"role": "tool", "content": [{"type": "text", "text": "noon"}]}]
    assert render(USER, {"role": "assistant", "content": "Wait.", "tool_calls": calls}, *answers) == (
        ASKED + "<|im_start|>assistant\n<think>\n\n</think>\n\nWait.\n\n"
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=text>\ntwo\nlines\n</parameter>\n"
        '<parameter=list>\n[1, {"é": null}]\n</parameter>\n<parameter=flag>\nTrue\n</parameter>\n</function>\n</tool_call>\n'
        "<tool_call>\n<function=now>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
    )


def test_template_describes_tools_in_a_system_block(render):
    text = render({"role": "system", "content": "Be brief."}, USER, tools=[TOOL])
    block, rest = text.split("<|im_end|>\n", 1)
    assert rest == ASKED
    assert block.startswith("<|im_start|>system\n") and block.endswith("\n\nBe brief.")
    assert '<tools>\n{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}\n</tools>' in block
    assert re.search(r"<tool_call>\n<function=.+>\n<parameter=.+>\n.+\n</parameter>", block)
    assert render(USER, tools=[TOOL]).startswith("<|im_start|>system\n")


@pytest.mark.parametrize(
    "messages, words",
    [
        ([{"role": "system", "content": "x"}], "no user turn"),
        ([USER, {"role": "system", "content": "x"}], "only come first"),
        ([{"role": "system", "content": [{"type": "image"}]}, USER], "system message cannot hold images"),
        ([{"role": "system", "content": [{"type": "video"}]}, USER], "system message cannot hold videos"),
        ([USER, {"role": "critic", "content": "x"}], "unknown role"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "neither text, image nor video"),
        ([{"role": "user", "content": {"text": "x"}}], "Content is an object"),
        ([{"role": "user", "content": 5}], "neither text nor a list"),
    ],
)
def test_template_refusals(render, messages, words):
    with pytest.raises(jinja2.TemplateError, match=words):
        render(*messages)


def test_template_refuses_an_empty_conversation(demo_folder):
    """transformers refuses it before it renders the template; other users of the template may not."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    template = jinja2.Environment().from_string((demo_folder / "chat_template.jinja").read_text())
    with pytest.raises(jinja2.TemplateError, match="no messages"):
        template.render(messages=[], raise_exception=refuse)
