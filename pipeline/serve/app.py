"""The local page of ``caption.py --serve``, and its endpoint for scripts; see docs/server.md.

Served to this machine alone. Gradio would make such a page in a few lines, but it is heavy, fetches
fonts from elsewhere and reports its use; this is one page without any address but its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import tempfile
import threading
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.outputs.formats import caption_record
from pipeline.utils.errors import UserError
from pipeline.utils.terminal import as_json, echo

try:
    import h11
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from pipeline.serve.uploads import (
        MAX_FILE_BYTES,
        RANGES,
        RefusedError,
        Upload,
        Wishes,
        in_time,
        read_form,
    )
except ImportError as error:
    raise UserError(
        f"--serve: {error.name} is not installed; pip install starlette uvicorn python-multipart"
    ) from error

if TYPE_CHECKING:
    from pipeline.captioner import Captioner, Prediction

TEMPLATES = Path(__file__).parents[1] / "templates"
# Requests that may wait for the one that is captioned.
MAX_WAITING = 256
# Of these, whose images are taken in; those of the others stay where they are.
MAX_ARRIVED = 32
# Seconds that the head of a request may take.
HEAD_SECONDS = 20.0
# Names of this machine. Another name that leads here is a stranger's, who would read the answers.
LOCAL_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")
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

Result = TypeVar("Result")


def caption_uploads(
    captioner: Captioner, uploads: Sequence[Upload], wishes: Wishes
) -> list[Prediction]:
    """Caption the images of one request."""
    config = captioner.search_config(
        wishes.beam_size,
        least=wishes.num_captions,
        temperature=wishes.temperature,
        top_p=wishes.top_p,
        seed=wishes.seed,
    )
    paths = [upload.path for upload in uploads]
    return list(captioner.stream(paths, config, wishes.num_captions, details=True))


def as_answer(upload: Upload, prediction: Prediction) -> dict[str, Any]:
    """Describe what became of an image, under the name that it came with."""
    if prediction.error is not None:
        return {"image": upload.name, "error": prediction.error}
    captions = [caption_record(caption) for caption in prediction.captions]
    return {"image": upload.name, "captions": captions}


class Line:
    """Requests that wait their turn: the network works best on one at a time."""

    def __init__(self) -> None:
        self.length = 0
        # One who is refused asks again later and finds others there: waiting in order is fair.
        self._arrived = asyncio.Semaphore(MAX_ARRIVED)
        self._turn = asyncio.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="caption")

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Have a place in the line; goes on when the request's images may come in.

        Raises:
            RefusedError: 503, it is too long.
        """
        if self.length > MAX_WAITING:
            raise RefusedError(503, f"{MAX_WAITING} requests are waiting already; try again soon")
        self.length += 1
        try:
            async with self._arrived:
                yield
        finally:
            self.length -= 1

    async def run(self, request: Request, function: Callable[[], Result]) -> Result:
        """Call ``function`` in a thread, after those that came before.

        Raises:
            ClientDisconnect: nobody waits for the answer any more.
        """
        async with self._turn:
            if await request.is_disconnected():
                raise ClientDisconnect
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class PunctualProtocol(H11Protocol):
    """HTTP with uvicorn, which would wait for ever for the end of a request's head."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take what has come, and wait for the rest of a head."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        if self._head is not None:
            self._head.cancel()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            if self._head is not None:
                self._head.cancel()
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._end)

    def _end(self) -> None:
        self._head = None
        if self.conn.their_state is h11.IDLE:
            self.transport.close()


class Guard:
    """Answers only what this machine asks itself, and says on every answer what it may do.

    A page of a stranger can make the browser send requests here. What it would send it marks
    with the page's own address (Origin), or, where the stranger's name was made to lead here (DNS
    rebinding), with that name (Host).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        app = self.app
        if LOCAL_HOST.fullmatch(host) is None:
            app = refusal(403, "this is for the machine itself: http://127.0.0.1 or localhost")
        elif origin is not None and origin != f"http://{host}":
            app = refusal(403, "this is for its own page, and for scripts; not for other pages")
        await app(scope, receive, send_with_headers)


