"""Scores of a run on a split, and the files that keep them.

References and predictions go through the same tokenizer; the references never pass
through the vocabulary, so its rare words count against the model as they should.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.captioner import SEARCHED_AT_ONCE
from pipeline.datasets.caption_table import CaptionTable, read_captions
from pipeline.datasets.encoded_captions import load_table, tokenized
from pipeline.datasets.image_sources import open_source
from pipeline.datasets.images import unreadable_images
from pipeline.datasets.tokenizers import ENGLISH, tokenizer_of
from pipeline.decoding.captions import Caption, captions_of, detailed_captions
from pipeline.decoding.options import SearchOptions, describe_search
from pipeline.decoding.reranking import best_captions, reranker_of
from pipeline.features.cache import DONE, FeatureCache, default_cache_path
from pipeline.features.encode_images import encode_images
from pipeline.features.feature_set import rows_of
from pipeline.metrics.bootstrap import RESAMPLES, Difference, Interval, PerImage, bootstrap, compare
from pipeline.metrics.coco import Scorer, diversity
from pipeline.metrics.java import java_metrics
from pipeline.models.checkpoint import Checkpoint, encoder_of, load_ensemble
from pipeline.models.openvino import choose_engine
from pipeline.models.pretrained import PRETRAINED, is_pretrained
from pipeline.utils.devices import choose_precision, default_workers
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write
from pipeline.utils.progress import progress_bar
from pipeline.utils.terminal import echo, echo_failure

BOOTSTRAP_SEED = 0
# Captions kept an image, for a page of them; the best alone is scored.
KEPT_CAPTIONS = 5
NOT_ENGLISH = "METEOR and SPICE are left out: they are made for English."


@dataclass(frozen=True)
class ScoredImage:
    """One image of a split.

    Attributes:
        name: what the captions file calls it.
        path: where its file was; that features are cached does not tell that it still is, and in
            shards there is none.
        captions: best first.
        references: as people wrote them.
        cider: CIDEr-D of the best caption, in percent.
    """

    name: str
    path: Path
    captions: list[Caption]
    references: tuple[str, ...]
    cider: float


@dataclass
class Evaluation:
    """The result of ``evaluate``.

    Attributes:
        predictions: image name to caption.
        scores: in percent, with the diversity of the captions.
        left_out: a sentence for each score that could not be had.
        intervals: 95 % bootstrap interval over images of BLEU-4 and CIDEr-D.
        facts: what the scores were taken on and how: scorer, split, hash, search, and the
            seed and the options of the training.
        images: what was scored, one by one.
        unreadable: the images of the split that could not be read and were left out, and why.
    """

    predictions: dict[str, str]
    scores: dict[str, float]
    left_out: list[str]
    intervals: dict[str, Interval]
    facts: dict[str, Any]
    images: list[ScoredImage]
    unreadable: dict[Path, str]


@dataclass
class SplitData:
    """The images of a split as a decoder sees them.

    Attributes:
        source: where the features come from, in words.
        table: the captions of all splits.
        references: tokenised captions by image name.
        paths: image files by image name.
        features: batches (B, 2048), in the order of ``references``.
        unreadable: the images of the split that had to be left out, and why.
    """

    source: str
    table: CaptionTable
    references: dict[str, list[list[str]]]
    paths: dict[str, Path]
    features: Iterable[Tensor]
    unreadable: dict[Path, str]


def evaluate_runs(
    runs: Sequence[Path],
    device: torch.device,
    data: str | Path | None = None,
    captions: Path | None = None,
    features: Path | None = None,
    split: str = "val",
    search: SearchOptions | None = None,
    output: Path | None = None,
    java: bool = True,
    words: bool = False,
) -> Evaluation:
    """Score ``best.pt`` of a run, or of several as one model, and write predictions and scores.

    Args:
        runs: run folders, or checkpoints; the decoders of several caption together.
        device: where to decode.
        data, captions, features: by default those of the training; for other data, features
            are looked for under their default name.
        split: ``train``, ``val`` or ``test``.
        search: how captions are searched.
        output: where the predictions go, in the COCO results format; by default
            ``predictions.json`` in the first run's folder (in runs/pretrained for the model that
            comes with the program); the scores go to ``scores.json``
            beside it. The names tell the split if it is not val, and ``-ensemble``.
        java: whether METEOR and SPICE are wanted, which take Java and some seconds.
        words: whether each word's probability is wanted, as on a page.

    Raises:
        UserError: checkpoint, captions or features are missing or do not belong together.
    """
    checkpoint = load_ensemble(runs)
    settings = checkpoint.settings
    data = data or settings.get("data")
    if not data:
        raise UserError(f"{runs[0]}: does not say which data it was trained on; give --data")
    own = str(data) == settings.get("data")
    if captions is None and own and settings.get("captions"):
        captions = Path(settings["captions"])
    if features is None:
        known = settings.get("features") if own else None
        features = Path(known) if known else default_cache_path(data)
    search = search or SearchOptions()
    result = evaluate(checkpoint, device, data, captions, features, split, search, java, words)
    if is_pretrained(runs[0]):
        folder = Path("runs") / PRETRAINED
    else:
        folder = runs[0] if runs[0].is_dir() else runs[0].parent
    suffix = "-ensemble" if len(runs) > 1 and not output else ""
    suffix += "" if split == "val" or output else f"-{split}"
    output = output or folder / f"predictions{suffix}.json"
    _write_json(output, [{"image_id": i, "caption": c} for i, c in result.predictions.items()])
    _write_json(
        output.with_name(f"scores{suffix}.json"),
        {
            **result.facts,
            "scores": result.scores,
            "intervals_95_percent": {k: [v.low, v.high] for k, v in result.intervals.items()},
            "left_out": result.left_out,
        },
    )
    echo(f"predictions: {output}", err=True)
    return result


def evaluate(
    checkpoint: Checkpoint,
    device: torch.device,
    data: str | Path,
    captions: Path | None,
    features: Path,
    split: str,
    search: SearchOptions,
    java: bool,
    words: bool = False,
) -> Evaluation:
    """Caption the images of a split and score the captions; see ``evaluate_runs``."""
    opened = _open_split(checkpoint, device, data, captions, features, split)
    groups = opened.references
    decoder = checkpoint.build_decoder().to(device)
    vocabulary = checkpoint.vocabulary
    reranker = reranker_of(checkpoint).to(device)
    config = search.resolve(vocabulary, reranker, checkpoint.decoder_config.members)

    def captioned_images() -> Iterator[list[Caption]]:
        for batch in opened.features:
            batch = batch.to(device)
            found = [h[:KEPT_CAPTIONS] for h in best_captions(decoder, batch, config, reranker)]
            if words:
                yield from detailed_captions(decoder, batch, found, vocabulary)
            else:
                yield from (captions_of(hypotheses, vocabulary) for hypotheses in found)

    bar = progress_bar(captioned_images(), total=len(groups), unit="image", desc="captioning")
    captioned = dict(zip(groups, bar, strict=True))
    predictions = {name: best[0].text for name, best in captioned.items()}
    tokenizer = vocabulary.tokenizer.name
    tokens = {name: vocabulary.tokenize(text) for name, text in predictions.items()}
    java_scores: dict[str, float] = {}
    left_out: list[str] = []
    if java and tokenizer == ENGLISH:
        java_scores, left_out = java_metrics(groups, tokens)
    elif java:
        left_out = [NOT_ENGLISH]
    train = tokenized(opened.table.of_split("train"), tokenizer)
    scorer = Scorer(groups)
    scores = {
        **scorer.score(tokens),
        **java_scores,
        **diversity(tokens, (words for group in train.values() for words in group)),
    }
    facts = {
        "split": split,
        "split_sha256": opened.table.split_hash(split),
        "images": len(groups),
        "references": sum(map(len, groups.values())),
        "scorer": describe_scorer(tokenizer),
        "tokenizer": tokenizer,
        "search": asdict(config),
        "epoch": checkpoint.epoch,
        "features": opened.source,
        "decoders": checkpoint.decoder_config.members,
        "seed": checkpoint.settings.get("seeds", checkpoint.settings.get("seed")),
        "options": checkpoint.settings,
        "bootstrap": {"resamples": RESAMPLES, "seed": BOOTSTRAP_SEED},
    }
    intervals = bootstrap(PerImage(scorer, tokens), BOOTSTRAP_SEED)
    cider = scorer.per_image_cider(tokens)
    images = [
        ScoredImage(i.name, opened.paths[i.name], captioned[i.name], i.captions, cider[i.name])
        for i in opened.table.of_split(split)
        if i.name in captioned
    ]
    return Evaluation(predictions, scores, left_out, intervals, facts, images, opened.unreadable)


def _open_split(
    checkpoint: Checkpoint,
    device: torch.device,
    data: str | Path,
    captions: Path | None,
    features: Path,
    split: str,
) -> SplitData:
    """Find the features of a split: in the cache if it is the model's encoder's, else anew."""
    checkpoint.refuse_other_features()
    source = open_source(data)
    tokenizer = checkpoint.vocabulary.tokenizer.name
    cache = FeatureCache(features) if features.is_file() else None
    mismatch = checkpoint.encoder.mismatch(cache.identity) if cache is not None else None
    if cache is not None and mismatch is None:
        table, names = load_table(source, captions, cache.names(DONE))
        groups = _groups(table, split, tokenizer)
        rows = rows_of(cache, [names[name] for name in groups])
        batches = (torch.from_numpy(cache.read(chunk.numpy())) for chunk in rows.split(256))
        paths = {name: Path(source.origin) / names[name] for name in groups}
        return SplitData(str(features), table, groups, paths, batches, {})
    if checkpoint.encoder_weights is None and cache is not None:
        raise UserError(
            f"--features {features}: not of the encoder that this run was trained with ({mismatch})"
        )
    if checkpoint.encoder_weights is None:
        FeatureCache(features)  # says that it is missing, and what to do
    table, names = load_table(source, captions, source.names)
    workers = default_workers(device)
    groups = _groups(table, split, tokenizer)
    images = {name: source.image(names[name]) for name in groups}
    broken = unreadable_images([*images.values()], workers)
    for image, reason in broken.items():
        echo_failure(str(image), reason)
    groups = {name: group for name, group in groups.items() if images[name] not in broken}
    encoder = encoder_of(checkpoint, None, choose_precision("auto", device))
    encoder.for_inference(choose_engine("auto", device, len(groups))).to(device)
    kept = [images[name] for name in groups]
    encoded = (torch.from_numpy(b.features) for b in encode_images(encoder, kept, workers))
    joined = _gathered(encoded, SEARCHED_AT_ONCE)
    paths = {name: Path(str(images[name])) for name in groups}
    left_out = {Path(str(image)): reason for image, reason in broken.items()}
    return SplitData("the checkpoint's own encoder", table, groups, paths, joined, left_out)


def _gathered(batches: Iterable[Tensor], least: int) -> Iterator[Tensor]:
    """Join small batches (B, 2048) until there are ``least`` rows."""
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= least:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)


def _groups(table: CaptionTable, split: str, tokenizer: str) -> dict[str, list[list[str]]]:
    groups = tokenized(table.of_split(split), tokenizer)
    if not groups:
        raise UserError(
            f"--split {split}: no image of that split is here (captions: {table.source})"
        )
    return groups


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as handle:
        json.dump(content, handle, ensure_ascii=False, indent=1)
        handle.write("\n")


def print_table(results: Mapping[str, Evaluation]) -> None:
    """Print the scores of runs on one split as a Markdown table on standard output.

    Several runs, such as those of several seeds, get a last row with mean and deviation.
    """
    first = next(iter(results.values()))
    facts = first.facts
    names = [name for name in first.scores if name[0].isupper()]
    echo(
        f"{facts['split']}: {facts['images']:,} images ({facts['split_sha256']}), "
        f"{facts['references']:,} references, {describe_search(facts['search'])}"
        f"{_tokenizer_in_words(facts['tokenizer'])}"
    )
    lead = ["run"] if len(results) > 1 else []
    echo("| " + " | ".join([*lead, *names]) + " |")
    echo("|" + "---|" * len(lead) + "---:|" * len(names))
    for run, result in results.items():
        figures = [f"{result.scores[name]:.1f}" for name in names]
        echo("| " + " | ".join([run, *figures] if lead else figures) + " |")
    if lead:
        columns = [[result.scores[name] for result in results.values()] for name in names]
        means = [f"{statistics.mean(c):.1f} ± {statistics.stdev(c):.1f}" for c in columns]
        echo("| " + " | ".join(["mean ± deviation", *means]) + " |")
    for run, result in results.items():
        scores = result.scores
        # The line above the table is of the first run: another may have been searched otherwise.
        how = f"{result.facts['split_sha256']}, {describe_search(result.facts['search'])}"
        how += _tokenizer_in_words(result.facts["tokenizer"])
        echo(
            (f"{run} ({how}): " if lead else "")
            + f"{scores['distinct_captions']:,} distinct captions, {scores['distinct_words']:,} "
            f"words used, {scores['copied_from_train']:,} captions "
            f"({scores['copied_from_train_percent']:.1f} %) copied from train, "
            f"{scores['mean_length']:.1f} words long on average; over images, 95 %: "
            + ", ".join(f"{k} {v.low:.1f} to {v.high:.1f}" for k, v in result.intervals.items())
        )
    for sentence in first.left_out:
        echo(sentence, err=True)


def describe_scorer(tokenizer: str) -> str:
    """Say how scores came about: what is scored decides as much as the formulas do."""
    return f"pipeline.metrics.coco (COCO definitions, {tokenizer_of(tokenizer).description})"


def _tokenizer_in_words(name: str) -> str:
    return "" if name == ENGLISH else f", tokenizer {name}"


def compare_predictions(
    first: Path,
    second: Path,
    data: str | Path,
    captions: Path | None,
    split: str,
    tokenizer: str | None = None,
) -> dict[str, Difference]:
    """Test whether two prediction files for the same images differ.

    Args:
        first, second: in the COCO results format, as ``evaluate_runs`` writes them.
        data, captions: where the references are.
        split: of which the images are.
        tokenizer: its name; by default what the scores beside the files were taken with, or
            ``english`` where none are.

    Raises:
        UserError: a file cannot be read, or they are not of the same images of that split.
    """
    if tokenizer is None:
        found = {_tokenizer_beside(path) for path in (first, second)} - {None}
        if len(found) > 1:
            raise UserError(
                f"{first} and {second} were scored with different tokenizers; choose one with "
                "--tokenizer"
            )
        tokenizer = found.pop() or ENGLISH if found else ENGLISH
    tokens = [_read_predictions(path, tokenizer) for path in (first, second)]
    if tokens[0].keys() != tokens[1].keys():
        apart = sorted(tokens[0].keys() ^ tokens[1].keys())
        raise UserError(
            f"{first} and {second} are not of the same images ({apart[0]!r} is in one alone)"
        )
    groups = _groups(read_captions(open_source(data).captioned, captions), split, tokenizer)
    strangers = sorted(tokens[0].keys() - groups.keys())
    if strangers:
        raise UserError(f"{first}: {strangers[0]!r} is not in the {split} split of {data}")
    if len(tokens[0]) < len(groups):
        echo(f"{len(tokens[0]):,} of {len(groups):,} images have predictions", err=True)
    scorer = Scorer({name: groups[name] for name in tokens[0]})
    return compare(PerImage(scorer, tokens[0]), PerImage(scorer, tokens[1]))


def _tokenizer_beside(path: Path) -> str | None:
    """Find the tokenizer in the scores that ``evaluate_runs`` wrote with a predictions file."""
    beside = [path.with_name("scores.json")]
    if path.name.startswith("predictions"):
        beside = [path.with_name(path.name.replace("predictions", "scores", 1)), *beside]
    for scores in beside:
        try:
            name = json.loads(scores.read_text(encoding="utf-8"))["tokenizer"]
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            continue
        return name if isinstance(name, str) else None
    return None


def _read_predictions(path: Path, tokenizer: str) -> dict[str, list[str]]:
    tokenize = tokenizer_of(tokenizer).tokenize
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tokens = {str(entry["image_id"]): tokenize(entry["caption"]) for entry in content}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a predictions file (a JSON list of image_id and caption)"
        ) from error
    if not tokens:
        raise UserError(f"{path}: no predictions in it")
    return tokens


def print_comparison(differences: Mapping[str, Difference], first: Path, second: Path) -> None:
    """Print the result of ``compare_predictions`` as a Markdown table on standard output."""
    echo(f"| | {first} | {second} | difference | 95 % over images | p |")
    echo("|---|---:|---:|---:|---:|---:|")
    for name, d in differences.items():
        echo(
            f"| {name} | {d.first:.1f} | {d.second:.1f} | {d.second - d.first:+.1f} | "
            f"{d.interval.low:+.1f} to {d.interval.high:+.1f} | {d.p_value:.4f} |"
        )
