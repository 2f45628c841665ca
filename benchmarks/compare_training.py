"""Stages 2 and 3, and the whole job, against plain loops and one that encodes in every step."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import baselines
import torch
from material import Material, inception_weights
from measure import Comparison, echo, interleave
from torch import Tensor

from pipeline.datasets.encoded_captions import EncodedCaptions, encode_captions
from pipeline.datasets.vocabulary import END_ID, START_ID
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.search import search
from pipeline.features.feature_set import FeatureSet, feature_statistics
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder import load_encoder
from pipeline.training.decoder_stage import DecoderStage, build_decoder
from pipeline.training.joint_stage import JointStage, TrainingImage
from pipeline.training.loop import Training, learning_rate_factor
from pipeline.training.options import DecoderOptions, JointOptions
from pipeline.training.validation import Validator, mean_loss
from pipeline.utils.devices import choose_training_precision, default_workers

CPU = torch.device("cpu")
# The plain network that both sides train, and defaults of train_decoder.py and finetune_joint.py.
BATCH, RATE, DECAY, SMOOTHING, SIZE = 128, 1e-3, 1e-2, 0.1, 512
JOINT_BATCH = 16


@dataclass
class Trained:
    """What decoder training leaves for the comparisons after it.

    Attributes:
        decoder: trained for some epochs.
        val_seconds: the time to caption the val images.
    """

    decoder: Decoder
    val_seconds: float


def compare_decoder_training(material: Material, rounds: int) -> tuple[Comparison, Trained]:
    """Captions per second, the val loss after equal epochs, and the share of val decoding."""
    few = material.train[: 30 * BATCH // 5]
    stage = decoder_stage(material, few, plain_options())
    training = Training(stage, Path())
    plain = baselines.PlainDecoder(len(material.vocabulary), SIZE, SIZE)
    plain.load_state_dict(stage.decoder.state_dict())
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=DECAY)
    data = plain_data(stage)

    def ours() -> int:
        training.train_epoch(1)
        return len(stage.captions)

    def baseline() -> int:
        return baselines.train_epoch(plain, data, plain_optimizer, None, BATCH)

    result = interleave("decoder training", "caption", {"baseline": baseline, "ours": ours}, rounds)
    precision = stage.options.precision
    goal = None if precision == "fp32" else 4.0
    result.compare(f"decoder training, {precision}", "ours", "baseline", goal)

    echo("  decoder training: val loss after equal epochs")
    mine, theirs, decoder = equal_epochs(material, material.train[:1500], epochs=2)
    result.facts["val loss after the same 2 epochs, baseline"] = round(theirs, 4)
    result.facts["val loss after the same 2 epochs, ours"] = round(mine, 4)
    result.facts["val loss, ours relative to baseline, percent"] = round(
        100 * (mine / theirs - 1), 2
    )

    images = torch.arange(len(material.val))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for chunk in images.split(256):
            search(decoder, stage.val_features[chunk], SearchConfig())
        seconds.append(time.perf_counter() - began)
    val_seconds = statistics.median(seconds)
    epoch = sum(map(len, material.train)) / result.median("ours")
    result.facts["val decoding, seconds"] = round(val_seconds, 2)
    result.facts["val decoding, percent of an epoch"] = round(
        100 * val_seconds / (epoch + val_seconds), 1
    )
    return result, Trained(decoder, val_seconds)


def equal_epochs(
    material: Material, captions: list[list[list[str]]], epochs: int
) -> tuple[float, float, Decoder]:
    """Train both for some epochs from the same weights; return both val losses and our decoder."""
    stage = decoder_stage(material, captions, replace(plain_options(), epochs=epochs))
    plain = baselines.PlainDecoder(len(material.vocabulary), SIZE, SIZE)
    plain.load_state_dict(stage.decoder.state_dict())
    steps = epochs * stage.batches_per_epoch(1)
    training = Training(stage, Path())
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        plain_optimizer, lambda step: learning_rate_factor(step, steps)
    )
    data = plain_data(stage)
    for epoch in range(1, epochs + 1):
        training.train_epoch(epoch)
        baselines.train_epoch(plain, data, plain_optimizer, schedule, BATCH)
    losses = []
    other = Decoder(stage.decoder.config)
    other.load_state_dict(plain.state_dict())
    for decoder in (stage.decoder.eval(), other.eval()):
        losses.append(mean_loss(decoder, stage.validator.captions, stage.val_features))
    return losses[0], losses[1], stage.decoder


def default_options() -> DecoderOptions:
    """Return what ``python train_decoder.py`` trains with."""
    return DecoderOptions(data="", features="", precision=choose_training_precision("auto", CPU))


def plain_options(size: int = SIZE, batch: int = BATCH) -> DecoderOptions:
    """Return the options of the plain network: what tutorials train."""
    return replace(
        default_options(),
        epochs=1,
        batch_size=batch,
        embed_size=size,
        hidden_size=size,
        feature_dropout=0.0,
        init_state_from_image=False,
        tie_embeddings=False,
        ema_decay=0.0,
    )


def decoder_stage(
    material: Material, captions: list[list[list[str]]], options: DecoderOptions
) -> DecoderStage:
    """Build stage 2 on made-up features, for the first ``len(captions)`` train images."""
    features = FeatureSet(material.train_cache, torch.arange(len(captions)), 2e9)
    decoder = build_decoder(options, len(material.vocabulary))
    decoder.set_feature_statistics(*feature_statistics(features))
    val = {str(number): group for number, group in enumerate(material.val)}
    return DecoderStage(
        decoder=decoder,
        vocabulary=material.vocabulary,
        encoder=material.train_cache.identity,
        features=features,
        captions=encode_captions(captions, material.vocabulary),
        validator=Validator(val, material.vocabulary),
        val_features=FeatureSet(material.val_cache, torch.arange(len(val)), 2e9),
        options=options,
        device=CPU,
    )


def plain_data(stage: DecoderStage) -> baselines.CaptionedFeatures:
    """Return the same captions and features as a tutorial's Dataset."""
    return baselines.CaptionedFeatures(
        stage.features[torch.arange(len(stage.features))], list_captions(stage.captions)
    )


