"""Layouts of captions from other programs: what each means, and that nothing is lost silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_caption_table import captions_of, splits_of

from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.tar_shards import TarShards
from pipeline.datasets.text_encoding import CANDIDATES, decode_text
from pipeline.utils.errors import UserError

THREE = ("a dog, running", "a man's bike", 'two "children"')


def put(path: Path, content: Any, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode(encoding))
    return path


# Several captions in a cell, a row or an object

QUOTED = ",".join('"' + text.replace('"', '""') + '"' for text in THREE)
PRINTED = "['a dog, running', \"a man's bike\", 'two \"children\"']"


@pytest.mark.parametrize(
    "name, content",
    [
        ("cell.csv", f"image\tcaptions\na.jpg\t{json.dumps(THREE)}\n"),
        ("python.csv", f"image\tcaptions\na.jpg\t{PRINTED}\n"),
        ("numpy.csv", f"image\tcaptions\na.jpg\t{PRINTED.replace(',', ' ', 1)}\n"),
        ("repeated.csv", f"image,caption,caption,caption\na.jpg,{QUOTED}\n"),
        ("numbered.csv", f"caption_0,caption_1,caption_2,image\n{QUOTED},a.jpg\n"),
        ("pandas.csv", f"image,caption,caption.1,caption.2,more\na.jpg,{QUOTED},x\n"),
        ("flickr30k.csv", f"raw\tsplit\tfilename\n{json.dumps(THREE)}\ttrain\ta.jpg\n"),
        ("rows.jsonl", {"file_name": "a.jpg", **{f"text{n}": t for n, t in enumerate(THREE)}}),
        ("lists.jsonl", {"image": "a.jpg", "captions": THREE}),
        ("cells.jsonl", {"image": "a.jpg", "captions": json.dumps(THREE)}),
        ("blip.json", [{"image": "a.jpg", "caption": text} for text in THREE]),
        ("lavis.json", [{"image": "a.jpg", "image_id": "coco_1", "caption": THREE}]),
        ("results.json", [{"image_id": "a.jpg", "caption": text} for text in THREE]),
        ("mapping.json", {"a.jpg": THREE}),
        ("lines.txt", "".join(f"a.jpg\t{text}\n" for text in THREE)),
        ("scored.txt", "".join(f"a.jpg\t{text}\t-7.1250\n" for text in THREE)),
    ],
)
def test_several_captions_of_an_image(tmp_path: Path, name: str, content: Any) -> None:
    if name in ("cell.csv", "python.csv", "numpy.csv"):
        lines = [line.split("\t") for line in content.splitlines()]
        doubled = [[cell.replace('"', '""') for cell in line] for line in lines]
        content = "\n".join(",".join(f'"{cell}"' for cell in line) for line in doubled)
    if name == "numpy.csv":
        content = content.replace("running' ", "running'\n ")
    table = read_captions(tmp_path, put(tmp_path / name, content))
    found = captions_of(table)["a.jpg"]
    assert [text.replace(",", "") for text in found] == [text.replace(",", "") for text in THREE]
    assert not table.notes


def test_a_caption_that_begins_with_a_bracket_stays_one(tmp_path: Path) -> None:
    texts = ("[man] walks [slowly]", "[1, 2]", "['unclosed", "[a] 'quoted'")
    put(tmp_path / "x.jsonl", {"image": "a.jpg", "captions": texts})
    assert captions_of(read_captions(tmp_path)) == {"a.jpg": texts}


def test_rows_of_several_caption_columns_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    rows = ("image,caption_1,caption_2", "a.jpg,one,", "b.jpg,one,two,three", "c.jpg,one", "d.jpg")
    table = read_captions(tmp_path, put(tmp_path / "x.csv", "\n".join(rows)))
    assert captions_of(table) == {"a.jpg": ("one",), "c.jpg": ("one",)}
    assert table.notes == {
        "empty captions dropped (first: line 2)": 1,
        "malformed lines or entries dropped (first: line 3)": 2,
    }


def test_karpathy_json_with_tokens_only_and_coco_ids(tmp_path: Path) -> None:
    sentences = [{"tokens": ["a", "dog"]}, {"raw": "A cat.", "tokens": ["a", "cat"]}]
    image = {"filename": "a.jpg", "split": "val", "cocoid": 42, "sentences": sentences}
    put(tmp_path / "dataset_x.json", {"images": [image]})
    table = read_captions(tmp_path)
    assert captions_of(table) == {"a.jpg": ("a dog", "A cat.")}
    assert table.image_id("a.jpg") == 42 and not table.notes


def test_kohya_caption_files_come_before_texts(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        put(tmp_path / name, "")
    put(tmp_path / "a.caption", "a dog runs")
    put(tmp_path / "a.txt", "dog, 1girl, grass")
    put(tmp_path / "b.txt", "a cat")
    put(tmp_path / "d.caption", "no image")
    table = read_captions(tmp_path)
    assert captions_of(table) == {"a.jpg": ("a dog runs",), "b.jpg": ("a cat",)}
    assert table.notes == {
        ".txt files beside a .caption file of the same image ignored (first: a.txt)": 1,
        "text files without one image of their name ignored (first: d.caption)": 1,
    }


# Folders that name the split

NAMES = ("train/a.jpg", "train/b.jpg", "validation/c.jpg", "test/d.jpg")
BY_FOLDER = dict(zip(NAMES, ("train", "train", "val", "test"), strict=True))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("place", ["top", "each", "mixed"])
def test_imagefolder_of_hugging_face(tmp_path: Path, suffix: str, place: str) -> None:
    files: dict[Path, list[str]] = {}
    for name in NAMES:
        folder, _, file = name.partition("/")
        path = tmp_path / ("" if place == "top" else folder) / f"metadata.{suffix}"
        files.setdefault(path, []).append(file if place == "each" else name)
    for path, names in files.items():
        rows = [{"file_name": name, "text": "a dog"} for name in names]
        if suffix == "csv":
            put(path, "file_name,text\n" + "".join(f"{name},a dog\n" for name in names))
        else:
            put(path, "\n".join(map(json.dumps, rows)))
    table = read_captions(tmp_path)
    assert splits_of(table) == BY_FOLDER
    assert table.split_source == "the names of the folders"
    assert not table.notes


@pytest.mark.parametrize("before", ["", "photos/", "/home/me/photos/", "C:\\photos\\"])
def test_folders_in_the_names_of_a_table_are_the_split(tmp_path: Path, before: str) -> None:
    rows = "".join(f"{before}{name},a dog\n" for name in NAMES)
    table = read_captions(tmp_path, put(tmp_path / "x.csv", "image,caption\n" + rows))
    assert [*splits_of(table).values()] == ["test", "train", "train", "val"]
    with_column = "".join(f"{before}{name},a dog,val\n" for name in NAMES)
    put(tmp_path / "x.csv", "image,caption,split\n" + with_column)
    assert {*splits_of(read_captions(tmp_path)).values()} == {"val"}


def test_folders_of_the_images_are_the_split_if_the_names_have_none(tmp_path: Path) -> None:
    for name in NAMES:
        put(tmp_path / name, "")
    rows = "".join(f"{name.partition('/')[2]},a dog\n" for name in NAMES)
    table = read_captions(tmp_path, put(tmp_path / "x.csv", "image,caption\n" + rows))
    assert splits_of(table) == {name.partition("/")[2]: s for name, s in BY_FOLDER.items()}


def test_test_images_are_never_trained_on_where_there_is_no_val(tmp_path: Path) -> None:
    names = [f"{'test' if n % 4 else 'train'}/{n:03}.jpg" for n in range(400)]
    put(tmp_path / "x.csv", "image,caption\n" + "".join(f"{name},a dog\n" for name in names))
    table = read_captions(tmp_path)
    assert {name for name, split in splits_of(table).items() if split == "test"} == {
        name for name in names if name.startswith("test/")
    }
    assert 3 <= len(table.of_split("val")) <= 20
    assert "val: a hash of those in train" in table.split_source


# Several files


def test_several_files_are_merged_and_this_is_counted(tmp_path: Path) -> None:
    put(tmp_path / "one.csv", "image,caption\na.jpg,a dog\na.jpg,a dog\nb.jpg,a cat\n")
    put(tmp_path / "two.json", [{"image": "a.jpg", "caption": c} for c in ("a dog", "it runs")])
    table = read_captions(tmp_path, ["one.csv", tmp_path / "two.json", "one.csv"])
    assert captions_of(table) == {"a.jpg": ("a dog", "a dog", "it runs"), "b.jpg": ("a cat",)}
    assert table.layout == "CSV and JSON list, 2 files"
    assert table.notes == {
        "captions that are in an earlier file too dropped (first: entry 1)": 1,
        "images in several captions files, merged": 1,
    }


@pytest.mark.parametrize("pattern", ["{}.csv", "my_{}_captions.csv", "coco_karpathy_{}.json"])
def test_names_of_several_files_give_the_split(tmp_path: Path, pattern: str) -> None:
    for number, split in enumerate(("train", "dev", "test")):
        records = [{"image": f"{number}.jpg", "caption": "a dog"}]
        csv = f"image,caption\n{number}.jpg,a dog\n"
        put(tmp_path / pattern.format(split), csv if pattern.endswith("csv") else records)
    table = read_captions(tmp_path)
    assert splits_of(table) == {"0.jpg": "train", "1.jpg": "val", "2.jpg": "test"}
    assert table.split_source == "the names of the captions files"


def test_files_that_are_all_of_one_split_give_none(tmp_path: Path) -> None:
    names = [put(tmp_path / f"train_{n}.csv", f"image,caption\n{n}.jpg,a dog\n") for n in (0, 1)]
    assert {*splits_of(read_captions(tmp_path, names)).values()} == {"train", "val"}


def test_folders_given_together_keep_their_names_apart(tmp_path: Path) -> None:
    for folder in ("old", "new"):
        put(tmp_path / folder / "a.jpg", "")
        put(tmp_path / folder / "a.txt", f"an {folder} dog")
    table = read_captions(tmp_path, ["old", "new"])
    assert captions_of(table) == {"new/a.jpg": ("an new dog",), "old/a.jpg": ("an old dog",)}


# Encodings

TEXTS = {
    "gb18030": "一只狗在草地上奔跑。两个孩子在海滩上玩耍。",
    "big5": "一隻狗在草地上奔跑。兩個孩子在海灘上玩耍。",
    "shift_jis": "犬が草の上を走っている。二人の子供が海で遊んでいる。男が赤い自転車に乗っている。",
    "cp949": "개가 풀밭에서 뛰고 있다. 두 아이가 해변에서 놀고 있다.",
    "cp1251": "собака бежит по траве . двое детей играют на пляже .",
    "koi8_r": "собака бежит по траве . двое детей играют на пляже .",
    "cp1253": "ένας σκύλος τρέχει στο γρασίδι",
    "cp1256": "كلب يجري على العشب",
    "cp874": "สุนัขวิ่งบนหญ้า เด็กสองคนเล่นบนชายหาด ชายขี่จักรยานสีแดง",
    "utf-16-le": "a dog runs\n",
    "utf-16-be": "一只狗\n",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_an_encoding_that_is_not_western_is_named_and_can_be_given(
    tmp_path: Path, encoding: str
) -> None:
    rows = "".join(f"p{n}.jpg,{TEXTS[encoding].strip()}\n" for n in range(12))
    put(tmp_path / "captions.csv", f"image,caption\n{rows}", encoding)
    with pytest.raises(UserError, match=f"likely {encoding}: add --encoding {encoding}"):
        read_captions(tmp_path)
    table = read_captions(tmp_path, encoding=encoding)
    assert {*captions_of(table).values()} == {(TEXTS[encoding].strip(),)}


@pytest.mark.parametrize(
    "text",
    [
        "Un garçon à côté de l’école, où l'été… « très beau »",
        "Ein Hund läuft über die Straße – größer",
        "¿Dónde está el niño? ¡Allí! El 1º, 3 m², 5 °C",
        "Hundur hleypur í grasinu; þetta er það",
        "“…”",
    ],
)
def test_western_text_is_read_and_counted(text: str) -> None:
    found, note = decode_text(text.encode("cp1252"), "x.csv")
    assert found == text and "read as Windows-1252, see --encoding" in note


def test_damage_in_utf_8_does_not_make_all_of_it_western() -> None:
    found, note = decode_text("été à côté, straße über".encode() + b" \xe9t", "x.csv")
    assert found == "été à côté, straße über \ufffdt" and "damaged" in note


@pytest.mark.parametrize(
    "encoding, message",
    [
        ("utf-8", r"x\.csv: not in --encoding utf-8 \(byte 1"),
        ("no-such", "--encoding no-such: no such text encoding"),
        ("rot13", "--encoding rot13: no such text encoding"),
    ],
)
def test_a_wrong_encoding_is_one_line(encoding: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode_text(b"a\xe9b", "x.csv", encoding)
    assert decode_text("é".encode("utf-8-sig"), "x.csv", "cp1252") == ("é", "")


def test_every_candidate_is_an_encoding() -> None:
    for name in CANDIDATES:
        assert decode_text(b"a", "x", name) == ("a", "")


def test_texts_in_shards_are_decoded_like_others(tmp_path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in (("a.jpg", b"x"), ("a.txt", "café".encode("cp1252"))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    table = read_captions(TarShards(str(tmp_path / "0.tar")))
    assert captions_of(table) == {"0.tar/a.jpg": ("café",)}
    assert any("Windows-1252" in note for note in table.notes)
