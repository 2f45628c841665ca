"""Export a captioner as ONNX files; see docs/export.md."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli import options
from pipeline.utils.terminal import echo


@options.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@options.path("--model", "The same as RUNS, as in caption.py.", multiple=True)
@options.ensemble
@options.weights
@options.path("--output", "Folder to write.", default="captioner-onnx")
@click.option(
    "--beam-size",
    type=click.IntRange(min=1),
    help="Default of the runner's --beam-size. The runner does not rerank; 3 to 5 are enough. "
    "[default: 3]",
)
@click.option("--force", is_flag=True, help="Also write into a folder with other files in it.")
def main(
    runs: tuple[Path, ...],
    model: tuple[Path, ...],
    ensemble: bool,
    weights: str | None,
    output: Path,
    beam_size: int | None,
    force: bool,
) -> None:
    """Export RUNS as ONNX files, with a program that captions without PyTorch.

    RUNS are run folders or checkpoints. By default runs/joint, else runs/decoder, else
    'pretrained', the model that comes with the program.

    \b
    Example:
      captioner export runs/decoder --output captioner-onnx/
      python captioner-onnx/run_captioner.py photo.jpg
    """
    options.check_ensemble([*runs, *model], ensemble)
    from pipeline.export.onnx import export_captioner

    models = [*runs, *model] or [options.default_model()]
    for path in export_captioner(models, output, weights, beam_size, force):
        echo(f"{output / path.name}: {path.stat().st_size / 1e6:.1f} MB", err=True)
