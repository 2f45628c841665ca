"""Describe a model, a run or a feature cache from its own contents, without torch.

Files that it refers to are never opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pipeline.cli import options
from pipeline.datasets.vocabulary import SPECIALS
from pipeline.models.pretrained import (
    BEST,
    CARD,
    DOCUMENT,
    LAST,
    LICENCE,
    is_pretrained,
    pretrained_path,
)
from pipeline.utils.errors import UserError
from pipeline.utils.files import HDF5
from pipeline.utils.terminal import echo, escape_control

SHOWN_SCORES = ("CIDEr-D", "BLEU-4", "METEOR", "ROUGE-L", "SPICE")
LONGEST = 2000  # characters of a value
LARGEST_HEADER = 100_000_000  # bytes, the limit of safetensors
Facts = dict[str, str]


@options.command()
@click.argument(
    "path", metavar="[MODEL|RUN|CACHE]", required=False, type=click.Path(path_type=Path)
)
def main(path: Path | None) -> None:
    """Show what a checkpoint, a run folder or a feature cache contains.

    Without an argument: the model that captions by default (runs/joint, else runs/decoder, else
    'pretrained', the model that comes with the program). For 'pretrained' the model card follows.

    \b
    Examples:
      captioner info runs/decoder
      captioner info pretrained
      captioner info data/features/flickr8k.h5
    """
    path = path or options.default_model()
    facts = describe(path)
    width = max(map(len, facts))
    for name, value in facts.items():
        text = escape_control(value)
        text = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
        echo(f"{name:{width}}  {text}")
    if is_pretrained(path):
        card = pretrained_path().with_name(CARD)
        echo("\n" + card.read_text(encoding="utf-8").rstrip())


def describe(path: Path) -> Facts:
    """Return what a file or a run says about itself.

    Raises:
        UserError: it does not exist, or is neither a model nor a feature cache.
    """
    if is_pretrained(path):
        return _describe_model(pretrained_path(), "the pretrained model") | {"licence": LICENCE}
    if path.is_dir():
        return _describe_run(path)
    partial = path.with_name(f"{path.name}.partial")
    path = partial if partial.is_file() and not path.is_file() else path
    if not path.is_file():
        raise UserError(f"{path}: no such model, run or feature cache")
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return _describe_cache(path) if HDF5.match(start) else _describe_model(path, "a checkpoint")


def _describe_cache(path: Path) -> Facts:
    import numpy

    from pipeline.features.cache import DONE, FAILED, FeatureCache

    cache = FeatureCache(path)
    counts = numpy.bincount(cache.status, minlength=3)
    images = f"{counts[DONE]:,} of {len(cache):,} encoded, {counts[FAILED]:,} could not be read"
    return {
        "file": _file(path),
        "kind": f"{'' if cache.complete else 'unfinished '}feature cache",
        "images": f"{images}; from {cache.data}",
        "encoder": _encoder(vars(cache.identity)),
        **({"shards": ", ".join(shard.name for shard in cache.shards)} if cache.shards else {}),
    }


def _describe_run(run: Path) -> Facts:
    path = next((run / name for name in (BEST, LAST) if (run / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{run}: not a run: it has no {BEST}; for a folder of data: train_decoder.py --check "
            f"--data {run}"
        )
    facts = _describe_model(path, f"a run; {path.name} of it")
    for file in sorted(run.glob("*scores*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            scores = f"{_scores(content['scores'])} ({content['split']})"
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            continue  # not a file of evaluate.py
        facts[file.name] = scores
    return facts


def _describe_model(path: Path, kind: str) -> Facts:
    """Describe a checkpoint from its document and the shapes of its tensors."""
    try:
        document, shapes = _header(path)
        sizes, scores = document["decoder_config"], document["scores"]
        groups = {name.partition(".")[0] for name in shapes}
        weights = sum(
            math.prod(shape)
            for name, shape in shapes.items()
            if name.startswith("decoder.") and not name.endswith(("feature_mean", "feature_scale"))
        )
        words = len(document["vocabulary"]) - len(SPECIALS)
        members = int(sizes.get("members", 1))
        ensemble = f"an ensemble of {members} LSTMs" if members > 1 else "an LSTM"
        rerankers = ["image-text matcher"] if "matcher" in groups else []
        if "predictor" in groups:
            rerankers.append(f"predictor of {shapes['predictor.keys'][0]:,} n-grams")
        inside = "in the file" if "encoder" in groups else "not in the file"
        settings = document["settings"].items()
        given = {name: value for name, value in settings if value not in (None, [])}
        return {
            "file": _file(path),
            "kind": kind,
            "encoder": f"{_encoder(document['encoder'])}; {inside}",
            "decoder": f"{ensemble} of {sizes['hidden_size']:,} units, {weights:,} weights",
            "vocabulary": f"{words:,} words ({document['tokenizer']})",
            "reranking": ", ".join(rerankers) or "none",
            "trained": f"{document['epoch']:,} epochs",
            "scores": f"{_scores(scores) or 'none'} (val, in training, without reranking)",
            "settings": ", ".join(f"{name} {value}" for name, value in given.items()) or "none",
            "licence": "that of the images, captions and weights that it was trained with",
        }
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint of this program, or damaged") from error


def _header(path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return a checkpoint's document and the shape of each tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError("not a header of safetensors")
        header = json.loads(file.read(length))
    document = json.loads(header.pop("__metadata__")[DOCUMENT])
    return document, {name: entry["shape"] for name, entry in header.items()}


def _file(path: Path) -> str:
    return f"{path}, {path.stat().st_size / 1e6:,.1f} MB"


def _encoder(identity: Mapping[str, str]) -> str:
    return (
        f"{identity['encoder']}, weights {identity['weights_source']} "
        f"(SHA-256 {identity['weights_sha256'][:12]}), {identity['transform']}, "
        f"{identity['precision']}"
    )


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {scores[name]:.1f}" for name in SHOWN_SCORES if name in scores)
