"""Write small captioned data sets in the layouts that people have, for docs/own-data.md.

    python data/example_layouts.py                             # to data/examples

The images are those of draw_scenes.py. Every folder is a data set of its own:

    csv/      Images/*.jpg, captions.csv                       one table
    coco/     train/*.jpg, val/*.jpg, annotations/*.json       COCO's captions
    text/     *.jpg, *.txt                                     a text beside each image
    german/   Images/*.jpg, captions.csv                       captions in German
    chinese/  Images/*.jpg, captions.csv                       captions in Chinese
    new/      *.jpg                                            other images, without captions
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import click
from draw_scenes import WEAR, Scene, compose, draw_scenes, generator

NEW_PICTURES = 4

# Gender, one, several.
GERMAN_NOUNS = {
    "dog": ("m", "Hund", "Hunde"), "cat": ("f", "Katze", "Katzen"), "bird": ("m", "Vogel", "Vögel"),
    "boat": ("n", "Boot", "Boote"), "car": ("n", "Auto", "Autos"), "fish": ("m", "Fisch", "Fische"),
    "man": ("m", "Mann", "Männer"), "woman": ("f", "Frau", "Frauen"),
    "boy": ("m", "Junge", "Jungen"), "girl": ("n", "Mädchen", "Mädchen"),
}  # fmt: skip
GERMAN_COLOURS = {
    "red": "rot", "blue": "blau", "yellow": "gelb", "green": "grün", "black": "schwarz",
    "white": "weiß", "brown": "braun", "orange": "orangefarben", "pink": "rosafarben",
    "purple": "violett", "gray": "grau",
}  # fmt: skip
GERMAN_VERBS = {  # one does, several do
    "stand": ("steht", "stehen"), "sit": ("sitzt", "sitzen"), "run": ("rennt", "rennen"),
    "jump": ("springt", "springen"), "fly": ("fliegt", "fliegen"),
    "swim": ("schwimmt", "schwimmen"), "sail": ("segelt", "segeln"), "drive": ("fährt", "fahren"),
    "hold": ("hält einen {other}", ""),
}  # fmt: skip
GERMAN_PLACES = {
    "field": "auf der Wiese", "beach": "am Strand", "night": "in der Nacht", "snow": "im Schnee",
    "room": "im Zimmer", "street": "auf der Straße", "lake": "auf dem See", "sea": "im Wasser",
}  # fmt: skip
GERMAN_HELD = {"kite": "Drachen", "balloon": "Luftballon"}

CHINESE_NOUNS = {  # with their measure words
    "dog": "只狗", "cat": "只猫", "bird": "只鸟", "boat": "条船", "car": "辆汽车", "fish": "条鱼",
    "man": "个男人", "woman": "个女人", "boy": "个男孩", "girl": "个女孩",
}  # fmt: skip
CHINESE_COLOURS = {
    "red": "红色", "blue": "蓝色", "yellow": "黄色", "green": "绿色", "black": "黑色",
    "white": "白色", "brown": "棕色", "orange": "橙色", "pink": "粉色", "purple": "紫色",
    "gray": "灰色",
}  # fmt: skip
CHINESE_VERBS = {
    "stand": "站着", "sit": "坐着", "run": "奔跑", "jump": "跳跃", "fly": "飞", "swim": "游泳",
    "sail": "航行", "drive": "行驶", "hold": "拿着一个{other}",
}  # fmt: skip
CHINESE_PLACES = {
    "field": "草地上", "beach": "海滩上", "night": "夜里", "snow": "雪地里", "room": "房间里",
    "street": "街上", "lake": "湖面上", "sea": "水里",
}  # fmt: skip
CHINESE_HELD = {"kite": "风筝", "balloon": "气球"}


def german_captions(scene: Scene) -> list[str]:
    """Return two German captions that are true of ``scene``."""
    gender, one, several = GERMAN_NOUNS[scene.kind]
    place, colour = GERMAN_PLACES[scene.setting], GERMAN_COLOURS[scene.colour]
    verb = GERMAN_VERBS[scene.action][scene.count > 1]
    verb = verb.format(other=GERMAN_HELD.get(scene.other, ""))
    article = {"m": "ein", "f": "eine", "n": "ein"}[gender]
    ending = {"m": "er", "f": "e", "n": "es"}[gender] if scene.count == 1 else "e"
    number = {1: article, 2: "zwei", 3: "drei"}[scene.count]
    noun = one if scene.count == 1 else several
    if scene.kind in WEAR:
        who = f"{number} {noun} in {colour.capitalize()}"
    else:
        who = f"{number} {colour}{ending} {noun}"
    if scene.kind in WEAR and colour.endswith("farben"):
        who = f"{number} {noun} mit {colour}en Kleidern"
    return [f"{who[0].upper()}{who[1:]} {verb} {place}.", f"{place} {verb} {number} {noun}"]


def chinese_captions(scene: Scene) -> list[str]:
    """Return two Chinese captions that are true of ``scene``."""
    measure, noun = CHINESE_NOUNS[scene.kind][0], CHINESE_NOUNS[scene.kind][1:]
    place, colour = CHINESE_PLACES[scene.setting], CHINESE_COLOURS[scene.colour]
    verb = CHINESE_VERBS[scene.action].format(other=CHINESE_HELD.get(scene.other, ""))
    number = {1: "一", 2: "两", 3: "三"}[scene.count]
    described = f"穿着{colour}衣服的{noun}" if scene.kind in WEAR else f"{colour}的{noun}"
    return [f"{number}{measure}{described}在{place}{verb}。", f"{place}有{number}{measure}{noun}"]


def scenes_of(images: int, seed: int) -> list[Scene]:
    """Compose the scenes that ``draw_scenes`` drew with this seed."""
    return [compose(generator(seed, index)) for index in range(images)]


def read_captions(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Read what ``draw_scenes`` wrote: image -> its captions, each with the split."""
    captions: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    with (folder / "captions.csv").open(encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle):
            captions[row["image"]].append((row["caption"], row["split"]))
    return dict(captions)


