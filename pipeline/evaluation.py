"""Evaluation: captions of a split, their scores, and the files that keep both.

References and predictions go through the same tokenizer; the references never pass through the
vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.captioner import SEARCHED_AT_ONCE
from pipeline.datasets.caption_table import CaptionPaths, CaptionTable, caption_paths
from pipeline.datasets.encoded_captions import load_table, tokenized
from pipeline.datasets.image_sources import ImageSource, open_source
from pipeline.datasets.tar_shards import refuse_elsewhere
from pipeline.datasets.tokenizers import ENGLISH
from pipeline.decoding.captions import Caption, caption_features, explained
from pipeline.decoding.options import SearchOptions, option_words
from pipeline.decoding.reranking import reranker_of
from pipeline.features.cache import DONE, FeatureCache, default_cache_path
from pipeline.features.encode_images import encode_batches, encode_distributed
from pipeline.features.feature_set import rows_of
from pipeline.metrics.bootstrap import RESAMPLES, Interval, PerImage, bootstrap
from pipeline.metrics.coco import Scorer, diversity
from pipeline.metrics.compare import references_of, scores_path
from pipeline.metrics.java import java_metrics
from pipeline.models.checkpoint import Checkpoint, encoder_of, load_ensemble
from pipeline.models.openvino import choose_engine
from pipeline.models.pretrained import PRETRAINED, is_pretrained
from pipeline.utils.devices import choose_precision, default_workers, inference_batch_size
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write
from pipeline.utils.progress import progress_bar
from pipeline.utils.terminal import echo, echo_failure

PREDICTIONS = "predictions.json"
BOOTSTRAP_SEED = 0
# Captions kept per image, for the page; only the best is scored.
KEPT_CAPTIONS = 5
NOT_ENGLISH = "METEOR and SPICE are left out: they are made for English."


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, and where it is written.

    Attributes:
        data, captions, encoding, features: None for those of the training; for other data,
            features are looked for under their default name.
        split: ``train``, ``val`` or ``test``.
        search: how captions are searched.
        output: the predictions file; None for the name of ``predictions_path``.
        java: compute METEOR and SPICE.
        page: the gallery page to write; captions then have details.
        explain: add each image part's contribution to the words of the best captions; this reads
            the images.
    """

    data: str | Path | None = None
    captions: CaptionPaths = None
    encoding: str | None = None
    features: Path | None = None
    split: str = "val"
    search: SearchOptions = field(default_factory=SearchOptions)
    output: Path | None = None
    java: bool = True
    page: Path | None = None
    explain: bool = False


@dataclass(frozen=True)
class ScoredImage:
    """One image of a split.

    Attributes:
        name: its name in the captions file.
        path: where its file was when its features were cached.
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
        left_out: a sentence per score that could not be computed.
        intervals: confidence intervals of BLEU-4 and CIDEr-D, over images.
        facts: how the scores were computed, for the scores file.
        images: the scored images.
        unreadable: the images of the split that could not be read, and why.
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
        source: a description of where the features come from.
        table: the captions of all splits.
        references: tokenised captions by image name.
        paths: image files by image name.
        features: batches (B, 2048), in the order of ``references``.
        unreadable: see ``Evaluation``.
    """

    source: str
    table: CaptionTable
    references: dict[str, list[list[str]]]
    paths: dict[str, Path]
    features: Iterable[Tensor]
    unreadable: dict[Path, str]


def evaluate_runs(
    runs: Sequence[Path], device: torch.device, options: EvaluationOptions
) -> Evaluation:
    """Score a checkpoint, or several as an ensemble, and write predictions and scores.

    Raises:
        UserError: checkpoint, captions or features are missing or do not match; the checkpoint
            names remote data; ``output`` belongs to another evaluation.
    """
    checkpoint = load_ensemble(runs)
    settings = checkpoint.settings if checkpoint.is_own else {}
    data = options.data or settings.get("data")
    if not data:
        raise UserError(
            f"{runs[0]}: is not in the run folder of its training, so its data are unknown; give "
            "--data"
        )
    own_data = str(data) == settings.get("data")
    if own_data:
        unset = [n for n in ("data", "captions", "features") if not getattr(options, n)]
        refuse_elsewhere(settings, unset, runs[0])
    captions, encoding, features = options.captions, options.encoding, options.features
    if not captions and own_data:
        captions, encoding = settings.get("captions"), encoding or settings.get("encoding")
    if features is None:
        known = settings.get("features") if own_data else None
        features = Path(known) if known else default_cache_path(data)
    output = predictions_path(runs, options, settings)
    source = open_source(data)
    split = options.split
    split_data = _open_split(checkpoint, device, source, captions, encoding, features, split)
    result = evaluate(checkpoint, device, split_data, options)
    ids, captioned = split_data.table.image_id, result.predictions.items()
    _write_json(output, [{"image_id": ids(name), "caption": text} for name, text in captioned])
    _write_json(
        scores_path(output),
        {
            "predictions": output.name,
            "page": str(options.page.resolve()) if options.page else None,
            **result.facts,
            "scores": result.scores,
            "intervals_95_percent": {k: [v.low, v.high] for k, v in result.intervals.items()},
            "left_out": result.left_out,
        },
    )
    echo(f"predictions: {output}", err=True)
    return result