class Answer(JSONResponse):
    """JSON that a terminal, too, can show: control characters are escaped."""

    def render(self, content: Any) -> bytes:
        """Write the body."""
        return as_json(content).encode("utf-8")


def refusal(status: int, reason: str) -> JSONResponse:
    """Say why a request is not served."""
    headers = {"Retry-After": "2"} if status == 503 else {}
    return Answer({"error": reason}, status, headers)


def make_app(captioner: Captioner, model_name: str) -> Starlette:
    """Make the application: the page, ``POST /caption`` and ``GET /health``.

    Args:
        captioner: what makes the captions, one request at a time.
        model_name: what people know the model by.
    """
    line = Line()

    async def caption(request: Request) -> Response:
        async with line.place():
            with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
                content_type = request.headers.get("content-type", "")
                form = await read_form(content_type, in_time(request.stream()), Path(folder))
                wishes = Wishes.parse(form.fields)
                if not form.uploads:
                    raise RefusedError(400, "image: no image; with curl, write -F image=@photo.jpg")
                predictions = await line.run(
                    request, lambda: caption_uploads(captioner, form.uploads, wishes)
                )
                images = map(as_answer, form.uploads, predictions)
                return Answer({"model": model_name, "images": list(images)})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": model_name, "requests": line.length})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        line.close()

    def static(text: str, media_type: str) -> Callable[[Request], Response]:
        return lambda request: Response(text, media_type=media_type)

    return Starlette(
        routes=[
            Route("/", static(page(model_name), "text/html")),
            Route("/page.css", static(_template("serve.css"), "text/css")),
            Route("/page.js", static(_template("serve.js"), "text/javascript")),
            Route("/caption", caption, methods=["POST"]),
            Route("/health", health),
        ],
        middleware=[Middleware(Guard)],
        exception_handlers={
            RefusedError: lambda request, error: refusal(error.status, str(error)),
            UserError: lambda request, error: refusal(400, error.message),
            HTTPException: lambda request, error: refusal(error.status_code, error.detail),
            # Nobody reads this answer.
            ClientDisconnect: lambda request, error: refusal(400, "cancelled"),
            Exception: lambda request, error: JSONResponse(
                {"error": "the captioner failed; its terminal says more"}, 500, HEADERS
            ),
        },
        lifespan=lifespan,
    )


def page(model_name: str) -> str:
    """Fill in the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("serve.html").render(
        model=model_name, ranges=RANGES, max_file_bytes=MAX_FILE_BYTES
    )


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def listen(port: int) -> socket.socket:
    """Take a port of 127.0.0.1; 0 for any that is free.

    Raises:
        UserError: it cannot be had.
    """
    try:
        return socket.create_server(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "not a port"
        raise UserError(
            f"--port {port}: cannot be had ({reason}); give another, or 0 for any that is free"
        ) from error


def serve(captioner: Captioner, model_name: str, port: int, open_browser: bool) -> None:
    """Serve the page until Ctrl-C.

    Args:
        captioner: what makes the captions.
        model_name: what people know the model by.
        port: of 127.0.0.1; 0 for any that is free.
        open_browser: show the page in the user's browser.

    Raises:
        UserError: the port cannot be had.
    """
    with listen(port) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        echo(f"captions at {address} for this machine alone; Ctrl-C ends it", err=True)
        if open_browser:
            # A browser in the terminal would not come back before it is closed.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            make_server(captioner, model_name).run([listener])


def make_server(captioner: Captioner, model_name: str) -> uvicorn.Server:
    """Make the server of ``make_app``'s application."""
    config = uvicorn.Config(
        make_app(captioner, model_name),
        http=PunctualProtocol,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)
