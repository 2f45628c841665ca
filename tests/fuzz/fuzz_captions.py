"""A fuzzer of the readers of captions: CSV, TSV, token files, JSON of all kinds, .txt sidecars.

    pip install atheris
    PYTHONPATH=. python tests/fuzz/fuzz_captions.py FOLDER [--seconds 660]

Run it for ten minutes at least after a change of ``caption_files``, ``captions``,
``sidecar_captions`` or the tokenizers. FOLDER keeps the inputs that reached something new, for the
next run; an input that failed is ``failed-...`` there, and given alone as
``use(Path(...).read_bytes())`` it fails again.

An input's first byte chooses the file's name, which chooses the reader; the rest is its content.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import atheris
from fuzzing import run

with atheris.instrument_imports(include=["pipeline", "json", "csv"]):
    from pipeline.captions import CaptionTable, read_captions
    from pipeline.errors import UserError
    from pipeline.vocabulary import TOKENIZERS

NAMES = (
    "captions.csv",
    "x.tsv",
    "Flickr8k.token.txt",
    "captions.txt",
    "dataset_x.json",
    "captions_train2017.json",
    "x.jsonl",
    "photo.txt",
)
PARTS = b"\n===\n"  # between a token file and its lists of splits
LISTS = ("Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt")

FOLDER = tempfile.TemporaryDirectory(prefix="captions-")
DATA = Path(FOLDER.name)
(DATA / "photo.jpg").touch()


def use(content: bytes) -> None:
    """Read one made-up captions file, and use what it gives."""
    if not content:
        return
    name, content = NAMES[content[0] % len(NAMES)], content[1:]
    parts = content.split(PARTS, len(LISTS)) if name == "Flickr8k.token.txt" else [content]
    written = [DATA / file for file, _ in zip((name, *LISTS), parts, strict=False)]
    for file, part in zip(written, parts, strict=True):
        file.write_bytes(part)
    try:
        check(read_captions(DATA, None if name == "photo.txt" else written[0]))
    except UserError as error:
        assert error.message.startswith(str(DATA)), error.message
        assert "\n" not in error.message and len(error.message) < 1000, error.message
    finally:
        for file in written:
            file.unlink()


def check(table: CaptionTable) -> None:
    """Tell that a table is whole, and that what follows can use it."""
    names = [image.name for image in table.images]
    assert names and names == sorted(set(names))
    table.split_hash("train")
    "\n".join(table.summary()).encode("utf-8")
    for image in table.images:
        assert image.captions and all(text.strip() == text != "" for text in image.captions)
        for text in image.captions:
            for tokenizer in TOKENIZERS.values():
                tokens = tokenizer.tokenize(text)
                assert tokenizer.tokenize(tokenizer.detokenize(tokens)) == tokens, (
                    tokenizer.name,
                    text,
                )
    smaller, _ = table.restrict(["photo.jpg", "a/b.jpg"])
    assert all(image.name in names for image in smaller.images)


def seeds() -> list[bytes]:
    """Make a small valid file for every reader."""
    karpathy = {
        "images": [
            {
                "filename": "b.jpg",
                "filepath": "a",
                "split": "restval",
                "sentences": [{"raw": "A kite ."}],
            }
        ]
    }
    coco = {
        "images": [{"id": 5, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 5, "caption": "A kite ."}],
    }
    line = {"image": "b.jpg", "captions": ["A kite .", None], "split": "dev"}
    texts = {
        "captions.csv": 'image,caption,split\nb.jpg,"A kite, high\nup .",train\nc.jpg.1,Two .,',
        "x.tsv": "file_name\ttext\nb.jpg\tA man's dog doesn't move, 3.5 m\n",
        "Flickr8k.token.txt": "b.jpg#0\tA kite .\nc.jpg#1\tTwo .\n===\nb.jpg\n===\nc.jpg\n===\n",
        "captions.txt": "image,caption\n2513260012_03d33305cf.jpg,A dog & a cat .\n",
        "dataset_x.json": json.dumps(karpathy),
        "captions_train2017.json": json.dumps(coco),
        "x.jsonl": "\n".join([json.dumps(line)] * 2),
        "photo.txt": "A kite .\r\n一只狗在草地上跑\rTwo pots .",
    }
    found = [bytes([NAMES.index(name)]) + text.encode() for name, text in texts.items()]
    return [*found, found[0][:1] + texts["captions.csv"].encode("utf-16")]


WORDS = (
    *(b"image", b"caption", b"split", b"train", b"val", b"restval", b"filename", b"file_name"),
    *(b"sentences", b"raw", b"annotations", b"image_id", b'"images": [', b'"id": ', b"filepath"),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"-Infinity", b"[[["),
    *(
        b"#0\t",
        b".jpg",
        b".jpg.1",
        b"../",
        b"\r\n",
        b'""',
        b"\xcc\x95\xcc\x80",
        PARTS,
        b"n't",
        b"'s",
    ),
)

if __name__ == "__main__":
    run(use, seeds(), WORDS, largest=4096)
