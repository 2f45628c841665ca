"""The commands: one module each; the scripts beside this package call them.

After ``pip install .`` they are also sub-commands of one program:

    captioner extract | train | finetune | caption | evaluate | report | export
"""

from __future__ import annotations

import importlib

import click

import pipeline

# Name -> what it does; each is the module of that name in this package, and has a script
# (options.SCRIPTS).
COMMANDS = {
    "extract": "Run InceptionV3 once over every image and keep its numbers.",
    "train": "Train the decoder on the numbers.",
    "finetune": "Fine-tune both networks on the images.",
    "caption": "Caption images.",
    "evaluate": "Score captions.",
    "report": "Show a training run as one page.",
    "export": "Write a captioner as ONNX files, to run without PyTorch.",
    "compress": "Write a captioner as one small file.",
}


class LazyGroup(click.Group):
    """A group that imports a command only when it is asked for: none waits for another."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Name the commands, in the order of their use."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import the command of that name."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"pipeline.cli.{name}").main
        return command

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

    Tab completion: put this into ~/.bashrc (for zsh and fish, the same with zsh_source and
    fish_source):

    \b
      eval "$(_CAPTIONER_COMPLETE=bash_source captioner)"
    """
