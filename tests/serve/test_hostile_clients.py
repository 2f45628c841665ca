"""The page's server and clients that are slow, many, strangers or liars, on real connections."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("python_multipart", reason="the extra 'serve' is not installed")

from running_server import running

from pipeline import Captioner
from pipeline.captioner import Prediction
from pipeline.decoding.captions import Caption
from pipeline.serve import app as server
from pipeline.serve import uploads


class StubCaptioner:
    """Captions in no time; ``most`` is how many requests it ever had at once."""

    def __init__(self) -> None:
        self.now = self.most = self.calls = 0

    def search_config(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace()

    def stream(self, paths: list[Path], *_: object, **__: object) -> Iterator[Prediction]:
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.01)
        self.now -= 1
        return iter([Prediction(str(path), [Caption("a \x9bdog", -1.0)]) for path in paths])


@pytest.fixture
def captioner() -> StubCaptioner:
    return StubCaptioner()


@pytest.fixture
def port(
    captioner: StubCaptioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with running(cast(Captioner, captioner)) as port:
        yield port
    assert list(folder.iterdir()) == []  # whatever happened


def body() -> bytes:
    image = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(image, "PNG")
    head = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return head + image.getvalue() + b"\r\n--x--\r\n"


def head(port: int, length: int, **headers: str) -> bytes:
    lines = {
        "host": f"127.0.0.1:{port}",
        "content-type": "multipart/form-data; boundary=x",
        "content-length": str(length),
        "connection": "close",
        **headers,
    }
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST /caption HTTP/1.1\r\n{text}\r\n".encode()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def answer(connection: socket.socket) -> tuple[int, Any]:
    """Read to the end; gives status and JSON, or 0 where there is no answer."""
    content = b""
    try:
        while piece := connection.recv(65536):
            content += piece
    except ConnectionResetError:
        pass
    if not content:
        return 0, None
    lines, _, text = content.partition(b"\r\n\r\n")
    return int(lines.split()[1]), json.loads(text) if b"json" in lines else None


def ask(port: int, **headers: str) -> tuple[int, Any]:
    with connect(port) as connection:
        connection.sendall(head(port, len(body()), **headers) + body())
        return answer(connection)


def test_fifty_at_once_are_answered_one_by_one(port: int, captioner: StubCaptioner) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: ask(port), range(50)))
    assert [status for status, _ in answers] == [200] * 50
    assert captioner.calls == 50 and captioner.most == 1
    assert ask(port)[0] == 200  # nobody's place is left taken


def test_who_never_ends_a_head_is_let_go(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    silent = [connect(port) for _ in range(60)]
    for number, connection in enumerate(silent):
        connection.sendall(b"POST /caption HTTP/1.1\r\nx: "[: number % 28])
    assert ask(port)[0] == 200  # others are served meanwhile
    for connection in silent:
        assert answer(connection)[0] == 0
        connection.close()


def test_who_sends_a_image_byte_by_byte_is_refused(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "BODY_SECONDS", 0.5)
    slow = [connect(port) for _ in range(server.MAX_WAITING)]
    stopped = threading.Event()

    def drip() -> None:
        while not stopped.wait(0.05):
            for connection in slow:
                try:
                    connection.send(b"\r\n")
                except OSError:
                    return

    for connection in slow:
        connection.sendall(head(port, 1_000_000))
    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        assert ask(port)[0] == 200
        status, refused = answer(slow[0])
        assert (status, refused) == (408, {"error": "the request arrives too slowly"})
    finally:
        stopped.set()
        dripping.join(20)
        for connection in slow:
            connection.close()
    assert ask(port)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ],
)
def test_strangers_names_are_refused_unread(
    port: int, captioner: StubCaptioner, headers: dict[str, str]
) -> None:
    status, _ = ask(port, **headers)
    assert status == 403
    assert captioner.calls == 0


@pytest.mark.parametrize("length", [-10, 10])
def test_a_length_that_lies_captions_nothing_and_breaks_nothing(
    port: int, captioner: StubCaptioner, length: int
) -> None:
    with connect(port) as connection:
        connection.sendall(head(port, len(body()) + length) + body())
        connection.shutdown(socket.SHUT_WR)
        status, _ = answer(connection)
    assert status in (0, 400)
    assert captioner.calls == 0
    assert ask(port)[0] == 200


def test_answers_show_no_controls(port: int) -> None:
    with connect(port) as connection:
        content = body().replace(b"a.png", "\u202egpj.exe".encode())
        connection.sendall(head(port, len(content)) + content)
        raw = connection.recv(65536)
        while piece := connection.recv(65536):
            raw += piece
    text = raw.decode()
    assert "\x9b" not in text and "\u202e" not in text
    (image,) = json.loads(text.partition("\r\n\r\n")[2])["images"]
    assert image["image"] == "\u202egpj.exe" and image["captions"][0]["caption"] == "a \x9bdog"


@given(
    at=st.integers(0, 200),
    new=st.binary(max_size=12),
    cut=st.integers(1, 100),
    content_type=st.just("multipart/form-data; boundary=x")
    | st.text(st.characters(max_codepoint=255), max_size=60)  # as headers are decoded
    | st.text(st.characters(max_codepoint=255), max_size=80).map("multipart/form-data;".__add__),
)
@example(at=0, new=b"", cut=1, content_type="multipart/form-data; boundary=x")
@settings(max_examples=300)
def test_any_body_is_a_form_or_refused(
    at: int, new: bytes, cut: int, content_type: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(body())
    content[at : at + len(new)] = new

    async def read() -> None:
        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(content), cut):
                yield bytes(content[start : start + cut])

        folder = tmp_path_factory.mktemp("uploads")
        try:
            form = await uploads.read_form(content_type, pieces(), folder)
        except uploads.RefusedError as error:
            assert 400 <= error.status < 500
        else:
            assert all(folder in upload.path.parents for upload in form.uploads)

    asyncio.run(read())
