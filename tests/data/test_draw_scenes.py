"""The drawn data set: the same bytes each time, and captions that are true of the images."""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path

import draw_scenes as scenes
import pytest
from click.testing import CliRunner
from PIL import Image


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "captions.csv").open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def words_of(caption: str) -> list[str]:
    return re.findall(r"[a-z]+", caption.lower())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.draw_scenes(folder, 40, 0)
    return folder


def test_same_seed_gives_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    random.seed(123)  # the global generator has no say
    scenes.draw_scenes(tmp_path, 40, 0)
    assert contents(tmp_path) == contents(drawn)


def test_other_seed_gives_other_images_and_captions(drawn: Path, tmp_path: Path) -> None:
    scenes.draw_scenes(tmp_path, 40, 1)
    ours, theirs = contents(tmp_path), contents(drawn)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] != theirs[name] for name in ours)


def test_shorter_run_over_a_longer_one_leaves_nothing_behind(drawn: Path, tmp_path: Path) -> None:
    scenes.draw_scenes(tmp_path, 12, 0)
    scenes.draw_scenes(tmp_path, 10, 0)
    assert len(contents(tmp_path)) == 11
    full = contents(drawn)
    images = {name: data for name, data in contents(tmp_path).items() if name != "captions.csv"}
    assert all(full[name] == data for name, data in images.items())


def test_every_image_has_five_distinct_captions_and_one_split(drawn: Path) -> None:
    rows = read_rows(drawn)
    assert list(rows[0]) == ["image", "caption", "split"]
    by_image: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_image.setdefault(row["image"], []).append(row)
    assert sorted(by_image) == sorted(path.name for path in (drawn / "Images").iterdir())
    for own in by_image.values():
        # Distinct in their words, not only in capitals and full stops.
        assert len({" ".join(words_of(row["caption"])) for row in own}) == len(own) == 5
        assert len({row["split"] for row in own}) == 1
    splits = [own[0]["split"] for own in by_image.values()]
    assert {name: splits.count(name) for name in splits} == {"train": 32, "val": 4, "test": 4}


def test_images_open_at_their_size_and_are_not_blank(drawn: Path) -> None:
    for path in (drawn / "Images").iterdir():
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (320, 240))
            assert max(high - low for low, high in image.getextrema()) > 100


def test_captions_say_what_the_scene_records_and_nothing_else() -> None:
    forms = {
        name: {name, scenes.PLURALS.get(name, name + "s")}
        for kind in scenes.KINDS.values()
        for name in kind.names
    }
    counts = {"two": 2, "three": 3}
    seen = set()
    for index in range(300):
        rng = random.Random(index)
        scene = scenes.compose(rng)
        subject, other = scenes.KINDS[scene.kind], scenes.KINDS.get(scene.other)
        subject_words = set().union(*(forms[name] for name in subject.names))
        other_words = set(other.names) if other else set()
        setting = scenes.SETTINGS[scene.setting]
        place_words = set(words_of(" ".join(setting.places + setting.skies)))
        colours = {scene.colour, scene.other_colour} | place_words
        for caption in scenes.write_captions(scene, rng):
            words = set(words_of(caption))
            assert words & subject_words, caption
            named = words & set().union(*forms.values())
            assert named <= subject_words | other_words | place_words, caption
            assert words & set(scenes.COLOURS) <= colours, caption
            assert {counts[word] for word in words & set(counts)} <= {scene.count}, caption
            sizes = {word for _, names in scenes.SIZES.values() for word in names}
            own = set(scenes.SIZES[scene.size][1]) if scene.size else set()
            assert words & sizes <= own, caption
            assert "sunny" not in words or scene.sunny, caption
            seen |= words
    assert 80 <= len(seen) <= 150
    assert {"red", "two", "three", "left", "under", "front", "running", "holding"} <= seen


def test_subject_is_drawn_in_its_colour_where_the_captions_put_it() -> None:
    scene = scenes.Scene(
        "snow", "man", "stand", "purple", 1, "", "left", False, "ball", "orange", "next"
    )
    image = scenes.draw(scene, random.Random(0))

    def middle_of(colour: str) -> float:
        wanted = scenes.ImageColor.getrgb(scenes.COLOURS[colour])
        pixels = image.load()
        assert pixels is not None
        hits = [x for x in range(320) for y in range(240) if pixels[x, y] == wanted]
        assert len(hits) > 200
        return sum(hits) / len(hits)

    assert middle_of("purple") < 140
    assert middle_of("orange") > 180


def test_every_combination_in_the_tables_can_be_drawn() -> None:
    for name, setting in scenes.SETTINGS.items():
        for subject in setting.subjects.split():
            kind, actions = subject.split(":")
            for action in actions.split(","):
                colour = scenes.KINDS[kind].colours.split()[0]
                assert action in scenes.KINDS[kind].drawings
                scene = scenes.Scene(name, kind, action, colour, 3, "", "right", False)
                scenes.draw(scene, random.Random(0))
        for entry in setting.others.split():
            other, relation = entry.split(":")
            assert relation == "hold" or relation in scenes.RELATIONS
            assert other in scenes.KINDS


def test_command_line(tmp_path: Path) -> None:
    run = CliRunner().invoke(scenes.main, ["--output", str(tmp_path / "out"), "--images", "3"])
    assert run.exit_code == 0, run.output
    assert len(read_rows(tmp_path / "out")) == 15
    assert CliRunner().invoke(scenes.main, ["--images", "0"]).exit_code == 2
    with pytest.raises(ValueError, match="at least 1"):
        scenes.draw_scenes(tmp_path, 0, 0)
