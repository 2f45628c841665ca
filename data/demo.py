"""Caption photographs, and run every stage on drawn scenes: ``make demo``.

    python data/demo.py

First the pretrained model captions ten photographs that come with scikit-image: some show what it
knows, others what it does not. Then the demo draws 400 captioned scenes, extracts their features,
trains a decoder, fine-tunes both networks for two epochs, scores both models, and captions drawings
that neither has seen. Each command is printed before it runs. Nothing is downloaded: features come
from the pretrained model's encoder.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
DECODER = "--epochs 40 --batch-size 64 --lr 2e-3 --embed-size 256 --hidden-size 256 --min-count 2"
JOINT = "--epochs 2 --unfreeze-from Mixed_7a --grad-accum-steps 1 --min-crop 0.9 --encoder-lr 2e-5"
SHOWN = 8
PHOTOS = "data/examples/photos"
PHOTOGRAPHS = (
    *("camera.png", "motorcycle_left.png", "astronaut.png", "brick.png", "grass.png"),
    *("chelsea.png", "coffee.png", "rocket.jpg", "coins.png", "moon.png"),
)
LEARNT = """\
The model was trained on 6,000 photographs of people, dogs, sports and streets (Flickr8k).
It recognises, but invents details:      a man (camera), a motorcycle
It is wrong, as Flickr8k has hardly any: an astronaut, bare bricks, blades of grass, a cat
                                         (chelsea), a cup of coffee, a rocket, coins, the moon"""


@click.command()
def main() -> None:
    """Caption photographs, then run all stages on drawings; a few minutes on two cores."""
    caption_photographs()
    run("data/draw_scenes.py")
    run("extract_features.py --data data/scenes --weights pretrained --force")
    run(f"train_decoder.py --data data/scenes --run runs/demo --force {DECODER}")
    run(f"finetune_joint.py --start runs/demo --run runs/demo-joint --force {JOINT}")
    run("evaluate.py runs/demo --split test --no-java")
    run("evaluate.py runs/demo-joint --split test --no-java --html runs/demo-joint/test.html")
    show_captions()
    echo("Open in a browser: runs/demo/report.html, runs/demo-joint/test.html")


def caption_photographs() -> None:
    """Caption scikit-image's photographs with the pretrained model."""
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        echo(
            "scikit-image is not installed (pip install -e '.[photos]'): no photographs to caption"
        )
        return
    echo(LEARNT)
    folder = ROOT / PHOTOS
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOGRAPHS:
        shutil.copy(Path(package.origin).parent / "data" / name, folder)
    run(f"caption.py --model pretrained {' '.join(f'{PHOTOS}/{name}' for name in PHOTOGRAPHS)}")


def run(command: str) -> None:
    """Print a command and run it in the repository's folder; end with it if it fails."""
    echo(f"$ python {command}")
    ended = subprocess.run([sys.executable, *command.split()], cwd=ROOT, check=False)
    if ended.returncode:
        sys.exit(ended.returncode)


def show_captions() -> None:
    """Caption test images with caption.py and print each beside two references."""
    with (ROOT / "data/scenes/captions.csv").open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    references: dict[str, list[str]] = {}
    for row in rows:
        if row["split"] == "test":
            references.setdefault(row["image"], []).append(row["caption"])
    names = sorted(references)[:SHOWN]
    paths = " ".join(f"data/scenes/Images/{name}" for name in names)
    command = f"caption.py {paths} --model runs/demo-joint --format json"
    echo(f"$ python {command}")
    output = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout
    for record in json.loads(output):
        name = Path(record["image"]).name
        click.echo(f"{record['image']}")
        click.echo(f"    captioner  {record['captions'][0]['caption']}")
        click.echo(f"    reference  {references[name][0]}")
        click.echo(f"               {references[name][1]}")


def echo(line: str) -> None:
    """Print a line in bold, before the output of the commands."""
    click.secho(f"\n{line}", bold=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
