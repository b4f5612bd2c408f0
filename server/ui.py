"""`GET /`: a page to try the model. One static file, and headers that forbid whatever it does not do."""

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

PAGE = Path(__file__).with_name("static") / "index.html"


def add_ui(app: FastAPI) -> None:
    """Serve the page at /. It is read once, here."""
    page = PAGE.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",  # a new server's page at once
    }

    @app.get("/", include_in_schema=False)
    async def ui() -> Response:
        """The page."""
        return HTMLResponse(page, headers=headers)


def content_security_policy(page: str) -> str:
    """Only the script and style that stand in the page run, and they reach this server alone.

    Trusted types: the script cannot turn text into HTML, so no answer of a model can become any.
    """
    rules = (
        "default-src 'none'",
        f"script-src {_hashes('script', page)}",
        f"style-src {_hashes('style', page)}",
        "img-src data:",  # the icon
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return "; ".join(rules)


def _hashes(tag: str, page: str) -> str:
    bodies = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(body.encode()).digest()).decode()}'" for body in bodies)
