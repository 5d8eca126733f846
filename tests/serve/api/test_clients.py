"""The openai client and the demo checkpoint over a loopback port: images, streams, concurrency, errors."""

import asyncio
import base64
import io
import wave

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from serve.api import Service
from serve.api.common.prompt import opens_thinking
from serve.multimodal.media_fetcher import MediaFetcher
from tests.serve.engine.small_engine import SMALL_PLAN
from tests.serve.support import NAME, live

FEW = {"max_tokens": 12, "temperature": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that local media may be read from."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def address(demo, demo_engine, folder):
    service = Service(demo, demo_engine, NAME, api_keys=("secret",), fetcher=MediaFetcher(folder))
    with live(service) as address:
        yield f"{address}/v1"
    service.media.close()


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=address, api_key="secret", max_retries=0, timeout=60)


def data_url(image, kind="png"):
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def conversation(*parts):
    return [{"role": "user", "content": [*parts]}]


def text(words):
    return {"type": "text", "text": words}


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def video(content):
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(content).decode()}"}}


def clip(frames, rate=4):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * i, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def sound():
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1), out.setsampwidth(2), out.setframerate(8000)
        out.writeframes(bytes(16000))
    return file.getvalue()


def test_photograph(client, demo, photos):
    question = text("What is this?")
    expected = demo.chat(conversation({"type": "image", "image": photos[0]}, question), max_new_tokens=12, temperature=0.0)
    messages = conversation(image(data_url(photos[0])), question)
    answer = client.chat.completions.create(model=NAME, messages=messages, **FEW)
    assert answer.choices[0].message.content == expected != ""
    assert answer.usage.prompt_tokens == len(demo.process(messages).token_ids)

    chunks = list(client.chat.completions.create(model=NAME, messages=messages, stream=True, **FEW))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason

    whole = {"extra_body": {"mm_processor_kwargs": {"max_slice_nums": 1}}}
    fewer = client.chat.completions.create(model=NAME, messages=messages, **FEW, **whole)
    assert fewer.usage.prompt_tokens < answer.usage.prompt_tokens  # 640 x 427 is sliced by default


def test_stream_equals_the_whole_answer(client):
    ask = {"model": NAME, "messages": [{"role": "user", "content": "Say something long."}], "temperature": 0.0, "max_tokens": 60}
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 1
    assert chunks[-1].usage == whole.usage


def test_same_seed_gives_the_same_answer(client):
    def draw(seed):
        messages = [{"role": "user", "content": "Draw."}]
        answer = client.chat.completions.create(model=NAME, messages=messages, seed=seed, temperature=1.0, max_tokens=12)
        return answer.choices[0].message.content

    assert draw(3) == draw(3) != draw(4)


def test_logprobs(client):
    messages = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(
        model=NAME, messages=messages, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0.0
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)  # greedy
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
        assert len(entry.top_logprobs) == 3


def test_concurrent_requests_get_the_same_answers_as_alone(address, client, photos):
    small = photos[1].resize((80, 60))
    conversations = [[{"role": "user", "content": f"Question {i}"}] for i in range(4)]
    conversations += [conversation(image(data_url(small.rotate(120 * i))), text("Which way up?")) for i in range(3)]
    conversations += [conversation(video(clip(5)), text("What moves?"))]
    alone = [client.chat.completions.create(model=NAME, messages=messages, **FEW) for messages in conversations]

    async def at_once():
        async with openai.AsyncOpenAI(base_url=address, api_key="secret", max_retries=0, timeout=60) as http:
            return await asyncio.gather(*(streamed(http, messages) for messages in conversations))

    async def streamed(http, messages):
        stream = await http.chat.completions.create(model=NAME, messages=messages, stream=True, **FEW)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(at_once()) == [answer.choices[0].message.content for answer in alone]


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]


def test_tokenize_reports_media_costs(address, demo, photos):
    messages = conversation(video(clip(5)), image(data_url(photos[0])), text("?"), image(data_url(photos[1].resize((80, 60)))))
    root, headers = address.removesuffix("/v1"), {"Authorization": "Bearer secret"}
    answer = httpx.post(f"{root}/tokenize", headers=headers, json={"messages": messages}, timeout=60).json()
    inputs = demo.process(messages)
    assert answer["tokens"] == inputs.token_ids.tolist() and answer["count"] == len(answer["tokens"])
    film, large, small = answer["media"]
    assert (film["type"], film["pictures"]) == ("video", len(inputs.video_grids[0]))
    assert [large["grid"], small["grid"]] == [list(grid) for grid in inputs.image_grids] and small["grid"] == [0, 0]
    assert len(large["views"]) == 1 + large["grid"][0] * large["grid"][1]
    pads = sum(view.num_tokens for view in inputs.views)
    assert film["tokens"] + large["tokens"] + small["tokens"] == pads
    assert large["tokens"] > small["tokens"] > 0


