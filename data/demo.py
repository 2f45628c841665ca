"""Run every stage on drawn scenes: what ``make demo`` does.

    python data/demo.py

Draws 400 captioned scenes, extracts their features, trains a decoder, fine-tunes both
networks for a moment, scores both models, and captions pictures that neither has seen. Each
command is printed before it runs. Nothing is downloaded: the encoder is InceptionV3 with
ImageNet's weights if torchvision has them on this machine already, and else an untrained
one, whose features are good enough to tell drawings apart, and no more.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
DECODER = "--epochs 40 --batch-size 64 --lr 2e-3 --embed-size 256 --hidden-size 256 --min-count 2"
JOINT = "--epochs 2 --smallest-crop 0.9 --encoder-lr 2e-5 --decoder-lr 3e-4"
SHOWN = 8


@click.command()
def main() -> None:
    """Run all stages on a small drawn data set; takes a few minutes on two cores."""
    weights = "imagenet" if imagenet_is_at_hand() else "random"
    if weights == "random":
        say(
            "ImageNet's weights are not on this machine, so the encoder is an untrained "
            "InceptionV3 (seeded). It does for drawings; photographs need --weights imagenet."
        )
    run("data/draw_scenes.py")
    run(f"extract_features.py --data data/scenes --weights {weights} --force")
    run(f"train_decoder.py --data data/scenes --run runs/demo --force {DECODER}")
    run(f"finetune_joint.py --start runs/demo --run runs/demo-joint --force {JOINT}")
    run("evaluate.py runs/demo --split test --no-java")
    run("evaluate.py runs/demo-joint --split test --no-java")
    show_captions()


def imagenet_is_at_hand() -> bool:
    """Tell whether torchvision has downloaded the ImageNet weights before."""
    import torch
    import torchvision

    url = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.url
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]).is_file()


def run(command: str) -> None:
    """Print a command and run it in the repository's folder; end with it if it fails."""
    say(f"$ python {command}")
    ended = subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=False)
    if ended.returncode:
        sys.exit(ended.returncode)


def show_captions() -> None:
    """Caption test pictures with caption.py and set each beside a person's words."""
    with (ROOT / "data/scenes/captions.csv").open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    references: dict[str, list[str]] = {}
    for row in rows:
        if row["split"] == "test":
            references.setdefault(row["image"], []).append(row["caption"])
    names = sorted(references)[:SHOWN]
    paths = " ".join(f"data/scenes/Images/{name}" for name in names)
    command = f"caption.py {paths} --model runs/demo-joint --format json"
    say(f"$ python {command}")
    output = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout
    for record in json.loads(output):
        name = Path(record["image"]).name
        click.echo(f"{record['image']}")
        click.echo(f"    captioner  {record['captions'][0]['caption']}")
        click.echo(f"    reference  {references[name][0]}")
        click.echo(f"               {references[name][1]}")


def say(line: str) -> None:
    """Print a line that stands out, before what the commands print."""
    click.secho(f"\n{line}", bold=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
