"""How often captions are wrong, by confidence: chooses the threshold of "low confidence".

    python evaluate.py pretrained --html page.html
    python benchmarks/confidence.py page.html

A caption counts as wrong if its CIDEr-D is below 10: hardly a phrase of it is in the references.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import numpy

WRONG = 10.0
RECORD = re.compile(r'<script type="application/json">(.*?)</script>', re.DOTALL)


@click.command()
@click.argument("page", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(page: Path) -> None:
    """Print for each threshold how many captions are below it, and how often these are wrong."""
    records = [json.loads(found) for found in RECORD.findall(page.read_text(encoding="utf-8"))]
    captioned = [record for record in records if record["captions"]]
    confidence = numpy.array([record["captions"][0]["confidence"] for record in captioned])
    wrong = numpy.array([record["score"] for record in captioned]) < WRONG
    click.echo("threshold  below it  wrong below it  wrong above it")
    for threshold in numpy.arange(0.26, 0.46, 0.02):
        low = confidence < threshold
        shares = low.mean(), wrong[low].mean(), wrong[~low].mean()
        click.echo(f"{threshold:9.2f}" + "".join(f"{100 * share:12.0f} %" for share in shares))


if __name__ == "__main__":
    main()
