"""GET /: the chat page."""

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from serve.web import page

router = APIRouter()


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def home() -> HTMLResponse:
    """Open to all: it asks for a key where the server wants one."""
    html, headers = page()
    return HTMLResponse(html, headers=headers)
