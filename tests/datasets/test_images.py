"""Images: decoding whatever people keep, squares."""

from __future__ import annotations

import os
import struct
import sys
import warnings
import zlib
from pathlib import Path
from random import Random

import numpy
import pytest
from conftest import draw
from hostile_images import png
from PIL import Image

from pipeline.cli.options import GroupedCommand
from pipeline.datasets import images
from pipeline.datasets.images import (
    IMAGE_SIZE,
    ImageError,
    augmented_square,
    load_image,
    read_square,
    to_square,
)


def pixels(path: Path) -> list[list[list[int]]]:
    image = load_image(path)
    assert image.mode == "RGB"
    return numpy.asarray(image).tolist()


def difference(first: numpy.ndarray, second: numpy.ndarray) -> float:
    return float(numpy.abs(first.astype(float) - second.astype(float)).mean())


def photograph(width: int, height: int) -> Image.Image:
    """Draw smooth colours with some texture, as a camera would give them."""
    y, x = numpy.mgrid[0:height, 0:width]
    waves = (numpy.sin(x / 90), numpy.cos(y / 70), numpy.sin((x + y) / 130))
    smooth = 120 + 80 * numpy.stack(waves, axis=-1)
    texture = numpy.random.default_rng(0).normal(0, 12, smooth.shape)
    return Image.fromarray((smooth + texture).clip(0, 255).astype(numpy.uint8))


# Modes


@pytest.mark.parametrize(
    "values, grey",
    [
        (numpy.array([[0, 100, 255]], numpy.uint8), [0, 100, 255]),
        (numpy.array([[False, True]]), [0, 255]),  # mode "1"
        (numpy.array([[0, 25700, 65535]], numpy.uint16), [0, 100, 255]),
    ],
)
def test_grey(tmp_path: Path, values: numpy.ndarray, grey: list[int]) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(values).save(path)
    assert pixels(path) == [[[value] * 3 for value in grey]]


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    rgba, la = tmp_path / "rgba.png", tmp_path / "la.png"
    red = [[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]]
    Image.fromarray(numpy.array(red, numpy.uint8)).save(rgba)
    assert pixels(rgba) == [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]
    Image.fromarray(numpy.array([[[100, 255], [100, 0]]], numpy.uint8), mode="LA").save(la)
    assert pixels(la) == [[[100] * 3, [255] * 3]]


@pytest.mark.parametrize("mode, black", [("RGB", (0, 0, 0)), ("L", 0)])
def test_one_transparent_colour(
    tmp_path: Path, mode: str, black: int | tuple[int, int, int]
) -> None:
    path = tmp_path / "x.png"
    image = Image.new(mode, (2, 1), "#323232")
    image.putpixel((0, 0), black)
    image.save(path, transparency=black)
    assert pixels(path) == [[[255] * 3, [50] * 3]]


