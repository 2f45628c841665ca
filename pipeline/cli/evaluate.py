"""Score a run on a split: BLEU, ROUGE-L, CIDEr-D, and METEOR and SPICE if they are available."""

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
from pipeline.utils.files import PAGE, PREDICTIONS, SCORES, check_replaceable
from pipeline.utils.terminal import echo

GROUPS = {
    "Output": ("output", "html", "explain", "java"),
    "Data": ("data", "captions", "encoding", "features", "tokenizer"),
    "Machine": ("device",),
}
# Options of caption.py only: here the best caption of a search is scored.
NOT_SCORED = [
    f.name for f in dataclasses.fields(SearchOptions) if f.metadata.get("heading") == CAPTIONS
]


@options.command(GROUPS)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=options.DataPath(),
    help="Folder of the captions.  [default: the training's]",
)
@options.captions
@options.encoding
@options.path(
    "--features",
    "Feature cache of the run's encoder. A run of finetune_joint.py encodes the images "
    "itself if the cache is of another encoder.  [default: the training's]",
)
@click.option(
    "--split",
    type=click.Choice(["val", "test", "train"]),
    default="val",
    help="The split to score. Choose models and options on val; use test once, at the end.",
)
@click.option(
    "--tokenizer",
    type=click.Choice(list(TOKENIZERS)),
    help="The tokenizer of --compare; a run has its own.  [default: that of the scores file "
    "beside the predictions, else english]",
)
@options.from_dataclass(SearchOptions, leave_out=NOT_SCORED)
@options.output(
    "--output",
    "Predictions file; the scores file goes beside it.  [default: RUN/predictions.json; for "
    "another split, search, checkpoint or data a name with the differences, such as "
    "predictions-test-beam-size-5.json]",
    PREDICTIONS,
)
@options.output(
    "--html",
    "Also write a page of the images with their captions, references and CIDEr-D, the worst "
    "first. The page is one file.",
    PAGE,
    metavar="PAGE",
)
@click.option(
    "--explain",
    is_flag=True,
    help="On the page of --html, show which parts of an image speak for each word of its caption; "
    "reads the images.",
)
@click.option(
    "--java/--no-java",
    default=True,
    help="Compute METEOR and SPICE, if Java and pycocoevalcap are installed; METEOR takes some "
    "seconds.",
)
@options.path(
    "--compare",
    "Test whether two predictions files for the same images differ, instead of scoring a run. A "
    "difference with p below 0.05 is unlikely to be chance over the images; variation between "
    "seeds is not included.",
    nargs=2,
    metavar="FIRST SECOND",
)
@click.option(
    "--ensemble",
    is_flag=True,
    help="Score RUNS as one ensemble; they must have the same encoder and recipe, and other seeds. "
    "The files go into the first run's folder, as predictions-ensemble.json.",
)
@options.device
def main(
    runs: tuple[Path, ...],
    compare: tuple[Path, Path] | None,
    ensemble: bool,
    html: Path | None,
    explain: bool,
    device: str,
    data: str | None,
    captions: tuple[Path, ...],
    encoding: str | None,
    features: Path | None,
    split: str,
    tokenizer: str | None,
    output: Path | None,
    java: bool,
    **search: Any,
) -> None:
    """Score the best checkpoint of RUNS (run folders, or checkpoints) on a split.

    \b
    Examples:
      python evaluate.py runs/decoder
      python evaluate.py runs/decoder --split test --beam-size 5
      python evaluate.py runs/decoder --html decoder.html
      python evaluate.py runs/seed-0 runs/seed-1 runs/seed-2
      python evaluate.py --ensemble runs/seed-0 runs/seed-1 runs/seed-2
      python evaluate.py --compare a.json b.json

    Several runs, such as those of several seeds, are scored one by one and summarised by mean and
    deviation.
    """
    search_options = SearchOptions(**search)
    _check(click.get_current_context().params)
    if compare is not None:
        from pipeline.metrics.compare import compare_predictions
        from pipeline.reports.score_table import print_comparison

        data = data or "data/flickr8k"
        differences = compare_predictions(*compare, data, captions, split, tokenizer, encoding)
        print_comparison(differences, *compare)
        return
    from pipeline.evaluation import EvaluationOptions, evaluate_runs, scores_path
    from pipeline.reports.score_table import print_table
    from pipeline.utils.devices import choose_device

    if output is not None:
        check_replaceable(scores_path(output), SCORES)
    evaluation = EvaluationOptions(
        data=data,
        captions=captions,
        encoding=encoding,
        features=features,
        split=split,
        search=search_options,
        output=output,
        java=java,
        page=html,
        explain=explain,
    )
    chosen = choose_device(device)
    groups = [runs] if ensemble else [(run,) for run in runs]
    results = {
        " + ".join(map(str, group)): evaluate_runs(group, chosen, evaluation) for group in groups
    }
    print_table(results)
    if html is not None:
        from pipeline.reports.evaluation_page import write_page

        [(run, result)] = results.items()
        write_page(result, run, html)
        echo(f"page: {html}", err=True)
    for folder in runs:
        if (folder / "report.html").is_file():
            from pipeline.reports.training_report import write_report

            write_report(folder)  # with these scores
    if any(result.unreadable for result in results.values()):
        sys.exit(1)


def _check(given: dict[str, Any]) -> None:
    """Raise UserError for options that contradict each other, before anything is loaded."""
    runs, ensemble, html = given["runs"], given["ensemble"], given["html"]
    compared = given["compare"] is not None
    several = len(runs) > 1 and not ensemble
    if bool(runs) == compared:
        raise UserError("give the runs to score, or --compare with two predictions files")
    if given["output"] is not None and several:
        raise UserError("--output: is for one run; each of several writes into its own folder")
    if given["output"] is not None and compared:
        raise UserError("--output: --compare writes no file")
    if html is not None and (compared or several):
        raise UserError("--html: is for one run, or several with --ensemble")
    if html is None:
        options.refuse_given(["explain"], "is for the page of --html")
    if ensemble and not compared:
        options.check_ensemble(runs, ensemble)
    if compared:
        searched = [field.name for field in dataclasses.fields(SearchOptions)]
        unused = ["ensemble", "features", "java", "device", *searched]
        options.refuse_given(unused, "has no effect with --compare")
    if given["tokenizer"] is not None and not compared:
        raise UserError("--tokenizer: is for --compare; a run is scored with its own")
