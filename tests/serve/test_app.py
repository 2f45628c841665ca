"""The endpoint of caption.py --serve: ordinary requests, hostile ones, and the server itself."""

from __future__ import annotations

import asyncio
import html
import importlib
import io
import math
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from conftest import REPOSITORY
from drawn_run import DrawnRun
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from running_server import running

from pipeline import Captioner
from pipeline.captioner import Prediction
from pipeline.decoding.captions import Caption
from pipeline.decoding.options import SearchConfig, SearchOptions
from pipeline.serve import app as server
from pipeline.serve import form
from pipeline.utils.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it prefers a successor of httpx
    from starlette.testclient import TestClient

pytestmark = pytest.mark.usefixtures("tiny_inception")

HOME = "http://127.0.0.1:8321"
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
PART = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
Files = list[tuple[str, tuple[str, bytes]]]


class StubCaptioner(Captioner):
    """Captions every image in 10 ms, when the gate is open; counts the requests at once."""

    def __init__(self) -> None:
        self.calls: list[list[Path]] = []
        self.now = self.most = 0
        self.gate = threading.Event()
        self.gate.set()

    def search_config(self, options: SearchOptions | None = None) -> SearchConfig:
        return SearchConfig()

    def stream(self, images: Iterable[Any], *_: Any, **__: Any) -> Iterator[Prediction]:
        paths = list(images)
        assert all(path.is_file() for path in paths)
        self.calls.append(paths)
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.01)
        assert self.gate.wait(20)
        self.now -= 1
        return iter([Prediction(str(path), [Caption("a \x9bdog", -1.0)]) for path in paths])


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files; nothing may be left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def stub() -> StubCaptioner:
    return StubCaptioner()


@pytest.fixture
def client(stub: StubCaptioner) -> TestClient:
    return TestClient(server.make_app(stub, "stub"), base_url=HOME)


def files(*images: tuple[str, bytes]) -> Files:
    return [("image", image) for image in images]


def small_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def drawn_client(captioner: Captioner) -> TestClient:
    return TestClient(server.make_app(captioner, "drawn"), base_url=HOME)


def test_captions_are_those_of_the_captioner(
    drawn_client: TestClient, captioner: Captioner, scenes: list[Path]
) -> None:
    sent = [(path.name, path.read_bytes()) for path in scenes[:2]]
    sent.insert(1, ("broken.jpg", sent[0][1][:900]))
    sent.append(("empty.png", b""))
    data = {"num_captions": "3"}
    answer = drawn_client.post("/caption", files=files(*sent), data=data)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "drawn"
    first, broken, second, empty = images = answer.json()["images"]
    assert [image["image"] for image in images] == [name for name, _ in sent]
    assert "truncated" in broken["error"] and empty["error"] == "empty file"
    direct = captioner.stream(scenes[:2], SearchOptions(num_captions=3))
    for image, expected in zip((first, second), direct, strict=True):
        captions = image["captions"]
        assert [c["caption"] for c in captions] == [c.text for c in expected.captions]
        assert [c["log_probability"] for c in captions] == pytest.approx(
            [c.log_probability for c in expected.captions], abs=1e-3
        )
        words = captions[0]["words"]
        assert " ".join(word["text"] for word in words) == captions[0]["caption"]
        # The words' log-probabilities lack that of the caption's end.
        rest = captions[0]["log_probability"] - sum(math.log(w["probability"]) for w in words)
        assert -5 < rest <= 0.01


def test_draws_depend_on_seed_and_image_alone(drawn_client: TestClient, scenes: list[Path]) -> None:
    one, other = (path.read_bytes() for path in scenes[:2])

    def drawn(seed: int, *images: tuple[str, bytes]) -> list[list[str]]:
        data = {"temperature": "1.5", "top_p": "0.95", "seed": str(seed), "num_captions": "4"}
        answer = drawn_client.post("/caption", files=files(*images), data=data)
        assert answer.status_code == 200, answer.text
        return [[c["caption"] for c in i["captions"]] for i in answer.json()["images"]]

    first = drawn(1, ("a.jpg", one))
    assert drawn(1, ("z.jpg", other), ("b.jpg", one))[1] == first[0]
    assert drawn(2, ("a.jpg", one)) != first


