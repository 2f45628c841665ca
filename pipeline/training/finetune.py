"""Stage 3: train encoder and decoder together, on images; what learns is in ``joint_stage``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from pipeline.datasets.encoded_captions import (
    EncodedCaptions,
    encode_captions,
    load_table,
    tokenized,
)
from pipeline.datasets.image_sources import open_source
from pipeline.datasets.images import ImageRefT, unreadable_images
from pipeline.datasets.tokenizers import ENGLISH
from pipeline.datasets.vocabulary import END_ID, UNKNOWN_ID
from pipeline.features.encode_images import encode_distributed
from pipeline.models.checkpoint import encoder_of, load_checkpoint, load_ensemble, save_checkpoint
from pipeline.models.encoder import TRUNK_LAYERS
from pipeline.models.neighbours import choose_neighbours, sampled_images
from pipeline.training.joint_stage import JointOptions, JointStage, TrainingImage
from pipeline.training.loop import Progress, train
from pipeline.training.matcher_training import train_matcher
from pipeline.training.run_folder import open_run
from pipeline.training.stage import EpochCallback, Phase, TrainingConfig
from pipeline.training.validation import Validator
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError
from pipeline.utils.progress import progress_bar
from pipeline.utils.terminal import echo

# An image whose captions tell sides is never flipped.
SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


def may_flip(captions: Sequence[str]) -> bool:
    """Tell whether a mirrored image still agrees with its captions."""
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
        echo(
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
    callbacks: Sequence[EpochCallback] = (),
    world: World = SINGLE_PROCESS,
) -> tuple[Progress, Mapping[str, str]]:
    """Fine-tune the runs ``options.start`` in the folder ``run``, or go on with that.

    ``watchers`` and ``job`` are those of ``training.train``.

    Returns:
        The state at the end, and the images that could not be read, with reasons.

    Raises:
        UserError: images, captions, the starting run or its encoder are missing or do not
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
    force = force and not world.restarted
    resumed = world.broadcast(lambda: last.is_file() and not force)
    start = world.broadcast(lambda: load_ensemble([last] if resumed else starts))
    table, names = load_table(source, captions_file, source.names)
    tokenizer = start.vocabulary.tokenizer.name
    train_captions = tokenized(table.of_split("train"), tokenizer)
    val_captions = tokenized(table.of_split("val"), tokenizer)
    val_images = {name: source.image(names[name]) for name in val_captions}
    broken = find_unreadable([*val_images.values()], workers, world)
    val_captions = {n: group for n, group in val_captions.items() if val_images[n] not in broken}
    for split, images in (("train", train_captions), ("val", val_captions)):
        if not images:
            raise UserError(f"{table.source}: no image is in the {split} split")
    weights = None if resumed else options.weights
    encoder = world.local_main_first(lambda: encoder_of(start, weights, "fp32"))
    encoder.source = str(run / "best.pt")
    splits = {f"{split}_images": table.split_hash(split) for split in ("train", "val")}
    open_run(run, {**asdict(options), **splits}, force, world)
    validator = Validator(val_captions, start.vocabulary)
    raw = {image.name: image.captions for image in table.images}
    english = tokenizer == ENGLISH
    if options.flip and not english:
        echo(
            "no image is flipped: which words say left and right is known for English alone",
            err=True,
        )
    captions = encode_captions(train_captions.values(), start.vocabulary)
    refuse_strange_words(captions, table.source, starts[0])
    stage = JointStage(
        encoder=encoder.to(device),
        decoder=start.build_decoder().to(device),
        vocabulary=start.vocabulary,
        images=[
            TrainingImage(source.image(names[name]), english and may_flip(raw[name]))
            for name in train_captions
        ],
        captions=captions,
        val_images=[val_images[name] for name in val_captions],
        validator=validator,
        options=options,
        workers=workers,
        device=device,
        unreadable={str(photo): reason for photo, reason in broken.items()},
        world=world,
    )
    learning = sum(parameter.numel() for parameter in stage.unfrozen.parameters())
    echo(
        f"{len(stage.images):,} training images with {len(stage.captions):,} captions; "
        f"{options.unfreeze_from} and above learn ({learning:,} weights), "
        f"{options.precision} on {device.type}",
        err=True,
    )
    config = TrainingConfig(
        (Phase(options.epochs),),
        options.patience,
        options.seed,
        options.precision,
        grad_accum_steps=options.grad_accum_steps,
        ema_decay=options.ema_decay,
    )
    progress = train(stage, run, config, score_start=True, callbacks=callbacks, world=world)
    add_second_opinions(stage, run)
    return progress, stage.unreadable


def find_unreadable(
    images: Sequence[ImageRefT], workers: int, world: World
) -> dict[ImageRefT, str]:
    """Decode every image once, each process a share, and give the reasons of those that fail."""
    found: dict[ImageRefT, str] = {}
    for part in world.all_gather(unreadable_images(world.share(images), workers)):
        found |= part
    return {image: found[image] for image in images if image in found}


def add_second_opinions(stage: JointStage, run: Path) -> None:
    """Give ``best.pt`` of a finished run its neighbours and its matcher (see ``reranking``).

    For that the training images are encoded once more, as they are, by the encoder that was
    chosen: of many a sample. The processes of a job share this; rank 0 does the rest.
    """
    best = stage.world.broadcast(lambda: load_checkpoint(run))
    if best.matcher is not None:
        return
    kept = sampled_images(len(stage.images))
    encoder = encoder_of(best, None, stage.options.precision).for_inference().to(stage.device)
    images = [stage.images[number].image for number in kept.tolist()]
    mine = -(-len(images) // stage.world.size)
    with progress_bar(total=mine, unit="image", desc="encoding train") as bar:
        features, failures = encode_distributed(
            encoder, images, stage.workers, stage.world, torch.float16, bar.update
        )
    stage.unreadable |= {str(images[number]): why for number, why in failures.items()}
    if stage.world.rank > 0:
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