def list_captions(captions: EncodedCaptions) -> list[tuple[int, list[int]]]:
    """Return image and token ids of every caption."""
    bounds = captions.offsets.tolist()
    return [
        (image, captions.tokens[start:end].tolist())
        for image, (start, end) in zip(
            captions.images.tolist(), itertools.pairwise(bounds), strict=True
        )
    ]


def compare_whole_job(
    material: Material, extraction: Comparison, trained: Trained, rounds: int
) -> Comparison:
    """50 epochs with the network in every step, against extraction once and 50 epochs."""
    paths = sorted(material.images.iterdir())
    texts = [" ".join(words) for group in material.train for words in group]
    numbers = material.vocabulary

    def tokens(text: str) -> list[int]:
        return [START_ID, *numbers.encode(text.lower().split()), END_ID]

    samples = list(zip(itertools.cycle(paths), texts, strict=False))
    model = baselines.OneStepCaptioner(inception_weights(material.weights), len(numbers))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    rates = []
    batches = baselines.one_step_batches(model, baselines.RawCaptions(samples, tokens), optimizer)
    for number in range(3 * rounds + 2):
        began = time.perf_counter()
        rate = next(batches) / (time.perf_counter() - began)
        if number >= 2:  # the first batches wait for the loader to start
            echo(f"  whole job: step with the encoder: {rate:.1f} captions/s")
            rates.append(rate)
    few = material.train[:500]
    small_rates = training_rates(decoder_stage(material, few, plain_options(256, 32)), rounds)
    default_rates = training_rates(decoder_stage(material, few, default_options()), rounds)

    engine = "openvino" if "openvino" in extraction.rates else "torch"
    baseline_hours = 40_455 * 50 / statistics.median(rates) / 3600
    extracting = 8_091 / extraction.median(engine)
    epochs = 50 * (30_000 / statistics.median(default_rates) + trained.val_seconds)
    same_sizes = 40_455 * 50 / statistics.median(small_rates)
    sides = {"ours, defaults": default_rates, "ours, 256/256, batch 32": small_rates}
    result = Comparison("whole job", "caption", {"baseline": rates, **sides})
    result.facts = {
        "encoder in every step, 40,455 captions x 50 epochs, hours": round(baseline_hours, 1),
        f"extraction of 8,091 images ({engine}), minutes": round(extracting / 60, 2),
        "50 epochs with the defaults (30,000 captions, val decoded), minutes": round(
            epochs / 60, 1
        ),
        "speedup, with the defaults": round(baseline_hours * 3600 / (extracting + epochs)),
        "50 epochs, 256/256, batch 32, 40,455 captions, minutes": round(same_sizes / 60, 1),
        "speedup, with 256/256, batch 32, 40,455 captions": round(
            baseline_hours * 3600 / (extracting + same_sizes)
        ),
        "goal of the speedup": 300,
    }
    return result


