"""Which people and colours captions mention, compared with references of the same images.

    python evaluate.py pretrained --output predictions.json
    python benchmarks/biases.py predictions.json

Only words count: an image shows the people that its references mention.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from pipeline.datasets.encoded_captions import load_table
from pipeline.datasets.image_sources import open_source

WORDS = {
    "man or men": "man|men",
    "woman or women": "woman|women",
    "boy": "boys?",
    "girl": "girls?",
    "red": "red",
    "black": "black",
    "blue": "blue",
    "white": "white",
    "shirt": "shirts?",
    "dog": "dogs?",
}
MALE, FEMALE = "man|men|boys?|guys?", "woman|women|girls?|lady|ladies"


def mentions(words: str, text: str) -> bool:
    """True if a text has one of the words, given as a regular expression."""
    return re.search(rf"\b({words})\b", text.lower()) is not None


@click.command()
@click.argument("predictions", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", default="data/flickr8k", show_default=True)
def main(predictions: Path, data: str) -> None:
    """Print the share of captions and of references that mention a word, in percent."""
    captions = {p["image_id"]: p["caption"] for p in json.loads(predictions.read_text("utf-8"))}
    source = open_source(data)
    table, _ = load_table(source, (), source.names)
    references = {i.name: list(i.captions) for i in table.images if i.name in captions}
    written = [text for texts in references.values() for text in texts]
    click.echo("| | captions | references |\n|---|---:|---:|")
    for name, words in WORDS.items():
        shares = [
            100 * sum(mentions(words, text) for text in texts) / len(texts)
            for texts in (captions.values(), written)
        ]
        click.echo(f"| {name} | {shares[0]:.1f} % | {shares[1]:.1f} % |")
    for people, own, other in (("women and girls", FEMALE, MALE), ("men and boys", MALE, FEMALE)):
        images = [
            name
            for name, texts in references.items()
            if any(mentions(own, text) for text in texts)
            and not any(mentions(other, text) for text in texts)
        ]
        found = [sum(mentions(w, captions[name]) for name in images) for w in (FEMALE, MALE)]
        click.echo(
            f"of {len(images)} images whose references mention only {people}: {found[0]} captions "
            f"mention a woman or a girl, {found[1]} a man or a boy"
        )


if __name__ == "__main__":
    main()
