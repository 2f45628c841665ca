"""The endpoint of caption.py --serve: real requests, hostile ones, and the server itself."""

from __future__ import annotations

import asyncio
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
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from drawn_run import DrawnRun
from PIL import Image
from running_server import running

from pipeline import Captioner
from pipeline.captioner import Prediction
from pipeline.decoding.captions import Caption, Word
from pipeline.utils.errors import UserError

pytest.importorskip("starlette", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")
pytest.importorskip("python_multipart", reason="the extra 'serve' is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would rather have a successor of httpx
    from starlette.testclient import TestClient

from pipeline.serve import app as server
from pipeline.serve import uploads

HOME = "http://127.0.0.1:8321"
ROOT = Path(__file__).resolve().parents[2]
# A request as the application gets it from a server.
BODY = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n\r\n--x--\r\n'
SCOPE = {
    **{"type": "http", "method": "POST", "path": "/caption", "query_string": b"", "root_path": ""},
    "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=x")],
}


@pytest.fixture(scope="module")
def captioner(drawn_run: DrawnRun) -> Captioner:
    return Captioner.load(drawn_run.run, device="cpu", precision="fp32")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where uploads lie while they are captioned; nothing may be left there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def client(captioner: Captioner) -> Iterator[TestClient]:
    with TestClient(server.make_app(captioner, "drawn"), base_url=HOME) as client:
        yield client


@pytest.fixture
def scenes(drawn_run: DrawnRun) -> list[Path]:
    return sorted((drawn_run.data / "Images").glob("*.jpg"))