def training_rates(stage: DecoderStage, rounds: int) -> list[float]:
    """Train some epochs, after one that does not count; return the captions/s of each."""
    training = Training(stage, Path())
    rates = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        training.train_epoch(1)
        rates.append(len(stage.captions) / (time.perf_counter() - began))
        sizes = f"{stage.options.embed_size}/{stage.options.hidden_size}"
        echo(f"  whole job: ours, {sizes}: {rates[number]:.1f} captions/s")
    return rates[1:]


def compare_joint(material: Material, rounds: int) -> Comparison:
    """Stage 3, its blocks and batch, images per second."""
    paths = sorted(material.images.iterdir())[: 3 * JOINT_BATCH]
    groups = material.train[: len(paths)]
    captions = encode_captions(groups, material.vocabulary)
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(len(material.vocabulary)))
    plain_decoder = baselines.PlainDecoder(len(material.vocabulary), SIZE, SIZE)
    plain_decoder.load_state_dict(decoder.state_dict())
    network = baselines.plain_inception(inception_weights(material.weights))
    network.requires_grad_(False)
    learning: list[Tensor] = list(plain_decoder.parameters())
    for name, block in network.named_children():
        if name.startswith("Mixed_7"):
            block.requires_grad_(True)
            learning += list(block.parameters())
    plain_optimizer = torch.optim.AdamW(learning, lr=1e-4)
    by_image: list[list[list[int]]] = [[] for _ in groups]
    for number, tokens in list_captions(captions):
        by_image[number].append(tokens)
    data = baselines.CaptionedImages(paths, by_image)
    stage = JointStage(
        encoder=load_encoder(material.weights),
        decoder=decoder,
        vocabulary=material.vocabulary,
        images=[TrainingImage(path, True) for path in paths],
        captions=captions,
        val_images=[],
        validator=Validator({"none": [["none"]]}, material.vocabulary),
        options=JointOptions(
            start=(),
            data="",
            features="",
            epochs=1,
            batch_size=JOINT_BATCH,
            grad_accum_steps=1,
            encoder_lr=3e-4,
            decoder_lr=1e-4,
            weight_decay=DECAY,
            label_smoothing=SMOOTHING,
            ema_decay=0.0,
            unfreeze_from="Mixed_7a",
            min_crop=0.85,
            precision=choose_training_precision("auto", CPU),
        ),
        workers=default_workers(CPU),
        device=CPU,
    )
    training = Training(stage, Path())

    def ours() -> int:
        training.train_epoch(1)
        return len(paths)

    def baseline() -> int:
        return baselines.joint_epoch(network, plain_decoder, data, plain_optimizer, JOINT_BATCH)

    result = interleave("joint fine-tuning", "image", {"baseline": baseline, "ours": ours}, rounds)
    precision = stage.options.precision
    return result.compare(f"joint fine-tuning from Mixed_7a, {precision}", "ours", "baseline", 2.0)
