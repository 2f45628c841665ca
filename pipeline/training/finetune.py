"""Stage 3: fine-tune encoder and decoder together on images; the model is in ``joint_stage``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.datasets.encoded_captions import EncodedCaptions, encode_captions, load_table
from pipeline.datasets.image_sources import open_source
from pipeline.datasets.images import ImageRef, unreadable_images
from pipeline.datasets.tokenizers import ENGLISH
from pipeline.datasets.vocabulary import END_ID, UNKNOWN_ID
from pipeline.features.encode_images import encode_distributed
from pipeline.models.checkpoint import encoder_of, load_checkpoint, load_ensemble, save_checkpoint
from pipeline.models.encoder import TRUNK_LAYERS
from pipeline.models.ngram_predictor import fit_predictor, ngram_targets, sampled_images
from pipeline.models.pretrained import BEST, LAST
from pipeline.training.joint_stage import JointStage, TrainingImage
from pipeline.training.loop import Progress, train
from pipeline.training.matcher_training import train_matcher
from pipeline.training.options import JointOptions
from pipeline.training.run_folder import can_resume, open_run, split_hashes
from pipeline.training.stage import EpochCallback
from pipeline.training.validation import Validator, split_captions
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError
from pipeline.utils.progress import progress_bar
from pipeline.utils.terminal import echo

# An image whose captions mention sides is never flipped.
SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)


def settings_to_start_from(run: Path, starts: Sequence[str], force: bool) -> dict[str, Any]:
    """Return the settings of the run to resume or start from.

    A run in progress is self-contained, as the run it started from may be gone. A checkpoint that
    may come from someone else provides no settings.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    path = run / LAST if can_resume(run, force) else Path(starts[0])
    checkpoint = load_checkpoint(path)
    return checkpoint.settings if checkpoint.is_own else {}


def finetune_joint(
    options: JointOptions,
    run: Path,
    device: torch.device,
    workers: int,
    force: bool,
    callbacks: Sequence[EpochCallback] = (),
    world: World = SINGLE_PROCESS,
) -> tuple[Progress, Mapping[str, str]]:
    """Fine-tune the runs ``options.start`` in the folder ``run``, or resume the run there.

    ``workers`` is the number of threads that decode images; for the other arguments see
    ``decoder_stage.train_decoder``.

    Returns:
        The final state, and the images that could not be read, with reasons.

    Raises:
        UserError: images, captions, the starting run or its encoder are missing or do not match;
            the existing run has other settings.
    """
    stage = prepare_stage(options, run, device, workers, force, world)
    progress = train(stage, run, score_start=True, callbacks=callbacks)
    _add_reranking(stage, run)
    return progress, stage.unreadable


def prepare_stage(
    options: JointOptions,
    run: Path,
    device: torch.device,
    workers: int,
    force: bool,
    world: World = SINGLE_PROCESS,
) -> JointStage:
    """Read models, captions and images, and open the run folder; see ``finetune_joint``."""
    starts = _check_options(options, run)
    resumed = world.broadcast(lambda: can_resume(run, force))
    start = world.broadcast(lambda: load_ensemble([run / LAST] if resumed else starts))

    source = open_source(options.data)
    table, names = load_table(source, options.captions, source.names, options.encoding)
    tokenizer = start.vocabulary.tokenizer.name
    train_captions, val_captions = split_captions(table, tokenizer, "image")
    val_images = {name: source.image(names[name]) for name in val_captions}
    unreadable = _find_unreadable([*val_images.values()], workers, world)
    val_images = {name: image for name, image in val_images.items() if str(image) not in unreadable}
    if not val_images:
        raise UserError(f"{table.source}: no image of the val split can be read")
    captions = encode_captions(train_captions.values(), start.vocabulary)
    _refuse_unknown_words(captions, table.source, starts[0])

    weights = None if resumed else options.weights
    encoder = world.local_main_first(lambda: encoder_of(start, weights, "fp32"))
    encoder.source = str(run / BEST)
    open_run(run, {**asdict(options), **split_hashes(table)}, force, world)
    english = tokenizer == ENGLISH
    if options.flip and not english:
        echo("images are not flipped: left and right are recognized in English only", err=True)
    flippable = {image.name: english and may_flip(image.captions) for image in table.images}
    stage = JointStage(
        encoder=encoder.to(device),
        decoder=start.build_decoder().to(device),
        vocabulary=start.vocabulary,
        images=[
            TrainingImage(source.image(names[name]), flippable[name]) for name in train_captions
        ],
        captions=captions,
        val_images=[*val_images.values()],
        validator=Validator({name: val_captions[name] for name in val_images}, start.vocabulary),
        options=options,
        workers=workers,
        device=device,
        unreadable=unreadable,
        world=world,
    )
    trained = sum(parameter.numel() for parameter in stage.unfrozen.parameters())
    echo(
        f"{len(stage.images):,} training images with {len(stage.captions):,} captions; "
        f"{options.unfreeze_from} and above learn ({trained:,} weights), "
        f"{options.precision} on {device.type}",
        err=True,
    )
    return stage


def _check_options(options: JointOptions, run: Path) -> list[Path]:
    """Return what to start from; raise UserError for incompatible options."""
    blocks = TRUNK_LAYERS[:-1]
    if options.unfreeze_from not in blocks:
        raise UserError(
            f"--unfreeze-from {options.unfreeze_from}: no such block; one of {', '.join(blocks)}"
        )
    starts = [Path(start) for start in options.start]
    for path in starts:
        if run.resolve() in (path.resolve(), path.resolve().parent):
            raise UserError(f"--run {run}: is the run that --start names; give another folder")
    return starts


def may_flip(captions: Sequence[str]) -> bool:
    """True if a mirrored image still agrees with its captions."""
    return not any(SIDES.search(caption) for caption in captions)


def _refuse_unknown_words(captions: EncodedCaptions, source: Path, start: Path) -> None:
    """Report many unknown words; raise UserError if most are unknown, as in another language."""
    tokens = captions.tokens[captions.tokens > END_ID]
    share = float((tokens == UNKNOWN_ID).float().mean())
    if share > 0.5:
        raise UserError(
            f"{source}: {100 * share:.0f} % of its words are unknown to --start {start}, whose "
            "vocabulary is fixed; train a decoder on these captions: train_decoder.py"
        )
    if share > 0.05:
        words = f"{100 * share:.0f} % of the captions' words"
        echo(f"{words} are unknown to {start}, whose vocabulary is fixed", err=True)


def _find_unreadable(images: Sequence[ImageRef], workers: int, world: World) -> dict[str, str]:
    """Decode every image once, each process a share; return failed images with reasons."""
    found: dict[ImageRef, str] = {}
    for part in world.all_gather(unreadable_images(world.share(images), workers)):
        found |= part
    return {str(image): found[image] for image in images if image in found}


def _add_reranking(stage: JointStage, run: Path) -> None:
    """Add n-gram predictor and matcher to the best checkpoint of a finished run.

    The fine-tuned encoder first encodes the training images, or a sample of them, without
    augmentation. The processes share this work; rank 0 does the rest.
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
    readable = torch.ones(len(kept), dtype=torch.bool)
    readable[list(failures)] = False
    features, kept = features[readable], kept[readable]
    decoder = best.build_decoder().to(stage.device)
    batches = (part.float() for part in features.split(4096))
    captions = stage.captions.of_images(kept)
    best.predictor = fit_predictor(decoder, batches, ngram_targets(captions))
    best.matcher = train_matcher(features, captions, decoder, stage.options.seed)
    save_checkpoint(run / BEST, best)
