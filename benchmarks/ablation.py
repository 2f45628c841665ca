"""What each part of the recipe contributes, over several seeds: the tables of docs/ablation.md.

    python benchmarks/ablation.py                              # 12 epochs, seeds 0, 1 and 2
    python benchmarks/ablation.py --epochs 50 --only recipe    # the recipe alone, in full

Trains the recipe of train_decoder.py and its variants with every seed, and scores each model on
val with three beams; then the models of one variant with every search. Runs and scores are kept
in --runs, so the same command resumes after an interruption. On two cores, two trainings in
parallel with one core each finish sooner than one after the other; a GPU needs several (--jobs).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from measure import ROOT, echo

from pipeline.utils.files import atomic_write

# What is trained. Variants and searches are compared with dropout on features, which the recipe had
# until this table showed that captions are better without it.
SEARCHED = "with dropout on features"
VARIANTS = {
    "recipe": "",
    SEARCHED: "--feature-dropout 0.5",
    "that, without the image as initial state": "--feature-dropout 0.5 --no-init-state-from-image",
    "that, without tied embeddings": "--feature-dropout 0.5 --no-tie-embeddings",
    "that, without EMA": "--feature-dropout 0.5 --ema-decay 0",
    "that, without label smoothing": "--feature-dropout 0.5 --label-smoothing 0",
    "without any of these": (
        "--no-init-state-from-image --no-tie-embeddings --ema-decay 0 --label-smoothing 0"
    ),
}
PLAIN = "--beam-size 3 --consensus 0 --matching 0"
SEARCHES = {
    "greedy": "--beam-size 1",
    "3 beams": PLAIN,
    "10 beams": "--beam-size 10 --consensus 0 --matching 0",
    "10 beams, consensus": "--beam-size 10 --matching 0",
    "10 beams, matching": "--beam-size 10 --consensus 0",
    "10 beams, both (the default)": "",
}
ENSEMBLE = "--ensemble"
ENSEMBLES = {
    "all seeds as an ensemble, 3 beams": PLAIN,
    "all seeds as an ensemble, 20 beams, both (the default)": "",
}
SCORES = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "distinct_captions")
TABLE = ROOT / "docs" / "ablation.md"


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--data", type=click.Path(path_type=Path), default="data/flickr8k")
@click.option("--features", type=click.Path(path_type=Path), default="data/features/flickr8k.h5")
@click.option("--runs", type=click.Path(path_type=Path), default="runs/ablation")
@click.option("--epochs", type=click.IntRange(min=1), default=12, help="Epochs of every training.")
@click.option("--precision", default="auto", help="Precision of every training.")
@click.option("--seeds", type=click.IntRange(min=2), default=3, help="Number of seeds, from 0.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, help="Trainings in parallel.")
@click.option(
    "--only",
    type=click.Choice(list(VARIANTS)),
    multiple=True,
    help="Variants to train; all if none.",
)
@click.option("--output", type=click.Path(path_type=Path), default=TABLE, help="File of the table.")
def main(
    data: Path,
    features: Path,
    runs: Path,
    epochs: int,
    precision: str,
    seeds: int,
    jobs: int,
    only: tuple[str, ...],
    output: Path,
) -> None:
    """Train and score the recipe and its variants, and write the tables."""
    variants = {name: VARIANTS[name] for name in only or VARIANTS}
    source = f"--data {data} --features {features}"
    trainings = [
        f"{source} --epochs {epochs} --seed {seed} --run {folder(runs, name, seed)} "
        f"--precision {precision} {options}"
        for name, options in variants.items()
        for seed in range(seeds)
    ]
    searched = [folder(runs, SEARCHED, seed) for seed in range(seeds)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda options: train(options, jobs), trainings))

        def scored(models: Sequence[Sequence[Path]], options: str) -> list[Future[dict[str, Any]]]:
            return [pool.submit(score, each, options, source, jobs) for each in models]

        rows = {
            "Training, scored with 3 beams": {
                name: scored([[folder(runs, name, seed)] for seed in range(seeds)], PLAIN)
                for name in variants
            }
        }
        if SEARCHED in variants:
            alone = {
                name: scored([[run] for run in searched], options)
                for name, options in SEARCHES.items()
            }
            ensembles = {name: scored([searched], options) for name, options in ENSEMBLES.items()}
            rows[f"Search, with the models {SEARCHED}"] = alone | ensembles
        sections = {
            title: {name: [found.result() for found in results] for name, results in row.items()}
            for title, row in rows.items()
        }
    text = report(sections, epochs, seeds)
    with atomic_write(output) as handle:
        handle.write(text)
    click.echo(text)


def folder(runs: Path, name: str, seed: int) -> Path:
    """Return the run folder of a variant and a seed."""
    return runs / f"{name.replace(' ', '-')}-{seed}"


def train(options: str, jobs: int) -> None:
    """Train or resume one model with its share of the cores; skip a finished one."""
    words = options.split()
    run = Path(words[words.index("--run") + 1])
    if (run / "scores.json").is_file():  # written at the end
        return
    echo(f"train_decoder.py {options}")
    run.mkdir(parents=True, exist_ok=True)
    with (run / "output.txt").open("a", encoding="utf-8") as log:
        ended = subprocess.run(
            [sys.executable, str(ROOT / "train_decoder.py"), *words],
            env=share_of_cores(jobs),
            stdout=log,
            stderr=log,
            check=False,
        )
    if ended.returncode:
        raise click.ClickException(f"train_decoder.py failed: see {run / 'output.txt'}")


def share_of_cores(jobs: int) -> dict[str, str]:
    """Return the environment of one of ``jobs`` processes in parallel."""
    return {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}


def score(models: Sequence[Path], options: str, source: str, jobs: int) -> dict[str, Any]:
    """Score a model or an ensemble, or read its scores if they exist."""
    name = options.replace("--", "").replace(" ", "-") or "default"
    if len(models) > 1:
        name += "-ensemble"
    output = models[0] / name / "predictions.json"
    scores = output.with_name("scores.json")
    if not scores.is_file():
        output.parent.mkdir(exist_ok=True)
        words = [*map(str, models), *options.split(), *source.split(), "--output", str(output)]
        if len(models) > 1:
            words.append(ENSEMBLE)
        command = [sys.executable, str(ROOT / "evaluate.py"), *words]
        echo(f"evaluate.py {' '.join(words)}")
        ended = subprocess.run(
            command, env=share_of_cores(jobs), capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise click.ClickException(f"evaluate.py failed: {ended.stderr.strip()}")
    content: dict[str, Any] = json.loads(scores.read_text(encoding="utf-8"))
    return content


def report(
    sections: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]], epochs: int, seeds: int
) -> str:
    """Return the page: mean and deviation over the seeds, and the options of each row."""
    [first, *_] = next(iter(next(iter(sections.values())).values()))
    lines = [
        "# Ablation",
        "",
        f"Made by `python benchmarks/ablation.py --epochs {epochs} --seeds {seeds} --precision "
        f"{first['options']['precision']}`, scored on {first['split']} "
        f"({first['images']:,} images, list hash `{first['split_sha256']}`).",
        "Mean ± standard deviation over the seeds.",
    ]
    for title, rows in sections.items():
        commands = {**VARIANTS, **SEARCHES, **ENSEMBLES}
        program = "train_decoder.py" if title.startswith("Training") else "evaluate.py"
        names = [name for name in SCORES if name in first["scores"]]
        lines += ["", f"## {title}", ""]
        lines += [
            f"| | {program} | " + " | ".join(n.replace("_", " ") for n in names) + " |",
            "|---|---|" + "---:|" * len(names),
        ]
        for row, results in rows.items():
            options = f"`{commands[row]}`" if commands[row] else ""
            if len(results) == 1:
                options = f"`{ENSEMBLE}` {options}".strip()
            cells = [_mean([r["scores"][name] for r in results], name) for name in names]
            lines.append(f"| {row} | {options} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float], name: str) -> str:
    digits = 0 if name.startswith("distinct") else 1
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
