"""Make the report of a training run again."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli import options


@options.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=options.DataPath(),
    help="Folder, or tar shards, with the images and captions, if they moved.  [default: that of "
    "the training]",
)
def main(runs: tuple[Path, ...], data: str | None) -> None:
    """Write report.html into RUNS, the folders of training runs: curves, scores and captions.

    \b
    Examples:
      captioner report runs/decoder
      captioner report runs/*

    Training writes it too, while it runs and at its end. The page is one file that loads nothing
    else, so it can be sent to others; it shows some of the data set's images.
    """
    from pipeline.reports.training_report import write_report

    for run in runs:
        write_report(run, data)
