"""The comparisons: each stage against what people do today, on the same work in turn."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import baselines
import numpy
import torch
from material import Material, inception_weights
from measure import ROOT, Comparison, interleave, run_command, say
from torch import Tensor

from pipeline.captioner import Captioner
from pipeline.checkpoint import Checkpoint, save_checkpoint
from pipeline.dataset import (
    EncodedCaptions,
    PictureFeatures,
    encode_captions,
    feature_statistics,
)
from pipeline.decoder import Decoder, DecoderConfig
from pipeline.decoder_training import DecoderOptions, DecoderStage
from pipeline.devices import (
    choose_precision,
    choose_training_precision,
    default_workers,
    inference_batch_size,
    threads_per_worker,
)
from pipeline.encoder import Encoder, load_encoder
from pipeline.extraction import extract
from pipeline.features import EncoderIdentity
from pipeline.images import find_images, prefetch, read_square
from pipeline.joint_training import JointOptions, JointStage, Picture
from pipeline.openvino_engine import choose_engine
from pipeline.search import SearchConfig, search
from pipeline.training import (
    TrainingConfig,
    learning_rate_factor,
    make_optimizer,
    train_epoch,
)
from pipeline.validation import Validator, mean_loss
from pipeline.vocabulary import END_ID, START_ID

CPU = torch.device("cpu")
# The defaults of train_decoder.py and finetune_joint.py.
BATCH, RATE, DECAY, SMOOTHING, SIZE = 128, 1e-3, 1e-2, 0.1, 512
JOINT_BATCH = 16


def compare_extraction(material: Material, folder: Path, rounds: int) -> Comparison:
    """JPEG files to a finished cache; and how near the network alone and decoding alone are."""
    weights = inception_weights(material.weights)
    network = baselines.plain_inception(weights)
    names = find_images(material.pictures)
    paths = [material.pictures / name for name in names]
    precision = choose_precision("auto", CPU)
    workers, batch = default_workers(CPU), inference_batch_size(CPU)
    squares = [read_square(path) for path in paths[:40]]
    found: dict[str, numpy.ndarray] = {}

    def baseline() -> int:
        found["baseline"] = baselines.extract(network, paths, folder / "baseline.h5")
        return len(paths)

    sides: dict[str, Callable[[], int]] = {"baseline": baseline}
    engines = ["torch"]
    if choose_engine("auto", CPU) == "openvino":
        engines.append("openvino")
    for engine in engines:
        ready = load_encoder(material.weights, precision).for_inference(engine)

        def ours(engine: str = engine, ready: Encoder = ready) -> int:
            output = folder / f"{engine}.h5"
            result = extract(
                *(material.pictures, names, output, ReadyEncoder(ready)),  # type: ignore[arg-type]
                *(batch, workers, engine),
                force=True,
            )
            found[engine] = result.cache.read(result.cache.rows(names))
            return len(names)

        def network_alone(ready: Encoder = ready) -> int:
            groups = [squares[start : start + batch] for start in range(0, len(squares), batch)]
            run_side_by_side(ready.encode, groups, workers)
            return len(squares)

        sides[engine] = ours
        sides[f"{engine}, network alone"] = network_alone

    def decoding_alone() -> int:
        run_side_by_side(read_square, paths, workers)
        return len(paths)

    sides["decoding alone"] = decoding_alone
    result = interleave("extraction", "image", sides, rounds)
    for engine in engines:
        alone, decoding = result.rates[f"{engine}, network alone"], result.rates["decoding alone"]
        ceiling = [1 / (1 / a + 1 / d) for a, d in zip(alone, decoding, strict=True)]
        result.rates[f"{engine}, ceiling"] = ceiling
        goal = {"fp32": 2.0}.get(precision, 5.0 if engine == "torch" else 10.0)
        result.compare(f"extraction, {engine} {precision}", engine, "baseline", goal)
        result.compare(
            f"of what network and decoding allow together, {engine}",
            engine,
            f"{engine}, ceiling",
            0.85,
        )
        reference, features = found["baseline"], found[engine]
        norms = numpy.linalg.norm(reference, axis=1) * numpy.linalg.norm(features, axis=1)
        cosines = (reference * features).sum(axis=1) / norms
        result.facts[f"lowest cosine to the baseline's features, {engine}"] = round(
            float(cosines.min()), 6
        )
    return result


class ReadyEncoder:
    """An encoder that is folded and compiled already, so that no round pays for it."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.engine = encoder.engine
        self.encode = encoder.encode

    @property
    def identity(self) -> EncoderIdentity:
        """Give that of the encoder."""
        return self.encoder.identity

    def for_inference(self, engine: str) -> ReadyEncoder:
        """Do nothing: it is ready."""
        return self


