"""The readers of captions: every layout, the splits, the repairs and the matching of names."""

from __future__ import annotations

import hashlib
import json
import time
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED

from pipeline.datasets.caption_table import (
    CaptionedImage,
    CaptionTable,
    read_captions,
)
from pipeline.datasets.flickr8k import official_split
from pipeline.utils.errors import UserError

FLICKR8K = SHARED / "flickr8k"

# Real names (their captions are invented): two of train, one of val, one of test.
TRAIN, TRAIN2 = "2513260012_03d33305cf.jpg", "2903617548_d3e38d7f88.jpg"
VAL, TEST = "2090545563_a4e66ec76b.jpg", "3385593926_d3e9c21170.jpg"


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode("utf-8"))
    return path


def write_json(path: Path, document: Any) -> Path:
    return write(path, json.dumps(document))


def captions_of(table: CaptionTable) -> dict[str, tuple[str, ...]]:
    return {image.name: image.captions for image in table.images}


def splits_of(table: CaptionTable) -> dict[str, str | None]:
    return {image.name: image.split for image in table.images}


def table_of(*names: str) -> CaptionTable:
    images = [CaptionedImage(name, "train", ("a cat",)) for name in sorted(names)]
    return CaptionTable(images, Path("captions.csv"), "CSV", "none")


# Flickr8k


def test_token_file_with_its_own_lists(tmp_path: Path) -> None:
    lines = ["a.jpg#0\tA red kite .", "a.jpg#1\tA  kite\tflies .", "b#1.jpg#0\tTwo pots ."]
    lines += ["", "A lost line", "b.jpg\tA pot .", "c.jpg#0\tA lamp ."]
    source = write(tmp_path / "Flickr8k_text/Flickr8k.token.txt", *lines)
    write(source.with_name("Flickr_8k.trainImages.txt"), "b#1.jpg")
    write(source.with_name("Flickr_8k.devImages.txt"), "a.jpg ", "")
    write(source.with_name("Flickr_8k.testImages.txt"), "elsewhere.jpg")
    table = read_captions(tmp_path)
    assert table.split_hash("train") == hashlib.sha256(b"b#1.jpg").hexdigest()[:12]
    assert table.images == [
        CaptionedImage("a.jpg", "val", ("A red kite .", "A kite flies .")),
        CaptionedImage("b#1.jpg", "train", ("Two pots .",)),
        CaptionedImage("c.jpg", None, ("A lamp .",)),
    ]
    assert (table.source, table.layout) == (source, "Flickr8k token file")
    assert "beside the captions" in table.split_source
    assert table.notes == {"malformed lines or entries dropped (first: line 5)": 2}
    assert "malformed lines or entries dropped (first: line 5): 2" in table.summary()
    assert "images: 3 with 4 captions: 1 train, 1 val, 0 test, 1 in no split" in table.summary()


def test_token_file_without_lists_takes_the_official_ones(tmp_path: Path) -> None:
    names = (TRAIN, TRAIN2, VAL, TEST)
    write(tmp_path / "Flickr8k.token.txt", *(f"{name}#0\tA kite ." for name in names))
    write(tmp_path / "Flickr_8k.trainImages.txt", VAL)  # one list of three proves nothing
    table = read_captions(tmp_path)
    assert splits_of(table) == {TRAIN: "train", TRAIN2: "train", VAL: "val", TEST: "test"}
    assert table.split_source == "official Flickr8k lists"
    assert table.notes == {"incomplete split lists beside the captions ignored": 1}


def test_kaggle_commas_and_quotes(tmp_path: Path) -> None:
    lines = (
        "image,caption",
        'a.jpg,"A kite , red , flies ."',
        "a.jpg,A pot, a pan, and a cup .",
        'a.jpg,"""Stop"" , says a sign ."',
        'b.jpg,"Nobody closes this quote .',
        "c.jpg,A lamp .",
        'c.jpg,A 5" nail, bent .',
        "c.jpg,A cup .,",
        "d.jpg,A sign says #1",  # looks like the token of a Flickr8k token file
    )
    write(tmp_path / "captions.txt", *lines)
    table = read_captions(tmp_path)
    assert captions_of(table) == {
        "a.jpg": ("A kite , red , flies .", "A pot, a pan, and a cup .", '"Stop" , says a sign .'),
        "b.jpg": ("Nobody closes this quote .",),
        "c.jpg": ("A lamp .", 'A 5" nail, bent .', "A cup ."),
        "d.jpg": ("A sign says #1",),
    }
    assert table.layout == "Flickr8k captions.txt"
    assert not table.notes