def write_coco(drawn: Path, folder: Path) -> None:
    """Write a folder of images and a JSON file of captions for each of train and val."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for number, (name, captions) in enumerate(read_captions(drawn).items()):
            if captions[0][1] == split:
                shutil.copy(drawn / "Images" / name, folder / split)
                images.append({"id": number, "file_name": name})
                annotations += [{"image_id": number, "caption": text} for text, _ in captions]
        document = {"images": images, "annotations": annotations}
        target = folder / "annotations" / f"captions_{split}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(document, indent=1), encoding="utf-8")


def write_texts(drawn: Path, folder: Path) -> None:
    """Write a text file beside each image."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, captions in read_captions(drawn).items():
        shutil.copy(drawn / "Images" / name, folder)
        lines = "".join(f"{text}\n" for text, _ in captions)
        (folder / name).with_suffix(".txt").write_text(lines, encoding="utf-8")


def write_translated(
    drawn: Path, folder: Path, scenes: list[Scene], write: Callable[[Scene], list[str]]
) -> None:
    """Write the images with captions in another language, without a split."""
    shutil.copytree(drawn / "Images", folder / "Images", dirs_exist_ok=True)
    rows = [("image", "caption")]
    for name, scene in zip(sorted(read_captions(drawn)), scenes, strict=True):
        rows += [(name, caption) for caption in write(scene)]
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows(rows)


def write_examples(folder: Path, images: int, seed: int) -> None:
    """Write all the data sets below ``folder``."""
    drawn = folder / "csv"
    draw_scenes(drawn, images, seed)
    scenes = scenes_of(images, seed)
    write_coco(drawn, folder / "coco")
    write_texts(drawn, folder / "text")
    write_translated(drawn, folder / "german", scenes, german_captions)
    write_translated(drawn, folder / "chinese", scenes, chinese_captions)
    draw_scenes(folder / "new", NEW_PICTURES, seed + 1)
    for image in (folder / "new" / "Images").iterdir():
        image.replace(folder / "new" / image.name)
    (folder / "new" / "Images").rmdir()
    (folder / "new" / "captions.csv").unlink()


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default="data/examples",
              show_default=True, help="Folder to write.")  # fmt: skip
@click.option("--images", type=click.IntRange(min=20), default=100, show_default=True,
              help="Images in each data set.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other scenes.")
def main(output: Path, images: int, seed: int) -> None:
    """Write the examples; the command's help is the module's first line."""
    write_examples(output, images, seed)
    click.echo(f"csv, coco, text, german, chinese and new are in {output}", err=True)


if __name__ == "__main__":
    main()
