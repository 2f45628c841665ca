"""Make the report of a training run again."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli import options


@options.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.path(
    "--data",
    "Folder with the images and captions, where it moved.  [default: that of the training]",
)
def main(runs: tuple[Path, ...], data: Path | None) -> None:
    """Write report.html into RUNS, the folders of training runs: the run at a glance.

    \b
    Examples:
      captioner report runs/decoder
      captioner report runs/*

    Training writes it too, while it goes on and at its end. The page needs nothing beside it and
    loads nothing, so it can be sent to others; it shows some of the data set's images.
    """
    from pipeline.reports.training_report import write_report

    for run in runs:
        write_report(run, data)
