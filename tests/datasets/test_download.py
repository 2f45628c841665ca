"""Downloading and unpacking, against a small server in this process."""

from __future__ import annotations

import hashlib
import io
import random
import socket
import stat
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import extract_features
from pipeline.datasets import flickr8k as download
from pipeline.datasets.flickr8k import NetworkError, download_flickr8k, fetch, unpack_zip
from pipeline.features.cache import FeatureCache
from pipeline.utils.errors import UserError

BODY = random.Random(0).randbytes(300_000)
BODY_MD5 = hashlib.md5(BODY).hexdigest()


@dataclass
class Web:
    """A server on this machine: what it offers, how it behaves, what it was asked."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    etag: str = '"first"'
    ignores_range: bool = False
    cuts: list[int] = field(default_factory=list)  # bytes to send in each next answer
    statuses: list[int] = field(default_factory=list)  # error answers to give first
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range
    sent: int = 0


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0, 0.0))
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
            if self.headers.get("If-Range", state.etag) != state.etag or state.ignores_range:
                wanted = None
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if wanted and start >= len(body):
                return self.send_error(416)
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.send_header("ETag", state.etag)
            self.end_headers()
            rest = body[start:][: state.cuts.pop(0) if state.cuts else None]
            state.sent += len(rest)
            self.wfile.write(rest)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Web(f"http://127.0.0.1:{server.server_address[1]}/")
    state.files["body"] = BODY
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def make_zip(members: dict[str, bytes], link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if link is not None:
            info = zipfile.ZipInfo(link)
            info.create_system = 3
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


def saved_zip(folder: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    path = folder / "some.zip"
    path.write_bytes(make_zip(members, link))
    return path


def files_under(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def flickr8k(web: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """The server with two small archives laid out as the real ones."""
    web.files["Flickr8k_Dataset.zip"] = make_zip(
        {
            "Flicker8k_Dataset/": b"",
            "Flicker8k_Dataset/1000268201_693b08cb0e.jpg": b"first image" * 100,
            "Flicker8k_Dataset/1001773457_577c3a7d70.jpg": b"second image" * 100,
            "__MACOSX/._Flicker8k_Dataset": b"junk",
            "__MACOSX/visible.jpg": b"junk",
            "Flicker8k_Dataset/.DS_Store": b"junk",
        }
    )
    web.files["Flickr8k_text.zip"] = make_zip(
        {
            "Flickr8k.token.txt": b"1000268201_693b08cb0e.jpg#0\tA child .\n",
            "Flickr_8k.trainImages.txt": b"1000268201_693b08cb0e.jpg\n",
            "__MACOSX/._Flickr8k.token.txt": b"junk",
        }
    )
    sums = {name: hashlib.md5(web.files[name]).hexdigest() for name in download.FLICKR8K_MD5}
    monkeypatch.setattr(download, "FLICKR8K_MD5", sums)
    return web


def test_whole_flickr8k_and_a_second_call_that_asks_nothing(
    flickr8k: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data" / "flickr8k"
    download_flickr8k(folder, flickr8k.url)
    everything = [
        ".downloaded",
        "Flicker8k_Dataset/1000268201_693b08cb0e.jpg",
        "Flicker8k_Dataset/1001773457_577c3a7d70.jpg",
        "Flickr8k.token.txt",
        "Flickr_8k.trainImages.txt",
    ]
    assert files_under(folder) == everything
    assert (folder / everything[1]).read_bytes() == b"first image" * 100
    assert len(flickr8k.requests) == 2
    capsys.readouterr()
    download_flickr8k(folder, flickr8k.url)
    assert len(flickr8k.requests) == 2
    assert "is complete" in capsys.readouterr().err
    assert files_under(folder) == everything


def test_the_command_downloads_and_goes_on_to_extract(
    flickr8k: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = io.BytesIO()
    Image.new("RGB", (40, 30), "orange").save(image, "JPEG")
    name = "Flicker8k_Dataset/1000268201_693b08cb0e.jpg"
    flickr8k.files["Flickr8k_Dataset.zip"] = make_zip({name: image.getvalue()})
    sums = {name: hashlib.md5(flickr8k.files[name]).hexdigest() for name in download.FLICKR8K_MD5}
    monkeypatch.setattr(download, "FLICKR8K_MD5", sums)
    monkeypatch.setattr(download, "RELEASE_URL", flickr8k.url)
    data, output = tmp_path / "flickr8k", tmp_path / "flickr8k.h5"
    options = f"--download --data {data} --output {output} --weights random --device cpu"
    result = CliRunner().invoke(extract_features.main, options.split())
    assert result.exit_code == 0, result.output
    assert FeatureCache(output).names() == [name]


def test_a_second_copy_beside_that_of_kaggle_is_never_loaded(
    flickr8k: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Images").mkdir()
    (tmp_path / "captions.txt").touch()
    download_flickr8k(tmp_path, flickr8k.url)
    assert flickr8k.requests == []
    assert "Kaggle" in capsys.readouterr().err


def test_only_the_archive_that_is_missing_is_loaded(flickr8k: Web, tmp_path: Path) -> None:
    good = flickr8k.files.pop("Flickr8k_Dataset.zip")
    with pytest.raises(NetworkError, match="404"):
        download_flickr8k(tmp_path, flickr8k.url)
    flickr8k.files["Flickr8k_Dataset.zip"] = good
    flickr8k.requests.clear()
    download_flickr8k(tmp_path, flickr8k.url)
    assert flickr8k.requests == [("/Flickr8k_Dataset.zip", None)]


def test_part_is_continued_with_a_range_request(web: Web, tmp_path: Path) -> None:
    target = tmp_path / "body"
    (tmp_path / "body.part").write_bytes(BODY[:100_000])
    fetch(web.url + "body", target, BODY_MD5)
    assert web.requests == [("/body", "bytes=100000-")]
    assert web.sent == 200_000
    assert target.read_bytes() == BODY
    assert files_under(tmp_path) == ["body"]


def test_cut_connection_is_continued(web: Web, tmp_path: Path) -> None:
    web.cuts = [120_000, 80_000]
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert [wanted for _, wanted in web.requests] == [None, "bytes=120000-", "bytes=200000-"]
    assert (tmp_path / "body").read_bytes() == BODY


def test_server_that_always_cuts_ends_in_an_error_and_keeps_the_part(
    web: Web, tmp_path: Path
) -> None:
    web.cuts = [1000] + [0] * 20
    with pytest.raises(NetworkError, match=r"closed after 1,000 of 300,000 bytes"):
        fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert len(web.requests) == 1 + 1 + len(download.PAUSES)
    assert (tmp_path / "body.part").read_bytes() == BODY[:1000]
    web.cuts = []
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert web.requests[-1] == ("/body", "bytes=1000-")


def test_server_that_cuts_and_ignores_range_is_not_asked_for_ever(web: Web, tmp_path: Path) -> None:
    web.ignores_range = True
    web.cuts = [1000] * 50
    with pytest.raises(NetworkError, match="closed after"):
        fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert len(web.requests) == 1 + 1 + len(download.PAUSES)


def test_server_that_ignores_range_starts_over(web: Web, tmp_path: Path) -> None:
    web.ignores_range = True
    (tmp_path / "body.part").write_bytes(BODY[:100_000])
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert web.requests == [("/body", "bytes=100000-")]
    assert (tmp_path / "body").read_bytes() == BODY


@pytest.mark.parametrize(("part", "requests"), [(BODY, 1), (b"x" * len(BODY), 2)])
def test_part_of_full_length_is_used_if_right_and_loaded_anew_if_not(
    web: Web, tmp_path: Path, part: bytes, requests: int
) -> None:
    (tmp_path / "body.part").write_bytes(part)
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert len(web.requests) == requests
    assert (tmp_path / "body").read_bytes() == BODY


def test_changed_file_is_not_glued_to_an_old_part(web: Web, tmp_path: Path) -> None:
    web.files["body"] = bytes(300_000)
    web.cuts = [100_000] + [0] * 20
    with pytest.raises(NetworkError):
        fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    web.files["body"], web.etag, web.cuts = BODY, '"second"', []
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert (tmp_path / "body").read_bytes() == BODY


def test_passing_server_error_is_asked_again(web: Web, tmp_path: Path) -> None:
    web.statuses = [503, 502]
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert (tmp_path / "body").read_bytes() == BODY


def test_wrong_md5_removes_the_file(flickr8k: Web, tmp_path: Path) -> None:
    name = "Flickr8k_text.zip"
    flickr8k.files[name] = b"<html>please log in</html>"
    with pytest.raises(UserError, match=r"wrong MD5 .* run the same command again") as caught:
        download_flickr8k(tmp_path, flickr8k.url)
    assert flickr8k.url + name in caught.value.message
    assert files_under(tmp_path) == []


def test_target_with_the_right_md5_needs_no_request(web: Web, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(BODY)
    fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert web.requests == []


def test_no_network_names_the_url_and_the_other_way_at_once(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "PAUSES", (60.0,))
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        download_flickr8k(tmp_path, "http://127.0.0.1:1/release/")
    assert time.monotonic() - started < 10
    message = caught.value.message
    assert "http://127.0.0.1:1/release/Flickr8k_text.zip" in message
    assert "adityajn105/flickr8k" in message
    assert "\n" not in message


def test_silent_server_runs_into_the_time_out(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    monkeypatch.setattr(download, "PAUSES", (0.0,))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/body"
        with pytest.raises(NetworkError, match="timed out"):
            fetch(url, tmp_path / "body", BODY_MD5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_full_disk_is_one_line_and_keeps_the_part(web: Web, tmp_path: Path) -> None:
    part = tmp_path / "body.part"
    part.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"disk is full.*free some space") as caught:
        fetch(web.url + "body", tmp_path / "body", BODY_MD5)
    assert "\n" not in caught.value.message
    assert part.is_symlink()
    assert len(web.requests) == 1


@pytest.mark.parametrize(
    "name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "C:evil.txt", "..\\evil.txt"]
)
def test_member_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    archive = saved_zip(tmp_path, {"good.txt": b"good", name: b"evil"})
    with pytest.raises(UserError, match="refused"):
        unpack_zip(archive, tmp_path / "inner")
    assert files_under(tmp_path) == ["some.zip"]


def test_link_is_refused(tmp_path: Path) -> None:
    archive = saved_zip(tmp_path, {"good.txt": b"good"}, link="link.jpg")
    with pytest.raises(UserError, match=r"'link.jpg' is a link"):
        unpack_zip(archive, tmp_path / "inner")
    assert not (tmp_path / "inner").exists()


def test_archive_that_would_fill_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_UNPACKED", 1_000_000)
    archive = saved_zip(tmp_path, {"zeros": bytes(1_000_001)})
    with pytest.raises(UserError, match="would unpack to 1,000,001 bytes"):
        unpack_zip(archive, tmp_path / "inner")
    assert not (tmp_path / "inner").exists()


def test_unpacking_again_writes_only_what_is_missing_or_short(tmp_path: Path) -> None:
    archive = saved_zip(tmp_path, {"a.txt": b"aaaa", "b/b.txt": b"bbbb", "c.txt": b"cccc"})
    folder = tmp_path / "inner"
    unpack_zip(archive, folder)
    untouched = (folder / "a.txt").stat().st_ino, (folder / "a.txt").stat().st_mtime_ns
    (folder / "b/b.txt").write_bytes(b"bb")
    (folder / "c.txt").unlink()
    unpack_zip(archive, folder)
    assert ((folder / "a.txt").stat().st_ino, (folder / "a.txt").stat().st_mtime_ns) == untouched
    assert (folder / "b/b.txt").read_bytes() == b"bbbb"
    assert files_under(folder) == ["a.txt", "b/b.txt", "c.txt"]


def test_damaged_member_never_stands_under_its_name(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(10_000)
    archive = saved_zip(tmp_path, {"noise.jpg": noise})
    data = bytearray(archive.read_bytes())
    data[5000] ^= 0xFF
    archive.write_bytes(data)
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack_zip(archive, tmp_path / "inner")
    assert files_under(tmp_path / "inner") == []


def test_what_is_no_archive_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "page.zip").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"page\.zip cannot be unpacked"):
        unpack_zip(tmp_path / "page.zip", tmp_path / "inner")
    with pytest.raises(UserError, match=r"absent\.zip"):
        unpack_zip(tmp_path / "absent.zip", tmp_path / "inner")
