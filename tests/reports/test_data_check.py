"""train_decoder.py --check: what it finds in good and in broken data, and how it ends."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
from click.testing import Result
from commands import invoke
from conftest import draw
from small_data import IDENTITY, make_small_data

import train_decoder
from pipeline.datasets.caption_table import CaptionedImage
from pipeline.features.cache_writer import open_writer
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.reports import data_check
from pipeline.reports.caption_statistics import better_tokenizer, coverage, unspaced_example

SMALL = "--embed-size 16 --hidden-size 16 --device cpu --precision fp32".split()


@pytest.fixture(autouse=True)
def known_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not load the pretrained model."""
    monkeypatch.setattr(data_check, "_known_to_pretrained", lambda table: 95.0)


def check(data: Path, *arguments: object, code: int = 0) -> Result:
    return invoke(train_decoder.main, "--data", data, "--check", *SMALL, *arguments, code=code)


def data_set(folder: Path, captions: Sequence[tuple[str, str]], images: Sequence[str] = ()) -> Path:
    """Write captions.csv, and a different image for each of its names or of ``images``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([("image", "caption"), *captions])
    for number, name in enumerate(images or sorted({name for name, _ in captions})):
        draw(folder / name, number, (16, 12 + number))
    return folder


def many(count: int = 30, text: str = "a dog runs") -> list[tuple[str, str]]:
    return [(f"{number:03d}.png", f"{text} {number % 3}") for number in range(count)]


# Good data


def test_data_with_features_can_start(tmp_path: Path) -> None:
    data, features = make_small_data(tmp_path)
    for number in range(60):
        draw(data / f"{number:04d}.jpg", number)
    before = sorted(tmp_path.rglob("*"))
    run = tmp_path / "my run"
    result = check(data, "--features", features, "--run", run, "--min-count", 2)
    assert sorted(tmp_path.rglob("*")) == before, "a check writes nothing"
    lines = result.stdout.splitlines()
    assert lines[:4] == [
        f"captions: {data}/captions.csv (CSV)",
        "  120 captions of 60 images; per image: median 2, minimum 2, maximum 2",
        f"images: 60 in {data}, 60 of them with captions",
        "split: 36 train, 12 val, 12 test (the file's own split column)",
    ]
    assert "tokens (english): per caption: median 3, maximum 7" in lines
    # a, there, is, it, four colours, three things
    words = "vocabulary: 11 of 11 words, those that occur 2 times or more in train (--min-count)"
    assert words in lines
    assert "  unknown tokens in val: 0 (0.0 %), in 0 of 24 captions" in lines
    assert f"features: {features}, of 60 captioned images" in result.stdout
    assert lines[-2:] == [
        "next: training can start",
        f"  python train_decoder.py --data {data} --features {features} --run '{run}' "
        "--embed-size 16 --hidden-size 16 --min-count 2 --precision fp32 --device cpu",
    ]
    assert result.stderr == ""


def test_the_command_that_it_names_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, features = make_small_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ("--no-tie-embeddings", "--no-init-state-from-image")
    arguments = ("--features", features, "--epochs", 1, *flags)
    command = check(data, *arguments).stdout.splitlines()[-1].split()
    assert command[:2] == ["python", "train_decoder.py"] and "--no-tie-embeddings" in command
    assert "--check" not in command
    invoke(train_decoder.main, *command[2:])
    # The run is there now: a check says that it is finished, or that it is another.
    again = check(data, *arguments)
    assert "run: runs/decoder resumes after epoch 1 of 1" in again.stdout
    refused = check(data, *arguments, "--seed", 1, code=2)
    assert "runs/decoder was started with seed 0, not 1" in refused.stderr
    assert "started over" in check(data, *arguments, "--seed", 1, "--force").stdout


def test_without_features_it_names_the_command_that_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data_set(tmp_path / "photos", many())
    result = check(Path("photos"), "--run", "runs/photos", code=1)
    assert "features: data/features/photos.h5 is not there yet" in result.stdout
    assert result.stdout.endswith(
        "next: extract features\n"
        "  python extract_features.py --data photos --device cpu\n"
        "then:\n"
        "  python train_decoder.py --data photos --run runs/photos --embed-size 16 --hidden-size "
        "16 --precision fp32 --device cpu\n"
    )
    (tmp_path / "data/features").mkdir(parents=True)
    (tmp_path / "data/features/photos.h5.partial").touch()
    assert "is not finished" in check(Path("photos"), code=1).stdout


# Broken and doubtful data


def test_missing_images_are_named_and_so_are_those_without_captions(tmp_path: Path) -> None:
    data = data_set(tmp_path, [*many(), ("lost.png", "a cat"), ("gone.png", "a cat")])
    (data / "lost.png").unlink()
    (data / "gone.png").unlink()
    for number in range(5):
        draw(data / f"bare{number}.png", 100 + number)
    with (data / "captions.csv").open("a") as handle:
        handle.write("000.png, \nbroken\n")
    text = check(data, code=1).stdout
    assert "  empty captions dropped (first: line 34): 1" in text
    assert "  malformed lines or entries dropped (first: line 35): 1" in text
    assert "captions without an image, left out: 2 (gone.png, lost.png)" in text
    assert "images without captions, left out: 5 (bare0.png, bare1.png, bare2.png ...)" in text


ROWS = "image,caption\n"


@pytest.mark.parametrize(
    "captions, words",
    [
        (None, "no captions file; looked for"),
        ("", "the file is empty"),
        ("000.png,a dog\n", "no header with an image and a caption column"),
        (ROWS + "x.png,a dog\ny.png,a dog\n", "none of its images is among those of --data"),
        (ROWS + "000.png,a dog\n", "no image is in the train split"),
        (ROWS + "000.png,one\n001.png,two\n002.png,three\n", "no word occurs 5 times or more"),
    ],
)
def test_captions_that_cannot_be_trained_on_are_one_line(
    tmp_path: Path, captions: str | None, words: str
) -> None:
    data = data_set(tmp_path, many(3))
    file = data / "captions.csv"
    if captions is None:
        file.unlink()
    else:
        file.write_text(captions)
    refuse(data, words, "--features", tmp_path / "none.h5")


def test_images_and_features_that_cannot_be_trained_on_are_one_line(tmp_path: Path) -> None:
    features = tmp_path / "features.h5"
    refuse(tmp_path / "none", "no such folder", "--features", features)
    data = data_set(tmp_path / "data", many())
    features.write_bytes(b"no HDF5")
    refuse(data, "not a readable feature cache", "--features", features)
    make_cache(features, ["other.png"])
    refuse(data, "none of its images is among those", "--features", features)
    make_cache(features, [name for name, _ in many()])
    content = features.read_bytes()
    features.write_bytes(content.replace(b"\x00\x3c" * 64, b"\x00\x3d" * 64, 1))
    refuse(data, "rows are damaged", "--features", features)
    features.unlink()
    for image in data.glob("*.png"):
        image.unlink()
    refuse(data, "no images there, and no features of them", "--features", features)


def refuse(data: Path, words: str, *arguments: object) -> None:
    """Check that this is one line and exit code 2."""
    result = check(data, *arguments, code=2)
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("Error: ")


def make_cache(path: Path, names: list[str], failures: dict[int, str] | None = None) -> None:
    failures = failures or {}
    path.unlink(missing_ok=True)
    writer = open_writer(path, names, IDENTITY)
    rows = [row for row in range(len(names)) if row not in failures]
    writer.write(rows, numpy.ones((len(rows), FEATURE_SIZE), dtype=numpy.float32), failures)
    writer.finish()


def test_features_that_failed_or_were_never_made(tmp_path: Path) -> None:
    data = data_set(tmp_path / "data", many())
    features = tmp_path / "f.h5"
    names = [name for name, _ in many()]
    make_cache(features, names[:28], {3: "truncated file"})
    text = check(data, "--features", features).stdout
    assert "of 27 captioned images" in text
    assert "could not be read, left out: 1 (003.png: truncated file)" in text
    assert "not extracted, left out: 2 (028.png, 029.png)" in text
    assert (
        f"advice: extract the 2 images that were added: python extract_features.py --data {data}"
        in text
    )
    assert "untrained encoder" in text


def test_images_that_are_gone_since_extraction_are_not_missed(tmp_path: Path) -> None:
    data = data_set(tmp_path / "data", [*many(), ("lost.png", "a cat")])
    features = tmp_path / "f.h5"
    make_cache(features, [name for name, _ in many()])
    (data / "000.png").unlink()
    (data / "lost.png").unlink()
    text = check(data, "--features", features).stdout
    assert "captions without an image, left out: 1 (lost.png)" in text
    for image in data.glob("*.png"):
        image.unlink()
    text = check(data, "--features", features).stdout
    assert f"images: none in {data}; training needs only the features" in text
    assert "of 30 captioned images" in text and "left out" not in text


def test_words_that_only_val_has_and_another_min_count(tmp_path: Path) -> None:
    rows = [(f"{number:02d}.png", "a red dog") for number in range(20)]
    rows[0] = ("00.png", "a zebra runs")
    rows[1] = ("01.png", "a zebra walks")
    data = data_set(tmp_path, rows)
    with (data / "captions.csv").open("w", newline="") as handle:
        val = [("18.png", "a zebra and a zebra", "val"), ("19.png", "a dog", "val")]
        csv.writer(handle).writerows(
            [("image", "caption", "split"), *((n, t, "train") for n, t in rows[:18]), *val]
        )
    text = check(data, code=1).stdout
    assert "vocabulary: 3 of 6 words, those that occur 5 times or more in train" in text
    assert "unknown tokens in val: 3 (42.9 %), in 1 of 2 captions: zebra 2, and 1" in text
    assert "advice: --min-count 2 leaves 14.3 % of val's tokens unknown instead of 42.9 %" in text
    assert "advice: --min-count" not in check(data, "--min-count", 2, code=1).stdout


def test_long_captions(tmp_path: Path) -> None:
    rows = [
        (name, "a dog " * (40 if number < 3 else 11)) for number, (name, _) in enumerate(many())
    ]
    text = check(data_set(tmp_path, rows), code=1).stdout
    long = re.search(r"(\d+) captions \(100.0 %\) have more than 20 tokens", text)
    assert long is not None and int(long[1]) >= 20
    assert re.search(r"\d are cut to 50 tokens in training", text)
    text = check(tmp_path, "--tokenizer", "characters", code=1).stdout
    assert "have more than 40 tokens" in text and "advice: --tokenizer english" in text


@pytest.mark.parametrize(
    "text, chosen, words",
    [
        ("一只狗在草地上跑", "english", "advice: --tokenizer characters: 100 % of the letters"),
        ("một con chó chạy trên cỏ", "english", "advice: --tokenizer words: "),
        ("a dog runs on the grass", "characters", "advice: --tokenizer english: only 0.0 %"),
        ("Zwei große Mädchen", "characters", "advice: --tokenizer words: only 0.0 %"),
        ("a_dog_runs_over_the_grass_at_noon", "english", "advice: most captions have no space"),
    ],
)
def test_a_better_tokenizer_is_named_even_where_training_cannot_start(
    tmp_path: Path, text: str, chosen: str, words: str
) -> None:
    rows = [(name, text) for name, _ in many()]
    data = data_set(tmp_path, rows)
    assert words in check(data, "--tokenizer", chosen, code=1).stdout
    rows = [(name, f"{text[number % len(text)]}{number}") for number, (name, _) in enumerate(rows)]
    if chosen == "english" and text[0] == "一":
        result = check(data_set(tmp_path, rows), code=2)
        assert words in result.stdout and "no word occurs 5 times" in result.stderr


def test_few_images_and_a_caption_that_many_share_are_pointed_out(tmp_path: Path) -> None:
    data = data_set(tmp_path, many())
    text = check(data, "--run", "runs/x", code=1).stdout
    assert 'advice: 10 of 30 images share the caption "a dog runs 0"' in text
    assert re.search(r"advice: train has few images \(2\d\)", text)
    assert (
        "knows 95 % of their words, start from it: python finetune_joint.py --data "
        f"{data} --device cpu --start pretrained --run runs/x-joint" in text
    )
    assert re.search(r"advice: val has few images \(\d\): scores will depend on chance", text)
    assert "pretrained" not in check(data, "--tokenizer", "words", code=1).stdout


# The parts


def test_coverage() -> None:
    found = coverage({"a"}, [["a", "dog"], ["a"], ["<unk>"]])
    assert (found.tokens, found.captions, found.affected) == (4, 3, 2)
    assert found.unknown == {"dog": 1, "<unk>": 1} and found.percent == 50
    assert coverage({"a"}, []).percent == 0


def images(*captions: tuple[str, ...]) -> list[CaptionedImage]:
    return [CaptionedImage(f"{number}.jpg", "train", own) for number, own in enumerate(captions)]


def test_english_with_a_few_foreign_words_stays_english() -> None:
    captions = images(
        *[("a man sits in a café on the street",), *[("a dog runs on the grass",)] * 20]
    )
    assert better_tokenizer(captions, "english") is None
    assert better_tokenizer(images(("1, 2",)), "english") is None
    assert better_tokenizer(images(("빨간 옷을 입은 여자",)), "english") == (
        "words",
        "100.0 % of the letters are not those of English",
    )
    assert unspaced_example(images(("a dog runs over there",))) is None
