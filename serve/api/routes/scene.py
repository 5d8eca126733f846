"""GET /scene, for the chat page: a scene that the demo model was not trained on, and a question about it."""

import base64
import io
import secrets
from typing import Any

from fastapi import APIRouter, Request, Response
from PIL import Image

from minicpmv46_jax import scenes

router = APIRouter()

IMAGE_KINDS = ("shapes", "letters", "lines", "signs", "table", "small print", "pair")  # kinds without videos
MIX = {kind: scenes.MIX[kind] for kind in IMAGE_KINDS}


@router.get("/scene", include_in_schema=False, response_model=None)
async def scene(request: Request) -> dict[str, Any] | Response:
    """Returns a random question and the `data:` URLs of its images; 204 without content for other models."""
    service = request.app.state.service
    return await service.run_in_thread(draw_scene) if service.demo else Response(status_code=204)


def draw_scene() -> dict[str, Any]:
    """Draws a scene of the held-out split."""
    seed = secrets.randbits(32)
    drawn = scenes.draw(seed, held_out=True, mix=MIX)
    turn, _ = scenes.exam_turn(seed, drawn)
    return {"question": turn.question, "pictures": [_png(picture) for picture in drawn.media]}


def _png(picture: scenes.Picture) -> str:
    file = io.BytesIO()
    Image.fromarray(picture.render()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