def files(*images: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", image) for image in images]


def small_image() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def test_images_are_captioned_as_the_captioner_does_and_what_is_broken_is_said(
    client: TestClient, captioner: Captioner, scenes: list[Path]
) -> None:
    sent = [(path.name, path.read_bytes()) for path in scenes[:3]]
    sent.insert(1, ("broken.jpg", sent[0][1][:900]))
    sent.append(("empty.png", b""))
    answer = client.post("/caption", files=files(*sent), data={"num_captions": "3"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["model"] == "drawn"
    images = body["images"]
    assert [image["image"] for image in images] == [name for name, _ in sent]
    assert ["captions" in image for image in images] == [True, False, True, True, False]
    assert "truncated" in images[1]["error"] and images[4]["error"] == "empty file"
    direct = captioner.stream(scenes[:3], captioner.search_config(least=3), num_captions=3)
    good = [image["captions"] for image in images if "captions" in image]
    for captions, expected in zip(good, direct, strict=True):
        assert [c["caption"] for c in captions] == [c.text for c in expected.captions]
        assert [c["log_probability"] for c in captions] == pytest.approx(
            [c.log_probability for c in expected.captions], abs=1e-3
        )


def test_words_have_their_probabilities(client: TestClient, scenes: list[Path]) -> None:
    answer = client.post("/caption", files=files(("a.jpg", scenes[0].read_bytes())))
    (image,) = answer.json()["images"]
    (caption,) = image["captions"]
    words = caption["words"]
    assert " ".join(word["text"] for word in words) == caption["caption"]
    assert all(0 < word["probability"] <= 1 for word in words)
    # What is missing to the whole is the end of the caption.
    rest = caption["log_probability"] - sum(math.log(word["probability"]) for word in words)
    assert -5 < rest <= 0.01


def test_draws_depend_on_seed_and_image_alone(client: TestClient, scenes: list[Path]) -> None:
    one, other = (path.read_bytes() for path in scenes[:2])

    def drawn(seed: int, *images: tuple[str, bytes]) -> list[list[str]]:
        data = {"temperature": "1.5", "top_p": "0.95", "seed": str(seed), "num_captions": "4"}
        answer = client.post("/caption", files=files(*images), data=data)
        assert answer.status_code == 200, answer.text
        return [[c["caption"] for c in i["captions"]] for i in answer.json()["images"]]

    first = drawn(1, ("a.jpg", one))
    assert drawn(1, ("a.jpg", one)) == first
    assert drawn(1, ("z.jpg", other), ("b.jpg", one))[1] == first[0]
    assert drawn(2, ("a.jpg", one)) != first


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("../../etc/passwd", "../../etc/passwd"),
        ("/etc/passwd", "/etc/passwd"),
        ("<script>alert(1)</script>.jpg", "<script>alert(1)</script>.jpg"),
        ("..", ".."),
        ("Đà Nẵng 😀.jpg", "Đà Nẵng 😀.jpg"),
        ("a" * 3000, "a" * 3000),
    ],
)
def test_names_are_given_back_and_never_used(
    client: TestClient,
    captioner: Captioner,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    seen: str,
) -> None:
    stream, paths = captioner.stream, []

    def spy(images: list[Path], *arguments: Any, **options: Any) -> Iterator[Prediction]:
        for path in images:
            assert path.is_file()
            paths.append(path)
        return stream(images, *arguments, **options)

    monkeypatch.setattr(captioner, "stream", spy)
    photo = small_image()
    answer = client.post("/caption", files=files((name, photo), (name, b"no image")))
    assert answer.status_code == 200, answer.text
    images = answer.json()["images"]
    assert [image["image"] for image in images] == [seen, seen]
    assert images[0]["captions"] and images[1]["error"] == "not an image that Pillow reads"
    for path in paths:
        assert path.resolve().is_relative_to(temporary.resolve())
        assert re.fullmatch(
            r"captioner-\w+/\d+/[0-9a-f]{64}", path.relative_to(temporary).as_posix()
        )
        assert not path.exists()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"beam_size": "0"}, "beam_size: a whole number from 1 to 50, not '0'"),
        ({"beam_size": "51"}, "beam_size: a whole number from 1 to 50, not '51'"),
        ({"beam_size": "3.5"}, "beam_size: a whole number from 1 to 50, not '3.5'"),
        ({"num_captions": ""}, "num_captions: a whole number from 1 to 50, not ''"),
        ({"num_captions": "-1"}, "num_captions: a whole number from 1 to 50"),
        ({"num_captions": "4", "beam_size": "3"}, "num_captions: at most beam_size (3), not 4"),
        ({"temperature": "0"}, "temperature: a number from 0.05 to 5, not '0'"),
        ({"temperature": "nan"}, "temperature: a number from 0.05 to 5, not 'nan'"),
        ({"temperature": "inf"}, "temperature: a number from 0.05 to 5, not 'inf'"),
        ({"top_p": "1.01"}, "top_p: a number from 0.01 to 1, not '1.01'"),
        ({"top_p": "<b>"}, "top_p: a number from 0.01 to 1, not '<b>'"),
        ({"seed": "-1"}, "seed: a whole number from 0 to 4294967295, not '-1'"),
        ({"seed": "1e3"}, "seed: a whole number from 0 to 4294967295, not '1e3'"),
        ({"beamsize": "3"}, "'beamsize': no such field; there are image, beam_size"),
        ({"seed": ["1", "2"]}, "seed: is given twice"),
    ],
)
def test_wrong_values_are_named_with_their_range(
    client: TestClient, fields: dict[str, Any], complaint: str
) -> None:
    answer = client.post("/caption", files=files(("a.png", small_image())), data=fields)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(complaint)