@pytest.mark.parametrize("strangers, is_flickr8k", [(1, True), (2, False)])
def test_flickr8k_is_told_by_nine_names_in_ten(
    tmp_path: Path, strangers: int, is_flickr8k: bool
) -> None:
    photos = [f"{photo}_0123456789.jpg" for photo in sorted(official_split())[:9]]
    names = photos + [f"Images/my{number}.jpg" for number in range(strangers)]
    write(tmp_path / "captions.txt", "image,caption", *(f"{name},A kite ." for name in names))
    table = read_captions(tmp_path)
    assert (table.split_source == "official Flickr8k lists") is is_flickr8k
    assert splits_of(table)["Images/my0.jpg"] is None or not is_flickr8k


@pytest.mark.shared("flickr8k")
def test_both_layouts_of_the_real_flickr8k_give_one_table() -> None:
    images = [f"Images/{path.name}" for path in (FLICKR8K / "Images").iterdir()]
    token, token_images = read_captions(FLICKR8K).restrict(images)
    kaggle, kaggle_images = read_captions(FLICKR8K, Path("captions.txt")).restrict(images)
    assert (token.layout, kaggle.layout) == ("Flickr8k token file", "Flickr8k captions.txt")
    assert token.images == kaggle.images
    assert token_images == kaggle_images
    counts = Counter(image.split for image in kaggle.images)
    assert counts == {"train": 6000, "val": 1000, None: 91}
    assert {len(image.captions) for image in kaggle.images} == {5}
    assert token.split_hash("val") == kaggle.split_hash("val")
    # The stray id 2258277193_586949ec62.jpg.1, which has no image.
    assert token.notes == {"captioned images that are missing, dropped": 1}
    assert not kaggle.notes


# JSON


def test_karpathy_json(tmp_path: Path) -> None:
    def image(name: str, split: str, *raw: Any, **more: str) -> dict[str, Any]:
        return {"filename": name, "split": split, "sentences": [{"raw": r} for r in raw], **more}

    images = [
        image("a.jpg", "restval", "A kite .", " ", 7, filepath="val2014"),
        image("b.jpg", "val", "A pot ."),
        image("c.jpg", "test", "A cup ."),
        image("d.jpg", "test"),
        {"filename": "e.jpg"},
        "f.jpg",
    ]
    write_json(tmp_path / "dataset_toy.json", {"images": images, "dataset": "toy"})
    write_json(tmp_path / "dataset_infos.json", {})  # Hugging Face's, no captions
    table = read_captions(tmp_path)
    assert table.layout == "Karpathy JSON"
    assert splits_of(table) == {"val2014/a.jpg": "train", "b.jpg": "val", "c.jpg": "test"}
    assert captions_of(table)["val2014/a.jpg"] == ("A kite .",)
    assert table.notes == {
        "captions that are not text dropped (first: image 1)": 1,
        "empty captions dropped (first: image 1)": 1,
        "images left with no caption dropped": 1,
        "malformed lines or entries dropped (first: image 5)": 2,
    }


def coco(*names: str) -> dict[str, list[Any]]:
    return {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [
            {"image_id": number, "caption": f"A kite over {name} ."}
            for number, name in enumerate(names)
        ],
    }


