"""Asks a running server about a picture, with OpenAI's client: `python -m minicpmv46_jax.examples.client`.

Start a server first: `python -m serve`. The example requires `pip install openai`.
"""

import argparse
import base64
import io
import mimetypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image

from minicpmv46_jax.examples.describe_picture import drawn_picture


def data_url(picture: str | None) -> str:
    """Returns a picture file as a data URL; the drawn picture if None."""
    if picture is None:
        png = io.BytesIO()
        Image.fromarray(drawn_picture()).save(png, "png")
        media_type, data = "image/png", png.getvalue()
    else:
        media_type, data = mimetypes.guess_type(picture)[0] or "image/*", Path(picture).read_bytes()
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def answer(client: OpenAI, model: str, messages: list[Any]) -> str:
    """Returns the whole answer."""
    response = client.chat.completions.create(model=model, messages=messages, temperature=0.0)
    return response.choices[0].message.content or ""


def stream(client: OpenAI, model: str, messages: list[Any]) -> Iterator[str]:
    """Yields the answer's text while the server generates it."""
    for chunk in client.chat.completions.create(model=model, messages=messages, temperature=0.0, stream=True):
        if chunk.choices and (text := chunk.choices[0].delta.content):
            yield text


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the server's base URL (default: %(default)s)")
    parser.add_argument("--key", default="none", help="API key, for a server with --api-key")
    parser.add_argument("--picture", help="path or URL of a picture (default: two drawn shapes)")
    parser.add_argument("--question", default="What do you see?", help="the question (default: %(default)s)")
    args = parser.parse_args(arguments)

    client = OpenAI(base_url=args.url, api_key=args.key)
    model = client.models.list().data[0].id
    is_url = args.picture is not None and args.picture.startswith(("http://", "https://"))
    picture = {"type": "image_url", "image_url": {"url": args.picture if is_url else data_url(args.picture)}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": args.question}]}]

    print("whole:   ", answer(client, model, messages))
    print("streamed: ", end="")
    for text in stream(client, model, messages):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