@pytest.mark.parametrize(
    "options, opened",
    [
        ({}, False),
        ({"enable_thinking": True}, True),
        ({"add_generation_prompt": False}, False),
    ],
)
def test_opens_thinking(demo, options, opened):
    for prefix in ("Hi", "<think>", "<|im_start|>assistant\n<think>\n"):
        assert opens_thinking(demo, demo.process([{"role": "user", "content": prefix}], **options).token_ids) == opened


def test_opens_thinking_of_a_continued_message(demo):
    going = {"add_generation_prompt": False, "continue_final_message": True}
    for prefix, opened in (("<think>\nwell", True), ("Well", False)):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": prefix}]
        assert opens_thinking(demo, demo.process(messages, **going).token_ids) == opened, prefix


def test_local_files_under_the_allowed_folder(client, folder, photos):
    photos[1].resize((80, 60)).save(folder / "flower.png")
    messages = conversation(image((folder / "flower.png").as_uri()), text("What is it?"))
    sent = conversation(image(data_url(Image.open(folder / "flower.png"))), text("What is it?"))
    local, data = (client.chat.completions.create(model=NAME, messages=m, **FEW) for m in (messages, sent))
    assert local.choices[0].message.content == data.choices[0].message.content


def refusals():
    picture = Image.new("1", (20_000, 20_000))
    less = Image.new("1", (10_000, 10_000))
    hello = base64.b64encode(b"hello").decode()
    return {
        "not an image": (conversation(image(f"data:image/png;base64,{hello}")), "messages[0].content[0]", "not an image"),
        "not base64": (conversation(text("x"), image("data:image/png;base64,!")), "messages[0].content[1]", "broken base64"),
        "bomb": (conversation(image(data_url(picture))), "messages[0].content[0]", "400000000"),
        "large": (conversation(image(data_url(less))), "messages[0].content[0]", "100000000 pixels"),
        "truncated": (conversation(image(data_url(less)[:500])), "messages[0].content[0]", "data URL"),
        "not a video": (conversation(video(b"hello")), "messages[0].content[0]", "not a video"),
        "no frames": (conversation(video(clip(0))), "messages[0].content[0]", "data URL"),
        "half a video": (conversation(video(clip(9)[:600])), "messages[0].content[0]", "data URL"),
        "sound": (conversation(video(sound())), "messages[0].content[0]", "no video stream"),
        "secret": (conversation(image("/etc/hostname")), "messages[0].content[0]", "--allowed-local-media-path"),
        "private": (conversation(image("http://127.0.0.1:9/x.png")), "messages[0].content[0]", "not an address on the internet"),
        "link-local": (conversation(text("x"), image("http://169.254.169.254/")), "messages[0].content[1]", "169.254.169.254"),
        "scheme": (conversation(image("ftp://host/x.png")), "messages[0].content[0]", "unsupported scheme 'ftp'"),
        "no user": ([{"role": "assistant", "content": "x"}], "messages", "user"),
        "unknown part": (conversation({"type": "audio"}), "messages[0].content[0]", "'audio'"),
        "placeholder": (conversation(text("<|image_pad|>")), "messages[0].content[0]", "<|image_pad|>"),
        "too long": ([{"role": "user", "content": "x" * 9000}], "messages", str(SMALL_PLAN.max_model_len)),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow warns in addition to the server's error
@pytest.mark.parametrize("stream", [False, True])
def test_invalid_messages_and_media_are_refused(client, stream):
    for name, (messages, param, words) in refusals().items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=NAME, messages=messages, stream=stream, **FEW)
        assert caught.value.param == param, (name, caught.value)
        assert words in caught.value.body["message"] and "\n" not in caught.value.body["message"], (name, caught.value)
    assert client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Still there?"}], **FEW).usage


def test_wrong_key_and_wrong_model(address, client):
    unauthorized = openai.OpenAI(base_url=address, api_key="guess", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        unauthorized.models.list()
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "Hi"}])