def test_coco_files_give_their_names_as_splits(tmp_path: Path) -> None:
    train = coco("1.jpg", "2.jpg")
    train["annotations"] += [
        {"image_id": 0, "caption": "Two\nkites ."},
        {"image_id": 99, "caption": "Nobody's kite ."},
        {"image_id": 1, "caption": 3},
        {"image_id": 1},
        None,
    ]
    write_json(tmp_path / "annotations/captions_train2017.json", train)
    # The same ids as in the other file, for other images.
    write_json(tmp_path / "annotations/captions_val2017.json", coco("3.jpg", "2.jpg"))
    for name in ("captions_trainval.json", "captions_latest.json"):
        unsplit = read_captions(tmp_path, write_json(tmp_path / "other" / name, coco("1", "2")))
        assert unsplit.split_source == "hash of the image name (80/10/10)"
    table = read_captions(tmp_path)
    assert table.layout == "COCO JSON, 2 files"
    assert [table.image_id(name) for name in ("1.jpg", "2.jpg", "3.jpg")] == [0, 1, 0]
    assert splits_of(table) == {"1.jpg": "train", "2.jpg": "train", "3.jpg": "val"}
    assert captions_of(table)["1.jpg"] == ("A kite over 1.jpg .", "Two kites .")
    where = "captions_train2017.json, annotation"
    assert table.notes == {
        f"annotations of unknown images dropped (first: {where} 4)": 1,
        f"captions that are not text dropped (first: {where} 5)": 1,
        f"malformed lines or entries dropped (first: {where} 6)": 2,
        "images in two splits, kept in the first": 1,
        "images in several captions files, merged": 1,
        "captions that are in an earlier file too dropped (first: captions_val2017.json, "
        "annotation 2)": 1,
    }


def test_jsonl(tmp_path: Path) -> None:
    lines = (
        '{"file_name": "b\\\\a.jpg", "text": "A kite .", "split": "Training"}',
        '{"Image": "c.jpg", "captions": ["A pot .", "", 5, null], "split": "dev"}',
        "",
        '{"image": "d.jpg", "caption": "A cup .", "split": "holdout"}',
        '{"image": "e.jpg", "caption": "A \\ud800 lamp ."}',
        '{"image": "f.jpg", "caption": ',
        '{"image": 5, "caption": "A nail ."}',
        "[" * 100_000,
    )
    for name in ("metadata.jsonl", "anything.txt", "anything.json"):
        table = read_captions(tmp_path, write(tmp_path / name, *lines))
        assert table.layout == "JSONL"
        assert splits_of(table) == {
            "b/a.jpg": "train",
            "c.jpg": "val",
            "d.jpg": None,
            "e.jpg": None,
        }
        assert captions_of(table)["c.jpg"] == ("A pot .",)
        assert captions_of(table)["e.jpg"] == ("A ? lamp .",)
        assert table.notes == {
            "captions that are not text dropped (first: line 2)": 1,
            "empty captions dropped (first: line 2)": 2,
            "malformed lines or entries dropped (first: line 6)": 3,
            'unknown split names ignored (first: "holdout")': 1,
        }


# Text files beside the images


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_text_files_beside_the_images(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "sub/b.PNG", "sub/deep/c.webp", "d.jpg", "d.png", "e.jpg", "f.jpg")
    (tmp_path / "a.txt").write_bytes("\ufeffA kite .\r\n\r\n  Two   kites . \r\n".encode())
    write(tmp_path / "sub/b.txt", "A pot .", "\t", "Ein Topf, groß .")
    write(tmp_path / "sub/deep/c.webp.TXT", "A cup .")
    write(tmp_path / "d.txt", "A lamp .")  # of which of the two?
    write(tmp_path / "d.png.txt", "A red lamp .")
    write(tmp_path / "e.txt", "", "  ")
    write(tmp_path / "README.txt", "Images of kites .")
    write(tmp_path / "sub/notes.txt", "A list .")
    write(tmp_path / "elsewhere/g.txt", "A nail .")  # no image in this folder
    write(tmp_path / "._a.txt", "rubbish")
    table = read_captions(tmp_path)
    assert captions_of(table) == {
        "a.jpg": ("A kite .", "Two kites ."),
        "d.png": ("A red lamp .",),
        "sub/b.PNG": ("A pot .", "Ein Topf, groß ."),
        "sub/deep/c.webp": ("A cup .",),
    }
    assert (table.source, table.layout) == (tmp_path, "folder of .txt captions")
    assert table.split_source == "hash of the image name (80/10/10)"
    assert table.notes == {
        "text files without one image of their name ignored (first: README.txt)": 3,
        "images left with no caption dropped": 1,
    }
    restricted, _ = table.restrict(["a.jpg", "f.jpg", "sub/b.PNG", "sub/deep/c.webp", "d.png"])
    assert f"captions: {tmp_path} (folder of .txt captions)" in restricted.summary()
    assert "images without captions: 1" in restricted.summary()
    assert len(restricted.images) == 4


