"""Images from strangers: a square or one line, in bounded memory and time."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import hostile_images
import pytest
from conftest import REPOSITORY
from hostile_images import SMALL, black_png, png, png_chunk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from pipeline.datasets import images
from pipeline.datasets.images import IMAGE_SIZE, ImageError, load_image, read_square

# Reads images in a process of its own, where nothing else has taken memory before.
MEASURED = """
import json, resource, sys, time
from pipeline.datasets.images import ImageError, load_image, read_square
from PIL import Image
Image.init()
results, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    started = time.process_time()
    try:
        found = list(read_square(path).shape)
    except ImageError as error:
        found = str(error)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    results.append([found, kilobytes / 1024, time.process_time() - started])
print(json.dumps(results))
"""
# Pillow's own, of odd metadata and many pixels, which the program does not show.
pytestmark = pytest.mark.filterwarnings("ignore")
needs_rusage = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux")


def measured(*paths: Path) -> list[tuple[object, float, float]]:
    """Read images; for each the shape of its square or the reason, most megabytes yet, seconds."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, *map(str, paths)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return [(found, megabytes, seconds) for found, megabytes, seconds in json.loads(result.stdout)]


def reason(content: bytes, path: Path) -> str:
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(ImageError) as caught:
        load_image(path, IMAGE_SIZE)
    assert time.process_time() - started < 2
    assert "\n" not in str(caught.value) and path.name not in str(caught.value)
    return str(caught.value)


