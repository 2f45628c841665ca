"""Score a run on a split: BLEU, ROUGE-L, CIDEr-D, and METEOR and SPICE where they can be had.

    python evaluate.py runs/decoder
    python evaluate.py runs/decoder --split test --beam-size 5
    python evaluate.py runs/joint --output predictions.json

The table goes to standard output; predictions.json (COCO results format) and scores.json
go to the run folder (for test: predictions-test.json). Exit codes: 0 done, 1 some pictures
could not be read and were left out (each is named), 2 the command was wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder with the captions.  [default: that of the training]",
    show_default=False,
)
@click.option(
    "--captions",
    type=click.Path(path_type=Path),
    default=None,
    help="The captions file, where --data holds several.",
)
@click.option(
    "--features",
    type=click.Path(path_type=Path),
    default=None,
    help="Feature cache of the run's encoder. A run of finetune_joint.py encodes the pictures "
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
    "--beam-size",
    type=click.IntRange(min=1),
    default=3,
    help="Hypotheses kept a picture; 1 is greedy. 3 to 5 is best.",
)
@click.option(
    "--length-penalty",
    type=click.FloatRange(min=0),
    default=0.9,
    help="Exponent of the length normalisation: 0 favours short captions, 1 long ones.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    help="Predictions file; scores.json goes beside it.  [default: RUN/predictions.json]",
    show_default=False,
)
@click.option(
    "--java/--no-java",
    default=True,
    help="METEOR and SPICE, where Java and pycocoevalcap are there; METEOR takes some seconds.",
)
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps.")
def main(
    run: Path,
    data: Path | None,
    captions: Path | None,
    features: Path | None,
    split: str,
    beam_size: int,
    length_penalty: float,
    output: Path | None,
    java: bool,
    device: str,
) -> None:
    """Score the best epoch of RUN (a run folder, or a checkpoint) on a split.

    \b
    Examples:
      python evaluate.py runs/decoder
      python evaluate.py runs/decoder --split test --beam-size 5
    """
    from pipeline.devices import choose_device
    from pipeline.evaluation import evaluate_run
    from pipeline.search import SearchConfig

    search = SearchConfig(beam_size=beam_size, length_penalty=length_penalty)
    result = evaluate_run(
        run, choose_device(device), data, captions, features, split, search, output, java
    )
    if result.unreadable:
        sys.exit(1)


if __name__ == "__main__":
    main()