@pytest.mark.parametrize("extension", ["png", "gif"])
def test_palette(tmp_path: Path, extension: str) -> None:
    opaque, clear = tmp_path / f"opaque.{extension}", tmp_path / f"clear.{extension}"
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(opaque)
    image.save(clear, transparency=0)
    assert pixels(opaque) == [[[10, 20, 30], [200, 100, 50]]]
    assert pixels(clear) == [[[255, 255, 255], [200, 100, 50]]]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
    assert difference(numpy.array([254, 0, 0]), numpy.array(pixels(path)[8][8])) < 3


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 25700, 65535], [0, 100, 255]),
        ([0, 51_400_000, 131_070_000], [0, 100, 255]),  # beyond 16 bits: its own range
        ([-100, 0, 155], [0, 100, 255]),
        ([0.0, 100 / 255, 1.0], [0, 100, 255]),
        ([0.2, 0.2, 0.2], [51, 51, 51]),
        ([-1.0, 0.0, 4.0], [0, 51, 255]),
        ([0.0, 0.2, numpy.inf], [0, 51, 255]),
        ([-numpy.inf, 0.2, numpy.inf], [0, 51, 255]),
        ([numpy.nan, 0.2, 1.0], [0, 51, 255]),
        ([numpy.nan, -1.0, 4.0], [0, 0, 255]),
        ([numpy.nan, numpy.nan, numpy.nan], [0, 0, 0]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_32_bit_integers_and_floats(
    tmp_path: Path, values: list[float], expected: list[int]
) -> None:
    path = tmp_path / "x.tif"
    kind = numpy.int32 if isinstance(values[-1], int) else numpy.float32
    Image.fromarray(numpy.array([values], kind)).save(path)
    assert [pixel[0] for pixel in pixels(path)[0]] == expected


def test_16_bit_colour(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    rows = struct.pack(">B6H", 0, 0, 25700, 65535, 51400, 0, 257)
    path.write_bytes(png(2, 1, 16, 2, zlib.compress(rows)))
    assert pixels(path) == [[[0, 100, 255], [200, 0, 1]]]


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert getattr(image, "n_frames") == 3  # noqa: B009
    assert pixels(path)[4][4] == [255, 0, 0]


# Orientation


def heic(path: Path, image: Image.Image, **options: object) -> Path:
    """Write an image as HEIC, in the best quality."""
    plugin = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    plugin.from_pillow(image).save(path, quality=100, chroma=444, **options)
    return path


@pytest.mark.parametrize("extension", ["png", "jpg", "heic"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, orientation: int, extension: str) -> None:
    upright = numpy.zeros((64, 96, 3), numpy.uint8)
    upright[:32, :32] = 255, 0, 0
    upright[32:, :32] = 0, 255, 0
    upright[:32, 64:] = 0, 0, 255
    # Where EXIF 2.32, table 6, says that row 0 and column 0 of the stored image belong.
    turned = upright.transpose(1, 0, 2)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: turned,
        6: turned[::-1],
        7: turned[::-1, ::-1],
        8: turned[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path, image = tmp_path / f"x.{extension}", Image.fromarray(numpy.ascontiguousarray(stored))
    if extension == "heic":
        # The library notes the orientation as EXIF and as HEIC's own turn, as a phone does.
        heic(path, image, exif=exif.tobytes())
    else:
        image.save(path, exif=exif, quality=95)
    for size in (None, IMAGE_SIZE):
        image = load_image(path, size)
        assert image.size == (96, 64)
        assert difference(numpy.asarray(image), upright) < (0.1 if extension == "png" else 8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_broken_exif_spoils_no_image(tmp_path: Path, exif: bytes) -> None:
    path = tmp_path / "x.jpg"
    Image.new("RGB", (48, 32), "red").save(path, exif=exif)
    assert load_image(path).size == (48, 32)


# What cannot be read


def reason(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(path, IMAGE_SIZE)
    assert path.name not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_truncated(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"x.{extension}"
    photograph(200, 150).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "truncated" in reason(path)


def test_no_images(tmp_path: Path) -> None:
    empty, text, folder = tmp_path / "empty.jpg", tmp_path / "text.jpg", tmp_path / "folder.jpg"
    empty.touch()
    text.write_text("<html>404 Not Found</html>")
    folder.mkdir()
    assert reason(empty) == "empty file"
    assert reason(text) == "not a supported image"
    assert "directory" in reason(folder) or os.name == "nt"
    assert reason(tmp_path / "missing.jpg") == "no such file"


def test_heic_without_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # makes the import fail
    for openers in ("OPEN", "MIME", "EXTENSION"):
        kept = {key: value for key, value in getattr(Image, openers).items() if value != "HEIF"}
        kept.pop("HEIF", None)
        monkeypatch.setattr(Image, openers, kept)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    images._register_heif.cache_clear()
    try:
        assert reason(path) == "a HEIC image, which needs a plugin: pip install pillow-heif"
        path.write_bytes(b"\0\0\0\x18ftypqt  \0\0\0\0" + bytes(200))
        assert reason(path) == "not a supported image"
        draw(tmp_path / "x.png")
        assert load_image(tmp_path / "x.png").size == (64, 48)
    finally:
        images._register_heif.cache_clear()


def test_heic_transparent_or_damaged(tmp_path: Path) -> None:
    path = heic(tmp_path / "x.heif", Image.new("RGBA", (40, 30), (0, 0, 200, 0)))
    assert difference(numpy.array(pixels(path)), numpy.array(255)) < 2
    content = heic(tmp_path / "x.heic", photograph(200, 150)).read_bytes()
    for damaged in (content[: len(content) // 2], content[:20] + bytes(200)):
        path.write_bytes(damaged)
        assert "pip install" not in reason(path)


def test_commands_and_not_the_library_silence_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It warns of half as many pixels as it refuses, and of odd metadata."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = draw(tmp_path / "x.png", size=(50, 30))
    with pytest.warns(Image.DecompressionBombWarning):
        load_image(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        GroupedCommand("x", callback=lambda: load_image(path), groups={}).main(
            [], standalone_mode=False
        )
    assert not caught
    assert "too many pixels" in reason(draw(tmp_path / "y.png", size=(50, 50)))


# Squares


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (299, 299), (30, 20), (900, 700)])
def test_square(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "x.png"
    Image.new("RGB", size, (10, 200, 90)).save(path)
    square = read_square(path)
    assert square.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert square.dtype == numpy.uint8
    assert (square == (10, 200, 90)).all()


def test_square_keeps_the_whole_image() -> None:
    image = Image.new("RGB", (1000, 400), "black")
    image.paste("red", (0, 0, 100, 400))
    image.paste("blue", (900, 0, 1000, 400))
    square = to_square(image)
    assert (square[:, :28] == (255, 0, 0)).all()
    assert (square[:, -28:] == (0, 0, 255)).all()
    assert (square[:, 32:-32] == 0).all()


def test_square_is_antialiased() -> None:
    stripes = numpy.zeros((100, 2990, 3), numpy.uint8)
    stripes[:, ::2] = 255
    assert difference(to_square(Image.fromarray(stripes)), numpy.array(127.5)) < 2


def test_draft_is_nearly_the_same_and_never_below_twice_the_square(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    photograph(1500, 1250).save(path, quality=92)
    assert load_image(path).size == (1500, 1250)
    assert load_image(path, IMAGE_SIZE).size == (750, 625)
    assert difference(read_square(path), to_square(load_image(path))) < 1
    Image.new("RGB", (1190, 1190)).save(path)
    assert load_image(path, IMAGE_SIZE).size == (1190, 1190)


# Augmentation


def test_augmentation_repeats_with_its_seed() -> None:
    image = photograph(300, 200)
    first, again, other = (augmented_square(image, Random(seed), True, 0.6) for seed in (1, 1, 2))
    assert (first == again).all()
    assert difference(first, other) > 1


def test_flip_only_where_allowed() -> None:
    image = Image.new("RGB", (300, 200), "red")
    image.paste("blue", (150, 0, 300, 200))
    lefts = {
        flip: {
            tuple(augmented_square(image, Random(seed), flip, 0.9)[150, 10]) for seed in range(20)
        }
        for flip in (False, True)
    }
    assert lefts == {False: {(255, 0, 0)}, True: {(255, 0, 0), (0, 0, 255)}}


def test_nothing_augmented_is_the_plain_square() -> None:
    for image in (photograph(640, 480), photograph(100, 333)):
        plain = to_square(image).astype(int)
        augmented = augmented_square(image, Random(0), False, 1.0).astype(int)
        assert numpy.abs(plain - augmented).max() <= 1


def test_how_much_is_cut_off_and_where() -> None:
    across = numpy.linspace(0, 255, 600).astype(numpy.uint8)[None, :].repeat(400, axis=0)
    down = numpy.linspace(0, 255, 400).astype(numpy.uint8)[:, None].repeat(600, axis=1)
    image = Image.fromarray(numpy.stack([across, down, down], axis=-1))
    squares = [augmented_square(image, Random(seed), False, 0.5) for seed in range(50)]
    for channel in (0, 1):
        starts = numpy.array([square[..., channel].min() for square in squares]) / 255
        ends = numpy.array([square[..., channel].max() for square in squares]) / 255
        assert 0.48 < (ends - starts).min() < 0.6
        assert 0.9 < (ends - starts).max() <= 1.0
        assert starts.min() < 0.02
        assert starts.max() > 0.3  # the window moves
        assert ends.max() > 0.98