def test_the_ends_of_the_ranges_are_served(client: TestClient) -> None:
    for fields in (
        {"beam_size": "1", "num_captions": "1"},
        {"beam_size": "50", "num_captions": "50"},
        {"temperature": "0.05", "top_p": "0.01", "seed": "0"},
        {"temperature": "5", "top_p": "1", "seed": str(2**32 - 1)},
    ):
        answer = client.post("/caption", files=files(("a.png", small_image())), data=fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["images"][0]["captions"]


def test_what_is_no_such_request_is_said(client: TestClient) -> None:
    boundary = {"content-type": "multipart/form-data; boundary=x"}
    head = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
    for content, headers, status, complaint in (
        (b"{}", {"content-type": "application/json"}, 415, "multipart/form-data"),
        (b"--x--\r\n", {"content-type": "multipart/form-data"}, 415, "multipart/form-data"),
        (b"", {}, 415, "multipart/form-data"),
        (b"", boundary, 400, "ends in the middle"),
        (b"junk", boundary, 400, "not a multipart request"),
        (head + b"half of it", boundary, 400, "ends in the middle"),
        (b"--x\r\na: b\r\n\r\n1\r\n--x--\r\n", boundary, 400, "a field has no name"),
        (b"--x\r\n" + b"a" * 9000, boundary, (400, 413), ""),
        (b"--x\r\n" + b"a: b\r\n" * 99, boundary, (400, 413), ""),
    ):
        answer = client.post("/caption", content=content, headers=headers)
        assert answer.status_code in (status if isinstance(status, tuple) else (status,))
        assert complaint in answer.json()["error"]
    for fields, image, complaint in (
        ({}, {}, "multipart/form-data"),
        ({"image": "a"}, {"photo": ("a.png", b"a")}, "image: is no file"),
        ({}, {"photo": ("a.png", b"a")}, "photo: images go into the field image"),
    ):
        answer = client.post("/caption", data=fields, files=image)
        assert answer.status_code in (400, 415) and complaint in answer.json()["error"]
    no_image = b'--x\r\ncontent-disposition: form-data; name="seed"\r\n\r\n1\r\n--x--\r\n'
    answer = client.post("/caption", content=no_image, headers=boundary)
    assert answer.status_code == 400 and answer.json()["error"].startswith("image: no image")


def test_too_many_images_or_fields_are_refused(client: TestClient) -> None:
    most = [(f"{number}.png", small_image()) for number in range(uploads.MAX_FILES)]
    answer = client.post("/caption", files=files(*most), data={"beam_size": "1"})
    assert answer.status_code == 200 and len(answer.json()["images"]) == uploads.MAX_FILES
    answer = client.post("/caption", files=files(*most, ("more.png", b"")))
    assert (answer.status_code, answer.json()["error"]) == (
        *(413, f"image: at most {uploads.MAX_FILES} images a request"),
    )
    image = files(("a.png", small_image()))
    answer = client.post("/caption", files=image, data={"seed": "1" * 1001})
    assert (answer.status_code, answer.json()["error"]) == (413, "seed: is too long")
    many = {str(number): "1" for number in range(uploads.MAX_PARTS)}
    answer = client.post("/caption", files=image, data=many)
    assert (answer.status_code, answer.json()["error"]) == (413, "the request has too many fields")


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_file_is_refused_before_the_rest_is_read(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 1_000_000)
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        yield b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for _ in range(1000):
            taken += 1
            yield bytes(100_000)
        yield b"\r\n--x--\r\n"

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=server.make_app(captioner, "drawn"))
        headers = {"content-type": "multipart/form-data; boundary=x"}
        if announced:
            headers["content-length"] = "100000100"
        async with httpx.AsyncClient(transport=transport, base_url=HOME) as client:
            return await client.post("/caption", content=body(), headers=headers)

    answer = asyncio.run(ask())
    assert answer.status_code == 413
    assert answer.json() == {"error": "image: 'a.png' is larger than 1 MB"}
    assert taken == 11


def test_an_endless_request_of_nothing_is_refused(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 1000)

    async def body() -> AsyncIterator[bytes]:
        while True:  # line ends before the first boundary are no part of anything
            yield b"\r\n" * 500

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=server.make_app(captioner, "drawn"))
        headers = {"content-type": "multipart/form-data; boundary=x"}
        async with httpx.AsyncClient(transport=transport, base_url=HOME) as client:
            return await asyncio.wait_for(
                client.post("/caption", content=body(), headers=headers), timeout=20
            )

    assert asyncio.run(ask()).status_code in (400, 413)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8321"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:8321"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "evil.example:127.0.0.1"}, 403),
        ({"host": ""}, 403),
        ({"origin": HOME}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://127.0.0.1:8321"}, 403),
        ({"host": "localhost:8321", "origin": HOME}, 403),
    ],
)
def test_only_this_machine_and_its_own_page_are_answered(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], status: int
) -> None:
    calls = 0

    def caption(*_: object) -> list[Prediction]:
        nonlocal calls
        calls += 1
        return [Prediction("", [Caption("a dog", -1.0, (Word("a", 0.5),))])]

    monkeypatch.setattr(server, "caption_uploads", caption)
    image = files(("a.png", small_image()))
    assert client.post("/caption", files=image, headers=headers).status_code == status
    assert calls == (status == 200)
    assert client.get("/", headers=headers).status_code == status
    assert client.get("/health", headers=headers).status_code == status


