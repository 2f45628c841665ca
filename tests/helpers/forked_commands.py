"""Commands in processes forked from this one, which are there at once: to kill and interrupt them.

Their encoder is of InceptionV3's form, but tiny; all else is as people run it.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from draw_scenes import draw_scenes
from forked import ended, start
from tiny_inception import TinyInception

import caption
import extract_features
import finetune_joint
import pipeline.captioner
import pipeline.models.encoder
import train_decoder
from pipeline.datasets.tokenizers import ENGLISH, tokenizer_of

# What commands import only when they need it, and a process that is forked then has already.
for module in (
    "features.extraction",
    "models.pretrained",
    "outputs.caption_folder",
    "reports.training_report",
    "training.decoder_stage",
    "training.finetune",
    "utils.distributed",
):
    importlib.import_module(f"pipeline.{module}")
tokenizer_of(ENGLISH).tokenize("it's")


@dataclass
class Command:
    """A command, to be run in a folder of its own.

    Attributes:
        main: which one.
        options: its options; ``{world}`` is where the data are.
        output: what it makes in the folder.
    """

    main: click.Command
    options: str
    output: str


COMMANDS = {
    "extract": Command(
        extract_features.main,
        "--data {world}/scenes --weights random --output x.h5 --batch-size 2 --workers 2 "
        "--precision fp32 --engine torch",
        "x.h5",
    ),
    "train": Command(
        train_decoder.main,
        "--data {world}/scenes --features {world}/x.h5 --run run --epochs 3 --batch-size 16 "
        "--embed-size 16 --hidden-size 16 --min-count 1 --lr 0.01 --precision fp32 "
        "--self-critical-epochs 1",
        "run",
    ),
    "finetune": Command(
        finetune_joint.main,
        "--start {world}/run --weights random --run joint --epochs 2 --batch-size 8 --workers 2 "
        "--unfreeze-from Mixed_7c --precision fp32",
        "joint",
    ),
    "caption": Command(
        caption.main,
        "{world}/scenes/Images --model {world}/run --weights random --output x.jsonl --words "
        "--batch-size 1",
        "x.jsonl",
    ),
}


@dataclass
class World:
    """A small data set, and what each command makes when nothing disturbs it.

    Attributes:
        folder: holds the data, and the results of the first two commands, for the others.
        results: by command, its undisturbed folder.
        seconds: by command, how long that took.
    """

    folder: Path
    results: dict[str, Path] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def start(self, name: str, folder: Path, prepare: Callable[[], Any] = lambda: None) -> int:
        """Start a command in a folder; gives the number of its process.

        ``prepare`` is called there first. What the command says is in ``FOLDER.log``.
        """

        def run() -> None:
            pipeline.models.encoder.Inception3 = TinyInception
            pipeline.captioner.SEARCHED_AT_ONCE = 4
            try:
                folder.mkdir(exist_ok=True)
                os.chdir(folder)
                prepare()
            except KeyboardInterrupt:  # on a busy machine it comes before the command has begun
                sys.exit(130)
            command = COMMANDS[name]
            options = command.options.format(world=self.folder).split()
            command.main.main([*options, "--device", "cpu"])

        return start(run, folder.with_suffix(".log"))

    def run(self, name: str, folder: Path) -> None:
        """Run a command to its end, which must be a good one."""
        assert ended(self.start(name, folder)) == 0, said(folder)


def said(folder: Path) -> str:
    return folder.with_suffix(".log").read_text(encoding="utf-8")


def make_world(folder: Path) -> World:
    """Draw scenes and run every command on them."""
    world = World(folder)
    draw_scenes(folder / "scenes", images=20, seed=0)
    for name in COMMANDS:
        world.results[name] = folder / f"{name}-undisturbed"
        began = time.monotonic()
        world.run(name, world.results[name])
        world.seconds[name] = time.monotonic() - began
        if name in ("extract", "train"):
            output = COMMANDS[name].output
            (folder / output).symlink_to(world.results[name] / output)
    return world