def test_a_captions_file_comes_before_text_files(tmp_path: Path) -> None:
    touch(tmp_path, "sub/a.jpg")
    write(tmp_path / "sub/a.txt", "A kite .")
    for name, content in (
        ("metadata.jsonl", '{"image": "a.jpg", "caption": "A pot ."}'),
        ("anything.csv", "image,caption\na.jpg,A pot ."),
        ("captions.txt", "image,caption\na.jpg,A pot ."),
    ):
        write(tmp_path / name, content)
        assert captions_of(read_captions(tmp_path)) == {"a.jpg": ("A pot .",)}
        # Named outright, the folder itself is read.
        assert captions_of(read_captions(tmp_path, tmp_path)) == {"sub/a.jpg": ("A kite .",)}
        assert captions_of(read_captions(tmp_path, Path("sub"))) == {"a.jpg": ("A kite .",)}
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="bare: no such file"):
        read_captions(tmp_path, Path("bare"))


def test_folders_give_the_split_if_train_and_val_are_among_them(tmp_path: Path) -> None:
    for name in ("train/a", "train/b/c", "more/e", "f"):
        touch(tmp_path, f"{name}.jpg")
        write(tmp_path / f"{name}.txt", "A kite .")
    assert read_captions(tmp_path).split_source == "hash of the image name (80/10/10)"
    for name in ("valid/g", "Test/d"):
        touch(tmp_path, f"{name}.jpg")
        write(tmp_path / f"{name}.txt", "A kite .")
    table = read_captions(tmp_path)
    assert table.split_source == "the names of the folders"
    assert splits_of(table) == {
        "Test/d.jpg": "test",
        "f.jpg": None,
        "more/e.jpg": None,
        "train/a.jpg": "train",
        "train/b/c.jpg": "train",
        "valid/g.jpg": "val",
    }


# CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiter_and_columns_come_from_the_header(tmp_path: Path, delimiter: str) -> None:
    rows = (
        ("", "Comment", " File_Name ", "Subset"),
        ("0", "A kite .", " a.jpg ", ""),
        ("0", "A kite .", " a.jpg ", "train"),
        ("0", "A kite .", " a.jpg ", "val"),
        ("0", "A kite .", " a.jpg ", "x"),
        ("1", f"A pot{delimiter}a pan{delimiter}a cup .", "b.jpg", " Validation "),
        ("2", " ", "c.jpg", "test"),
        ("3", "A cup ."),
        ("4", "A lamp .", "d.jpg"),
    )
    write(tmp_path / "results.tsv", *(delimiter.join(row) for row in rows))
    table = read_captions(tmp_path)
    assert table.layout == "CSV"
    assert table.split_source == "the file's own split column"
    assert splits_of(table) == {"a.jpg": "train", "b.jpg": "val", "d.jpg": None}
    pieces = captions_of(table)["b.jpg"][0].split(delimiter)
    assert [piece.strip() for piece in pieces] == ["A pot", "a pan", "a cup ."] or delimiter == "\t"
    assert table.notes == {
        "empty captions dropped (first: line 7)": 1,
        "images in two splits, kept in the first": 1,
        "images left with no caption dropped": 1,
        "malformed lines or entries dropped (first: line 8)": 1,
        'unknown split names ignored (first: "x")': 1,
    }


def test_quoted_caption_may_run_over_lines(tmp_path: Path) -> None:
    lines = (
        "image,caption",
        'a.jpg,"A kite',
        'flies ."',
        "b.jpg,A pot .",
        'c.jpg,"A cup .',
        "",
        "",
    )
    write(tmp_path / "captions.csv", *lines)
    table = read_captions(tmp_path)
    assert captions_of(table) == {
        "a.jpg": ("A kite flies .",),
        "b.jpg": ("A pot .",),
        "c.jpg": ("A cup .",),
    }
    assert not table.notes


# Splits by hash


def read_names(folder: Path, names: list[str]) -> CaptionTable:
    folder.mkdir(exist_ok=True)
    rows = (f"{name},A kite ." for name in names)
    return read_captions(folder, write(folder / "captions.csv", "image,caption", *rows))


