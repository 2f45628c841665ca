"""Where captions go: one file, text files, metadata, a page; interrupted, resumed, added to."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from commands import invoke
from drawn_run import DrawnRun

import caption as command
from pipeline import Captioner
from pipeline.captioner import Prediction
from pipeline.decoding.captions import Caption, Word
from pipeline.outputs.formats import WRITERS, read_predictions
from pipeline.outputs.gallery import write_gallery
from pipeline.outputs.resume import PartialResults, results_path
from pipeline.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny_inception")


@pytest.fixture(autouse=True)
def loaded_once(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each command the loading."""
    monkeypatch.setattr("pipeline.cli.caption._load", lambda *_: captioner)


@pytest.fixture
def album(scenes: list[Path], tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for name, image in zip(("a", "b", "c", "d", "e", "sub/f"), scenes, strict=False):
        shutil.copy(image, folder / f"{name}.jpg")
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that a captioner was asked for."""
    names: list[str] = []
    stream = Captioner.stream

    def spy(self: Captioner, images: Any, *arguments: Any, **options: Any) -> Iterator[Prediction]:
        names.extend(Path(image).name for image in images)
        return stream(self, images, *arguments, **options)

    monkeypatch.setattr(Captioner, "stream", spy)
    return names


def caption(run: DrawnRun, *words: object, **options: Any) -> Result:
    return invoke(command.main, "--model", run.run, "--device", "cpu", *words, **options)


NAMES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]


# One file


@pytest.mark.parametrize("name", ["out.jsonl", "out.txt"])
def test_an_interrupted_command_goes_on_and_ends_with_the_same_file(
    drawn_run: DrawnRun,
    album: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    whole, output = album.parent / f"whole{name}", album.parent / name
    words = ["--words"] if name == "out.jsonl" else []
    caption(drawn_run, album, "--output", whole, *words)
    append = PartialResults.append

    def interrupted(self: PartialResults, prediction: Prediction) -> None:
        append(self, prediction)
        if prediction.path.endswith("c.jpg"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "append", interrupted)
        result = caption(drawn_run, album, "--output", output, *words, code=130)
    assert "interrupted; run the same command to resume" in result.stderr
    assert not output.exists() and results_path(output).read_bytes().count(b"\n") == 4
    with results_path(output).open("a", encoding="utf-8") as handle:
        handle.write('{"path": "d.jpg", "sta')  # a line that a kill cut off

    asked.clear()
    result = caption(drawn_run, album, "--output", output, *words)
    assert "3 were captioned before the interruption" in result.stderr
    assert asked == ["d.jpg", "e.jpg", "f.jpg"]
    assert output.read_bytes() == whole.read_bytes()
    assert {p.name for p in album.parent.iterdir()} == {"album", output.name, whole.name}


def test_an_interruption_promises_to_go_on_only_where_something_is_kept(
    drawn_run: DrawnRun, album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Captioner, "stream", interrupted)
    result = caption(drawn_run, album, code=130)
    assert result.stderr == "interrupted\n"
    result = caption(drawn_run, album, "--sidecar", code=130)
    assert result.stderr == "interrupted; run the same command to resume\n"


def test_what_changed_since_the_interruption_is_captioned_again(
    drawn_run: DrawnRun, album: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = album.parent / "out.csv"

    def fail(*arguments: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.utils.files.os.fsync", fail)
        caption(drawn_run, album, "--output", output, code=2)
    assert not output.exists()
    shutil.copy(album / "a.jpg", album / "b.jpg")
    (album / "c.jpg").unlink()
    asked.clear()
    caption(drawn_run, album, "--output", output)
    assert asked == ["b.jpg"]
    rows = list(csv.DictReader(io.StringIO(output.read_text(encoding="utf-8"))))
    captions = {Path(row["image"]).name: row["caption"] for row in rows}
    assert list(captions) == ["a.jpg", "b.jpg", "d.jpg", "e.jpg", "f.jpg"]
    assert captions["a.jpg"] == captions["b.jpg"]


@pytest.mark.parametrize("change", [("--beam-size", 2), ("--num-captions", 2), ("--words",)])
def test_another_search_does_not_go_on_with_the_captions_of_the_first(
    drawn_run: DrawnRun,
    album: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    change: tuple[object, ...],
) -> None:
    output = album.parent / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "__exit__", lambda *_: None)  # as if killed at the very end
        caption(drawn_run, album, "--output", output)
    asked.clear()
    caption(drawn_run, album, "--output", output, *change)
    assert asked == NAMES


@pytest.mark.parametrize("layout", list(WRITERS))
def test_skip_existing_keeps_what_the_file_has_and_adds_the_rest(
    drawn_run: DrawnRun, album: Path, asked: list[str], layout: str
) -> None:
    whole, output = album.parent / "whole", album.parent / "out"
    caption(drawn_run, album, "--format", layout, "--output", whole)
    some = [album / "b.jpg", album / "e.jpg"]
    caption(drawn_run, *some, "--format", layout, "--output", output)
    asked.clear()
    result = caption(drawn_run, album, "--format", layout, "--output", output, "--skip-existing")
    assert asked == ["a.jpg", "c.jpg", "d.jpg", "f.jpg"]
    assert "2 already captioned: skipped" in result.stderr
    assert output.read_bytes() == whole.read_bytes()

    # What the file has of other images stays, before the rest.
    def add(name: str) -> list[str]:
        asked.clear()
        words = ["--format", layout, "--output", output, "--skip-existing"]
        caption(drawn_run, album / name, *words)
        return asked

    assert add("a.jpg") == [] and output.read_bytes() == whole.read_bytes()
    shutil.copy(album / "a.jpg", album / "g.jpg")
    assert add("g.jpg") == ["g.jpg"]
    before, after = read_predictions(whole, layout), read_predictions(output, layout)
    assert [p.path for p in after] == [*(p.path for p in before), str(album / "g.jpg")]
    assert [p.captions[0].text for p in after[:6]] == [p.captions[0].text for p in before]


@pytest.mark.parametrize("layout", list(WRITERS))
def test_every_format_can_be_read_again(tmp_path: Path, layout: str) -> None:
    words = (Word("a", 0.5), Word('"b"', 0.25))
    predictions = [
        Prediction('x, "y"\n.jpg' if layout != "text" else 'x, "y".jpg', [Caption("a b", -1.25)]),
        Prediction("z\u2028.jpg", [Caption("a", -0.5, words), Caption("c,\u2028d", -2.0)]),
        Prediction("broken.jpg", [], "empty file"),
    ]
    buffer = io.StringIO()
    WRITERS[layout](iter(predictions), buffer)
    file = tmp_path / "file"
    file.write_text(buffer.getvalue(), encoding="utf-8", newline="")
    found = read_predictions(file, layout)
    good = [p for p in found if p.error is None]
    assert [p.path for p in good] == [p.path for p in predictions[:2]]
    assert [[c.text for c in p.captions] for p in good] == [["a b"], ["a", "c,\u2028d"]]
    if layout in ("json", "jsonl"):
        assert found == predictions
    if layout == "csv":
        assert [c.log_probability for p in good for c in p.captions] == [-1.25, -0.5, -2.0]
        assert found[2].error == "empty file"


def test_the_format_follows_the_name_of_the_output(drawn_run: DrawnRun, album: Path) -> None:
    for name, layout in (("o.csv", "csv"), ("o.JSON", "json"), ("o.jsonl", "jsonl"), ("o", "text")):
        output = album.parent / name
        caption(drawn_run, album / "a.jpg", "--output", output)
        assert len(read_predictions(output, layout)) == 1
    foreign = album.parent / "foreign.csv"
    foreign.write_text("image,rank,text\na,1,b\n", encoding="utf-8")
    result = caption(drawn_run, album, "--output", foreign, "--skip-existing", code=2)
    assert "foreign.csv: not in --format csv" in result.stderr
    assert foreign.read_text(encoding="utf-8") == "image,rank,text\na,1,b\n"


# Text files and metadata


def test_sidecars_are_written_beside_and_never_replaced_unasked(
    drawn_run: DrawnRun, album: Path, asked: list[str]
) -> None:
    (album / "b.txt").write_text("my own words\n", encoding="utf-8")
    (album / "c.txt").write_text("")  # nothing in it: no caption
    result = caption(drawn_run, album, "--sidecar")
    assert asked == ["a.jpg", "c.jpg", "d.jpg", "e.jpg", "f.jpg"]
    assert "1 already captioned: skipped" in result.stderr
    shown = dict(line.split("\t") for line in result.stdout.splitlines())
    for name in asked:
        image = next(album.rglob(name))
        assert image.with_suffix(".txt").read_text(encoding="utf-8") == f"{shown[str(image)]}\n"
    assert (album / "b.txt").read_text(encoding="utf-8") == "my own words\n"

    asked.clear()
    caption(drawn_run, album, "--sidecar", "--skip-existing")
    assert asked == []
    output = album.parent / "out.json"  # wants all captions, also of images with a sidecar
    caption(drawn_run, album, "--sidecar", "--output", output)
    assert asked == NAMES and len(json.loads(output.read_text(encoding="utf-8"))) == 6
    assert (album / "b.txt").read_text(encoding="utf-8") == "my own words\n"
    asked.clear()
    caption(drawn_run, album, "--sidecar", "--overwrite", "--num-captions", 2)
    assert asked == NAMES
    assert len((album / "b.txt").read_text(encoding="utf-8").splitlines()) == 2


def test_a_sidecar_that_cannot_be_written_is_named_and_the_rest_goes_on(
    drawn_run: DrawnRun, album: Path
) -> None:
    shutil.copy(album / "a.jpg", album / "a.png")
    (album / "b.txt").mkdir()
    result = caption(drawn_run, album, "--sidecar", "--overwrite", code=1)
    assert f"failed: {album / 'a.png'}: a.txt belongs to a.jpg" in result.stderr
    assert f"failed: {album / 'b.jpg'}: " in result.stderr and "is a folder" in result.stderr
    assert len(result.stdout.splitlines()) == 7
    assert len([path for path in album.rglob("*.txt") if path.is_file()]) == 5


def test_metadata_get_the_caption_once(drawn_run: DrawnRun, album: Path, asked: list[str]) -> None:
    pytest.importorskip("pyexiv2", reason="pyexiv2 is not installed")
    from pipeline.outputs.metadata import read_description

    before = {path: path.stat().st_mtime_ns for path in album.rglob("*.jpg")}
    result = caption(drawn_run, album, "--write-metadata")
    shown = dict(line.split("\t") for line in result.stdout.splitlines())
    assert {str(path): read_description(path) for path in before} == shown
    assert {path: path.stat().st_mtime_ns for path in before} == before
    asked.clear()
    caption(drawn_run, album, "--write-metadata")
    assert asked == []


def test_a_page_has_more_captions_than_the_other_places(drawn_run: DrawnRun, album: Path) -> None:
    (album / "broken.jpg").write_bytes(b"no image")
    page = album.parent / "page.html"
    words = ("--html", page, "--sidecar", "--format", "jsonl", "--explain")
    result = caption(drawn_run, album, *words, code=1)
    assert f"page: {page}" in result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [len(r.get("captions", [])) for r in records] == [1, 1, 0, 1, 1, 1, 1]
    assert '"words"' not in result.stdout
    assert len((album / "a.txt").read_text(encoding="utf-8").splitlines()) == 1
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/webp") == 6 and "not a supported image" in text
    assert "<title>album</title>" in text
    assert '"name": "broken.jpg"' in text, "relative to the folder of all images"
    scripts = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    items = [item for item in map(json.loads, scripts) if item.get("captions")]
    assert [len(item["captions"]) for item in items] == [5] * 6
    for item in items:
        for found in item["captions"]:
            assert [word for word, *_ in found["words"]] == found["text"].split()
        first, second = (item["captions"][n]["words"] for n in (0, 1))
        assert all(len(cells) == 64 and max(cells) == 100 for _, _, cells in first)
        assert all(len(word) == 2 for word in second), "only the best caption is explained"
    assert not results_path(page).exists()


def test_captions_do_not_gather_in_memory_for_a_page(
    drawn_run: DrawnRun, album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Prediction]] = []
    kept: list[int] = []
    stream = Captioner.stream

    def watched(self: Captioner, *arguments: Any, **options: Any) -> Iterator[Prediction]:
        for prediction in stream(self, *arguments, **options):
            made.append(weakref.ref(prediction))
            yield prediction

    def counted(*arguments: Any) -> None:
        kept.append(sum(reference() is not None for reference in made))
        write_gallery(*arguments)

    monkeypatch.setattr(Captioner, "stream", watched)
    monkeypatch.setattr("pipeline.outputs.caption_folder.write_gallery", counted)
    caption(drawn_run, album, "--html", album.parent / "page.html")
    assert len(made) == 6
    assert kept[0] <= 1, "but for the last, which is still in hand"


# Which images


def test_paths_are_read_from_standard_input(drawn_run: DrawnRun, album: Path) -> None:
    odd = album / "an odd  name é.jpg"
    shutil.copy(album / "a.jpg", odd)
    paths = [odd, album / "b.jpg", album / "missing.jpg", album / "sub", album / "b.jpg"]
    listed = b"".join(os.fsencode(path) + b"\n" for path in paths)
    result = caption(drawn_run, "-", input=listed, code=1)
    shown = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert shown == [str(odd), str(album / "b.jpg"), str(album / "sub" / "f.jpg")]
    assert f"failed: {album / 'missing.jpg'}: no such file" in result.stderr


# What captions


def test_prefix_lengths_and_draws(drawn_run: DrawnRun, album: Path) -> None:
    def texts(*arguments: object) -> list[str]:
        result = caption(drawn_run, album, *arguments)
        return [line.split("\t")[1] for line in result.stdout.splitlines()]

    assert all(text.startswith("two red ") for text in texts("--prefix", "Two red"))
    assert all(len(text.split()) >= 9 for text in texts("--min-length", 9))
    assert all(len(text.split()) <= 3 for text in texts("--max-length", 3))
    drawn = texts("--temperature", 3, "--seed", 1)
    assert drawn == texts("--temperature", 3, "--seed", 1, "--batch-size", 1)
    assert drawn != texts("--temperature", 3, "--seed", 2)
    several = texts("--num-captions", 4, "--diverse")
    assert len(several) == 24
    assert all(len(set(several[i : i + 4])) == 4 for i in range(0, 24, 4))


def test_words_have_probabilities_that_make_up_the_caption(
    drawn_run: DrawnRun, album: Path
) -> None:
    options = ("--format", "json", "--num-captions", 2)
    detailed, plain = (caption(drawn_run, album, *options, *w).stdout for w in (["--words"], []))
    for record in json.loads(detailed):
        for found in record["captions"]:
            assert " ".join(word["text"] for word in found["words"]) == found["caption"]
    assert '"words":' not in plain
    assert all(0 <= p <= 1 for p in map(float, re.findall(r'"probability": ([\d.]+)', detailed)))


def test_wrong_commands_are_one_line(drawn_run: DrawnRun, album: Path) -> None:
    for arguments, message in (
        ((), "name images or a folder of them"),
        ((album, "--serve"), "--serve takes no images"),
        ((album, "--skip-existing"), "--skip-existing: needs --output, --sidecar"),
        ((album, "--diverse"), "--diverse: is for several captions"),
        ((album, "--diverse", "--num-captions", 2, "--top-p", 0.5), "--diverse: drawn captions"),
        ((album, "--prefix", "a xyzzy"), "--prefix: the model does not know 'xyzzy'"),
        ((album, "--prefix", "a dog runs", "--max-length", 2), "--prefix: "),
        ((album, "--min-length", 9, "--max-length", 3), "--min-length 9: must not be above"),
        ((album, "--temperature", 0), "--temperature"),
        ((album, "--html", album), "is a folder"),
        ((album, "--sidecar", "--overwrite", "--skip-existing"), "contradict each other"),
        ((album, "--words"), "--words: is for json and jsonl"),
        ((album, "--overwrite"), "--overwrite: is for --sidecar"),
        ((album, "--thumbnails", "beside"), "--thumbnails: is for the page"),
        ((album, "--explain"), "--explain: is for the page"),
        (("--serve", "--beam-size", 2), "--serve: takes no search options (beam-size-2)"),
        (("--serve", "--sentence"), "--sentence: has no effect with --serve"),
        (("--serve", "--output", "x.csv"), "--output: has no effect with --serve"),
        ((album, "--port", 1), "--port: is for --serve"),
        ((album, "--seed", 1), "--seed: is for --temperature and --top-p"),
        ((album, "--beam-size", 1, "--length-penalty", 0), "--length-penalty: has no effect"),
        ((album, "--model", drawn_run.run), "2 models: add --ensemble to use them as one"),
        (("-",), "standard input: no images there"),
    ):
        result = caption(drawn_run, *arguments, code=2)
        assert message in result.stderr and result.stdout == ""


def test_captions_are_sentences_everywhere(
    drawn_run: DrawnRun, album: Path, tmp_path: Path
) -> None:
    plain, page, output = (tmp_path / name for name in ("plain.csv", "page.html", "out"))
    caption(drawn_run, album / "a.jpg", "--output", plain)
    [text] = [row["caption"] for row in csv.DictReader(plain.open(encoding="utf-8"))]
    words = ["--output", output, "--html", page, "--sidecar", "--sentence"]
    caption(drawn_run, album / "a.jpg", *words)
    sentence = text[0].upper() + text[1:] + "."
    for file in (output, page, album / "a.txt"):
        assert sentence in file.read_text(encoding="utf-8")


# The records of an interrupted command


def test_records_that_cannot_be_used_are_made_again(tmp_path: Path) -> None:
    target, image = tmp_path / "x.csv", tmp_path / "p.jpg"
    image.write_bytes(b"1")
    made = Prediction(str(image), [Caption("a", -1.0, (Word("a", 0.5),))])
    results_path(target).write_bytes(b"\xff\xfe garbage\n[1, 2")
    results = PartialResults(target, {"a": 1})
    assert str(image) not in results
    results.append(made)
    results.append(Prediction("broken.jpg", [], "not an image"))
    assert results[str(image)] == made and results["broken.jpg"].error == "not an image"
    again = PartialResults(target, {"a": 1})
    assert again[str(image)] == made and "broken.jpg" not in again
    image.write_bytes(b"12")
    assert str(image) not in PartialResults(target, {"a": 1})
    results_path(target).unlink()
    results_path(target).mkdir()
    with pytest.raises(UserError, match="is a folder"):
        PartialResults(target, {})