# Bombs


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (65_535, 2)])
def test_thin_images_are_images(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(black_png(*size))
    began = time.process_time()
    assert read_square(path).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert time.process_time() - began < 2
    expected = "a side of 70,000 pixels; at most 65,535 are read"
    width, height = (70_000 if side > 2 else side for side in size)
    assert reason(black_png(width, height), path) == expected


@pytest.mark.slow
@needs_rusage
@pytest.mark.parametrize(
    "bits, colour, samples, most",  # RGBA, 16-bit grey, a palette with transparency
    [(8, 6, 4, 3000), (16, 0, 1, 800), (8, 3, 1, 2500)],
)
def test_the_largest_images_fit(
    tmp_path: Path, bits: int, colour: int, samples: int, most: int
) -> None:
    path = tmp_path / "x.png"
    extra = png_chunk(b"PLTE", bytes(768)) + png_chunk(b"tRNS", b"\0") if colour == 3 else b""
    path.write_bytes(black_png(13_000, 13_700, bits, colour, extra, samples))
    [(found, megabytes, _)] = measured(path)
    assert found == [IMAGE_SIZE, IMAGE_SIZE, 3]
    assert megabytes < most


def test_a_jpeg_of_many_scans(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    elsewhere = hostile_images.saved("JPEG", comment=b"\xff\xda" * 500) + b"\xff\xda" * 500
    for content in (hostile_images.jpeg_of_scans(20), elsewhere):
        path.write_bytes(content)
        assert load_image(path).size == (24, 16)
    content = hostile_images.jpeg_of_scans(200)
    assert reason(content, path) == "a JPEG of more than 100 scans"

    class Member:
        def read(self) -> bytes:
            return content

    with pytest.raises(ImageError, match="scans"):
        load_image(Member())


def test_a_tile_far_larger_than_its_image(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    path.write_bytes(hostile_images.tiled_tiff(1024))
    assert load_image(path).size == (100, 100)
    assert reason(hostile_images.tiled_tiff(8192), path).startswith("tiles of 67,108,864 pixels")


def test_what_is_decoded_in_python_may_not_be_large(tmp_path: Path) -> None:
    path = tmp_path / "x.bmp"
    path.write_bytes(hostile_images.rle_bmp(640, 480))
    assert load_image(path).size == (640, 480)
    assert "very slow to decode" in reason(hostile_images.rle_bmp(65_000, 2_700), path)


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.webp"
    with path.open("wb") as file:
        file.write(SMALL["webp"]())
        file.truncate(images.MAX_FILE_BYTES + 1)  # a hole, which takes no disk
    with pytest.raises(ImageError, match=r"1,073,741,825 bytes; at most 1,073,741,824"):
        load_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    os.mkfifo(path)
    with pytest.raises(ImageError, match="not a file"):
        load_image(path)


# Metadata


@needs_rusage
def test_many_pixels_and_tags_that_share_their_bytes_take_no_memory(tmp_path: Path) -> None:
    exif = hostile_images.overlapping_tags(1 << 20)
    chunk = png_chunk(b"eXIf", exif)
    parts = [exif[at : at + 65_000] for at in range(0, len(exif), 65_000)]
    jpeg = SMALL["progressive jpeg"]()
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", 8 + len(part)) + b"Exif\0\0" + part for part in parts
    )
    contents = {
        "bomb.png": black_png(50_000, 50_000, bits=1),  # a legal one
        "x.png": black_png(4, 4, extra=chunk),
        "x.jpg": jpeg[:2] + segments + jpeg[2:],
        "x.tif": exif,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    bomb, *others = measured(*(tmp_path / name for name in contents))
    assert bomb[0] == "too many pixels (decompression bomb?)"
    assert bomb[1] < 20 and bomb[2] < 2
    square = [IMAGE_SIZE, IMAGE_SIZE, 3]
    assert [found == square for found, _, _ in others] == [True, True, False]
    assert others[-1][1] < 100  # 69 GB if each were copied


@pytest.mark.parametrize(
    "kind, start", [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")]
)
def test_texts_and_profiles_that_unpack_without_end(
    tmp_path: Path, kind: bytes, start: bytes
) -> None:
    chunk = png_chunk(kind, start + hostile_images.zeros(1 << 26))
    assert "too large" in reason(black_png(4, 4, extra=chunk), tmp_path / "x.png")


# Large images, one at a time


def test_a_large_image_is_decoded_alone_and_reduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "LARGE_IMAGE", 5000)
    contents = {
        "large.png": Image.new("RGB", (100, 60)),
        "small.png": Image.new("RGB", (20, 20)),
        "camera.jpg": Image.new("RGB", (200, 160)),  # small as soon as it is decoded
        "progressive.jpg": Image.new("RGB", (200, 160)),
    }
    for name, image in contents.items():
        image.save(tmp_path / name, progressive=name == "progressive.jpg")
    alone: list[bool] = []
    load = ImageFile.ImageFile.load

    def watched(self: ImageFile.ImageFile) -> object:
        alone.append(images._large_image_lock.locked())
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    for name in contents:
        alone.clear()
        assert max(load_image(tmp_path / name, 10).size) <= 50
        assert alone[0] == (name in ("large.png", "progressive.jpg"))
    assert not images._large_image_lock.locked()


# Formats


@pytest.mark.parametrize("format", ["EPS", "PDF", "ICO", "PCX", "SGI", "TIFF"])
def test_only_formats_of_images_are_opened(tmp_path: Path, format: str) -> None:
    path = tmp_path / "x.jpg"
    Image.new("RGB", (32, 32), "red").save(path, format)
    if format == "TIFF":  # whatever its name
        assert load_image(path).size == (32, 32)
    else:
        assert reason(path.read_bytes(), path) == "not a supported image"


def test_two_formats_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.avif"  # with the brand of HEIF
    path.write_bytes(SMALL["avif"]().replace(b"ftypavif", b"ftypmif1", 1))
    assert load_image(path).size == (24, 16)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("evil.html", "<script>alert(1)</script>")
    for name in ("jpeg", "png", "gif", "bmp", "webp"):
        path = tmp_path / f"{name}.html"
        path.write_bytes(SMALL[name]() + archive.getvalue() + b"<script>alert(1)</script>")
        assert max(load_image(path).size) == 24
    front = tmp_path / "front.jpg"
    front.write_bytes(b"<html>" + SMALL["jpeg"]())
    with pytest.raises(ImageError, match="not a supported image"):
        load_image(front)


def test_a_size_said_twice_is_that_of_the_pixels(tmp_path: Path) -> None:
    twice = png(4, 4, 8, 0, zlib.compress(bytes(20)))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    assert "too many pixels" in reason(twice[:33] + header + twice[33:], tmp_path / "x.png")
    content = SMALL["jpeg 2000"]()
    at = content.index(b"\xff\x4f\xff\x51") + 8
    spoiled = content[:at] + struct.pack(">II", 60_000, 60_000) + content[at + 8 :]
    assert reason(spoiled, tmp_path / "x.jp2")


# Spoiled in any way

CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 12), st.binary(min_size=1, max_size=8), st.booleans()), max_size=8
)


@pytest.mark.parametrize("kind", SMALL)
@given(changes=CHANGES, left=st.floats(0, 1))
@settings(max_examples=40)
def test_whatever_becomes_of_them_is_an_image_or_one_line(
    kind: str,
    changes: list[tuple[int, bytes, bool]],
    left: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if kind == "heic":
        pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    path = tmp_path_factory.getbasetemp() / "spoiled"
    path.write_bytes(SMALL[kind]())
    assert read_square(path).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    content = bytearray(path.read_bytes())
    for at, new, insert in changes:
        at %= len(content)
        content[at : at + (0 if insert else len(new))] = new
    path.write_bytes(content[: len(content) if left > 0.5 else int(2 * left * len(content))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 20)  # else some take seconds, as they may
        try:
            assert read_square(path).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        except ImageError as error:
            assert str(error) and "\n" not in str(error)