def test_hash_split_never_moves_an_image(tmp_path: Path) -> None:
    names = [f"{number}.jpg" for number in range(2000)]
    many = splits_of(read_names(tmp_path, names))
    few = splits_of(read_names(tmp_path, names[::-3]))
    assert all(many[name] == split for name, split in few.items())
    counts = Counter(many.values())
    assert abs(counts["train"] - 1600) < 60 and abs(counts["val"] - 200) < 45
    # Fixed for ever: another machine or version must give the same split.
    digest = hashlib.sha256(b"7.jpg").digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    assert many["7.jpg"] == ("train" if fraction < 0.8 else "val" if fraction < 0.9 else "test")


def test_hash_split_leaves_neither_train_nor_val_empty(tmp_path: Path) -> None:
    for start in range(30):
        for size in (2, 3):
            names = [f"{number}.jpg" for number in range(start, start + size)]
            splits = splits_of(read_names(tmp_path, names))
            assert {"train", "val"} <= set(splits.values())
            assert splits == splits_of(read_names(tmp_path, names[::-1]))


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, line_end: str) -> None:
    text = line_end.join(("image,caption", "é.jpg,A café .", "b.jpg,A pot\x0bis red .", ""))
    (tmp_path / "captions.txt").write_bytes(text.encode(encoding))
    table = read_captions(tmp_path)
    assert captions_of(table) == {"é.jpg": ("A café .",), "b.jpg": ("A pot is red .",)}
    notes = {"file not UTF-8, read as Windows-1252, see --encoding (first: captions.txt)": 1}
    assert table.notes == (notes if encoding == "cp1252" else {})


def test_composed_and_decomposed_names_are_one(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "é.jpg")
    rows = (f"{decomposed},A kite .", "é.jpg,A pot .")
    write(tmp_path / "captions.csv", "image,caption", *rows)
    table, images = read_captions(tmp_path).restrict([f"Images/{decomposed}"])
    assert captions_of(table) == {"é.jpg": ("A kite .", "A pot .")}
    assert images == {"é.jpg": f"Images/{decomposed}"}
    touch(tmp_path / "beside", decomposed)
    write(tmp_path / "beside" / "é.txt", "A cup .")
    assert captions_of(read_captions(tmp_path / "beside")) == {"é.jpg": ("A cup .",)}


# Names of images


@pytest.mark.parametrize(
    "names, available, expected",
    [
        (["x.jpg"], ["x.jpg", "a/x.jpg"], {"x.jpg": "x.jpg"}),
        (["x.jpg"], ["Images/x.jpg", "Images/y.jpg"], {"x.jpg": "Images/x.jpg"}),
        (["/home/me/a/x.jpg"], ["a/x.jpg", "b/x.jpg"], {"/home/me/a/x.jpg": "a/x.jpg"}),
        (["a/x.jpg"], ["z/a/x.jpg", "b/x.jpg"], {"a/x.jpg": "z/a/x.jpg"}),
        (["a/x.jpg"], ["b/x.jpg"], {"a/x.jpg": "b/x.jpg"}),
        (["a/x.jpg"], ["b\\a\\x.jpg"], {"a/x.jpg": "b\\a\\x.jpg"}),
        (["x.jpg"], ["a/x.jpg", "b/x.jpg"], {}),
        (["c/x.jpg"], ["a/x.jpg", "b/x.jpg"], {}),
        (["a/x.jpg"], ["aa/x.jpg", "ba/x.jpg"], {}),
        (["a/x.jpg", "b/x.jpg"], ["x.jpg"], {}),
        (["a/x.jpg", "b/x.jpg"], ["c/a/x.jpg"], {"a/x.jpg": "c/a/x.jpg"}),
        (["a/x.jpg", "x.jpg"], ["x.jpg"], {"x.jpg": "x.jpg"}),
        (["x.jpg"], ["ax.jpg", "x.jpg/y.jpg"], {}),
    ],
)
def test_matching(names: list[str], available: list[str], expected: dict[str, str]) -> None:
    for order in (available, available[::-1]):
        table, images = table_of(*names).restrict(order)
        assert images == expected
        assert [image.name for image in table.images] == sorted(expected)