def test_names_are_text_and_never_paths(
    client: TestClient, stub: StubCaptioner, temporary: Path
) -> None:
    names = ["../../etc/passwd", "/etc/passwd", "..", "<script>1</script>.jpg", "Đà 😀.jpg"]
    names += ["a" * 3000, "\u202egpj.exe"]
    answer = client.post("/caption", files=files(*((name, name.encode()) for name in names)))
    assert [image["image"] for image in answer.json()["images"]] == names
    assert "\x9b" not in answer.text and "\u202e" not in answer.text  # escaped in the JSON
    (paths,) = stub.calls
    for path in paths:
        place = path.resolve().relative_to(temporary.resolve()).as_posix()
        assert re.fullmatch(r"captioner-\w+/\d+/[0-9a-f]{64}", place)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"beam_size": "0"}, "beam_size: a whole number from 1 to 50, not '0'"),
        ({"beam_size": "51"}, "beam_size: a whole number from 1 to 50, not '51'"),
        ({"beam_size": "3.5"}, "beam_size: a whole number from 1 to 50, not '3.5'"),
        ({"num_captions": ""}, "num_captions: a whole number from 1 to 50, not ''"),
        ({"num_captions": "4", "beam_size": "3"}, "num_captions: at most beam_size (3), not 4"),
        ({"temperature": "0"}, "temperature: a number from 0.05 to 5, not '0'"),
        ({"temperature": "nan"}, "temperature: a number from 0.05 to 5, not 'nan'"),
        ({"top_p": "<b>"}, "top_p: a number from 0.01 to 1, not '<b>'"),
        ({"seed": "-1"}, "seed: a whole number from 0 to 4294967295, not '-1'"),
        ({"beamsize": "3"}, "'beamsize': no such field; there are image, beam_size"),
        ({"seed": ["1", "2"]}, "seed: given twice"),
        ({"image": "a.png"}, "image: not a file"),
    ],
)
def test_wrong_values_are_named_with_their_range(
    client: TestClient, fields: dict[str, Any], complaint: str
) -> None:
    answer = client.post("/caption", files=files(("a.png", small_image())), data=fields)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(complaint)


