"""The page of captioned images: what is written, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

import pytest
from browser import browser_page
from click.testing import Result
from commands import invoke
from conftest import draw
from drawn_run import DrawnRun
from html_page import HtmlPage
from PIL import Image

import evaluate as command
from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.tokenizers import tokenize_english
from pipeline.decoding.captions import Caption, Word
from pipeline.evaluation import Evaluation
from pipeline.metrics.coco import Scorer
from pipeline.outputs import gallery
from pipeline.outputs.gallery import GalleryItem, confidence, write_gallery
from pipeline.reports.evaluation_page import write_page
from pipeline.utils.errors import UserError
from pipeline.utils.html import tidy

pytestmark = pytest.mark.usefixtures("tiny_inception")

if TYPE_CHECKING:
    from playwright.sync_api import Page

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'>",
    '"\'><b onclick="hacked">`${hacked}`&amp;&lt;',
    "{{ 7 * 7 }}{% raw %}<!-- <script> ]]>",
    "\u202egpj.elif\u202c \u2028\u2029 \u2066left open",
)
ODD_NAMES = (
    "a#b.png",
    "a?b=c&d.png",
    "%41.png",
    "c:d.png",
    'it\'s "so".png',
    "é ü 図.png",
    "[1]{2}^~|.png",
    "back\\slash.png",
    "new\nline.png",
    " lead.png",
)


def item(path: Path, text: str = "a dog runs", **more: Any) -> GalleryItem:
    captions = more.pop("captions", [Caption(text, -2.0), Caption(f"{text} away", -4.0)])
    return GalleryItem(path, more.pop("name", path.name), captions, **more)


def written(tmp_path: Path, *items: GalleryItem, **options: Any) -> HtmlPage:
    page = tmp_path / "page.html"
    write_gallery(items, page, "Images", {"Model": "m"}, **options)
    return HtmlPage(page)


# What is written


def test_thumbnails_inside_the_page_are_small_images(tmp_path: Path) -> None:
    sizes = {(1600, 400): (320, 80), (3, 2000): (1, 320), (64, 48): (64, 48)}
    paths = [draw(tmp_path / f"{n}.png", size=size) for n, size in enumerate(sizes)]
    records = written(tmp_path, *map(item, paths)).records
    for record, size in zip(records, sizes.values(), strict=True):
        head, content = record["thumbnail"].split(",")
        assert head == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            image.load()
            assert image.format == "WEBP" and image.size == size
        assert (record["width"], record["height"]) == size
    assert not (tmp_path / "page_files").exists()


def test_thumbnails_beside_the_page_are_replaced_by_the_next_run(tmp_path: Path) -> None:
    first, second = (draw(tmp_path / f"{n}.png", n) for n in (1, 2))
    folder = tmp_path / "page_files"
    page = written(tmp_path, item(first), item(first), thumbnails="beside")
    addresses = [record["thumbnail"] for record in page.records]
    assert addresses[0] == addresses[1] and addresses[0].startswith("page_files/")
    with Image.open(tmp_path / addresses[0]) as image:
        assert image.size == (64, 48)
    (folder / "mine.webp").write_text("somebody's own")

    written(tmp_path, item(second), thumbnails="beside")
    assert not (tmp_path / addresses[0]).exists()
    assert len(list(folder.iterdir())) == 2
    written(tmp_path, item(second))
    assert [path.name for path in folder.iterdir()] == ["mine.webp"]

    odd = tmp_path / "a b#%.html"
    write_gallery([item(first)], odd, "t", {}, thumbnails="beside")
    (record,) = HtmlPage(odd).records
    assert (tmp_path / os.fsdecode(unquote_to_bytes(record["thumbnail"]))).is_file()


@pytest.mark.parametrize("thumbnails", ["inside", "beside"])
def test_a_stream_that_breaks_leaves_the_earlier_page_whole(
    tmp_path: Path, thumbnails: str
) -> None:
    images = [draw(tmp_path / f"{n}.png", n) for n in range(60)]
    before = written(tmp_path, item(images[0]), thumbnails="beside")

    def broken() -> Iterator[GalleryItem]:
        yield from map(item, images)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gallery(broken(), tmp_path / "page.html", "t", {}, thumbnails)
    assert HtmlPage(tmp_path / "page.html").records == before.records
    assert (tmp_path / before.records[0]["thumbnail"]).is_file()
    written(tmp_path, item(images[0]), thumbnails="beside")
    assert len(list((tmp_path / "page_files").iterdir())) == 1


def test_items_are_taken_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, done, ahead = 0, 0, 0
    page = gallery._page

    def counted(title: str, facts: Any, tiles: Any, records: Iterator[Any]) -> Iterator[str]:
        def passed() -> Iterator[Any]:
            nonlocal done
            for record in records:
                done += 1
                yield record

        return page(title, facts, tiles, passed())

    def items() -> Iterator[GalleryItem]:
        nonlocal taken, ahead
        for _ in range(300):
            taken += 1
            ahead = max(ahead, taken - done)
            yield item(tmp_path / "none.jpg")

    monkeypatch.setattr(gallery, "_page", counted)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    write_gallery(items(), tmp_path / "page.html", "t", {})
    assert done == 300 and 0 < ahead <= 12


def test_images_that_cannot_be_read_keep_their_captions_or_their_reason(tmp_path: Path) -> None:
    broken, good = tmp_path / "broken.jpg", draw(tmp_path / "good.png")
    broken.write_bytes(b"\xff\xd8 no image")
    records = written(
        tmp_path,
        item(tmp_path / "gone.jpg"),
        item(broken),
        item(good, captions=[], error="not an image"),
        item(good, captions=[]),
    ).records
    names = ("missing", "error", "original")
    assert [tuple(record[name] for name in names) for record in records] == [
        ("no such file", None, None),
        ("not a supported image", None, None),
        (None, "not an image", None),
        (None, None, "good.png"),
    ]
    assert [r["thumbnail"] is None for r in records] == [True, True, True, False]
    assert [len(r["captions"]) for r in records] == [2, 2, 0, 0]


def test_the_original_is_shown_where_browsers_know_its_format(tmp_path: Path) -> None:
    tiff, png = draw(tmp_path / "a.tif"), draw(tmp_path / "a b" / "b.png")
    disguised = Path(shutil.copy(png, tmp_path / "c.tif"))
    page = tmp_path / "pages" / "page.html"
    write_gallery(map(item, (tiff, png, disguised)), page, "t", {})
    originals = [record["original"] for record in HtmlPage(page).records]
    assert originals == [None, "../a%20b/b.png", "../c.tif"]


def odd_images(folder: Path) -> list[Path]:
    names = [os.fsencode(name) for name in ODD_NAMES]
    if sys.platform == "linux":
        names.append(b"bytes \xff\xfe.png")
    else:
        names = [name for name in names if not set(name) & set(b'?:"\\|\n')]
    return [draw(folder / os.fsdecode(name), seed) for seed, name in enumerate(names)]


def test_addresses_of_odd_names_lead_to_the_files(tmp_path: Path) -> None:
    paths = odd_images(tmp_path)
    records = written(tmp_path, *map(item, paths)).records
    for path, record in zip(paths, records, strict=True):
        assert unquote_to_bytes(record["original"]) == os.fsencode(path.name)
        assert not set(record["original"]) & set(" #?:\"'&\\\n<>")
        assert record["name"].isprintable() or "\n" in record["name"]


def test_hostile_text_is_data(tmp_path: Path) -> None:
    image = draw(tmp_path / "a.png")
    page = tmp_path / "page.html"
    items = [
        item(image, text, name=text, references=[text], error=error)
        for text in HOSTILE
        for error in (None, text)
    ]
    write_gallery(items, page, HOSTILE[1], {text: text for text in HOSTILE})
    parsed = HtmlPage(page)
    assert len(parsed.all("script")) == len(items) + 1
    assert not [a for a in parsed.attributes if a.startswith("on") or a == "style"]
    assert not parsed.all("b") and not parsed.all("img")
    for text in HOSTILE:
        assert parsed.text.count(text) >= 2
    for record, given in zip(parsed.records, items, strict=True):
        assert record["name"] == record["references"][0] == given.name
        assert record["captions"][0]["text"] == given.captions[0].text
        assert record["error"] == given.error
    data = page.read_text(encoding="utf-8").split('<div id="records"')[1]
    assert "\u2028" not in data and "hacked = 1</" not in data


def test_confidence_is_the_mean_probability_of_a_token(tmp_path: Path) -> None:
    probabilities = (0.5, 0.25, 0.9)
    caption = Caption(
        "a man's",
        math.log(math.prod(probabilities) * 0.8),
        tuple(Word(w, p) for w, p in zip(("a", "man", "'s"), probabilities, strict=True)),
    )
    assert confidence(caption) == pytest.approx((math.prod(probabilities) * 0.8) ** 0.25)
    assert confidence(Caption("a dog", -6.0)) == pytest.approx(math.exp(-2))
    assert confidence(Caption("a dog", -math.inf)) is None
    image = draw(tmp_path / "a.png")
    endless = Caption("a", math.nan, (Word("a", math.nan),))
    records = written(tmp_path, item(image, captions=[caption, endless], score=math.inf)).records
    assert records[0]["captions"][0]["words"] == [["a", 0.5], ["man", 0.25], ["'s", 0.9]]
    assert records[0]["captions"][1]["logProbability"] is None
    assert records[0]["captions"][1]["words"] == [["a", None]]
    assert records[0]["score"] is None


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        write_gallery([], tmp_path, "t", {})
    (tmp_path / "page_files").write_text("a file")
    with pytest.raises(UserError, match=r"page_files.*cannot be written"):
        written(tmp_path, item(draw(tmp_path / "a.png")), thumbnails="beside")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "page_files"]


# evaluate.py --html


def evaluate(*words: object, code: int = 0) -> Result:
    return invoke(command.main, *words, "--no-java", "--device", "cpu", code=code)


def test_evaluate_writes_what_it_scored(drawn_run: DrawnRun, tmp_path: Path) -> None:
    page, output = tmp_path / "page.html", tmp_path / "predictions.json"
    split = ("--split", "train")
    result = evaluate(drawn_run.run, *split, "--html", page, "--explain", "--output", output)
    assert f"page: {page}" in result.stderr
    parsed = HtmlPage(page)
    table = read_captions(drawn_run.data)
    images = table.of_split("train")
    predictions = {p["image_id"]: p["caption"] for p in json.loads(output.read_text())}
    cider = Scorer(
        {i.name: [tokenize_english(c) for c in i.captions] for i in images}
    ).per_image_cider({name: tokenize_english(text) for name, text in predictions.items()})
    assert [r["name"] for r in parsed.records] == [i.name for i in images]
    for record, image in zip(parsed.records, images, strict=True):
        assert record["references"] == [tidy(caption) for caption in image.captions]
        assert record["captions"][0]["text"] == predictions[image.name]
        best, *others = record["captions"]
        assert len(others) == 4 and all(len(word) == 2 for o in others for word in o["words"])
        assert all(len(cells) == 64 and max(cells) == 100 for _, _, cells in best["words"])
        assert record["score"] == pytest.approx(cider[image.name], rel=1e-4)
        assert record["missing"] is None
        assert (tmp_path / record["original"]).resolve().is_file()
    scores = json.loads((tmp_path / "scores.json").read_text())
    for text in (
        f"CIDEr-D{scores['scores']['CIDEr-D']:.1f}95 %: ",
        f"train ({table.split_hash('train')})",
        "Images24120 references",
        "beam 10, consensus 3, matching 2",
    ):
        assert text in parsed.text


def test_evaluate_needs_no_image_files(drawn_run: DrawnRun, tmp_path: Path) -> None:
    data, page = tmp_path / "scenes", tmp_path / "page.html"
    data.mkdir()
    shutil.copy(drawn_run.data / "captions.csv", data)
    options = ("--data", data, "--features", drawn_run.features, "--output", tmp_path / "p.json")
    evaluate(drawn_run.run, *options, "--html", page, "--explain")
    records = HtmlPage(page).records
    assert [r["missing"] for r in records] == ["no such file"] * 3
    assert all(r["captions"] and r["references"] and r["score"] is not None for r in records)


def test_images_that_evaluate_left_out_are_named(tmp_path: Path) -> None:
    facts = {
        **dict.fromkeys(("split", "split_sha256", "features"), "x"),
        **dict.fromkeys(("images", "references"), 1),
        "search": {"beam_size": 1, "consensus": 0, "matching": 0},
    }
    left_out = {Path("x/broken.jpg"): "empty file"}
    result = Evaluation({}, {"distinct_captions": 0}, [], {}, facts, [], left_out)
    write_page(result, "run", tmp_path / "page.html")
    parsed = HtmlPage(tmp_path / "page.html")
    assert "Images11 reference\n" in parsed.text
    (record,) = parsed.records
    assert (record["name"], record["error"]) == (str(Path("x/broken.jpg")), "empty file")


def test_a_page_of_several_runs_is_refused_at_once(drawn_run: DrawnRun, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for arguments, message in (
        ((drawn_run.run, drawn_run.run, "--html", page), "--html: is for one run"),
        ((drawn_run.run, "--explain"), "--explain: is for the page of --html"),
        (("--compare", "a.json", "b.json", "--html", page), "--html: is for one run"),
        ((drawn_run.run, "--html", tmp_path), "is a folder"),
    ):
        result = evaluate(*arguments, code=2)
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not page.exists()


# In a browser


@contextmanager
def opened(
    folder: Path, items: Iterable[GalleryItem], gallery: Mapping[str, Any] = {}, **options: Any
) -> Iterator[Page]:
    """Write a page of ``items`` and open it; nothing may go wrong on it while the block runs.

    ``gallery`` are options of ``write_gallery``, and ``options`` those of the browser.
    """
    target = folder / "page.html"
    write_gallery(items, target, **{"title": "t", "facts": {}, **gallery})
    with browser_page(own=folder.as_uri(), **options) as (page, problems):
        page.goto(target.as_uri())
        yield page
        assert problems == []


def captions_shown(page: Page) -> list[str]:
    return page.locator("#grid .caption").all_text_contents()


def test_hostile_text_is_shown_as_text_and_odd_files_open(tmp_path: Path) -> None:
    odd = odd_images(tmp_path / "album #1")
    texts = [*HOSTILE, *[f"odd {number}" for number in range(len(odd))]]
    items = [item(odd[0], text, name=text, references=[text]) for text in HOSTILE]
    items += [item(path, f"odd {number}") for number, path in enumerate(odd)]
    items += [item(odd[0], name=text, captions=[], error=text) for text in HOSTILE]
    facts = dict.fromkeys(HOSTILE, HOSTILE[1])
    gallery = {"title": HOSTILE[0], "facts": facts, "thumbnails": "beside"}
    with opened(tmp_path, items, gallery) as page:
        assert page.title() == HOSTILE[0]
        page.locator("#failures summary").click()
        assert sorted(captions_shown(page)) == sorted(texts)
        failed = page.locator("#failures li").all_text_contents()
        assert failed == [f"{text}: {text}" for text in HOSTILE]
        alternatives = page.locator("#grid img").evaluate_all("all => all.map(e => e.alt)")
        assert sorted(alternatives) == sorted(texts)
        page.locator("#grid .open").first.click()
        for _ in texts:
            # The file itself, not the thumbnail: the same address as the record's.
            page.wait_for_selector('#stage img[src^="album%20%231/"]')
            assert page.locator("#stage img").evaluate("e => e.decode().then(() => e.naturalWidth)")
            page.keyboard.press("ArrowRight")
        assert page.evaluate("window.hacked === undefined")
        assert page.locator("b, #grid script").count() == 0


def test_search_and_sort(tmp_path: Path) -> None:
    image = draw(tmp_path / "a.png")
    rows = [
        ("10.png", "a red dog", 30.0, -8.0, "seen"),
        ("9.png", "a blue dog", 10.0, -1.0, "seen"),
        ("Éva.png", "two red cars", 20.0, 4 * math.log(0.2999), "ONE"),
    ]
    items = [
        item(image, name=name, captions=[Caption(text, p)], references=[seen], score=score)
        for name, text, score, p, seen in rows
    ]
    with opened(tmp_path, items) as page:
        assert captions_shown(page) == ["a blue dog", "two red cars", "a red dog"]  # worst first
        # Rounded down: 30 % would not be below the threshold.
        confidences = page.locator("#grid .figure span:last-child").all_inner_texts()
        shown = ["confidence 77 %", "low confidence 29 %", "low confidence 13 %"]
        assert confidences == [text.replace(" %", "\u00a0%") for text in shown]
        for label, first in (
            ("CIDEr-D, best first", "a red dog"),
            ("Name", "a blue dog"),
            ("Most certain first", "a blue dog"),
            ("Least certain first", "a red dog"),
        ):
            page.get_by_label("Sort").select_option(label)
            assert captions_shown(page)[0] == first
        page.get_by_label("Sort").select_option("Name")
        names = page.locator("#grid .name").all_text_contents()
        assert names == ["9.png", "10.png", "Éva.png"]
        search = page.get_by_label("Search", exact=True)
        for words, found in (
            ("dog", ["a blue dog", "a red dog"]),
            ("DOG re", ["a red dog"]),
            ("eva", ["two red cars"]),
            ("one", ["two red cars"]),
            ("seen red", ["a red dog"]),
            ("dog cars", []),
        ):
            search.fill(words)
            assert captions_shown(page) == found
            assert page.get_by_role("status").first.inner_text() == f"{len(found)} of 3 images"
        page.get_by_role("button", name="Clear the search").click()
        assert len(captions_shown(page)) == 3
        assert page.get_by_role("status").first.inner_text() == "3 images"


def test_the_large_view_by_keyboard(tmp_path: Path) -> None:
    images = [draw(tmp_path / f"{n}.png", n, (640, 480)) for n in range(3)]
    words = (Word("a", 0.9), Word("man", 0.05), Word("'s", 0.004), Word("dog", 0.2))
    items = [
        item(p, captions=[Caption("A man's dog.", -4.0, words), Caption(f"number {n}", -5.0)])
        for n, p in enumerate(images)
    ]
    items[2] = item(tmp_path / "gone.png", "gone", references=["it was <here> ."], score=12.34)
    with opened(tmp_path, items, permissions=["clipboard-read", "clipboard-write"]) as page:
        page.get_by_label("Sort").select_option("Name")
        page.get_by_role("button", name="Dark colours").focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "open"
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog", name="0.png")
        page.wait_for_selector('#stage img[src="0.png"]')
        assert dialog.locator(".caption").all_text_contents() == ["A man's dog.", "number 0"]
        assert dialog.locator(".probabilities").first.text_content() == (
            "Word by word: a 90 %, man 5 %, 's < 1 %, dog 20 %".replace(" %", "\u00a0%")
        )
        doubted = dialog.locator(".low").all_inner_texts()
        assert doubted == ["low confidence 18\u00a0%"], "of the alternative; the first has 44"
        shades = dialog.locator(".word").evaluate_all(
            "all => all.map(e => getComputedStyle(e).backgroundColor)"
        )
        article, man, possessive, dog = shades
        assert article == possessive, "words of grammar are not doubted"
        assert len({article, man, dog}) == 3
        assert dialog.locator(".word").nth(1).get_attribute("title") == "5\u00a0%"
        page.keyboard.press("ArrowLeft")  # there is none before the first
        assert page.get_by_role("dialog", name="0.png").is_visible()
        page.keyboard.press("ArrowRight")
        page.wait_for_selector('#stage img[src="1.png"]')
        assert page.locator("#viewer-place").inner_text() == "2 of 3"
        assert "2 of 3: A man's dog." in page.locator("#announcement").inner_text()
        page.get_by_role("dialog").get_by_role("button", name="Copy").nth(1).press("Enter")
        page.wait_for_selector(".copy.done")
        assert page.evaluate("navigator.clipboard.readText()") == "number 1"
        page.keyboard.press("Home")
        assert page.locator("#viewer-place").inner_text() == "1 of 3"
        page.keyboard.press("End")
        dialog = page.get_by_role("dialog", name="gone.png")
        assert "no such file" in page.locator("#stage").inner_text()
        assert dialog.locator(".references li").all_inner_texts() == ["it was <here>."]
        assert "12.3" in page.locator("#viewer-score").inner_text()
        page.keyboard.press("Escape")
        assert not page.locator("#viewer").is_visible()
        # Not by wait_for_function, whose polling the page's security policy refuses.
        page.locator(".card:focus-within .name", has_text="gone.png").wait_for()


def test_a_word_shows_where_it_is_seen(tmp_path: Path) -> None:
    """By the pointer and by the arrow keys: all is shaded but the cells that speak for it."""
    image = draw(tmp_path / "a.png", size=(640, 480))
    cells = [[0.0] * 64 for _ in range(2)]
    cells[0][0], cells[1][63], cells[1][0] = 0.5, 0.25, -1.0
    words = tuple(Word(text, 0.5, tuple(c)) for text, c in zip(("two", "dogs"), cells, strict=True))
    shade = """canvas => {
      const [width, height] = [canvas.width, canvas.height];
      const at = (x, y) => canvas.getContext("2d").getImageData(x, y, 1, 1).data[3];
      return canvas.hidden ? null : [at(4, 4), at(width - 5, height - 5), at(width / 2, 4)];
    }"""
    with opened(tmp_path, [item(image, captions=[Caption("two dogs", -2.0, words)])]) as page:
        assert page.locator("#explained-hint").is_visible()
        page.locator("#grid .open").first.click()
        canvas = page.locator("#stage canvas")
        assert canvas.evaluate(shade) is None
        page.locator("#viewer-best .word").first.hover()
        lit, other, between = canvas.evaluate(shade)
        assert lit == 0 and other == between == 200
        page.keyboard.press("ArrowDown")
        assert canvas.evaluate(shade) == [200, 0, 200]
        assert page.locator(".looked-at").all_inner_texts() == ["dogs"]
        page.keyboard.press("ArrowDown")
        assert page.locator(".looked-at").all_inner_texts() == ["two"]
        boxes = [page.locator(f"#stage {kind}").bounding_box() for kind in ("img", "canvas")]
        assert boxes[0] == boxes[1]


def test_state_survives_a_reload_and_scores_are_filtered(tmp_path: Path) -> None:
    image = draw(tmp_path / "a.png")
    long = f"a/{'long/' * 20}name.png"
    parts = {"likelihood": -0.5, "matching": 1.25}
    best = Caption("a dog", -4.0, (Word("a", 0.5), Word("dog", 0.1)), parts)
    items = [item(image, f"dog {n}", name=f"{n}.png", score=float(10 * n)) for n in range(1, 9)] + [
        item(image, name=long, captions=[best], score=0.0)
    ]
    tiles = [("CIDEr-D", "62.7", "95 %: 60 to 65")]
    gallery = {"facts": {"Model": "mine", "Search": "beam 3"}, "tiles": tiles}
    with opened(tmp_path, items, gallery, viewport={"width": 800, "height": 600}) as page:
        assert page.locator("header .quiet").first.inner_text() == "mine · 9 images"
        assert not page.locator("#explained-hint").is_visible(), "nothing is explained"
        assert page.locator(".tiles").inner_text().split("\n") == list(tiles[0])
        cut = page.locator(f'.name[title="{long}"]')
        assert cut.inner_text().replace("\n", "") == long
        assert cut.locator("bdi").last.inner_text().endswith("name.png")
        assert cut.evaluate("e => e.scrollWidth <= e.clientWidth")

        bars = page.locator("#histogram button")
        bars.first.click()
        assert captions_shown(page) == ["a dog"]
        page.get_by_role("button", name="CIDEr-D 76 to 80: 1 image").click()
        assert len(captions_shown(page)) == 9
        bars.nth(3).click()
        assert page.get_by_role("status").first.inner_text() == "9 images"

        page.keyboard.press("/")
        page.keyboard.type("dog")
        page.get_by_label("Sort").select_option("Name")
        page.get_by_role("button", name="Dark colours").click()
        page.locator("#grid .open").nth(8).click()
        assert page.locator("#viewer-best .figure span").last.inner_text() == "score 0.75"
        title = page.locator("#viewer-best .figure span").last.get_attribute("title")
        assert title and "1.25  image-text match" in title and "−4.00 nats" in title
        page.reload()
        assert page.locator("#viewer").is_visible()
        assert page.locator("#viewer-place").inner_text() == "9 of 9"
        page.keyboard.press("Escape")
        assert page.locator("#search").input_value() == "dog"
        assert page.locator("#order").input_value() == "name"
        assert page.locator("html").get_attribute("data-theme") == "dark"


def test_many_images_are_drawn_as_they_come_into_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = draw(tmp_path / "a.png")
    thumbnail = gallery.make_thumbnail(image)
    monkeypatch.setattr(gallery, "make_thumbnail", lambda path: thumbnail)
    items = (item(image, f"a dog {n % 50}", name=f"{n}.jpg") for n in range(1500))
    with opened(tmp_path, items) as page:
        page.wait_for_selector(".card img")
        assert page.get_by_role("status").first.inner_text() == "1,500 images"
        assert 20 <= page.locator(".card").count() < 400
        search = page.get_by_label("Search", exact=True)
        search.fill("1499")
        assert page.locator(".card").count() == 1
        assert page.get_by_role("status").first.inner_text() == "1 of 1,500 images"
        search.fill("")
        # Drawing more moves the end of the page away: scroll until enough are drawn.
        page.wait_for_function("""() => {
            scrollTo(0, document.documentElement.scrollHeight);
            return document.querySelectorAll(".card").length >= 300;
        }""")
        assert page.locator(".card").count() < 1000
