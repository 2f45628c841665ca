"""Write a captioner as one small checkpoint file."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.cli import options
from pipeline.utils.files import SAFETENSORS
from pipeline.utils.terminal import echo


@options.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.ensemble
@options.weights
@options.output("--output", "Checkpoint to write.", SAFETENSORS, default="captioner.safetensors")
def main(runs: tuple[Path, ...], ensemble: bool, weights: str | None, output: Path) -> None:
    """Write RUNS as one small checkpoint with encoder and decoders, which captions by itself.

    RUNS are run folders or checkpoints of stage 2 or 3. The encoder's filters are stored in 8 bits,
    other networks in 16.

    \b
    Examples:
      captioner compress runs/joint --output small.safetensors
      captioner compress --ensemble runs/seed-0 runs/seed-1
    """
    options.check_ensemble(runs, ensemble)
    from pipeline.export.compress import save_compressed

    save_compressed(runs, output, weights)
    echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB", err=True)
