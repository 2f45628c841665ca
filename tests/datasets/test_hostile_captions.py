"""Captions from strangers: a table or one line, whatever the file holds, and in bounded time."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.datasets.caption_collector import MAX_CAPTION_LENGTH, MAX_NAME_LENGTH
from pipeline.datasets.caption_table import CaptionTable, read_captions
from pipeline.datasets.tokenizers import TOKENIZERS
from pipeline.utils.errors import UserError


def use(folder: Path, path: Path | None) -> CaptionTable | None:
    """Read captions and look at all of the table; None where one line refuses them."""
    try:
        table = read_captions(folder, path)
    except UserError as error:
        assert error.message.startswith(str(path or folder)), error.message
        assert len(error.message.splitlines()) == 1 and len(error.message) < 1000, error.message
        return None
    names = [image.name for image in table.images]
    assert names == sorted(set(names)) and all(0 < len(name) <= MAX_NAME_LENGTH for name in names)
    assert all(len(line.splitlines()) == 1 for line in table.summary())
    "".join(table.summary()).encode("utf-8")
    table.split_hash("train")
    for image in table.images:
        assert image.captions
        for text in image.captions:
            assert text == " ".join(text.split()) and 0 < len(text) <= MAX_CAPTION_LENGTH
            text.encode("utf-8")
        for tokenizer in TOKENIZERS.values():
            for text in set(image.captions):
                tokenizer.tokenize(text)
    _, images = table.restrict(["a.jpg", "b/c.jpg"])
    assert set(images.values()) <= {"a.jpg", "b/c.jpg"}
    return table


# Structures

WORDS = (
    "a.jpg ./a.jpg ../../etc/passwd /etc/passwd c:\\a.jpg a.jpg.1 train restval -0 NaN =1+1".split()
)
WORDS += ["A red kite .", "\ud800", "a\0b", "\ufeff", "\x1b[2J", "a\nb", "\u202ea", '"', "'" * 50]
WORDS += ["a\u0315\u0300" * 9, "1" * 5000 + "_0123456789.jpg", "2513260012_03d33305cf.jpg"]
KEYS = "images annotations sentences raw filename file_name filepath id image_id caption captions"
words = st.one_of(st.text(max_size=12), st.sampled_from([*WORDS, "/" * 9000]))
leaves = st.one_of(
    words,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -(2**63), 1e308]),
)
keys = st.sampled_from([*KEYS.split(), "image", "split", "Image ", "tokens"])
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(keys, words), inner, max_size=5)
    ),
    max_leaves=20,
)


def either(usual: Any) -> Any:
    """Mostly what is usual, so that readers are reached deep inside."""
    return st.one_of(usual, usual, usual, anything)


def records(**fields: Any) -> Any:
    """Make a list of dictionaries, mostly."""
    return either(st.lists(either(st.fixed_dictionaries(fields)), max_size=4))


number = st.integers(0, 3)
karpathy = st.fixed_dictionaries(
    {
        "images": records(
            filename=either(words),
            sentences=records(raw=either(words)),
            filepath=st.just("") | either(words),
            split=either(words),
        )
    }
)
coco = st.fixed_dictionaries(
    {
        "images": records(id=either(number), file_name=words),
        "annotations": records(image_id=either(number), caption=either(words)),
    }
)
record = st.fixed_dictionaries(
    {"image": either(words), "caption": either(words)}, optional={"split": either(words)}
)


@given(document=st.one_of(karpathy, coco, anything), ascii_only=st.booleans())
@settings(max_examples=120)
def test_any_json_is_a_table_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, document: Any, ascii_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("data")
    path = folder / "captions_train.json"
    text = json.dumps(document, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    use(folder, path)


@given(lines=st.lists(st.one_of(record, record, anything), max_size=6))
@settings(max_examples=60)
def test_any_jsonl_is_a_table_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("data")
    path = folder / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    use(folder, path)


@given(
    rows=st.lists(st.lists(words, max_size=4), max_size=6),
    header=st.permutations(["image", "caption", "split", "other"]),
    delimiter=st.sampled_from(",;\t|"),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
@settings(max_examples=100)
def test_any_table_is_a_table_or_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[list[str]],
    header: list[str],
    delimiter: str,
    encoding: str,
    quoting: Any,
) -> None:
    folder = tmp_path_factory.mktemp("data")
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting).writerows([header, *rows])
    path = folder / "captions.csv"
    path.write_bytes(text.getvalue().encode(encoding, "replace"))
    use(folder, path)


# Valid files, spoiled

VALID = {
    "captions.csv": 'image,caption,split\na.jpg,"A kite, up\nhigh .",train\nb.jpg,Two .,val\n',
    "x.tsv": "file_name\ttext\na.jpg\tA man's dog doesn't move .\n",
    "captions.txt": "image,caption\n2513260012_03d33305cf.jpg,A dog & a cat .\n",
    "Flickr8k.token.txt": "a.jpg#0\tA kite .\nb.jpg#1\tTwo pots .\n",
    "dataset_x.json": '{"images": [{"filename": "a.jpg", "sentences": [{"raw": "A kite ."}]}]}',
    "captions_train2017.json": '{"images": [{"id": 1, "file_name": "a.jpg"}], '
    '"annotations": [{"image_id": 1, "caption": "A kite ."}]}',
    "x.jsonl": '{"image": "a.jpg", "captions": ["A kite .", "Two pots ."], "split": "dev"}\n' * 2,
    "a.txt": "A kite .\r\n一只狗在草地上跑\rTwo pots .",
}
PIECES = [b"\0", b"\r", b"\n", b'"', b",", b"\t", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80"]
PIECES += [b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"NaN", b"1e999", b"\\ud800", b"\\u0000"]
PIECES += [b"../", b"/", b"#0\t", b"x" * 200_000, b"\xcc\x95\xcc\x80" * 5000, b"null", b"{}"]


@pytest.mark.parametrize("name", VALID)
def test_what_is_spoiled_below_is_valid(tmp_path: Path, name: str) -> None:
    """Else its readers would never get far."""
    (tmp_path / "a.jpg").touch()
    (tmp_path / name).write_bytes(VALID[name].encode())
    assert use(tmp_path, None) is not None


@given(name=st.sampled_from(sorted(VALID)), data=st.data())
@settings(max_examples=150)
def test_spoiled_files_are_a_table_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("data")
    whole = VALID[name].encode(data.draw(st.sampled_from(["utf-8", "utf-8", "utf-16"])))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(whole)))
        end = min(len(whole), start + data.draw(st.integers(0, 8)))
        piece = data.draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=4)))
        whole = whole[:start] + piece + whole[end:]
    (folder / "a.jpg").touch()
    (folder / name).write_bytes(whole)
    use(folder, None if name == "a.txt" else folder / name)


# What is large

MILLION = 1_000_000
LARGE: dict[str, tuple[str, Callable[[], str]]] = {
    "caption of a million words": (
        "x.csv",
        lambda: "image,caption\na.jpg," + "word " * MILLION + "\nb.jpg,A kite .\n",
    ),
    "100,000 captions of one image": (
        "x.csv",
        lambda: "image,caption\n" + "a.jpg,A kite .\n" * 100_000,
    ),
    "million columns": ("x.csv", lambda: "image,caption" + ",x" * MILLION + "\na.jpg,A kite .\n"),
    "open quotes": ("x.csv", lambda: "image,caption\n" + 'a.jpg,"A\n' * 50_000),
    "name of a million slashes": (
        "x.csv",
        lambda: "image,caption\n" + "a/" * MILLION + "b.jpg,A kite .\nb.jpg,A kite .\n",
    ),
    "name of digits": (  # int() takes 4,300
        "x.csv",
        lambda: "image,caption\n" + "1" * 5000 + "_0123456789.jpg,A kite .\nb.jpg,Two .\n",
    ),
    "word of apostrophes": ("x.csv", lambda: "image,caption\na.jpg,a" + "'" * MILLION + "b\n"),
    "accents": ("x.csv", lambda: "image,caption\na.jpg,a" + "\u0315\u0300" * 200_000 + "\n"),
    "lines without end": ("x.txt", lambda: "a.jpg#0\tA kite\n" + "\n" * MILLION),
    "number signs": ("x.txt", lambda: "a.jpg#0\tA kite\n" + "#1" * MILLION),
    "nested lists": ("x.json", lambda: "[" * MILLION),
    "nested id": (
        "x.json",
        lambda: json.dumps({"annotations": [], "images": [{"file_name": "a", "id": "?"}]}).replace(
            '"?"', "[" * 900 + "]" * 900
        ),
    ),
    "digits": ("x.jsonl", lambda: '{"image": "a.jpg", "caption": "b", "split": ' + "9" * MILLION),
    "keys": (
        "x.jsonl",
        lambda: json.dumps({"image": "a", "caption": "b", **dict.fromkeys(map(str, range(10**5)))}),
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_ones_take_seconds(tmp_path: Path, name: str) -> None:
    file, make = LARGE[name]
    (tmp_path / file).write_text(make(), encoding="utf-8")
    began = time.process_time()
    use(tmp_path, tmp_path / file)
    assert time.process_time() - began < 20  # what grows with the square: minutes


def test_a_caption_of_a_million_words_is_cut_and_counted(tmp_path: Path) -> None:
    file, make = LARGE["caption of a million words"]
    (tmp_path / file).write_text(make())
    table = read_captions(tmp_path, tmp_path / file)
    assert [len(image.captions[0]) for image in table.images] == [MAX_CAPTION_LENGTH - 1, 8]
    assert table.notes == {f"captions cut to {MAX_CAPTION_LENGTH:,} characters (first: line 2)": 1}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
def test_names_of_files_stay_on_one_line(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.txt", "b\nc.txt", "d\x1b.txt"):
        (tmp_path / name).write_text("A kite .")
    table = read_captions(tmp_path)
    assert len(table.notes) == 1 and all(len(line.splitlines()) == 1 for line in table.summary())
