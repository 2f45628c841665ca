"""The commands one after the other, as a user runs them, on drawn and on real images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import click
import pytest
from click.testing import Result
from commands import invoke
from conftest import SHARED
from draw_scenes import draw_scenes

import caption
import evaluate
import extract_features
import finetune_joint
import train_decoder
from pipeline.features.cache import FeatureCache
from pipeline.models.checkpoint import load_checkpoint

FLICKR8K = SHARED / "flickr8k"
STANDIN = SHARED / "weights" / "inception_v3_standin.pth"
has_shared = pytest.mark.shared("flickr8k", "flickr8k_fullres", "weights/inception_v3_standin.pth")


def run(command: click.Command, options: str, code: int = 0) -> Result:
    return invoke(command, *options.split(), code=code)


def learn_by_heart(data: Path, captions: dict[str, str], weights: str, folder: Path) -> None:
    """Train on one caption for each of eight images until caption.py says just these."""
    rows = [(name, text, "train") for name, text in captions.items()]
    spare = sorted(p.name for p in data.iterdir() if p.name not in captions)[0]
    with (data / "captions.csv").open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(
            [("image", "caption", "split"), *rows, (spare, "an image", "val")]
        )
    features = folder / "features.h5"
    run(
        extract_features.main,
        f"--data {data} --output {features} --weights {weights} --device cpu",
    )
    run(
        train_decoder.main,
        f"--data {data} --features {features} --run {folder / 'run'} --epochs 50 "
        "--batch-size 8 --lr 0.02 --embed-size 64 --hidden-size 128 --dropout 0 "
        "--label-smoothing 0 --min-count 1 --device cpu --precision fp32",
    )
    for beam_size in (1, 3):
        result = run(
            caption.main,
            f"{data} --model {folder / 'run' / 'last.safetensors'} --beam-size {beam_size} "
            "--format json --device cpu",
        )
        said = {
            Path(record["image"]).name: record["captions"][0]["caption"]
            for record in json.loads(result.stdout)
        }
        assert {name: said[name] for name in captions} == captions


def test_eight_drawn_images_are_learned_by_heart(tmp_path: Path) -> None:
    draw_scenes(tmp_path / "scenes", images=9, seed=5)
    with (tmp_path / "scenes" / "captions.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    (tmp_path / "scenes" / "captions.csv").unlink()
    captions: dict[str, str] = {}
    for row in rows:
        text = row["caption"].lower().rstrip(" .")
        captions.setdefault(row["image"], text)
    captions.pop(sorted(captions)[-1])
    assert len(captions) == 8
    learn_by_heart(tmp_path / "scenes" / "Images", captions, "random", tmp_path)


@pytest.mark.slow
@has_shared
def test_eight_photographs_are_learned_by_heart(tmp_path: Path) -> None:
    data = tmp_path / "photographs"
    data.mkdir()
    images = sorted((SHARED / "flickr8k_fullres").glob("*.jpg"))[:9]
    for image in images:
        shutil.copy(image, data)
    words = "a red dog sees two tall men near the old stone house by quiet water".split()
    captions = {p.name: " ".join(words[i : i + 4 + i]) for i, p in enumerate(images[:8])}
    learn_by_heart(data, captions, str(STANDIN), tmp_path)


@pytest.mark.slow
@has_shared
def test_flickr8k_subset_through_all_three_stages(tmp_path: Path) -> None:
    """1,200 real images: captions come out better than any fixed sentence, and stage 3
    leaves a model that captions without the data set.
    """
    data = tmp_path / "flickr8k"
    (data / "Images").mkdir(parents=True)
    shutil.copy(FLICKR8K / "captions.txt", data)
    text = FLICKR8K / "Flickr8k_text"
    for name, count in (("trainImages", 1000), ("devImages", 200)):
        for image in (text / f"Flickr_8k.{name}.txt").read_text().split()[:count]:
            shutil.copy(FLICKR8K / "Images" / image, data / "Images")
    features, decoder, joint = tmp_path / "f.h5", tmp_path / "decoder", tmp_path / "joint"
    run(extract_features.main, f"--data {data} --output {features} --weights {STANDIN}")
    assert len(FeatureCache(features)) == 1200
    run(
        train_decoder.main,
        f"--data {data} --features {features} --run {decoder} --epochs 12 --batch-size 64",
    )
    scores = json.loads((decoder / "scores.json").read_text())
    assert scores["images"] == 200 and scores["references"] == 1000
    assert scores["scores"]["CIDEr-D"] > 15, "a constant sentence gets 9"
    run(
        finetune_joint.main,
        f"--start {decoder} --run {joint} --epochs 1 --unfreeze-from Mixed_7b",
    )
    assert load_checkpoint(joint).encoder_weights is not None
    images = [shutil.copy(p, tmp_path) for p in sorted((data / "Images").iterdir())[:3]]
    shutil.rmtree(data)
    result = run(caption.main, f"{' '.join(map(str, images))} --model {joint}")
    assert len(result.stdout.splitlines()) == 3
    assert str(data) in run(evaluate.main, str(joint), code=2).stderr