def run_side_by_side(function: Callable, items: list, workers: int) -> None:
    """Call a function on every item, on the threads that extraction has."""
    with threads_per_worker(workers) as share:
        for _ in prefetch(
            function, items, workers, workers, start=lambda: torch.set_num_threads(share)
        ):
            pass


@dataclass
class Trained:
    """What decoder training leaves for the comparisons after it.

    Attributes:
        decoder: trained for some epochs.
        captions_per_second: the median rate of training.
        val_seconds: to decode the val pictures.
    """

    decoder: Decoder
    captions_per_second: float
    val_seconds: float


def decoder_stage(
    material: Material, captions: list[list[list[str]]], size: int = SIZE, batch: int = BATCH
) -> DecoderStage:
    """Build stage 2 on made-up features, for the first ``len(captions)`` train pictures."""
    torch.manual_seed(0)
    features = PictureFeatures(material.train_cache, torch.arange(len(captions)), 2e9)
    decoder = Decoder(DecoderConfig(len(material.vocabulary), size, size))
    decoder.standardise_by(*feature_statistics(features))
    val = {str(number): group for number, group in enumerate(material.val)}
    options = DecoderOptions(
        data="",
        captions=None,
        features="",
        epochs=1,
        batch_size=batch,
        lr=RATE,
        weight_decay=DECAY,
        label_smoothing=SMOOTHING,
        embed_size=size,
        hidden_size=size,
        dropout=0.5,
        min_count=5,
        patience=0,
        seed=0,
        precision=choose_training_precision("auto", CPU),
    )
    return DecoderStage(
        decoder=decoder,
        vocabulary=material.vocabulary,
        encoder=material.train_cache.identity,
        features=features,
        captions=encode_captions(captions, material.vocabulary),
        validator=Validator(val, material.vocabulary),
        val_features=PictureFeatures(material.val_cache, torch.arange(len(val)), 2e9),
        options=options,
        device=CPU,
    )


def plain_data(stage: DecoderStage) -> baselines.CaptionedFeatures:
    """Give the same captions and features as a tutorial's Dataset."""
    return baselines.CaptionedFeatures(
        stage.features[torch.arange(len(stage.features))], list_captions(stage.captions)
    )


def list_captions(captions: EncodedCaptions) -> list[tuple[int, list[int]]]:
    """Give picture and token ids of every caption."""
    bounds = captions.offsets.tolist()
    return [
        (picture, captions.tokens[start:end].tolist())
        for picture, (start, end) in zip(
            captions.pictures.tolist(), itertools.pairwise(bounds), strict=True
        )
    ]


