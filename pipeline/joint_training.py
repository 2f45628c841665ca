"""Stage 3: train encoder and decoder together, on pictures; what learns is in ``joint_stage``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pipeline.captioner import encoder_of
from pipeline.checkpoint import load_checkpoint, load_together, save_checkpoint
from pipeline.consensus import choose_neighbours, sampled_pictures
from pipeline.dataset import EncodedCaptions, encode_captions, load_table, tokenised
from pipeline.distributed import ALONE, Job
from pipeline.encoder import TRUNK_LAYERS
from pipeline.encoding import encode_together
from pipeline.errors import UserError
from pipeline.images import PictureFile, unreadable_images
from pipeline.joint_stage import JointOptions, JointStage, TrainingPicture
from pipeline.matching import train_matcher
from pipeline.picture_sources import open_source
from pipeline.progress import progress_bar
from pipeline.report import epoch_reporter
from pipeline.report_data import describe_data
from pipeline.run_folder import open_run
from pipeline.terminal import say
from pipeline.tokenizers import ENGLISH
from pipeline.training import Progress, Watcher, train
from pipeline.training_config import Phase, TrainingConfig
from pipeline.validation import Validator
from pipeline.vocabulary import END_ID, UNKNOWN_ID

# A picture whose captions tell sides is never flipped.
SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


def may_flip(captions: Sequence[str]) -> bool:
    """Tell whether a mirrored picture still agrees with its captions."""
    return not any(SIDES.search(caption) for caption in captions)


def refuse_strange_words(captions: EncodedCaptions, source: Path, start: Path) -> None:
    """Say aloud how many words of the training captions the starting run does not know, if many.

    Raises:
        UserError: it does not know most of them, as where the captions are of another language.
    """
    words = captions.tokens[captions.tokens > END_ID]
    share = float((words == UNKNOWN_ID).float().mean())
    if share > 0.5:
        raise UserError(
            f"{source}: {100 * share:.0f} % of its words are unknown to --start {start}, which "
            "learns no new ones here; train a decoder on these captions: train_decoder.py"
        )
    if share > 0.05:
        say(
            f"{100 * share:.0f} % of the captions' words are unknown to {start}, which learns no "
            "new ones",
            err=True,
        )


def finetune_joint(
    options: JointOptions,
    run: Path,
    device: torch.device,
    workers: int,
    force: bool,
    watchers: Sequence[Watcher] = (),
    job: Job = ALONE,
) -> tuple[Progress, Mapping[str, str]]:
    """Fine-tune the runs ``options.start`` in the folder ``run``, or go on with that.

    ``watchers`` and ``job`` are those of ``training.train``.

    Returns:
        The state at the end, and the pictures that could not be read, with reasons.

    Raises:
        UserError: pictures, captions, the starting run or its encoder are missing or do not
            belong together; the run there has other settings.
    """
    if options.unfreeze_from not in TRUNK_LAYERS[:-1]:
        raise UserError(
            f"--unfreeze-from {options.unfreeze_from}: no such block; one of "
            f"{', '.join(TRUNK_LAYERS[:-1])}"
        )
    starts = [Path(start) for start in options.start]
    for path in starts:
        if run.resolve() in (path.resolve(), path.resolve().parent):
            raise UserError(f"--run {run}: is the run that --start names; give another folder")
    source = open_source(options.data)
    captions_file = Path(options.captions) if options.captions else None
    last = run / "last.pt"
    force = job.starts_over(force)
    resumed = job.from_first(lambda: last.is_file() and not force)
    start = job.from_first(lambda: load_together([last] if resumed else starts))
    table, names = load_table(source, captions_file, source.names)
    tokenizer = start.vocabulary.tokenizer.name
    train_captions = tokenised(table.of_split("train"), tokenizer)
    val_captions = tokenised(table.of_split("val"), tokenizer)
    val_pictures = {name: source.picture(names[name]) for name in val_captions}
    broken = find_unreadable([*val_pictures.values()], workers, job)
    val_captions = {n: group for n, group in val_captions.items() if val_pictures[n] not in broken}
    for split, images in (("train", train_captions), ("val", val_captions)):
        if not images:
            raise UserError(f"{table.source}: no picture is in the {split} split")
    weights = None if resumed else options.weights
    encoder = job.one_a_machine_first(lambda: encoder_of(start, weights, "fp32"))
    encoder.source = str(run / "best.pt")
    splits = {f"{split}_images": table.split_hash(split) for split in ("train", "val")}
    open_run(run, {**asdict(options), **splits}, force, job)
    validator = Validator(val_captions, start.vocabulary)
    described = describe_data(
        *(table, source, names, train_captions, val_captions, start.vocabulary, validator.samples)
    )
    raw = {image.name: image.captions for image in table.images}
    english = tokenizer == ENGLISH
    if options.flip and not english:
        say(
            "no picture is flipped: which words say left and right is known for English alone",
            err=True,
        )
    captions = encode_captions(train_captions.values(), start.vocabulary)
    refuse_strange_words(captions, table.source, starts[0])
    stage = JointStage(
        encoder=encoder.to(device),
        decoder=start.build_decoder().to(device),
        vocabulary=start.vocabulary,
        pictures=[
            TrainingPicture(source.picture(names[name]), english and may_flip(raw[name]))
            for name in train_captions
        ],
        captions=captions,
        val_pictures=[val_pictures[name] for name in val_captions],
        validator=validator,
        options=options,
        workers=workers,
        device=device,
        unreadable={str(picture): reason for picture, reason in broken.items()},
        job=job,
    )
    learning = sum(parameter.numel() for parameter in stage.unfrozen.parameters())
    say(
        f"{len(stage.pictures):,} training pictures with {len(stage.captions):,} captions; "
        f"{options.unfreeze_from} and above learn ({learning:,} weights), "
        f"{options.precision} on {device.type}",
        err=True,
    )
    config = TrainingConfig(
        (Phase(options.epochs),),
        options.patience,
        options.seed,
        options.precision,
        accumulate=options.accumulate,
        average=options.average,
    )
    watchers = [*watchers, epoch_reporter(run, described)]
    progress = train(stage, run, config, score_start=True, watchers=watchers, job=job)
    add_second_opinions(stage, run)
    return progress, stage.unreadable


def find_unreadable(
    pictures: Sequence[PictureFile], workers: int, job: Job
) -> dict[PictureFile, str]:
    """Decode every picture once, each process a share, and give the reasons of those that fail."""
    found: dict[PictureFile, str] = {}
    for part in job.collect(unreadable_images(job.share(pictures), workers)):
        found |= part
    return {picture: found[picture] for picture in pictures if picture in found}


def add_second_opinions(stage: JointStage, run: Path) -> None:
    """Give ``best.pt`` of a finished run its neighbours and its matcher (see ``reranking``).

    For that the training pictures are encoded once more, as they are, by the encoder that was
    chosen: of many a sample. The processes of a job share this; rank 0 does the rest.
    """
    best = stage.job.from_first(lambda: load_checkpoint(run))
    if best.matcher is not None:
        return
    kept = sampled_pictures(len(stage.pictures))
    encoder = encoder_of(best, None, stage.options.precision).for_inference().to(stage.device)
    pictures = [stage.pictures[number].picture for number in kept.tolist()]
    mine = -(-len(pictures) // stage.job.size)
    with progress_bar(total=mine, unit="image", desc="encoding train") as bar:
        features, failures = encode_together(
            encoder, pictures, stage.workers, stage.job, torch.float16, bar.update
        )
    stage.unreadable |= {str(pictures[number]): why for number, why in failures.items()}
    if stage.job.rank > 0:
        return
    whole = torch.ones(len(kept), dtype=torch.bool)
    whole[list(failures)] = False
    features, kept = features[whole], kept[whole]
    decoder = best.build_decoder().to(stage.device)
    batches = (part.float() for part in features.split(4096))
    best.neighbours = choose_neighbours(decoder, kept, batches, stage.captions)
    best.matcher = train_matcher(
        features,
        best.neighbours.captions,
        len(stage.vocabulary),
        (decoder.feature_mean, decoder.feature_scale),
        stage.options.seed,
        stage.device,
    )
    save_checkpoint(run / "best.pt", best)
