"""Scores as Markdown tables on standard output."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.datasets.tokenizers import ENGLISH
from pipeline.decoding.options import describe_search
from pipeline.evaluation import Evaluation
from pipeline.metrics.bootstrap import Difference
from pipeline.utils.terminal import echo


def print_table(results: Mapping[str, Evaluation]) -> None:
    """Print the scores of runs on one split; for several, a last row has mean and deviation.

    A missing score is shown as a dash.
    """
    facts = next(iter(results.values())).facts
    scored = dict.fromkeys(name for result in results.values() for name in result.scores)
    names = [name for name in scored if name[0].isupper()]
    echo(
        f"{facts['split']}: {facts['images']:,} images ({facts['split_sha256']}), "
        f"{facts['references']:,} references, {_describe(facts)}"
    )
    lead = ["run"] if len(results) > 1 else []
    echo("| " + " | ".join([*lead, *names]) + " |")
    echo("|" + "---|" * len(lead) + "---:|" * len(names))
    for run, result in results.items():
        figures = [f"{result.scores[n]:.1f}" if n in result.scores else "-" for n in names]
        echo("| " + " | ".join([run, *figures] if lead else figures) + " |")
    if lead:
        cells = [_mean([r.scores[n] for r in results.values() if n in r.scores]) for n in names]
        echo("| " + " | ".join(["mean ± deviation", *cells]) + " |")
    for run, result in results.items():
        scores = result.scores
        # The line above the table describes the first run; others may have used another search.
        how = f"{result.facts['split_sha256']}, {_describe(result.facts)}"
        echo(
            (f"{run} ({how}): " if lead else "")
            + f"{scores['distinct_captions']:,} distinct captions, {scores['distinct_words']:,} "
            f"words used, {scores['copied_from_train']:,} captions "
            f"({scores['copied_from_train_percent']:.1f} %) copied from train, "
            f"{scores['mean_length']:.1f} words long on average; over images, 95 %: "
            + ", ".join(f"{k} {v.low:.1f} to {v.high:.1f}" for k, v in result.intervals.items())
        )
    for sentence in dict.fromkeys(s for result in results.values() for s in result.left_out):
        echo(sentence, err=True)


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return "-"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _describe(facts: Mapping[str, Any]) -> str:
    name = facts["tokenizer"]
    return describe_search(facts["search"]) + ("" if name == ENGLISH else f", tokenizer {name}")


def print_comparison(differences: Mapping[str, Difference], first: Path, second: Path) -> None:
    """Print the result of ``compare_predictions`` as a Markdown table on standard output."""
    echo(f"| | {first} | {second} | difference | 95 % over images | p |")
    echo("|---|---:|---:|---:|---:|---:|")
    for name, d in differences.items():
        echo(
            f"| {name} | {d.first:.1f} | {d.second:.1f} | {d.second - d.first:+.1f} | "
            f"{d.interval.low:+.1f} to {d.interval.high:+.1f} | {d.p_value:.4f} |"
        )
