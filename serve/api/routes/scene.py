"""GET /scene: pictures that the demo model has never seen, and a question about them; for the page."""

import base64
import io
import secrets
from typing import Any

from fastapi import APIRouter, Request, Response
from PIL import Image

from minicpmv46_jax import scenes

router = APIRouter()

SHOWN = ("shapes", "letters", "lines", "signs", "table", "small print", "pair")  # kinds that are pictures alone
MIX = {kind: scenes.MIX[kind] for kind in SHOWN}


@router.get("/scene", include_in_schema=False, response_model=None)
async def scene(request: Request) -> dict[str, Any] | Response:
    """A question and `data:` URLs of PNG files, others each time; nothing (204) where another model is served."""
    service = request.app.state.service
    return await service.in_thread(drawn) if service.demo else Response(status_code=204)


def drawn() -> dict[str, Any]:
    """Of the held-out split."""
    seed = secrets.randbits(32)
    one = scenes.draw(seed, held_out=True, mix=MIX)
    turn, _ = scenes.exam_turn(seed, one)
    return {"question": turn.question, "pictures": [_png(picture) for picture in one.media]}


def _png(picture: scenes.Picture) -> str:
    file = io.BytesIO()
    Image.fromarray(picture.render()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