def predictions_path(
    runs: Sequence[Path], options: EvaluationOptions, settings: Mapping[str, Any]
) -> Path:
    """Return the predictions file of an evaluation.

    ``predictions.json`` in a run folder is reserved for the run's best checkpoint on its own val
    split with the default search. Any other evaluation's file name lists the differences, such as
    ``predictions-test-beam-size-5.json``; those of the pretrained model go to runs/pretrained.
    Raises UserError if ``options.output`` is the run's own file, and the evaluation is another one.
    """
    first = runs[0]
    if is_pretrained(first):
        folder, best = Path("runs") / PRETRAINED, True
    else:
        folder, best = (first, True) if first.is_dir() else (first.parent, first.stem == "best")
    given = {name: getattr(options, name) for name in ("data", "features")}
    other_data = any(v is not None and str(v) != settings.get(k) for k, v in given.items())
    captions = caption_paths(options.captions)
    other_data |= captions not in ([], caption_paths(settings.get("captions")))
    different = [
        *(["ensemble"] if len(runs) > 1 else []),
        *([] if best else [first.stem]),
        *(["other-data"] if other_data else []),
        *([] if options.split == "val" else [options.split]),
        *option_words(options.search),
    ]
    own = folder / PREDICTIONS
    if options.output is None:
        return folder / ("-".join(["predictions", *different]) + ".json")
    if different and options.output.resolve() == own.resolve():
        raise UserError(
            f"--output {options.output}: is for the run's best checkpoint on val with the default "
            "search; choose another name"
        )
    return options.output


def evaluate(
    checkpoint: Checkpoint,
    device: torch.device,
    split_data: SplitData,
    options: EvaluationOptions,
) -> Evaluation:
    """Caption the images of a split and score the captions; see ``evaluate_runs``."""
    references, vocabulary = split_data.references, checkpoint.vocabulary
    reranker = reranker_of(checkpoint).to(device)
    members = checkpoint.decoder_config.members
    config = options.search.resolve(vocabulary, reranker, members)
    decoder = checkpoint.build_decoder().to(device)

    def captioned() -> Iterator[list[Caption]]:
        for batch in split_data.features:
            yield from caption_features(
                decoder,
                batch.to(device),
                config,
                reranker,
                vocabulary,
                most=KEPT_CAPTIONS,
                details=options.page is not None,
            )

    bar = progress_bar(captioned(), total=len(references), unit="image", desc="captioning")
    captions = dict(zip(references, bar, strict=True))
    predictions = {name: best[0].text for name, best in captions.items()}
    tokens = {name: vocabulary.tokenize(text) for name, text in predictions.items()}
    tokenizer = vocabulary.tokenizer.name
    java_scores: dict[str, float] = {}
    left_out: list[str] = []
    if options.java and tokenizer == ENGLISH:
        java_scores, left_out = java_metrics(references, tokens)
    elif options.java:
        left_out = [NOT_ENGLISH]
    train = tokenized(split_data.table.of_split("train"), tokenizer)
    scorer = Scorer(references)
    scores = {
        **scorer.score(tokens),
        **java_scores,
        **diversity(tokens, (words for group in train.values() for words in group)),
    }
    facts = {
        "split": options.split,
        "split_sha256": split_data.table.split_hash(options.split),
        "images": len(references),
        "references": sum(map(len, references.values())),
        "scorer": f"pipeline.metrics.coco (COCO definitions, {vocabulary.tokenizer.description})",
        "tokenizer": tokenizer,
        "search": asdict(config),
        "epoch": checkpoint.epoch,
        "features": split_data.source,
        "decoders": members,
        "seed": checkpoint.settings.get("seeds", checkpoint.settings.get("seed")),
        "options": checkpoint.settings,
        "bootstrap": {"resamples": RESAMPLES, "seed": BOOTSTRAP_SEED},
    }
    cider, paths = scorer.per_image_cider(tokens), split_data.paths
    images = [
        ScoredImage(i.name, paths[i.name], captions[i.name], i.captions, cider[i.name])
        for i in split_data.table.of_split(options.split)
        if i.name in captions
    ]
    if options.explain:
        _explain(checkpoint, device, images)
    intervals = bootstrap(PerImage(scorer, tokens), BOOTSTRAP_SEED)
    unreadable = split_data.unreadable
    return Evaluation(predictions, scores, left_out, intervals, facts, images, unreadable)


