"""A model trained on a few drawn scenes: the fixture of the tests that need a whole run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from commands import invoke
from draw_scenes import draw_scenes

import extract_features
import train_decoder
from pipeline.models.encoder import load_encoder


@dataclass
class DrawnRun:
    """Where the pieces of the run are.

    Attributes:
        data: folder of 30 drawn scenes with captions.csv.
        weights: a trunk-only state dict of an untrained InceptionV3.
        features: the cache.
        run: the run folder.
    """

    data: Path
    weights: Path
    features: Path
    run: Path


def make_drawn_run(folder: Path) -> DrawnRun:
    """Draw, extract and train, with the commands themselves."""
    made = DrawnRun(folder / "scenes", folder / "weights.pth", folder / "scenes.h5", folder / "run")
    draw_scenes(made.data, images=30, seed=0)
    torch.save(load_encoder("random").trunk.state_dict(), made.weights)
    run(
        extract_features.main,
        f"--data {made.data} --output {made.features} --weights {made.weights}",
    )
    run(
        train_decoder.main,
        f"--data {made.data} --features {made.features} --run {made.run} --epochs 12 "
        "--batch-size 16 --embed-size 48 --hidden-size 48 --min-count 2 --lr 0.01",
    )
    return made


def run(command: click.Command, options: str) -> None:
    """Run a command in this process, on the CPU in fp32; it must end well."""
    invoke(command, *options.split(), "--device", "cpu", "--precision", "fp32")
