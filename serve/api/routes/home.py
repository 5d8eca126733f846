"""GET /: the chat page."""

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from serve.web import page

router = APIRouter()


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def home() -> HTMLResponse:
    """Returns the chat page, without an API key. The page itself asks for the key if the server has keys."""
    html, headers = page()
    return HTMLResponse(html, headers=headers)