def _explain(checkpoint: Checkpoint, device: torch.device, images: Sequence[ScoredImage]) -> None:
    """Explain the best caption of each image that can be read."""
    encoder = encoder_of(checkpoint, None, choose_precision("auto", device))
    encoder.for_inference().to(device)
    decoder, vocabulary = checkpoint.build_decoder().to(device), checkpoint.vocabulary
    paths = list(enumerate(image.path for image in images))
    size = inference_batch_size(device)
    batches = (paths[start : start + size] for start in range(0, len(paths), size))
    with progress_bar(total=len(images), unit="image", desc="explaining") as bar:
        for batch in encode_batches(encoder, batches, default_workers(device), with_cells=True):
            for key, cells in zip(batch.keys, batch.cells, strict=True):
                best = images[key].captions[0]
                tokens = vocabulary.encode([word.text for word in best.words])
                grid = torch.from_numpy(cells).to(device)
                images[key].captions[0] = explained(decoder, grid, best, tokens)
            bar.update(len(batch.keys) + len(batch.failures))


def _open_split(
    checkpoint: Checkpoint,
    device: torch.device,
    source: ImageSource,
    captions: CaptionPaths,
    encoding: str | None,
    features: Path,
    split: str,
) -> SplitData:
    """Return the features of a split: cached ones if from the model's encoder, else new ones."""
    checkpoint.refuse_other_features()
    tokenizer = checkpoint.vocabulary.tokenizer.name
    has_encoder = checkpoint.encoder_weights is not None
    # Without an encoder in the checkpoint a missing cache is an error, which this raises.
    cache = FeatureCache(features) if features.is_file() or not has_encoder else None
    mismatch = checkpoint.encoder.mismatch(cache.identity) if cache is not None else None
    if cache is not None and mismatch is None:
        table, names = load_table(source, captions, cache.names(DONE), encoding)
        groups = references_of(table, split, tokenizer)
        rows = rows_of(cache, [names[name] for name in groups])
        batches = (torch.from_numpy(cache.read(chunk.numpy())) for chunk in rows.split(256))
        paths = {name: Path(source.origin) / names[name] for name in groups}
        return SplitData(str(features), table, groups, paths, batches, {})
    if not has_encoder:
        raise UserError(
            f"--features {features}: not of the encoder that this run was trained with ({mismatch})"
        )
    table, names = load_table(source, captions, source.names, encoding)
    groups = references_of(table, split, tokenizer)
    images = {name: source.image(names[name]) for name in groups}
    encoder = encoder_of(checkpoint, None, choose_precision("auto", device))
    encoder.for_inference(choose_engine("auto", device, len(images))).to(device)
    with progress_bar(total=len(images), unit="image", desc="encoding") as bar:
        encoded, failures = encode_distributed(
            encoder, [*images.values()], default_workers(device), watch=bar.update
        )
    files = [Path(str(image)) for image in images.values()]
    left_out = {files[row]: why for row, why in failures.items()}
    for path, why in left_out.items():
        echo_failure(str(path), why)
    kept = {name: row for row, name in enumerate(images) if row not in failures}
    return SplitData(
        "the checkpoint's own encoder",
        table,
        {name: groups[name] for name in kept},
        {name: files[row] for name, row in kept.items()},
        encoded[[*kept.values()]].split(SEARCHED_AT_ONCE),
        left_out,
    )


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as handle:
        json.dump(content, handle, ensure_ascii=False, indent=1)
        handle.write("\n")