def compare_decoder_training(material: Material, rounds: int) -> tuple[Comparison, Trained]:
    """Captions a second, the val loss after equal epochs, and the share of val decoding."""
    few = material.train[: 30 * BATCH // 5]
    stage = decoder_stage(material, few)
    optimizer = make_optimizer(stage)
    plain = baselines.PlainDecoder(len(material.vocabulary), SIZE, SIZE)
    plain.load_state_dict(stage.decoder.state_dict())
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=DECAY)
    data = plain_data(stage)
    config = TrainingConfig(1, 0, 0, stage.options.precision)

    def ours() -> int:
        train_epoch(stage, optimizer, config, 1)
        return len(stage.captions)

    def baseline() -> int:
        return baselines.train_epoch(plain, data, plain_optimizer, None, BATCH)

    result = interleave("decoder training", "caption", {"baseline": baseline, "ours": ours}, rounds)
    precision = stage.options.precision
    goal = None if precision == "fp32" else 4.0
    result.compare(f"decoder training, {precision}", "ours", "baseline", goal)

    say("  decoder training: val loss after equal epochs")
    mine, theirs, decoder = equal_epochs(material, material.train[:1500], epochs=2)
    result.facts["val loss after 2 equal epochs, baseline"] = round(theirs, 4)
    result.facts["val loss after 2 equal epochs, ours"] = round(mine, 4)
    result.facts["val loss, ours against baseline, percent"] = round(100 * (mine / theirs - 1), 2)

    pictures = torch.arange(len(material.val))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for chunk in pictures.split(256):
            search(decoder, stage.val_features[chunk], SearchConfig())
        seconds.append(time.perf_counter() - began)
    val_seconds = statistics.median(seconds)
    epoch = sum(map(len, material.train)) / result.median("ours")
    result.facts["val decoding, seconds"] = round(val_seconds, 2)
    result.facts["val decoding, percent of an epoch"] = round(
        100 * val_seconds / (epoch + val_seconds), 1
    )
    return result, Trained(decoder, result.median("ours"), val_seconds)


def equal_epochs(
    material: Material, captions: list[list[list[str]]], epochs: int
) -> tuple[float, float, Decoder]:
    """Train both for some epochs from the same weights; gives both val losses and our decoder."""
    stage = decoder_stage(material, captions)
    plain = baselines.PlainDecoder(len(material.vocabulary), SIZE, SIZE)
    plain.load_state_dict(stage.decoder.state_dict())
    config = TrainingConfig(epochs, 0, 0, stage.options.precision)
    steps = epochs * stage.batches_per_epoch()
    optimizer = make_optimizer(stage)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        plain_optimizer, lambda step: learning_rate_factor(step, steps, config.warmup)
    )
    data = plain_data(stage)
    for epoch in range(1, epochs + 1):
        train_epoch(stage, optimizer, config, epoch)
        baselines.train_epoch(plain, data, plain_optimizer, schedule, BATCH)
    losses = []
    other = Decoder(stage.decoder.config)
    other.load_state_dict(plain.state_dict())
    for decoder in (stage.decoder.eval(), other.eval()):
        losses.append(mean_loss(decoder, stage.validator.captions, stage.val_features))
    return losses[0], losses[1], stage.decoder


def compare_whole_job(
    material: Material, extraction: Comparison, trained: Trained, rounds: int
) -> Comparison:
    """50 epochs with the network in every step, against extraction once and 50 epochs."""
    paths = sorted(material.pictures.iterdir())
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
            say(f"  whole job: step of the program replaced: {rate:.1f} captions/s")
            rates.append(rate)
    small = decoder_stage(material, material.train[:500], size=256, batch=32)
    small_optimizer = make_optimizer(small)
    config = TrainingConfig(1, 0, 0, small.options.precision)
    small_rates = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        train_epoch(small, small_optimizer, config, 1)
        small_rates.append(len(small.captions) / (time.perf_counter() - began))
    small_rate = statistics.median(small_rates[1:])

    engine = "openvino" if "openvino" in extraction.rates else "torch"
    seed_hours = 40_455 * 50 / statistics.median(rates) / 3600
    extracting = 8_091 / extraction.median(engine)
    epochs = 50 * (30_000 / trained.captions_per_second + trained.val_seconds)
    same_sizes = 40_455 * 50 / small_rate
    result = Comparison(
        "whole job", "caption", {"baseline": rates, "ours, 256/256, batch 32": small_rates[1:]}
    )
    result.facts = {
        "program replaced, 40,455 captions x 50 epochs, hours": round(seed_hours, 1),
        f"extraction of 8,091 pictures ({engine}), minutes": round(extracting / 60, 2),
        "50 epochs with the defaults (30,000 captions, val decoded), minutes": round(
            epochs / 60, 1
        ),
        "times less, with the defaults": round(seed_hours * 3600 / (extracting + epochs)),
        "50 epochs, 256/256, batch 32, 40,455 captions, minutes": round(same_sizes / 60, 1),
        "times less, with the sizes and captions of the program replaced": round(
            seed_hours * 3600 / (extracting + same_sizes)
        ),
        "goal: times less": 300,
    }
    return result


