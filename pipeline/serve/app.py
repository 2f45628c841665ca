"""The local page of ``caption.py --serve`` and its endpoint for scripts; see docs/server.md.

It listens on 127.0.0.1 only, and the page requests nothing from any other address.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import tempfile
import threading
import time
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.captioner import Captioner
from pipeline.decoding.options import SearchOptions
from pipeline.models.pretrained import PRETRAINED, pretrained_path
from pipeline.outputs.formats import as_record
from pipeline.utils.errors import UserError
from pipeline.utils.html import TEMPLATES, environment, read_asset
from pipeline.utils.terminal import as_json, echo

try:
    import python_multipart  # noqa: F401  (Starlette imports it with the first form)
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import Headers, MutableHeaders, UploadFile
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from pipeline.serve.form import FIELDS, MAX_IMAGE_BYTES, parse_form, read_form
except ImportError as error:
    raise UserError(
        f"--serve: {error.name} is not installed; pip install starlette uvicorn python-multipart"
    ) from error

# Limits: requests waiting for the one being captioned; those that may upload; open connections,
# beyond which uvicorn answers 503.
MAX_WAITING = 256
MAX_UPLOADING = 32
MAX_CONNECTIONS = 1024
# Example photographs in the public domain (CC0), from scikit-image.
EXAMPLES = TEMPLATES / "examples"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def caption_uploads(
    captioner: Captioner, images: Sequence[UploadFile], fields: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return a JSON record per image: its original name, and captions or an error."""
    search = dict(fields)
    explain = bool(search.pop("explain", 0))
    with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
        paths = []
        for number, image in enumerate(images):
            content = image.file.read()
            # Sampled captions depend on the file name, so make it depend only on the bytes.
            path = Path(folder, str(number), hashlib.sha256(content).hexdigest())
            path.parent.mkdir()
            path.write_bytes(content)
            paths.append(path)
        predictions = list(
            captioner.stream(paths, SearchOptions(**search), details=True, explain=explain)
        )
    return [
        {**as_record(prediction), "image": image.filename or ""}
        for image, prediction in zip(images, predictions, strict=True)
    ]


def respond(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response that is safe to print on a terminal: no control characters."""
    return Response(as_json(content), status, headers, "application/json")


def fail(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response to a failed request."""
    return respond({"error": reason}, status, headers)


class SameOriginOnly:
    """Refuses cross-site requests; sets ``HEADERS`` on every response.

    Browsers send the address of the requesting page (Origin). A site whose name was made to resolve
    to this machine (DNS rebinding) shows in Host, which ``TrustedHostMiddleware`` checks.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers, app = Headers(scope=scope), self.app
        if headers.get("origin") not in (None, f"http://{headers.get('host')}"):
            app = fail(403, "this server is for its own page and for scripts, not for other pages")
        await app(scope, receive, send_with_headers)


def model_card(model_name: str) -> str:
    """Return the text of the pretrained model's card; other models have none."""
    path = pretrained_path().with_name("MODEL_CARD.md") if model_name == PRETRAINED else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else ""


def make_app(captioner: Captioner, model_name: str) -> Starlette:
    """Return the application: the page, ``POST /caption`` and ``GET /health``."""
    requests = 0  # uploading, waiting or being captioned
    uploading = asyncio.Semaphore(MAX_UPLOADING)
    captioning = asyncio.Semaphore(1)

    async def caption(request: Request) -> Response:
        nonlocal requests
        if requests > MAX_WAITING:
            reason = f"{MAX_WAITING} requests are waiting already; try again soon"
            return fail(503, reason, {"Retry-After": "2"})
        requests += 1
        try:
            async with uploading, read_form(request) as form:
                images, fields = parse_form(form)
                async with captioning:
                    if await request.is_disconnected():
                        raise ClientDisconnect
                    began = time.perf_counter()
                    results = await run_in_threadpool(caption_uploads, captioner, images, fields)
                    seconds = round(time.perf_counter() - began, 3)
                return respond({"model": model_name, "images": results, "seconds": seconds})
        finally:
            requests -= 1

    async def health(request: Request) -> Response:
        return respond({"status": "ok", "model": model_name, "requests": requests})

    def static(address: str, text: str, media_type: str) -> Route:
        return Route(address, lambda _: Response(text, media_type=media_type))

    style, script = read_asset("base.css", "serve.css"), read_asset("words.js", "serve.js")
    page = environment().get_template("serve.html")
    card = model_card(model_name)
    search = captioner.search_config()
    text = page.render(
        model=model_name,
        model_card=card,
        examples=sorted(path.name for path in EXAMPLES.iterdir()),
        ranges=FIELDS,
        max_file_bytes=MAX_IMAGE_BYTES,
        beam_size=search.beam_size,
        reranked=bool(search.consensus or search.matching),
    )
    card_page = environment().get_template("model_card.html").render(card=card)
    cards = [static("/model-card", card_page, "text/html")] if card else []
    return Starlette(
        routes=[
            *cards,
            Mount("/examples", StaticFiles(directory=EXAMPLES)),
            static("/", text, "text/html"),
            static("/page.css", style, "text/css"),
            static("/page.js", script, "text/javascript"),
            Route("/caption", caption, methods=["POST"]),
            Route("/health", health),
        ],
        middleware=[
            Middleware(SameOriginOnly),
            Middleware(TrustedHostMiddleware, ["127.0.0.1", "localhost"], www_redirect=False),
        ],
        exception_handlers={
            HTTPException: lambda _, error: fail(error.status_code, error.detail, error.headers),
            UserError: lambda _, error: fail(400, error.message),
            ClientDisconnect: lambda *_: fail(400, "cancelled"),  # nobody reads this
            # This response bypasses the middleware.
            Exception: lambda *_: fail(500, "the captioner failed; see its terminal", HEADERS),
        },
    )


def listen(port: int) -> socket.socket:
    """Listen on a port of 127.0.0.1; 0 for any free one. UserError if it cannot be used."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        reason = f"{error.strerror}; choose another, or 0 for any free one"
        raise UserError(f"--port {port}: {reason}") from error


def make_server(captioner: Captioner, model_name: str) -> uvicorn.Server:
    """Return a server of ``make_app``'s application."""
    return uvicorn.Server(
        uvicorn.Config(
            make_app(captioner, model_name),
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
    )


def serve(captioner: Captioner, model_name: str, port: int, open_browser: bool) -> None:
    """Serve the page until Ctrl-C; see ``listen`` for ``port``."""
    with listen(port) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        echo(f"captioning at {address} for this machine only; Ctrl-C stops it", err=True)
        if open_browser:
            # webbrowser.open blocks as long as a browser in the terminal is open.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            make_server(captioner, model_name).run([listener])
