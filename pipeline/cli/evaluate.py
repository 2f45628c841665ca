"""Score a run on a split: BLEU, ROUGE-L, CIDEr-D, and METEOR and SPICE where they can be had.

The manual is in evaluate.py, the advice in its --help.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options
from pipeline.datasets.tokenizers import TOKENIZERS
from pipeline.decoding.options import CAPTIONS, SearchOptions
from pipeline.utils.errors import UserError
from pipeline.utils.files import check_writable
from pipeline.utils.terminal import echo

GROUPS = {
    "What is written": ("output", "html", "java"),
    "Other data": ("data", "captions", "features", "tokenizer"),
    "Machine": ("device",),
}

# Only the best caption is scored, and it is searched, not drawn.
NOT_SCORED = [
    f.name for f in dataclasses.fields(SearchOptions) if f.metadata.get("heading") == CAPTIONS
]


@options.command(GROUPS)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=options.DataPath(),
    default=None,
    help="Folder with the captions.  [default: that of the training]",
    show_default=False,
)
@options.captions
@click.option(
    "--features",
    type=click.Path(path_type=Path),
    default=None,
    help="Feature cache of the run's encoder. A run of finetune_joint.py encodes the images "
    "itself if this is not its own.  [default: that of the training]",
    show_default=False,
)
@click.option(
    "--split",
    type=click.Choice(["val", "test", "train"]),
    default="val",
    help="Choose models and options on val; look at test once, at the end.",
)
@click.option(
    "--tokenizer",
    type=click.Choice(list(TOKENIZERS)),
    default=None,
    help="For --compare: how the captions are split. A run has its own.  [default: that of the "
    "scores beside the predictions, else english]",
    show_default=False,
)
@options.from_dataclass(SearchOptions, leave_out=NOT_SCORED)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="Predictions file; scores.json goes beside it.  [default: RUN/predictions.json]",
    show_default=False,
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    default=None,
    metavar="PAGE",
    help="Also write a page of the images with their captions, references and CIDEr-D, the worst "
    "first, to see where the model fails. It can be sent alone.",
)
@click.option(
    "--java/--no-java",
    default=True,
    help="METEOR and SPICE, where Java and pycocoevalcap are there; METEOR takes some seconds.",
)
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    default=None,
    metavar="FIRST SECOND",
    help="Test whether two predictions files for the same images differ, instead of scoring a "
    "run. Below a p of 0.05 the difference is unlikely to be the luck of these images; what "
    "another seed gives is not in it.",
)
@click.option(
    "--ensemble",
    is_flag=True,
    help="Score RUNS as one model whose decoders caption together; they must be of one encoder and "
    "recipe, with other seeds. The files go into the first run's folder, as predictions-ensemble.",
)
@options.device
def main(
    runs: tuple[Path, ...],
    data: str | None,
    captions: Path | None,
    features: Path | None,
    split: str,
    tokenizer: str | None,
    output: Path | None,
    html: Path | None,
    java: bool,
    compare: tuple[Path, Path] | None,
    ensemble: bool,
    device: str,
    **search: Any,
) -> None:
    """Score the best epoch of RUNS (run folders, or checkpoints) on a split.

    \b
    Examples:
      python evaluate.py runs/decoder
      python evaluate.py runs/decoder --split test --beam-size 5
      python evaluate.py runs/decoder --html decoder.html
      python evaluate.py runs/seed-0 runs/seed-1 runs/seed-2
      python evaluate.py --ensemble runs/seed-0 runs/seed-1 runs/seed-2
      python evaluate.py --compare a.json b.json

    Several runs, such as the same with several seeds, are scored one by one and summed up by
    mean and deviation.
    """
    wanted_search = SearchOptions(**search)
    if bool(runs) == (compare is not None):
        raise UserError("give the runs to score, or --compare with two predictions files")
    if output is not None and len(runs) > 1 and not ensemble:
        raise UserError("--output is for one run; each of several writes into its own folder")
    if html is not None and (compare is not None or (len(runs) > 1 and not ensemble)):
        raise UserError("--html is for one run, or several --ensemble; write a page for each")
    if html is not None:
        check_writable(html)
    if tokenizer is not None and compare is None:
        raise UserError("--tokenizer is for --compare; a run is scored with its own")
    if compare is not None:
        from pipeline.evaluation import compare_predictions, print_comparison

        data = data or "data/flickr8k"
        differences = compare_predictions(*compare, data, captions, split, tokenizer)
        print_comparison(differences, *compare)
        return
    from pipeline.evaluation import evaluate_runs, print_table
    from pipeline.utils.devices import choose_device

    chosen = choose_device(device)
    groups = [runs] if ensemble else [(run,) for run in runs]
    results = {
        " + ".join(map(str, group)): evaluate_runs(
            group,
            chosen,
            data,
            captions,
            features,
            split,
            wanted_search,
            output,
            java,
            html is not None,
        )
        for group in groups
    }
    print_table(results)
    if html is not None:
        from pipeline.reports.evaluation_page import write_page

        [(run, result)] = results.items()
        write_page(result, run, html)
        echo(f"page: {html}", err=True)
    if any(result.unreadable for result in results.values()):
        sys.exit(1)