def compare_search(material: Material, trained: Trained, rounds: int) -> Comparison:
    """Beam search with three beams over features."""
    config = SearchConfig()
    plain = baselines.PlainDecoder(len(material.vocabulary), SIZE, SIZE)
    plain.load_state_dict(trained.decoder.state_dict())
    plain.eval()
    decoder = trained.decoder.eval()
    val = PictureFeatures(material.val_cache, torch.arange(len(material.val)), 2e9)
    features = val[torch.arange(len(val))]
    some = features[:: len(features) // 24]
    captions: dict[str, list[list[int]]] = {}

    def baseline() -> int:
        captions["baseline"] = [
            baselines.beam_search(
                plain,
                feature.unsqueeze(0),
                config.beam_size,
                config.max_length,
                config.length_penalty,
            )
            for feature in some
        ]
        return len(some)

    def ours() -> int:
        captions["ours"] = [
            hypotheses[0].tokens
            for chunk in features.split(256)
            for hypotheses in search(decoder, chunk, config)
        ]
        return len(features)

    result = interleave("beam search", "picture", {"baseline": baseline, "ours": ours}, rounds)
    result.compare("beam search with 3 beams, over features", "ours", "baseline", 20.0)
    same = captions["ours"][:: len(features) // 24]
    equal = sum(a == b for a, b in zip(captions["baseline"], same, strict=True))
    result.facts["captions equal to the baseline's"] = f"{equal} of {len(same)}"
    result.facts["words a caption"] = round(statistics.fmean(map(len, captions["ours"])), 1)
    return result


def compare_captioning(
    material: Material, trained: Trained, folder: Path, rounds: int
) -> Comparison:
    """A folder of pictures to captions, against extraction of the same pictures."""
    encoder = load_encoder(material.weights, choose_precision("auto", CPU))
    identity = encoder.identity
    engine = choose_engine("auto", CPU)
    encoder.for_inference(engine)
    save_checkpoint(
        folder / "best.pt",
        Checkpoint(
            trained.decoder.config, trained.decoder.state_dict(), material.vocabulary, identity
        ),
    )
    captioner = Captioner(encoder, trained.decoder.eval(), material.vocabulary)
    names = find_images(material.pictures)

    def extraction() -> int:
        extract(
            *(material.pictures, names, folder / "e.h5", ReadyEncoder(encoder)),  # type: ignore[arg-type]
            *(inference_batch_size(CPU), default_workers(CPU), engine),
            force=True,
        )
        return len(names)

    def captioning() -> int:
        return sum(1 for _ in captioner.stream([material.pictures / name for name in names]))

    result = interleave(
        "captioning", "picture", {"extraction": extraction, "captioning": captioning}, rounds
    )
    result.compare("captioning a folder, of extraction's rate", "captioning", "extraction", 0.85)
    return result


def compare_start(material: Material, folder: Path, rounds: int) -> Comparison:
    """How long the first answer takes, in whole processes."""
    picture = str(min(material.pictures.iterdir()))
    model = ["--model", str(folder / "best.pt"), "--weights", material.weights]
    load = (
        "import sys, torch, torchvision; "
        "n = torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=False); "
        "sys.argv[1] == 'random' or n.load_state_dict(torch.load(sys.argv[1]), strict=False)"
    )
    commands = {
        "import torch and load the weights": (["-c", load, material.weights], 0),
        "caption.py of one picture": (["caption.py", picture, *model], 0),
        "caption.py --help": (["caption.py", "--help"], 0),
        "caption.py of a file that is not there": (["caption.py", "gone.jpg"], 2),
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (arguments, expected) in commands.items():
            seconds, code = run_command(arguments)
            if code != expected:
                raise RuntimeError(f"{' '.join(arguments)} ended with exit code {code}")
            if number:
                say(f"  start: {name}: {seconds:.2f} s")
                rates[name].append(1 / seconds)
    result = Comparison("start", "run", rates)
    result.compare(
        "time to the first caption, of that to import torch and load the weights",
        "import torch and load the weights",
        "caption.py of one picture",
        1.5,
    )
    for name in commands:
        result.facts[f"{name}, seconds"] = round(1 / result.median(name), 2)
    return result


def compare_joint(material: Material, rounds: int) -> Comparison:
    """Stage 3, its blocks and batch, pictures a second."""
    paths = sorted(material.pictures.iterdir())[: 3 * JOINT_BATCH]
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
    by_picture: list[list[list[int]]] = [[] for _ in groups]
    for number, tokens in list_captions(captions):
        by_picture[number].append(tokens)
    data = baselines.CaptionedPictures(paths, by_picture)
    stage = JointStage(
        encoder=load_encoder(material.weights),
        decoder=decoder,
        vocabulary=material.vocabulary,
        pictures=[Picture(path, True) for path in paths],
        captions=captions,
        val_paths=[],
        validator=Validator({"none": [["none"]]}, material.vocabulary),
        options=JointOptions(
            start="",
            data="",
            captions=None,
            weights=None,
            features="",
            epochs=1,
            batch_size=JOINT_BATCH,
            accumulate=1,
            encoder_lr=3e-4,
            decoder_lr=1e-4,
            weight_decay=DECAY,
            label_smoothing=SMOOTHING,
            unfreeze_from="Mixed_7a",
            smallest_crop=0.85,
            flip=True,
            patience=0,
            seed=0,
            precision=choose_training_precision("auto", CPU),
        ),
        workers=default_workers(CPU),
        device=CPU,
    )
    optimizer = make_optimizer(stage)
    config = TrainingConfig(1, 0, 0, stage.options.precision)

    def ours() -> int:
        train_epoch(stage, optimizer, config, 1)
        return len(paths)

    def baseline() -> int:
        return baselines.joint_epoch(network, plain_decoder, data, plain_optimizer, JOINT_BATCH)

    result = interleave(
        "joint fine-tuning", "picture", {"baseline": baseline, "ours": ours}, rounds
    )
    precision = stage.options.precision
    return result.compare(f"joint fine-tuning from Mixed_7a, {precision}", "ours", "baseline", 2.0)


def measure_memory(material: Material, folder: Path) -> dict[str, float]:
    """Peak memory of each stage in GB: the real commands on a small data set."""
    data = folder / "memory"
    data.mkdir()
    rows = ["image,caption,split"]
    for number, path in enumerate(sorted(material.pictures.iterdir())):
        (data / path.name).write_bytes(path.read_bytes())
        split = "val" if number % 4 == 3 else "train"
        for words in material.train[number]:
            rows.append(f"{path.name},{' '.join(words)},{split}")
    (data / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    cache, run = folder / "memory.h5", folder / "memory-run"
    commands = {
        "extract_features.py": ["--data", data, "--output", cache, "--weights", material.weights],
        "train_decoder.py": (
            ["--data", data, "--features", cache, "--run", run, "--epochs", 2, "--min-count", 1]
        ),
        "finetune_joint.py": ["--start", run, "--run", f"{run}-joint", "--epochs", 1],
        "caption.py": [data, "--model", run, "--weights", material.weights],
    }
    peaks = {}
    for script, arguments in commands.items():
        command = [sys.executable, "benchmarks/measure.py", script, *map(str, arguments)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{script} ended with exit code {ended.returncode}: {ended.stderr}")
        peaks[script] = round(float(ended.stdout.splitlines()[-1]), 2)
        say(f"  memory: {script}: {peaks[script]} GB")
    return peaks
