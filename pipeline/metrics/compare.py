"""Comparison of two predictions files for the same images; helpers shared with evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.datasets.caption_collector import normalize_name
from pipeline.datasets.caption_table import (
    CaptionPaths,
    CaptionTable,
    match_names,
    read_captions,
)
from pipeline.datasets.encoded_captions import tokenized
from pipeline.datasets.image_sources import open_source
from pipeline.datasets.tokenizers import ENGLISH, tokenizer_of
from pipeline.metrics.bootstrap import Difference, PerImage, compare
from pipeline.metrics.coco import Scorer
from pipeline.utils.errors import UserError
from pipeline.utils.terminal import echo


def references_of(table: CaptionTable, split: str, tokenizer: str) -> dict[str, list[list[str]]]:
    """Return the tokenised captions of a split by image name.

    Raises:
        UserError: the split is empty.
    """
    references = tokenized(table.of_split(split), tokenizer)
    if not references:
        raise UserError(
            f"--split {split}: no image of that split is here (captions: {table.source})"
        )
    return references


def scores_path(predictions: Path) -> Path:
    """Return the scores file of predictions-NAME.json or NAME.json: scores-NAME.json beside it."""
    name = predictions.name
    if name.startswith("predictions"):
        return predictions.with_name(name.replace("predictions", "scores", 1))
    return predictions.with_name(f"scores-{name}")


def compare_predictions(
    first: Path,
    second: Path,
    data: str | Path,
    captions: CaptionPaths,
    split: str,
    tokenizer: str | None = None,
    encoding: str | None = None,
) -> dict[str, Difference]:
    """Test whether two prediction files for the same images differ.

    Args:
        first, second: in the COCO results format. Images are identified by their ids in the
            data, or by paths, which are matched like those in a captions file.
        data, captions, encoding: where the references are, see ``read_captions``.
        split: the split that the images belong to.
        tokenizer: by default that of the scores files beside the predictions, else ``english``.

    Raises:
        UserError: a file cannot be read, or they do not cover the same images of that split.
    """
    if tokenizer is None:
        found = {name for path in (first, second) if (name := _tokenizer_beside(path))}
        if len(found) > 1:
            raise UserError(
                f"{first} and {second} were scored with different tokenizers; choose one with "
                "--tokenizer"
            )
        tokenizer = found.pop() if found else ENGLISH
    table = read_captions(open_source(data), captions, encoding)
    references = references_of(table, split, tokenizer)
    names = {str(table.image_id(name)): name for name in references}
    tokens = []
    for path in (first, second):
        predictions = _read_predictions(path, tokenizer)
        others = {normalize_name(image): image for image in predictions if image not in names}
        matched, _ = match_names([*others], references)
        ids = names | {others[other]: name for other, name in matched.items()}
        unknown = [image for image in predictions if image not in ids]
        if unknown:
            raise UserError(f"{path}: {unknown[0]!r} is not in the {split} split of {data}")
        tokens.append({ids[image]: words for image, words in predictions.items()})
    if tokens[0].keys() != tokens[1].keys():
        apart = sorted(tokens[0].keys() ^ tokens[1].keys())
        raise UserError(
            f"{first} and {second} are not of the same images ({apart[0]!r} is in one alone)"
        )
    if len(tokens[0]) < len(references):
        echo(f"{len(tokens[0]):,} of {len(references):,} images have predictions", err=True)
    scorer = Scorer({name: references[name] for name in tokens[0]})
    return compare(PerImage(scorer, tokens[0]), PerImage(scorer, tokens[1]))


def _tokenizer_beside(path: Path) -> str | None:
    """Return the tokenizer named in the scores file of a predictions file, if there is one."""
    try:
        name = json.loads(scores_path(path).read_text(encoding="utf-8"))["tokenizer"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _read_predictions(path: Path, tokenizer: str) -> dict[str, list[str]]:
    """Return the tokens of each image's first caption, by the file's id for the image."""
    tokenize = tokenizer_of(tokenizer).tokenize
    tokens: dict[str, list[str]] = {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        for entry in content:
            tokens.setdefault(str(entry["image_id"]), tokenize(entry["caption"]))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a predictions file (a JSON list of image_id and caption)"
        ) from error
    if not tokens:
        raise UserError(f"{path}: no predictions in it")
    if ignored := len(content) - len(tokens):
        echo(f"{path}: only the first caption of an image counts: {ignored:,} ignored", err=True)
    return tokens
