"""No option that names a file to write replaces what is not the program's own."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import click
import h5py
import pytest
from click.testing import Result
from commands import invoke
from conftest import draw
from drawn_run import DrawnRun

import caption as caption_command
import evaluate
import extract_features
from pipeline.cli import compress

COMMANDS: dict[str, tuple[click.Command, str]] = {
    "caption --output": (caption_command.main, "photos --output {path}"),
    "caption --html": (caption_command.main, "photos --html {path}"),
    "evaluate --output": (evaluate.main, "runs/x --output {path}"),
    "evaluate --html": (evaluate.main, "runs/x --html {path}"),
    "extract --output": (extract_features.main, "--data photos --force --output {path}"),
    "compress --output": (compress.main, "runs/x --output {path}"),
}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    draw(tmp_path / "photos" / "a.jpg")
    shutil.copy(tmp_path / "photos" / "a.jpg", tmp_path / "photos" / "scan.txt")
    (tmp_path / "photos" / "archive").write_bytes(b"PK\3\4\0\0")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def caption(run: DrawnRun, *words: object, code: int = 0) -> Result:
    return invoke(caption_command.main, "--model", run.run, "--device", "cpu", *words, code=code)


@pytest.mark.parametrize("name", ["a.jpg", "new.PNG", "scan.txt", "archive", "../photos"])
@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_other_kinds_are_refused(photos: Path, command: str, name: str) -> None:
    before = {path: path.read_bytes() for path in photos.iterdir()}
    main, arguments = COMMANDS[command]
    result = invoke(main, *arguments.format(path=f"photos/{name}").split(), code=2)
    assert f"Error: photos/{name}: " in result.stderr and result.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


@pytest.mark.parametrize(
    "content",
    [
        "# My photographs\n",
        "image,caption\na.jpg,A kite .\n",
        "a.jpg#0\tA kite .\n",
        "photos/gone.jpg\tA kite .\n",
        '{"image": "a.jpg", "caption": "A kite ."}\n',
        '[{"image": "a.jpg", "caption": "A kite ."}]',
        '[{"image_id": 7, "caption": "A kite ."}]',
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Mine</title>\n',
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_texts_of_the_users_are_refused(photos: Path, command: str, content: str) -> None:
    mine = photos.parent / "mine"
    mine.write_text(content)
    main, arguments = COMMANDS[command]
    result = invoke(main, *arguments.format(path="mine").split(), code=2)
    assert result.stderr.splitlines()[-1].startswith("Error: mine: holds something else")
    assert mine.read_text() == content


@pytest.mark.usefixtures("tiny_inception")
def test_what_the_program_wrote_is_replaced(drawn_run: DrawnRun, photos: Path) -> None:
    shutil.copy(photos / "a.jpg", photos / 'a "b" c.jpg')
    names = ["x.txt", "x.csv", "x.json", "x.jsonl", "x.coco"]
    for name in names * 2:
        layout = ["--format", "coco"] if name == "x.coco" else []
        caption(drawn_run, "photos", "--output", name, "--html", "x.html", *layout)
    table = Path("x.csv").read_text().replace(",", ";").replace("\n", "\r\n")
    Path("x.csv").write_text("\ufeff" + table, encoding="utf-8")  # as a spreadsheet saves it
    caption(drawn_run, "photos", "--output", "x.csv", "--html", "x.html")
    assert Path("x.csv").read_text().startswith("image,rank,")
    (photos / 'a "b" c.jpg').unlink()
    caption(drawn_run, "photos", "--output", "x.txt", "--skip-existing")


def test_a_scores_file_beside_the_predictions_is_not_replaced_either(photos: Path) -> None:
    Path("scores-x.json").write_text('{"mine": 1}')
    result = invoke(evaluate.main, "runs/x", "--output", "x.json", code=2)
    assert "scores-x.json: holds something else" in result.stderr


def test_an_hdf5_file_of_another_program_is_not_replaced(photos: Path) -> None:
    with h5py.File("mine.h5", "w") as file:
        file["x"] = [1]
    words = "--data photos --weights random --force --output mine.h5".split()
    result = invoke(extract_features.main, *words, code=2)
    assert "mine.h5: holds something else" in result.stderr
    with h5py.File("mine.h5") as file:
        assert list(file) == ["x"]


@pytest.mark.usefixtures("tiny_inception")
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_pipe_is_written_through(drawn_run: DrawnRun, photos: Path) -> None:
    pipe = photos.parent / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()), daemon=True)
    reader.start()
    caption(drawn_run, "photos", "--output", pipe)
    reader.join(timeout=30)
    assert pipe.is_fifo() and received[0].startswith("photos/a.jpg\t")
    assert {path.name for path in photos.parent.iterdir()} == {"photos", "pipe"}


@pytest.mark.usefixtures("tiny_inception")
def test_outputs_are_neither_images_nor_each_other(drawn_run: DrawnRun, photos: Path) -> None:
    text = photos / "text"
    text.write_text("photos/a.jpg\tno image\n")
    for arguments, message in (
        (["photos/text", "--output", text], f"{text}: is one of the images"),
        (["photos", "--output", "both", "--html", "photos/../both"], "both are both"),
    ):
        assert message in caption(drawn_run, *arguments, code=2).stderr


@pytest.mark.usefixtures("tiny_inception")
def test_an_image_called_txt_is_not_its_own_text_file(drawn_run: DrawnRun, photos: Path) -> None:
    scan = photos / "scan.txt"
    before = scan.read_bytes()
    for more in ([], ["--overwrite"]):
        assert "not replaced" in caption(drawn_run, scan, "--sidecar", *more, code=1).stderr
        assert scan.read_bytes() == before


@pytest.mark.usefixtures("tiny_inception")
def test_a_folder_that_cannot_be_listed_is_a_named_failure(
    drawn_run: DrawnRun, photos: Path, unlistable: Callable[[str, int], None]
) -> None:
    (photos / "share").mkdir()
    unlistable("share", errno.EACCES)
    result = caption(drawn_run, "photos", code=1)
    assert "photos/a.jpg\t" in result.stdout
    assert "failed: photos/share: Permission denied" in result.stderr
    assert "skipped: files with other endings (2)" in result.stderr
    result = invoke(extract_features.main, "--data", "photos", "--weights", "random", code=2)
    assert "photos/share: cannot be listed" in result.stderr
