"""Text from strangers: names, captions, words and reasons, on terminals, in files and on pages."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from commands import invoke
from conftest import REPOSITORY, draw
from hypothesis import given
from hypothesis import strategies as st

import pipeline.cli.caption
from pipeline.captioner import Prediction
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.captions import Caption, captions_of
from pipeline.decoding.hypothesis import Hypothesis
from pipeline.decoding.options import SearchConfig, SearchOptions
from pipeline.outputs.caption_folder import Destinations, caption_images
from pipeline.outputs.formats import READERS, WRITERS, decodable, name_in, read_predictions
from pipeline.utils.errors import InputError, UserError
from pipeline.utils.terminal import as_json, echo, echo_failure, escape_control

HOSTILE = [
    "\x1b]0;title\x07",  # the window's title
    "\x1b[2J\x1b[H",  # an empty screen
    "\x1b]52;c;ZXZpbA==\x07",  # the clipboard
    "\x9b31m",  # C1: a sequence without ESC
    "a\rfailed: 0",
    "a\nfailed: b.jpg: no such file",
    "\x7f\x08\x00",
    "photo\u202egpj.exe",
    "\u2066a\u2069",
    "\udcff",
]
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="such names exist on Linux only")


# Terminals


@given(st.text(st.characters(), max_size=50))
def test_what_is_visible_is_one_line_and_stays_so(text: str) -> None:
    shown = escape_control(text)
    assert UNSEEN.search(shown) is None and "\n" not in shown and "\t" not in shown
    assert escape_control(shown) == shown
    if shown == text:
        assert UNSEEN.search(text) is None
    shown.encode("utf-8")


def test_letters_of_all_scripts_are_left_alone() -> None:
    text = "ein Hund läuft, 一只狗, שלום \u200f, é😀 C:\\photos\\new.jpg"
    assert escape_control(text) == text
    assert escape_control("\x1b[31m\n") == r"\x1b[31m\n"
    assert escape_control("a\tb\n", keep="\n\t") == "a\tb\n"


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_said_moves_no_cursor(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    escaped, error = escape_control(text), io.StringIO()
    for err in (False, True):
        echo(f"page: {text}", err=err)
    echo_failure(text, text)
    output = capsys.readouterr()
    assert UNSEEN.search(output.out + output.err) is None
    assert output.err.splitlines()[-1] == f"failed: {escaped}: {escaped}"
    for kind in (UserError, InputError):
        kind(f"{text}: cannot be read").show(error)
    assert error.getvalue() == 2 * f"Error: {escaped}: cannot be read\n"


def test_a_wrong_command_does_not_obey_its_words() -> None:
    result = invoke(pipeline.cli.caption.main, "--\x1b[2J", code=2)
    assert "\x1b" not in result.output and r"--\x1b[2J" in result.output


def test_nothing_is_printed_by_another_way() -> None:
    """The exported runner stands alone, and has the same of its own."""
    for path in sorted((REPOSITORY / "pipeline").rglob("*.py")):
        if path.name not in ("terminal.py", "onnx_runner.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"click\.s?echo\(|(?<![.\w])print\(", text), path


# Captions


def test_words_of_a_strangers_model_are_visible() -> None:
    vocabulary = Vocabulary(["<pad>", "<start>", "<end>", "<unk>", "a", "\x1b[2J", "b\n"])
    (caption,) = captions_of([Hypothesis([4, 5, 6, 2], -1.0, -1.0)], vocabulary)
    assert caption.text == r"a \x1b[2J b\n"


def written(layout: str, *predictions: Prediction) -> str:
    buffer = io.StringIO()
    WRITERS[layout](predictions, buffer)
    return buffer.getvalue()


PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize("layout", WRITERS)
@given(name=PATHS, caption=st.text(st.characters(exclude_categories=["Cs"])), error=st.text())
def test_every_layout_is_harmless_and_reads_back(
    layout: str, name: str, caption: str, error: str
) -> None:
    text = written(
        layout,
        Prediction(name, [Caption(caption, -1.5)]),
        Prediction("other", [], error or "broken"),
    )
    assert UNSEEN.search(text) is None
    text.encode("utf-8")
    (found,) = [made for made in READERS[layout](text) if made.error is None]
    assert found.path == name_in(name, layout)
    exact = layout in ("json", "jsonl", "coco")
    assert found.captions[0].text == (
        caption if exact else escape_control(caption, "\t\n" if layout == "csv" else "")
    )
    if exact:
        assert found.path == decodable(name)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\n", "'=", "''@", "'", "a=", ""])
def test_formulas_are_text_in_csv(start: str, tmp_path: Path) -> None:
    text = start + "cmd|'/c calc'!A0,\"x\""
    content = written("csv", Prediction(text, [Caption(text, -2.25)]), Prediction("b", [], text))
    rows = list(csv.reader(io.StringIO(content, newline="")))
    for cell in (rows[1][0], rows[1][2], rows[2][4]):
        assert cell[0] not in "=+-@\t\r\n"
        assert cell in (text, "'" + text)
        assert (cell == text) == (start in ("'", "a=", ""))
    assert rows[1][3] == "-2.25"  # a number stays one
    path = tmp_path / "out.csv"
    path.write_text(content, encoding="utf-8", newline="")
    first, second = read_predictions(path, "csv")
    assert (first.path, first.captions[0].text, second.error) == (text, text, text)


@linux_only
@pytest.mark.parametrize("layout", WRITERS)
def test_kept_captions_are_found_again_under_odd_names(layout: str, tmp_path: Path) -> None:
    names = ["=1+1.png", "\x1b[2J.png", "a\tb\n.png", "plain.png"]
    paths = [str(draw(tmp_path / name)) for name in names]
    asked: list[str] = []

    def stream(remaining: list[str], *_: object, **__: object) -> Iterator[Prediction]:
        asked.extend(remaining)
        return iter([Prediction(path, [Caption("a dog", -1.0)]) for path in remaining])

    captioner = Mock(stream=stream, search_config=lambda _: SearchConfig())
    output = tmp_path / "out"
    places = Destinations(layout=layout, output=output, skip_existing=True)
    for _ in range(2):
        outcome = caption_images(lambda _: captioner, paths, places, SearchOptions())
    assert asked == paths and outcome.passed_over == len(paths)
    assert [p.path for p in read_predictions(output, layout)] == [name_in(p, layout) for p in paths]


# JSON


@given(
    st.recursive(
        st.text() | st.floats(allow_nan=False),
        lambda v: st.lists(v) | st.dictionaries(st.text(), v),
    )
)
def test_json_is_exact_and_shows_no_controls(value: object) -> None:
    for indent in (None, 2):
        text = as_json(value, indent)
        assert json.loads(text) == value
        assert UNSEEN.search(text) is None
    assert as_json("é\x9b\u202e") == r'"é\u009b\u202e"'
