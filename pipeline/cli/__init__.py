"""The commands: one module each, called by the scripts and by the installed ``captioner``.

Imports every room. Start with ``options``, which they share, then ``train``.
"""

from __future__ import annotations

import importlib
from typing import cast

import click

import pipeline

# Name, which is also the module in this package -> first line of the help.
COMMANDS = {
    "extract": "Extract InceptionV3 features into an HDF5 cache.",
    "train": "Train the caption decoder on cached features.",
    "finetune": "Fine-tune encoder and decoder jointly on images.",
    "caption": "Caption images with a trained model.",
    "evaluate": "Score a model: BLEU, ROUGE-L, CIDEr-D, METEOR, SPICE.",
    "report": "Write a training run's report: curves, scores and captions on one page.",
    "info": "Show what a model, a run or a feature cache contains.",
    "export": "Export a model to ONNX, to run without PyTorch.",
    "compress": "Pack models into one small checkpoint.",
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when the command runs."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the commands in the order of their use."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import and return a command."""
        if name not in COMMANDS:
            return None
        return cast(click.Command, importlib.import_module(f"pipeline.cli.{name}").main)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pipeline.__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Train an image captioner in minutes, and caption images.

    \b
    Examples:
      captioner caption photos/
      captioner extract --download
      captioner train --epochs 50
      captioner evaluate runs/decoder

    Tab completion: add this line to ~/.bashrc (for zsh and fish, with zsh_source and
    fish_source):

    \b
      eval "$(_CAPTIONER_COMPLETE=bash_source captioner)"
    """
