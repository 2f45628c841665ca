"""caption.py and the Captioner behind it, on drawn images."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from click.testing import Result
from commands import invoke
from drawn_run import DrawnRun
from forked import ended
from PIL import Image

import caption as command
from pipeline import Captioner
from pipeline.decoding.options import SearchOptions
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.models.encoder import Encoder
from pipeline.utils.errors import InputError, UserError

pytestmark = pytest.mark.usefixtures("tiny_inception")


@pytest.fixture
def album(scenes: list[Path], tmp_path: Path) -> Path:
    """A folder as people have them: sub-folders, spaces, broken files, no data set near."""
    folder = tmp_path / "album"
    (folder / "trip to Đà Nẵng").mkdir(parents=True)
    shutil.copy(scenes[0], folder / "b.jpg")
    shutil.copy(scenes[1], folder / "a.JPG")
    shutil.copy(scenes[2], folder / "trip to Đà Nẵng" / "boat one.jpg")
    Image.open(scenes[3]).save(folder / "trip to Đà Nẵng" / "c.png")
    (folder / "broken.jpg").write_bytes(scenes[4].read_bytes()[:900])
    (folder / "notes.txt").write_text("no image")
    return folder


def caption(model: Path, *words: object, **options: Any) -> Result:
    return invoke(command.main, "--model", model, "--device", "cpu", *words, **options)


GOOD = ["a.JPG", "b.jpg", "trip to Đà Nẵng/boat one.jpg", "trip to Đà Nẵng/c.png"]


def test_a_folder_is_captioned_and_what_is_unreadable_named(
    drawn_run: DrawnRun, album: Path
) -> None:
    result = caption(drawn_run.run, album, code=1)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [path for path, _ in lines] == [str(album / name) for name in GOOD]
    assert all(text and "<" not in text for _, text in lines)
    assert f"failed: {album / 'broken.jpg'}: " in result.stderr
    assert "1 of 5 images could not be read" in result.stderr


def test_paths_and_patterns_take_images_and_folders_once_each(
    drawn_run: DrawnRun, album: Path
) -> None:
    result = caption(drawn_run.run, album / "b.jpg", album / "*.JPG", album / "b.jpg")
    names = [Path(line.split("\t")[0]).name for line in result.stdout.splitlines()]
    assert names == ["b.jpg", "a.JPG"]
    result = caption(drawn_run.run, album.parent / "alb*", album / "[ab].*", code=1)
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [
        str(album / name) for name in GOOD
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("layout", ["text", "json", "jsonl", "csv", "coco"])
def test_a_name_that_is_no_utf8_is_written_with_marks(
    drawn_run: DrawnRun, album: Path, tmp_path: Path, layout: str
) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(album / "b.jpg", os.fsdecode(bytes(folder) + b"/caf\xe9.jpg"))
    output = tmp_path / "captions"
    caption(drawn_run.run, folder, "--format", layout, "--output", output)
    assert "caf\ufffd.jpg" in output.read_text(encoding="utf-8")


def test_formats_say_the_same(drawn_run: DrawnRun, album: Path, tmp_path: Path) -> None:
    def output(layout: str) -> str:
        file = tmp_path / f"out.{layout}"
        words = ("--format", layout, "--output", file, "--num-captions", 2)
        result = caption(drawn_run.run, album, *words, code=1)
        assert result.stdout == ""
        return file.read_text(encoding="utf-8")

    records = json.loads(output("json"))
    assert [json.loads(line) for line in output("jsonl").splitlines()] == records
    assert [r["image"] for r in records if "error" in r] == [str(album / "broken.jpg")]
    pairs = [
        (r["image"], c["caption"], c["log_probability"])
        for r in records
        for c in r.get("captions", [])
    ]
    assert len(pairs) == 2 * len(GOOD) and len(set(pairs)) == len(pairs)
    assert all(p[2] < 0 for p in pairs)
    assert [tuple(line.split("\t")) for line in output("text").splitlines()] == [
        (image, text, f"{score:.4f}") for image, text, score in pairs
    ]
    rows = list(csv.DictReader(output("csv").splitlines()))
    assert [(r["image"], r["caption"]) for r in rows if not r["error"]] == [p[:2] for p in pairs]
    assert [r["image"] for r in rows if r["error"]] == [str(album / "broken.jpg")]
    coco = json.loads(output("coco"))
    assert [(c["image_id"], c["caption"]) for c in coco] == [p[:2] for p in pairs]


def test_captions_do_not_depend_on_the_batch(captioner: Captioner, scenes: list[Path]) -> None:
    options = SearchOptions(beam_size=3, num_captions=3, consensus=0, matching=0)
    one, four = (
        [p.captions for p in captioner.stream(scenes[:9], options, batch_size=size)]
        for size in (1, 4)
    )
    assert [[c.text for c in captions] for captions in one] == [
        [c.text for c in captions] for captions in four
    ]
    for alone, together in zip(one, four, strict=True):
        assert [c.log_probability for c in alone] == pytest.approx(
            [c.log_probability for c in together], abs=1e-3
        )
    assert len({c[0].text for c in one}) > 1, "different images, different captions"


def test_one_batch_has_all_threads_and_many_share_them(
    captioner: Captioner, scenes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, threads = captioner.encoder.encode, []

    def spy(images: list[numpy.ndarray]) -> numpy.ndarray:
        threads.append(torch.get_num_threads())
        return encode(images)

    monkeypatch.setattr(captioner.encoder, "encode", spy)
    monkeypatch.setattr("pipeline.captioner.default_workers", lambda device: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert len(captioner.caption(scenes[:4])) == 4
        assert threads == [2]
        captioner.caption(scenes[:4], batch_size=2)
        assert threads == [2, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_python_interface(drawn_run: DrawnRun, album: Path) -> None:
    captioner = Captioner.load(drawn_run.run / "best.safetensors", device="cpu")
    texts = captioner.caption([album / "a.JPG", album / "b.jpg"])
    assert len(texts) == 2 and all(isinstance(text, str) and text for text in texts)
    assert captioner.caption([]) == []
    assert [captioner.caption(str(album / "a.JPG")), captioner.caption(album / "b.jpg")] == texts
    with pytest.raises(InputError, match=r"broken\.jpg: "):
        captioner.caption([album / "broken.jpg"])


@pytest.mark.parametrize(
    ("engine", "units", "given", "chosen"),
    [
        ("openvino", True, "auto", "int8"),
        ("openvino", True, "fp32", "fp32"),
        ("openvino", False, "auto", "fp32"),
        ("torch", True, "auto", "fp32"),
    ],
)
def test_int8_is_taken_under_openvino_where_the_cpu_has_it(
    engine: str,
    units: bool,
    given: str,
    chosen: str,
    drawn_run: DrawnRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.captioner.choose_engine", lambda *_, **__: engine)
    monkeypatch.setattr("pipeline.captioner.cpu_has_int8", lambda: units)
    monkeypatch.setattr("pipeline.utils.devices.cpu_has_amx", lambda: False)
    monkeypatch.setattr(Encoder, "for_inference", lambda self, engine: self)
    captioner = Captioner.load(drawn_run.run, device="cpu", precision=given)
    assert captioner.encoder.precision == chosen


def test_images_and_arrays_are_captioned_like_their_files(
    captioner: Captioner, album: Path
) -> None:
    path = album / "trip to Đà Nẵng" / "c.png"
    image = Image.open(path)
    array = numpy.asarray(image.convert("RGB"))
    assert captioner.caption([image, array, path]) == [captioner.caption(image)] * 3
    exif = Image.Exif()
    exif[274] = 6  # upright after a turn to the right
    image.rotate(90, expand=True).save(album / "turned.png", exif=exif)
    wrong = numpy.zeros((4, 4), numpy.uint8)
    found = list(captioner.stream([Image.open(album / "turned.png"), wrong]))
    assert found[0].captions[0].text == captioner.caption(path)
    assert (found[1].path, found[1].error) == (
        "image 1",
        "not uint8 (height, width, 3) but uint8 (4, 4)",
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_captions(captioner: Captioner, album: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = captioner.caption(album / "b.jpg")  # the parent's threads have worked
        child = os.fork()
        if not child:
            os._exit(0 if captioner.caption(album / "b.jpg") == expected else 1)
        assert ended(child, patience=60) == 0
    finally:
        torch.set_num_threads(before)


def test_wrong_commands_are_one_line_and_exit_code_two(drawn_run: DrawnRun, album: Path) -> None:
    empty = album / "empty"
    empty.mkdir()
    for arguments, message in (
        ((drawn_run.run, album / "none.jpg"), "no such file, folder or pattern"),
        ((drawn_run.run, empty), "no images there"),
        ((album / "none.safetensors", album), "train_decoder.py"),
        ((album / "notes.txt", album), "not a checkpoint"),
        ((drawn_run.run, album / "n*.txt"), "no images there"),
        ((drawn_run.run, album, "--output", empty), "is a folder"),
        (
            (drawn_run.run, album, "--num-captions", 4, "--beam-size", 3),
            "--beam-size of at least 4",
        ),
        ((drawn_run.run, album, "--weights", album / "x.pth"), "--weights"),
    ):
        result = caption(*arguments, code=2)
        assert message in result.stderr and result.stdout == ""


def test_the_encoder_must_be_that_of_the_training(drawn_run: DrawnRun, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(drawn_run.run)
    state = torch.load(drawn_run.weights, weights_only=True)
    state["Conv2d_1a_3x3.conv.weight"][0, 0, 0, 0] += 0.01
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not the encoder that this model was trained with"):
        Captioner.load(drawn_run.run, device="cpu", weights=str(tmp_path / "other.pth"))
    moved = tmp_path / "moved.pth"
    shutil.copy(drawn_run.weights, moved)
    checkpoint.encoder = type(checkpoint.encoder)(
        **{**vars(checkpoint.encoder), "weights_source": "/nowhere/x.pth"}
    )
    save_checkpoint(tmp_path / "best.safetensors", checkpoint)
    with pytest.raises(UserError, match=r"/nowhere/x\.pth.*--weights FILE"):
        Captioner.load(tmp_path / "best.safetensors", device="cpu")
    Captioner.load(tmp_path / "best.safetensors", device="cpu", weights=str(moved))


def test_the_page_is_served_with_the_models_that_were_named(
    drawn_run: DrawnRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[object] = []
    monkeypatch.setattr("pipeline.serve.app.serve", lambda *given, **more: served.extend(given))
    caption(drawn_run.run, "--serve", "--port", 0)
    assert isinstance(served[0], Captioner) and served[1:] == [str(drawn_run.run), 0]
