"""Stage 1: extraction with its kills, broken images and changed images."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy
import pytest
from conftest import StubEncoder, draw
from stub_extraction import stub_extract as run

from pipeline.datasets.images import read_square
from pipeline.features.cache import PENDING, FeatureCache, partial_path
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.utils.errors import InputError, UserError


def spoil(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(b"")


# Extraction


def test_every_image_becomes_a_row(images: Path, tmp_path: Path) -> None:
    draw(images / "sub folder" / "é.jpg", 10)
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder)
    names = [*(f"{number}.png" for number in range(10)), "sub folder/é.jpg"]
    assert (result.encoded, result.kept) == (11, 0)
    assert result.cache.complete
    assert result.cache.path == tmp_path / "x.h5"
    assert result.cache.names() == names
    assert result.cache.identity == encoder.identity
    assert encoder.batches == [4, 4, 3]
    squares = [read_square(images / name) for name in names]
    expected = numpy.concatenate(
        [StubEncoder().for_inference().encode(squares[start : start + 4]) for start in (0, 4, 8)]
    )
    assert (result.cache.read(numpy.arange(11)) == expected.astype(numpy.float16)).all()
    assert len(result.cache.damaged_rows()) == 0


@pytest.mark.parametrize("batch_size, workers", [(1, 1), (3, 4), (100, 2)])
def test_any_batches_and_threads(
    images: Path, tmp_path: Path, batch_size: int, workers: int
) -> None:
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder, batch_size=batch_size, workers=workers)
    assert sum(encoder.batches) == 10
    assert max(encoder.batches) == min(batch_size, 10)
    alone = run(images, tmp_path / "y.h5", batch_size=batch_size, workers=1)
    assert result.cache.path.read_bytes() == alone.cache.path.read_bytes()


def test_broken_images_are_recorded(images: Path, tmp_path: Path) -> None:
    spoil(images / "1.png")
    (images / "5.png").write_text("no image")
    result = run(images, tmp_path / "x.h5")
    assert result.cache.failures() == {
        "1.png": "empty file",
        "5.png": "not a supported image",
    }
    assert (result.encoded, result.kept) == (8, 0)
    assert result.cache.complete
    encoder = StubEncoder()
    assert run(images, tmp_path / "x.h5", encoder).kept == 10  # left as it is
    assert encoder.batches == []
    draw(images / "1.png", 1)  # another image now
    result = run(images, tmp_path / "x.h5", encoder)
    assert list(result.cache.failures()) == ["5.png"]
    assert encoder.batches == [4]
    run(images, tmp_path / "x.h5", encoder, retry_failed=True)
    assert encoder.batches == [4, 3]


@pytest.mark.parametrize("broken, batches", [(range(4, 8), [4, 2]), (range(10), [])])
def test_a_batch_wholly_broken(
    images: Path, tmp_path: Path, broken: range, batches: list[int]
) -> None:
    names = [f"{number}.png" for number in broken]
    spoil(*(images / name for name in names))
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder)
    assert encoder.batches == batches
    assert list(result.cache.failures()) == names
    assert result.encoded == sum(batches)
    assert result.cache.complete


def test_stop_at_a_broken_image(images: Path, tmp_path: Path) -> None:
    spoil(images / "5.png")
    with pytest.raises(InputError, match=r"5\.png: empty file \(--on-error skip") as caught:
        run(images, tmp_path / "x.h5", on_error="fail")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "x.h5").exists()
    partial = FeatureCache(partial_path(tmp_path / "x.h5"))
    assert {"0.png", "3.png", "4.png", "7.png"} <= set(partial.names()) - set(
        partial.names(PENDING)
    )
    assert "5.png" in partial.names(PENDING)
    draw(images / "5.png", 5)
    encoder = StubEncoder()
    run(images, tmp_path / "x.h5", encoder, on_error="fail")
    assert encoder.batches == [4, 2]
    undisturbed = run(images, tmp_path / "undisturbed.h5").cache.path
    assert (tmp_path / "x.h5").read_bytes() == undisturbed.read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stop_after", [0, 1, 2])
@pytest.mark.parametrize("commit_interval", [0.0, 60.0])
def test_interrupted_and_resumed(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    stop_after: int,
    commit_interval: float,
) -> None:
    monkeypatch.setattr("pipeline.features.cache_writer.COMMIT_INTERVAL", commit_interval)
    spoil(images / "4.png")
    run(images, tmp_path / "undisturbed.h5")
    with pytest.raises(error):
        run(images, tmp_path / "x.h5", StubEncoder(stop_after=stop_after, error=error))
    assert not (tmp_path / "x.h5").exists()
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder)
    assert encoder.batches == [4, 3, 2][stop_after:]
    assert result.encoded == sum(encoder.batches)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "undisturbed.h5").read_bytes()
    assert not partial_path(tmp_path / "x.h5").exists()


def test_an_image_that_changed_is_encoded_again(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(images, tmp_path / "x.h5", batch_size=1).cache
    before = first.read(numpy.arange(10))
    draw(images / "3.png", 30)
    information = (images / "7.png").stat()
    draw(images / "7.png", 70, size=(80, 60))
    os.utime(images / "7.png", ns=(0, information.st_mtime_ns))  # its size tells
    (images / "8.png").rename(images / "8b.png")
    encoder = StubEncoder()
    after = run(images, tmp_path / "x.h5", encoder, batch_size=1).cache
    assert sum(encoder.batches) == 3
    said = capsys.readouterr().err
    assert "features dropped: 1\n" in said and "to be encoded again: 2\n" in said
    alike = (after.read(numpy.arange(10)) == before).all(1)
    assert alike.tolist() == [number not in (3, 7) for number in range(10)]
    alone = run(images, tmp_path / "alone.h5", batch_size=1).cache
    assert after.path.read_bytes() == alone.path.read_bytes()
    assert run(images, tmp_path / "x.h5", encoder, batch_size=1).kept == 10
    assert "dropped" not in capsys.readouterr().err


def test_an_image_that_changed_while_an_extraction_was_stopped(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.features.cache_writer.COMMIT_INTERVAL", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "x.h5", StubEncoder(stop_after=4), batch_size=1)
    for number in (0, 3, 9):  # two that were done, and one that was not
        draw(images / f"{number}.png", 90 + number)
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder, batch_size=1)
    assert (result.kept, sum(encoder.batches)) == (2, 8)
    run(images, tmp_path / "alone.h5", batch_size=1)
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "alone.h5").read_bytes()


def test_a_moved_folder_keeps_its_features(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "x.h5")
    moved = images.rename(tmp_path / "moved")
    encoder = StubEncoder()
    assert run(moved, tmp_path / "x.h5", encoder).kept == 10
    (moved / "8.png").rename(moved / "8b.png")  # in the same row, with the same size and time
    result = run(moved, tmp_path / "x.h5", encoder, batch_size=1)
    assert (result.kept, result.encoded) == (9, 1)
    assert result.cache.data == str(moved.resolve())


def test_another_folder_with_the_same_names_is_refused(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "x.h5")
    for number in range(10):
        draw(tmp_path / "others" / f"{number}.png", 50 + number)
    with pytest.raises(UserError, match=r"images, not .*others; --output .*--force"):
        run(tmp_path / "others", tmp_path / "x.h5")


@pytest.mark.parametrize("option", ["precision", "engine"])
def test_other_rounding_is_refused_only_where_rows_are_to_be_made(
    images: Path, tmp_path: Path, option: str
) -> None:
    run(images, tmp_path / "x.h5")
    other = StubEncoder(precision="bf16" if option == "precision" else "fp32")
    engine = "openvino" if option == "engine" else "torch"
    assert run(images, tmp_path / "x.h5", other, engine=engine).kept == 10
    draw(images / "more.png", 20)
    with pytest.raises(UserError, match=rf"begun with --{option} \w+, not"):
        run(images, tmp_path / "x.h5", other, engine=engine)


class MovedEncoder(StubEncoder):
    @property
    def identity(self) -> EncoderIdentity:
        weights = "/elsewhere/\udcff.pth"
        return dataclasses.replace(super().identity, weights_source=weights, torchvision="9")


def test_where_the_weights_lay_does_not_matter(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "x.h5")
    moved = MovedEncoder()
    assert run(images, tmp_path / "x.h5", moved).kept == 10
    assert run(images, tmp_path / "y.h5", moved).cache.identity.weights_source == (
        "/elsewhere/?.pth"
    )


def test_a_damaged_cache_is_begun_anew_with_force(images: Path, tmp_path: Path) -> None:
    partial_path(tmp_path / "x.h5").write_bytes(b"garbage")
    with pytest.raises(UserError, match="not a readable feature cache"):
        run(images, tmp_path / "x.h5")
    assert run(images, tmp_path / "x.h5", force=True).encoded == 10
    (tmp_path / "folder.h5").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        run(images, tmp_path / "folder.h5")
