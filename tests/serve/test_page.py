"""The page of caption.py --serve, in Chromium: images in, captions out, also by keyboard."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import browser_page
from running_server import running

from pipeline import Captioner
from pipeline.decoding.options import SearchOptions
from pipeline.serve import app as server

if TYPE_CHECKING:
    from playwright.sync_api import Page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.usefixtures("tiny_inception")

HOSTILE = "<img src=x onerror=alert(1)>.jpg"
# Makes files of base64, and gives them to the page as the browser would.
GIVE = """([kind, images]) => {
  const transfer = new DataTransfer();
  for (const [name, content] of images) {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
  }
  const options = { bubbles: true, cancelable: true };
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
    : new DragEvent(kind, { ...options, dataTransfer: transfer });
  document.querySelector("main").dispatchEvent(event);
  return event.defaultPrevented;
}"""


@pytest.fixture(scope="module")
def address(captioner: Captioner) -> Iterator[str]:
    with running(captioner) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(address: str) -> Iterator[Page]:
    """The page, open; nothing may be complained of at the end."""
    with browser_page(permissions=["clipboard-read", "clipboard-write"]) as (page, complaints):
        page.goto(address)
        yield page
        assert complaints == []


def give(page: Page, kind: str, *images: tuple[str, bytes]) -> bool:
    encoded = [[name, base64.b64encode(content).decode()] for name, content in images]
    return bool(page.evaluate(GIVE, [kind, encoded]))


def wait(page: Page, cards: int) -> None:
    """Wait until so many cards are there and none is at work."""
    sync_api.expect(page.locator(".card")).to_have_count(cards)
    sync_api.expect(page.locator(".card[aria-busy=false]")).to_have_count(cards, timeout=30_000)


def captions(page: Page) -> list[list[str]]:
    return [card.locator(".whole").all_text_contents() for card in page.locator(".card").all()]


def direct(
    captioner: Captioner, paths: list[Path], beam_size: int | None, count: int
) -> list[list[str]]:
    predictions = captioner.stream(paths, SearchOptions(beam_size, num_captions=count))
    return [[caption.text for caption in prediction.captions] for prediction in predictions]


def test_chosen_images_are_captioned_copied_and_captioned_anew_by_other_settings(
    page: Page, captioner: Captioner, scenes: list[Path]
) -> None:
    page.set_input_files("#files", scenes[:3])
    wait(page, 3)
    assert captions(page) == direct(captioner, scenes[:3], None, 3)
    assert page.locator(".card h2").all_text_contents() == [path.name for path in scenes[:3]]
    assert page.locator("#status").inner_text() == "3 images"
    for card in page.locator(".card").all():
        assert card.locator("img").evaluate(
            "image => image.decode().then(() => image.naturalWidth)"
        )
        # What is seen is the caption, with the words' numbers in the tooltips and for the ear.
        for sentence in card.locator(".captions > li").all():
            whole = sentence.locator(".whole").inner_text()
            assert sentence.locator(".words").inner_text() == whole
            words = sentence.locator(".word").evaluate_all(
                "words => words.map((word) => [word.innerText, word.title])"
            )
            assert [text for text, _ in words] == whole.split()
            assert all(re.fullmatch(r"(< 1|\d+)\xa0%", number) for _, number in words)
            spoken = [f"{text}: {number}" for text, number in words]
            assert sentence.locator("ul li").all_text_contents() == spoken
            title = sentence.locator(".score").get_attribute("title") or ""
            parts = [float(line.split()[0].replace("−", "-")) for line in title.split("\n")[:3]]
            total = float(sentence.locator(".value").inner_text().replace("−", "-"))
            assert total == pytest.approx(sum(parts), abs=0.02) and "image-text match" in title
        values = [float(v.replace("−", "-")) for v in card.locator(".value").all_inner_texts()]
        assert values == sorted(values, reverse=True), "the score is what orders the captions"
        assert re.fullmatch(r"\d+\.\d\d s", card.locator(".time").inner_text())

    found = captions(page)
    page.get_by_label("Show numbers").check()
    parts_of_score = page.locator(".score").first
    drawn = parts_of_score.evaluate("e => getComputedStyle(e, '::after').content")
    tooltip = parts_of_score.get_attribute("title")
    assert drawn.replace("\\a ", "\n") == f'"{tooltip}"', "for fingers, which cannot hover"
    page.locator(".copy").nth(1).click()
    assert page.evaluate("navigator.clipboard.readText()") == found[0][1]
    page.get_by_role("button", name="Copy all").click()
    sync_api.expect(page.locator("#status")).to_have_text("9 captions copied")
    header, *rows = page.evaluate("navigator.clipboard.readText()").rstrip("\n").split("\n")
    assert header == "image\trank\tcaption\tlog_probability"
    cells = [row.split("\t") for row in rows]
    assert [[cell[0], cell[2]] for cell in cells] == [
        [path.name, text] for path, texts in zip(scenes[:3], found, strict=True) for text in texts
    ]
    assert all(float(cell[3]) < 0 for cell in cells)
    files = []
    for name in ("Download CSV", "Download JSON"):
        with page.expect_download() as download:
            page.get_by_role("button", name=name).click()
        files.append(Path(download.value.path()).read_text(encoding="utf-8"))
    assert list(csv.reader(files[0].splitlines()))[1:] == cells
    assert [[c["caption"] for c in each["captions"]] for each in json.loads(files[1])] == found
    page.get_by_role("button", name=f"Enlarge {scenes[0].name}").click()
    assert page.locator("#large").is_visible()
    page.keyboard.press("Escape")

    beam = page.get_by_label("Beam size")
    assert beam.get_attribute("placeholder") == "auto (10)"
    beam.fill("2")
    assert page.locator(".card.stale").count() == 3, "made with other settings"
    assert page.get_by_label("Captions per image").input_value() == "2"
    sync_api.expect(page.locator(".whole")).to_have_count(6)
    wait(page, 3)
    assert page.locator(".card.stale").count() == 0
    assert captions(page) == direct(captioner, scenes[:3], 2, 2)
    page.get_by_label("Captions per image").fill("4")
    assert beam.input_value() == "4"


def test_a_photograph_of_the_page_can_be_tried(page: Page) -> None:
    for name in ("cat.jpg", "coffee.jpg", "photographer.jpg"):
        page.get_by_role("button", name=f"Try {name}").click()
        wait(page, 1)
        assert page.locator(".card h2").inner_text() == name and len(captions(page)[0]) == 3
        assert not page.locator("#examples").is_visible(), "only while there is nothing else to see"
        page.get_by_role("button", name="Clear").click()


def test_words_show_what_speaks_for_them_by_pointer_and_by_key(
    page: Page, scenes: list[Path]
) -> None:
    page.get_by_label("Explain").check()
    page.wait_for_timeout(400)  # a changed setting captions anew after 300 ms
    page.set_input_files("#files", scenes[0])
    wait(page, 1)
    canvas, words = page.locator(".card canvas"), page.locator(".sentence").first.locator(".word")
    sync_api.expect(canvas).to_be_hidden()
    words.nth(1).hover()
    sync_api.expect(canvas).to_be_visible()
    image = page.locator(".card img").bounding_box()
    assert image and canvas.bounding_box() == pytest.approx(image, abs=1)
    sync_api.expect(words.nth(1)).to_have_class("word looked-at")
    # Where a part adds most, the image is not shaded; elsewhere it is.
    shades = page.evaluate(
        """(canvas) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((_, place) => place % 4 === 3);
    }""",
        canvas.element_handle(),
    )
    assert min(shades) < 50 and max(shades) > 100
    page.locator("h1").hover()
    sync_api.expect(canvas).to_be_hidden()
    page.locator(".sentence").first.focus()
    page.keyboard.press("ArrowLeft")
    sync_api.expect(words.last).to_have_class("word looked-at")
    page.keyboard.press("ArrowRight")
    sync_api.expect(words.first).to_have_class("word looked-at")


def test_nothing_is_left_after_the_last_image(page: Page, scenes: list[Path]) -> None:
    for remove in ("Clear", f"Remove {scenes[0].name}"):
        page.set_input_files("#files", scenes[:1])
        wait(page, 1)
        page.get_by_role("button", name=remove, exact=True).click()
        sync_api.expect(page.locator(".card")).to_have_count(0)
        assert not page.locator("#bar").is_visible() and not page.locator("#legend").is_visible()
    page.evaluate("say('No images were dropped')")  # a message, but no buttons
    assert page.locator("#status").inner_text() == "No images were dropped"
    assert not page.get_by_role("button", name="Copy all").is_visible()


def test_draws_differ_by_their_seed_and_come_back_with_it(page: Page, scenes: list[Path]) -> None:
    assert not page.get_by_label("Temperature").is_visible()
    page.get_by_label("Sample").check()
    assert not page.get_by_label("Beam size").is_visible()
    page.get_by_label("Temperature").fill("1.5")
    page.set_input_files("#files", scenes[:2])
    wait(page, 2)
    page.wait_for_timeout(500)  # settings apply a moment after the last key
    wait(page, 2)
    first = captions(page)
    page.get_by_role("button", name="Resample").click()
    assert page.get_by_label("Seed").input_value() == "1"
    wait(page, 2)
    assert captions(page) != first
    page.get_by_label("Seed").fill("0")
    sync_api.expect(page.locator(".whole").first).to_have_text(first[0][0])
    wait(page, 2)
    assert captions(page) == first


def test_dropped_and_pasted_images_hostile_names_and_large_files(
    page: Page, scenes: list[Path]
) -> None:
    image = scenes[0].read_bytes()
    for kind in ("dragenter", "dragover"):
        give(page, kind, ("a.jpg", image))
    assert page.locator("#veil").is_visible()
    assert give(page, "drop", *[(f"{number}.jpg", image) for number in range(20)])
    wait(page, 20)
    assert not page.locator("#veil").is_visible()
    assert give(page, "paste", (HOSTILE, image))
    wait(page, 21)
    last = page.locator(".card").last
    assert last.locator("h2").inner_text() == HOSTILE
    assert last.locator("img").count() == 1
    assert captions(page) == 21 * captions(page)[:1]
    assert give(page, "drop", ("broken.jpg", image[:900]), ("notes.jpg", b"no image"))
    wait(page, 23)
    broken, other = page.locator(".failed .note").all_text_contents()
    assert broken.startswith("Image file is truncated")
    assert other == "Not a supported image"
    for card in page.locator(".failed").all():
        assert not card.locator(".image").is_visible()
        assert card.evaluate("e => e.offsetHeight") < 150
    assert page.locator("#status").inner_text() == "21 of 23 images captioned, 2 failed"
    assert not give(page, "paste"), "text goes into the field as ever"

    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.evaluate(
        """() => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(20000001)], "large.jpg"));
          const field = document.getElementById("files");
          field.files = transfer.files;
          field.dispatchEvent(new Event("change"));
        }"""
    )
    wait(page, 24)
    assert page.locator(".note").last.inner_text() == "File exceeds the 20 MB limit"
    assert [url for url in requests if url.endswith("caption")] == []


def test_the_keyboard_is_enough(page: Page, scenes: list[Path]) -> None:
    with page.expect_file_chooser() as chosen:
        page.keyboard.press("Tab")
        sync_api.expect(page.locator("#files")).to_be_focused()
        page.wait_for_timeout(500)  # until the browser passes choosers on to the test
        page.keyboard.press("Enter")
    chosen.value.set_files(scenes[:2])
    wait(page, 2)
    names = []
    for _ in range(30):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate(
                "(document.activeElement.getAttribute('aria-label')"
                " ?? document.activeElement.labels?.[0]?.textContent"
                " ?? document.activeElement.textContent).trim()"
            )
        )
        if names[-1] == f"Remove {scenes[1].name}":
            break
    assert names[:4] == ["Captions per image", "Beam size", "Sample", "Explain"]
    assert {
        "Show numbers",
        "Copy all",
        "Download CSV",
        "Clear",
        f"Copy: {captions(page)[0][0]}",
    } <= set(names)
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".card")).to_have_count(1)
    assert page.evaluate("document.activeElement.ariaLabel") == f"Remove {scenes[0].name}"
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".card")).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "files"


def test_a_busy_server_is_asked_again_and_a_dead_one_is_said(
    captioner: Captioner, scenes: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with browser_page() as (page, _):  # the browser itself complains of both
        with running(captioner) as port:
            page.goto(f"http://127.0.0.1:{port}/")
            monkeypatch.setattr(server, "MAX_WAITING", -1)
            with page.expect_response("**/caption") as response:
                page.set_input_files("#files", scenes[:1])
            assert response.value.status == 503
            monkeypatch.undo()
            wait(page, 1)
            assert captions(page) == direct(captioner, scenes[:1], None, 3)
        page.get_by_label("Captions per image").fill("2")
        note = page.locator(".failed .note")
        sync_api.expect(note).to_contain_text("No answer. The captioner may have been stopped")
        assert page.get_by_role("button", name="Try again").is_visible()
