"""Downloading and unpacking Flickr8k, against a small server in this process; its split."""

from __future__ import annotations

import hashlib
import io
import random
import socket
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import invoke
from conftest import SHARED
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import extract_features
from pipeline.datasets import flickr8k as module
from pipeline.datasets.flickr8k import (
    NetworkError,
    download_flickr8k,
    fetch,
    official_split,
    unpack_zip,
)
from pipeline.features.cache import FeatureCache
from pipeline.utils.errors import UserError

BODY = random.Random(0).randbytes(300_000)
BODY_MD5 = hashlib.md5(BODY).hexdigest()


@dataclass
class Web:
    """A server on this machine: what it offers, how it behaves, what it was asked."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    ignores_range: bool = False
    cuts: list[int] = field(default_factory=list)  # bytes to send in each next answer
    statuses: list[int] = field(default_factory=list)  # error answers to give first
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.requests.append((self.path, wanted))
            body = state.files.get(self.path.rpartition("/")[2])
            if state.statuses or body is None:
                return self.send_error(state.statuses.pop(0) if state.statuses else 404)
            if state.ignores_range:
                wanted = None
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if wanted and start >= len(body):
                return self.send_error(416)
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:][: state.cuts.pop(0) if state.cuts else None])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Web(f"http://127.0.0.1:{server.server_address[1]}/")
    state.files["body"] = BODY
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def make_zip(members: dict[str, bytes], link: str = "") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            information = zipfile.ZipInfo(name)
            if name == link:
                information.create_system = 3
                information.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(information, data)
    return buffer.getvalue()


def files_under(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def flickr8k(web: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """The server with two small archives laid out as the real ones."""
    image = io.BytesIO()
    Image.new("RGB", (40, 30), "orange").save(image, "JPEG")
    web.files["Flickr8k_Dataset.zip"] = make_zip(
        {
            "Flicker8k_Dataset/": b"",
            "Flicker8k_Dataset/1000268201_693b08cb0e.jpg": image.getvalue(),
            "__MACOSX/._Flicker8k_Dataset": b"junk",
            "__MACOSX/visible.jpg": b"junk",
            "Flicker8k_Dataset/.DS_Store": b"junk",
        }
    )
    text = b"1000268201_693b08cb0e.jpg#0\tA child .\n"
    web.files["Flickr8k_text.zip"] = make_zip({"Flickr8k.token.txt": text})
    sums = {name: hashlib.md5(web.files[name]).hexdigest() for name in module.FLICKR8K_MD5}
    monkeypatch.setattr(module, "FLICKR8K_MD5", sums)
    monkeypatch.setattr(module, "RELEASE_URL", web.url)
    return web


def test_the_command_downloads_and_extracts_and_a_second_call_asks_nothing(
    flickr8k: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "data" / "flickr8k", tmp_path / "flickr8k.h5"
    options = f"--download --data {folder} --output {output} --weights random --device cpu"
    invoke(extract_features.main, *options.split())
    image = "Flicker8k_Dataset/1000268201_693b08cb0e.jpg"
    assert FeatureCache(output).names() == [image]
    assert files_under(folder) == [".downloaded", image, "Flickr8k.token.txt"]
    assert len(flickr8k.requests) == 2
    download_flickr8k(folder)
    assert "is complete" in capsys.readouterr().err
    (tmp_path / "Images").mkdir()
    (tmp_path / "captions.txt").touch()
    download_flickr8k(tmp_path)  # nothing, beside Kaggle's copy
    assert "Kaggle" in capsys.readouterr().err
    assert len(flickr8k.requests) == 2


def test_only_the_missing_archive_is_loaded(flickr8k: Web, tmp_path: Path) -> None:
    good = flickr8k.files.pop("Flickr8k_Dataset.zip")
    with pytest.raises(NetworkError, match=r"404|Not Found") as caught:
        download_flickr8k(tmp_path)
    assert f"{flickr8k.url}Flickr8k_Dataset.zip" in caught.value.message
    assert "adityajn105/flickr8k" in caught.value.message
    assert "\n" not in caught.value.message
    flickr8k.files["Flickr8k_Dataset.zip"] = good
    flickr8k.requests.clear()
    download_flickr8k(tmp_path)
    assert flickr8k.requests == [("/Flickr8k_Dataset.zip", None)]


def test_a_part_and_cut_connections_are_continued_by_range_requests(
    web: Web, tmp_path: Path
) -> None:
    (tmp_path / "body.part").write_bytes(BODY[:100_000])
    web.cuts = [20_000, 80_000]
    web.statuses = [503]
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    ranges = ["bytes=100000-", "bytes=100000-", "bytes=120000-", "bytes=200000-"]
    assert [wanted for _, wanted in web.requests] == ranges
    assert (tmp_path / "body").read_bytes() == BODY
    assert files_under(tmp_path) == ["body"]
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)  # whole: no request
    assert len(web.requests) == 4


@pytest.mark.parametrize("ignores_range", [False, True])
def test_a_server_that_always_cuts_ends_in_an_error_and_keeps_the_part(
    web: Web, tmp_path: Path, ignores_range: bool
) -> None:
    web.ignores_range = ignores_range
    web.cuts = [1000] + [1000 if ignores_range else 0] * 20
    with pytest.raises(NetworkError, match=r"closed after 1,000 of 300,000 bytes"):
        fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert len(web.requests) == 1 + module.TRIES
    assert (tmp_path / "body.part").read_bytes() == BODY[:1000]
    web.cuts = []
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert (tmp_path / "body").read_bytes() == BODY


@pytest.mark.parametrize("part", [BODY, b"x" * len(BODY), b"x" * 1000])
def test_a_part_of_another_file_is_removed_by_its_md5(
    web: Web, tmp_path: Path, part: bytes
) -> None:
    (tmp_path / "body.part").write_bytes(part)
    if part != BODY:
        with pytest.raises(UserError, match=r"wrong MD5 .* run the same command again"):
            fetch(web.url + "body", tmp_path / "body", BODY_MD5)
        assert files_under(tmp_path) == []
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert (tmp_path / "body").read_bytes() == BODY


def test_no_network_and_a_silent_server_are_named(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    with pytest.raises(NetworkError, match=r"http://127.0.0.1:1/body: .*refused"):
        fetch("http://127.0.0.1:1/body", tmp_path / "body", BODY_MD5)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/body"
        with pytest.raises(NetworkError, match="timed out"):
            fetch(url, tmp_path / "body", BODY_MD5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk_is_one_line_and_keeps_the_part(web: Web, tmp_path: Path) -> None:
    part = tmp_path / "body.part"
    part.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"disk is full.*free some space") as caught:
        fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert "\n" not in caught.value.message
    assert part.is_symlink() and len(web.requests) == 1


PARTS = st.sampled_from(["..", ".", "", "a", "b.jpg", "C:", "\\..\\x", "a\n", "\x1b[2J", "é", "~"])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join) | st.text(min_size=1, max_size=30)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(
    names=st.lists(NAMES, max_size=4, unique=True),
    changes=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), max_size=1),
)
@example(names=["a", "a/b"], changes=[])
@example(names=["../evil.txt", "/etc/passwd", "C:evil.txt", "..\\evil.txt"], changes=[])
@example(names=["x" * 300], changes=[])
@settings(max_examples=100)
def test_any_archive_stays_inside_its_folder(
    names: list[str],
    changes: list[tuple[int, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    members = {"link.jpg": b"/etc/passwd", **dict.fromkeys(names, b"content")}
    content = bytearray(make_zip(members, "link.jpg"))
    for at, new in changes:
        content[at : at + len(new)] = new
    base = tmp_path_factory.mktemp("archive")
    folder, archive = base / "deep" / "folder", base / "deep" / "some.zip"
    folder.mkdir(parents=True)
    archive.write_bytes(content)
    try:
        unpack_zip(archive, folder)
    except UserError as error:
        assert "\n" not in error.format_message()
    outside = {path for path in base.rglob("*") if not path.is_relative_to(folder)}
    assert outside == {base / "deep", archive}
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    data = bytearray(make_zip({"noise.jpg": random.Random(1).randbytes(10_000)}))
    data[5000] ^= 0xFF
    for content in (bytes(data), b"<html>"):
        (tmp_path / "some.zip").write_bytes(content)
        with pytest.raises(UserError, match=r"some\.zip cannot be unpacked"):
            unpack_zip(tmp_path / "some.zip", tmp_path / "inner")


def test_the_official_split() -> None:
    split = official_split()
    assert Counter(split.values()) == {"train": 6000, "val": 1000, "test": 1000}
    photos = (2513260012, 2903617548, 2090545563, 3385593926)
    assert [split[photo] for photo in photos] == ["train", "train", "val", "test"]
    assert 2258277193 not in split


@pytest.mark.shared("flickr8k")
def test_the_official_split_is_that_of_the_published_lists() -> None:
    published: dict[int, str] = {}
    for split, word in (("train", "train"), ("val", "dev"), ("test", "test")):
        path = SHARED / "flickr8k" / "Flickr8k_text" / f"Flickr_8k.{word}Images.txt"
        ids = {int(name.split("_")[0]) for name in path.read_text().split()}
        assert not ids & published.keys()
        published.update(dict.fromkeys(ids, split))
    assert official_split() == published