def test_the_ends_of_the_ranges_are_served(drawn_client: TestClient) -> None:
    image = files(("a.png", small_image()))
    for fields in (
        {"beam_size": "1", "num_captions": "1"},
        {"beam_size": "50", "num_captions": "50"},
        {"temperature": "0.05", "top_p": "0.01", "seed": "0"},
        {"temperature": "5", "top_p": "1", "seed": str(2**32 - 1)},
    ):
        answer = drawn_client.post("/caption", files=image, data=fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["images"][0]["captions"]


def test_requests_are_refused(
    client: TestClient, stub: StubCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Malformed ones, and those of too many parts or too large ones."""
    most = [(f"{number}.png", b"") for number in range(form.MAX_IMAGES)]
    assert len(client.post("/caption", files=files(*most)).json()["images"]) == form.MAX_IMAGES
    monkeypatch.setattr(form, "MAX_IMAGE_BYTES", 1_000_000)
    seed = b'--x\r\ncontent-disposition: form-data; name="seed"\r\n\r\n1\r\n--x--\r\n'
    one, many = files(("a.png", b"")), {str(number): "1" for number in range(99)}
    for request, status, complaint in (
        ({"content": b"{}", "headers": {"content-type": "application/json"}}, 415, "multipart/"),
        ({}, 415, "multipart/form-data"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"junk", "headers": MULTIPART}, 400, "multipart"),
        ({"content": b"--x\r\na: b\r\n\r\n1\r\n--x--\r\n", "headers": MULTIPART}, 400, "name"),
        ({"content": PART + b"half of it", "headers": MULTIPART}, 400, "image: no image"),
        ({"content": b"", "headers": MULTIPART}, 400, "image: no image"),
        ({"content": seed, "headers": MULTIPART}, 400, "image: no image"),
        ({"files": {"photo": ("a", b"a")}}, 400, "photo: images go into the field image"),
        ({"files": files(*most, ("more.png", b""))}, 400, "Too many files"),
        ({"files": one, "data": {"seed": "1" * 1001}}, 400, "exceeded maximum size"),
        ({"files": one, "data": many}, 400, "Too many fields"),
        ({"files": files(("a.png", bytes(1_000_001)))}, 413, "image: 'a.png' is larger than 1 MB"),
        ({"files": files(("a.png", bytes(17_000_000)))}, 413, "the request is larger than 17 MB"),
    ):
        answer = client.post("/caption", **cast(Any, request))
        assert answer.status_code == status, request
        assert complaint in answer.json()["error"]
    assert len(stub.calls) == 1


@given(
    at=st.integers(0, 200),
    new=st.binary(max_size=12),
    content_type=st.just(MULTIPART["content-type"])
    | st.text(st.characters(max_codepoint=255), max_size=80).map("multipart/form-data;".__add__),
)
@example(at=0, new=b"", content_type=MULTIPART["content-type"])
@settings(max_examples=100)
def test_any_body_is_a_form_or_refused(at: int, new: bytes, content_type: str) -> None:
    content = bytearray(PART + small_image() + b"\r\n--x--\r\n")
    content[at : at + len(new)] = new
    header = [(b"content-type", content_type.encode("latin-1"))]
    client = TestClient(server.make_app(StubCaptioner(), "stub"), base_url=HOME)
    answer = client.post("/caption", content=bytes(content), headers=header)
    assert answer.status_code == 200 or 400 <= answer.status_code < 500
    assert answer.status_code == 200 or "error" in answer.json()


def test_large_and_slow_bodies_are_refused_before_all_is_sent(
    stub: StubCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(form, "MAX_IMAGE_BYTES", 10_000)
    piece = PART + bytes(200_000)
    with running(stub) as port:
        with connect(port) as announced:
            announced.sendall(head(port, "content-length: 900000000"))
            assert announced.recv(65536).startswith(b"HTTP/1.1 413 ")
        with connect(port) as chunked:
            chunked.sendall(head(port, "transfer-encoding: chunked"))
            chunked.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            assert chunked.recv(65536).startswith(b"HTTP/1.1 413 ")
        monkeypatch.setattr(form, "BODY_SECONDS", 1.0)
        with connect(port) as slow:
            slow.sendall(head(port, "content-length: 100000") + PART)
            answer = httpx.post(f"http://127.0.0.1:{port}/caption", files=files(("a", b"")))
            assert answer.status_code == 200
            for _ in range(10):
                slow.sendall(b"a")
                time.sleep(0.05)
            assert slow.recv(65536).startswith(b"HTTP/1.1 408 ")


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def head(port: int, *lines: str) -> bytes:
    content_type = f"content-type: {MULTIPART['content-type']}"
    start = ["POST /caption HTTP/1.1", f"host: 127.0.0.1:{port}", content_type]
    return ("\r\n".join([*start, *lines]) + "\r\n\r\n").encode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8321"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "evil.example"}, 400),
        ({"host": "127.0.0.1.evil.example:8321"}, 400),
        ({"host": "localhost.evil.example"}, 400),
        ({"host": "evil.example", "origin": "http://evil.example"}, 400),
        ({"host": ""}, 400),
        ({"origin": HOME}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://127.0.0.1:8321"}, 403),
        ({"host": "localhost:8321", "origin": HOME}, 403),
    ],
)
def test_only_this_machine_and_its_own_page_are_answered(
    client: TestClient, stub: StubCaptioner, headers: dict[str, str], status: int
) -> None:
    image = files(("a.png", small_image()))
    assert client.post("/caption", files=image, headers=headers).status_code == status
    assert len(stub.calls) == (status == 200)
    assert client.get("/", headers=headers).status_code == status


def test_every_response_tells_the_browser_its_limits(
    stub: StubCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(server, "caption_uploads", fail)
    app = server.make_app(stub, "stub")
    client = TestClient(app, base_url=HOME, raise_server_exceptions=False)
    answers = [
        *(client.get(path) for path in ("/", "/page.css", "/page.js", "/health", "/none")),
        client.get("/caption"),
        client.get("/", headers={"origin": "https://evil.example"}),
        client.post("/caption"),
        client.post("/caption", files=files(("a.png", small_image()))),
        client.get("/", headers={"host": "evil.example"}),
    ]
    statuses = [200, 200, 200, 200, 404, 405, 403, 415, 500, 400]
    assert [answer.status_code for answer in answers] == statuses
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
        assert "secret" not in answer.text
    assert all(set(answer.json()) == {"error"} for answer in answers[4:-1])


def test_the_page_loads_only_its_own_files_and_escapes_the_model(stub: StubCaptioner) -> None:
    name = "<script>alert('a')</script> & \"b\""
    client = TestClient(server.make_app(stub, name), base_url=HOME)
    page, *others = (client.get(path).text for path in ("/", "/page.css", "/page.js"))
    assert client.get("/health").json() == {"status": "ok", "model": name, "requests": 0}
    assert "&lt;script&gt;alert(&#39;a&#39;)" in page
    assert page.count("<script") == 1 and not re.search(r"<style|\son\w+=|\sstyle=", page)
    for text in (page, *others):
        assert not re.search(r"https?:|//\w+\.|@import|url\(", text)


def test_the_card_of_the_pretrained_model_is_a_page(stub: StubCaptioner) -> None:
    client = TestClient(server.make_app(stub, "pretrained"), base_url=HOME)
    assert 'href="model-card"' in client.get("/").text
    card = client.get("/model-card")
    assert card.headers["content-type"].startswith("text/html") and "page.css" in card.text
    text = html.unescape(card.text.partition("<pre>")[2].partition("</pre>")[0])
    assert text == server.model_card("pretrained")


def test_one_request_is_captioned_at_a_time_and_the_queue_is_bounded(
    stub: StubCaptioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_WAITING", 40)
    stub.gate.clear()

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=server.make_app(stub, "stub"))
        async with httpx.AsyncClient(transport=transport, base_url=HOME) as client:

            async def post() -> httpx.Response:
                return await client.post("/caption", files=files(("a.png", b"")))

            tasks = [asyncio.create_task(post()) for _ in range(41)]
            while (await client.get("/health")).json()["requests"] < 41:
                await asyncio.sleep(0.01)
            refused = await post()
            stub.gate.set()
            return [refused, *await asyncio.gather(*tasks), await post()]

    refused, *served = asyncio.run(ask())
    assert refused.status_code == 503 and refused.headers["retry-after"] == "2"
    assert refused.json() == {"error": "40 requests are waiting already; try again soon"}
    assert [answer.status_code for answer in served] == [200] * 42
    assert stub.most == 1


def test_a_client_that_left_is_not_captioned(stub: StubCaptioner) -> None:
    """One leaves while it waits for its turn, one in the middle of its body."""
    stub.gate.clear()
    with (
        running(stub) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        first = threading.Thread(
            target=client.post, args=("caption",), kwargs={"files": files(("a.png", b""))}
        )
        first.start()
        while not stub.calls:
            time.sleep(0.01)
        body = PART + b"\r\n--x--\r\n"
        with connect(port) as waiting, connect(port) as half:
            waiting.sendall(head(port, f"content-length: {len(body)}") + body)
            half.sendall(head(port, f"content-length: {len(body)}") + body[:60])
            while httpx.get(f"http://127.0.0.1:{port}/health").json()["requests"] < 3:
                time.sleep(0.01)
        time.sleep(0.2)  # until the server has seen that they left
        stub.gate.set()
        first.join(20)
        deadline = time.monotonic() + 20
        while client.get("health").json()["requests"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.get("health").json()["requests"] == 0
    assert len(stub.calls) == 1


def test_a_taken_port_is_one_line(stub: StubCaptioner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^--port {port}: .*; choose another"):
            server.serve(stub, "stub", port, open_browser=False)


def test_the_browser_opens_at_the_address(
    stub: StubCaptioner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr("webbrowser.open", shown.put)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_: None)
    server.serve(stub, "stub", 0, open_browser=True)
    address = shown.get(timeout=20)
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d+/", address)
    captured = capsys.readouterr()
    assert address in captured.err and captured.out == ""


@pytest.mark.parametrize("missing", ["uvicorn", "starlette.routing", "python_multipart"])
def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.serve.app")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"pip install starlette uvicorn python-multipart"):
        importlib.import_module("pipeline.serve.app")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_stops_the_server_quietly(drawn_run: DrawnRun) -> None:
    program = (
        "import sys\n"
        "import pipeline.models.encoder\n"
        "from pipeline import Captioner\n"
        "from pipeline.serve.app import serve\n"
        "from tiny_inception import TinyInception\n"
        "pipeline.models.encoder.Inception3 = TinyInception\n"
        "serve(Captioner.load(sys.argv[1], device='cpu'), 'drawn', 0, open_browser=False)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(drawn_run.run)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "tests" / "helpers")},
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line
        with httpx.Client(base_url=found.group()) as client:
            answer = client.post("caption", files=files(("a.png", small_image())))
            assert answer.json()["images"][0]["captions"]
            assert "server" not in answer.headers
            process.send_signal(signal.SIGINT)
            output, complaints = process.communicate(timeout=20)
    assert (process.returncode, output, complaints) == (0, "", "")