def test_every_answer_says_what_a_browser_may_do_with_it(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(server, "caption_uploads", fail)
    app = server.make_app(captioner, "drawn")
    with TestClient(app, base_url=HOME, raise_server_exceptions=False) as client:
        answers = [
            *(client.get(path) for path in ("/", "/page.css", "/page.js", "/health")),
            client.get("/none"),
            client.get("/caption"),
            client.get("/", headers={"host": "evil.example"}),
            client.post("/caption"),
            client.post("/caption", files=files(("a.png", small_image()))),
        ]
    assert [answer.status_code for answer in answers] == [*[200] * 4, 404, 405, 403, 415, 500]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers
        assert "secret" not in answer.text
    assert all(set(answer.json()) == {"error"} for answer in answers[4:])


def test_the_page_is_all_its_own_and_shows_the_model_as_text(captioner: Captioner) -> None:
    name = "<script>alert('a')</script> & \"b\""
    with TestClient(server.make_app(captioner, name), base_url=HOME) as client:
        page, *others = (client.get(path).text for path in ("/", "/page.css", "/page.js"))
        assert client.get("/health").json() == {"status": "ok", "model": name, "requests": 0}
    assert "&lt;script&gt;alert(&#39;a&#39;)" in page
    assert page.count("<script") == 1 and not re.search(r"<style|\son\w+=|\sstyle=", page)
    for text in (page, *others):
        assert not re.search(r"https?:|//\w+\.|@import|url\(", text)


def test_one_is_captioned_at_a_time_and_the_line_is_bounded(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MAX_WAITING", 4)
    go, order, together = threading.Event(), [], [0]

    def caption(_: Captioner, images: list[uploads.Upload], __: object) -> list[Prediction]:
        together[0] += 1
        assert together[0] == 1
        go.wait(20)
        order.append(images[0].name)
        together[0] -= 1
        return [Prediction("", [Caption("a dog", -1.0)])]

    monkeypatch.setattr(server, "caption_uploads", caption)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=server.make_app(captioner, "drawn"))
        async with httpx.AsyncClient(transport=transport, base_url=HOME) as client:

            async def post(number: int) -> httpx.Response:
                image = {"image": (f"{number}.png", small_image())}
                return await client.post("/caption", files=image)

            tasks = [asyncio.create_task(post(number)) for number in range(5)]
            while (await client.get("/health")).json()["requests"] < 5:
                await asyncio.sleep(0.01)
            refused = [await post(number) for number in (5, 6)]
            go.set()
            served = await asyncio.gather(*tasks)
            return [*served, *refused, await post(7)]

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [*[200] * 5, 503, 503, 200]
    assert answers[5].headers["retry-after"] == "2"
    assert answers[5].json() == {"error": "4 requests are waiting already; try again soon"}
    assert order == [f"{number}.png" for number in (0, 1, 2, 3, 4, 7)]


def test_many_clients_are_served_in_turn_and_few_images_are_taken_in(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    """Each of forty asks again as soon as it is answered, which leaves no gap for a latecomer."""
    go, order, arrived = threading.Event(), [], []

    def caption(_: Captioner, images: list[uploads.Upload], __: object) -> list[Prediction]:
        go.wait(20)
        arrived.append(len(list(temporary.iterdir())))
        order.append(images[0].name)
        return [Prediction("", [Caption("a dog", -1.0)])]

    monkeypatch.setattr(server, "caption_uploads", caption)

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(app=server.make_app(captioner, "drawn"))
        async with httpx.AsyncClient(transport=transport, base_url=HOME) as client:

            async def post_twice(number: int) -> list[int]:
                image = {"image": (f"{number}.png", small_image())}
                answers = [await client.post("/caption", files=image) for _ in range(2)]
                return [answer.status_code for answer in answers]

            tasks = [asyncio.create_task(post_twice(number)) for number in range(40)]
            while (await client.get("/health")).json()["requests"] < 40:
                assert not any(task.done() for task in tasks), "one is refused"
                await asyncio.sleep(0.01)
            go.set()
            return [status for both in await asyncio.gather(*tasks) for status in both]

    assert asyncio.run(ask()) == [200] * 80
    assert len(set(order[:40])) == len(set(order[40:])) == 40
    assert 0 < max(arrived) <= server.MAX_ARRIVED


def test_who_has_left_is_not_captioned(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(server, "caption_uploads", lambda *wish: calls.append(wish))
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": BODY, "more_body": False},
        {"type": "http.disconnect"},
    ]
    half: list[dict[str, Any]] = [
        {"type": "http.request", "body": BODY[:50], "more_body": True},
        messages[1],
    ]

    async def leave(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        arriving = iter(messages)

        async def receive() -> Any:
            return next(arriving)

        async def send(message: Any) -> None:
            sent.append(message)

        await server.make_app(captioner, "drawn")(SCOPE, receive, send)
        return sent

    for case in (messages, half):
        assert asyncio.run(leave(case))[0]["status"] == 400
    assert calls == []


def test_who_leaves_while_waiting_is_passed_over(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, order = threading.Event(), []

    def caption(_: Captioner, images: list[uploads.Upload], __: object) -> list[Prediction]:
        order.append(images[0].name)
        go.wait(20)
        return [Prediction("", [Caption("a dog", -1.0)])]

    monkeypatch.setattr(server, "caption_uploads", caption)

    async def ask() -> tuple[int, list[int]]:
        app, left, statuses = server.make_app(captioner, "drawn"), asyncio.Event(), []
        body = iter([{"type": "http.request", "body": BODY, "more_body": False}])

        async def receive() -> Any:
            for message in body:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            statuses.append(message.get("status"))

        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url=HOME) as client:

            async def in_hand(count: int) -> None:
                while (await client.get("/health")).json()["requests"] < count:
                    await asyncio.sleep(0.01)

            image = {"image": ("first.png", small_image())}
            first = asyncio.create_task(client.post("/caption", files=image))
            await in_hand(1)
            second = asyncio.create_task(app(SCOPE, receive, send))
            await in_hand(2)
            await asyncio.sleep(0.1)
            left.set()
            go.set()
            await second
            return (await first).status_code, statuses

    assert asyncio.run(ask()) == (200, [400, None])
    assert order == ["first.png"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_real_connection_gets_the_refusal_before_all_is_sent(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 1_000_000)
    head = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    with running(captioner) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(20)
        length = "transfer-encoding: chunked" if chunked else "content-length: 900000000"
        connection.sendall(
            f"POST /caption HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{length}\r\n"
            "content-type: multipart/form-data; boundary=x\r\n\r\n".encode()
        )
        piece = head + bytes(1_200_000)
        connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        answer = connection.recv(65536)  # though most of the image is still to come
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_taken_or_impossible_port_is_one_line(captioner: Captioner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^--port {port}: cannot be had .*; give another"):
            server.serve(captioner, "drawn", port, open_browser=False)
    with pytest.raises(UserError, match=r"^--port 70000: cannot be had"):
        server.serve(captioner, "drawn", 70000, open_browser=False)


def test_the_browser_is_shown_the_address_that_was_found(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr("webbrowser.open", shown.put)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_: None)
    server.serve(captioner, "drawn", 0, open_browser=True)
    address = shown.get(timeout=20)
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d+/", address)
    captured = capsys.readouterr()
    assert address in captured.err and captured.out == ""


@pytest.mark.parametrize("missing", ["uvicorn", "starlette.routing", "python_multipart.multipart"])
def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.serve.app")
    monkeypatch.delitem(sys.modules, "pipeline.serve.uploads")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=r"pip install starlette uvicorn python-multipart"):
        importlib.import_module("pipeline.serve.app")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_the_address_is_said_and_ctrl_c_ends_quietly(drawn_run: DrawnRun) -> None:
    program = (
        "import sys\n"
        "from pipeline import Captioner, server\n"
        "server.serve(Captioner.load(sys.argv[1], device='cpu'), 'drawn', 0, open_browser=False)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(drawn_run.run)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line
        with httpx.Client(base_url=found.group()) as client:
            assert client.get("health").json()["status"] == "ok"
            image = {"image": ("a.png", small_image())}
            assert client.post("caption", files=image).json()["images"][0]["captions"]
            assert "server" not in client.get("health").headers
            process.send_signal(signal.SIGINT)
            output, complaints = process.communicate(timeout=20)
    assert (process.returncode, output, complaints) == (0, "", "")
    with pytest.raises(httpx.ConnectError):
        httpx.get(found.group())