def test_restrict_counts_what_is_missing_and_keeps_the_notes() -> None:
    table = table_of("a.jpg", "b.jpg", "c.jpg", "d.jpg", "old/e.jpg")
    table.notes["empty captions dropped"] = 3
    smaller, _ = table.restrict(["a.jpg", "1/b.jpg", "2/b.jpg", "new/e.jpg", "y.jpg"])
    assert smaller.notes == {
        "empty captions dropped": 3,
        "captioned images that are missing, dropped": 2,
        "captioned images dropped because their name fits several images, or several images "
        "one image": 1,
        "images matched by file name alone, in another folder": 1,
        "images without captions": 3,
    }
    assert len(table.images) == 5 and table.notes == {"empty captions dropped": 3}


def test_matching_time_grows_linearly() -> None:
    names = [f"{number}/image.jpg" for number in range(20_000)]
    start = time.perf_counter()
    table, _ = table_of(*names).restrict([f"root/{name}" for name in names])
    assert len(table.images) == len(names)
    assert time.perf_counter() - start < 5  # quadratic: minutes


# Errors, each one line that names the file


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("data/train/metadata.csv", r"data has folders of splits: pass --data .*data$"),
        ("data/train-00000-of-00001.parquet", "Parquet files are not read: save the images"),
        ("images/a.jpg", "name another one with --captions$"),
    ],
)
def test_a_folder_without_captions_is_refused_with_advice(
    tmp_path: Path, file: str, advice: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    with pytest.raises(UserError, match=advice):
        read_captions(tmp_path)


def test_search_order_and_competing_files(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "A kite .")  # without an image
    with pytest.raises(
        UserError, match=r"no captions file; .* for a \.txt or \.caption beside each"
    ) as caught:
        read_captions(tmp_path)
    for words in (str(tmp_path), "Flickr8k.token.txt", "captions_*.json", "*.jsonl", "--captions"):
        assert words in caught.value.message
    with pytest.raises(UserError, match="no such folder"):
        read_captions(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere\.csv: no such file"):
        read_captions(tmp_path, Path("nowhere.csv"))
    write(tmp_path / "a.csv", "image,caption", "a.jpg,A kite .")
    (tmp_path / "._a.csv").write_bytes(b"\0\5\x16\7")  # macOS leaves such files
    assert read_captions(tmp_path).source == tmp_path / "a.csv"
    write(tmp_path / "b.csv", "image,caption", "b.jpg,A pot .")
    with pytest.raises(UserError, match=r"several captions files \(a.csv, b.csv\)"):
        read_captions(tmp_path)
    assert read_captions(tmp_path, Path("b.csv")).source == tmp_path / "b.csv"
    for name in ("captions.csv", "captions.txt", "Flickr8k_text/Flickr8k.token.txt"):
        write(tmp_path / name, "image,caption", "a.jpg,A kite .")
        assert read_captions(tmp_path).source == tmp_path / name


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.csv", "a.jpg,A kite .", 'line 1: no header.*begin the file with "image,caption"'),
        ("x.csv", "", "the file is empty"),
        ("x.csv", "image,caption\na.jpg\nb.jpg", r"no captions could be read \(malformed.*line 2"),
        ("x.csv", "image,caption\n", "no captions could be read"),
        ("x.json", '{"images": [', "not valid JSON"),
        ("x.json", "[" * 100_000, "not valid JSON"),
        ("x.json", '{"info": {}}', 'neither "images".*nor "annotations"'),
        ("x.json", '{"optimizer": "adam", "data": "a"}', 'neither "images".*nor "annotations"'),
        ("x.json", '["annotations"]', 'neither "images".*nor "annotations"'),
        ("x.json", '{"images": [{"filename": "a.jpg"}]}', 'no "sentences"'),
        ("x.json", '{"images": 5}', '"images" is missing or not a list'),
        ("x.json", '{"annotations": []}', '"images" is missing or not a list'),
        ("x.json", '{"annotations": {}, "images": []}', '"annotations" is missing or not a list'),
        ("x.jsonl", '{"a": 1}\n{"a": 2}', "no captions could be read.*malformed.*line 1.*: 2"),
    ],
)
def test_wrong_structure(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=words) as caught:
        read_captions(tmp_path, path)
    assert caught.value.message.startswith(str(path))
    assert "\n" not in caught.value.message
