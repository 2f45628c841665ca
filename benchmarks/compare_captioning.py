"""Search, captioning a folder, and the time to the first answer."""

from __future__ import annotations

import statistics
from pathlib import Path

import baselines
import torch
from compare_extraction import ReadyEncoder
from compare_training import SIZE, Trained
from material import Material
from measure import Comparison, echo, interleave, run_command

from pipeline.captioner import Captioner
from pipeline.datasets.encoded_captions import encode_captions
from pipeline.datasets.find_images import find_images
from pipeline.datasets.image_sources import ImageFolder
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.reranking import Reranker
from pipeline.decoding.search import search
from pipeline.features.extraction import Extraction, extract
from pipeline.features.feature_set import FeatureSet
from pipeline.models.checkpoint import Checkpoint, save_checkpoint
from pipeline.models.encoder import load_encoder
from pipeline.models.matcher import Matcher, MatcherConfig
from pipeline.models.ngram_predictor import NgramPredictor, fit_predictor, ngram_targets
from pipeline.models.openvino import choose_engine
from pipeline.utils.devices import choose_precision, default_workers, inference_batch_size

CPU = torch.device("cpu")


def compare_search(material: Material, trained: Trained, rounds: int) -> Comparison:
    """Beam search with three beams over features."""
    config = SearchConfig()
    plain = baselines.PlainDecoder(len(material.vocabulary), SIZE, SIZE)
    plain.load_state_dict(trained.decoder.state_dict())
    plain.eval()
    decoder = trained.decoder.eval()
    val = FeatureSet(material.val_cache, torch.arange(len(material.val)), 2e9)
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

    result = interleave("beam search", "image", {"baseline": baseline, "ours": ours}, rounds)
    result.compare("beam search with 3 beams, on features", "ours", "baseline", 20.0)
    same = captions["ours"][:: len(features) // 24]
    equal = sum(a == b for a, b in zip(captions["baseline"], same, strict=True))
    result.facts["captions identical to the baseline's"] = f"{equal} of {len(same)}"
    result.facts["words per caption"] = round(statistics.fmean(map(len, captions["ours"])), 1)
    return result


def compare_captioning(
    material: Material, trained: Trained, folder: Path, rounds: int
) -> Comparison:
    """A folder of images to captions, against extraction of the same images."""
    encoder = load_encoder(material.weights, choose_precision("auto", CPU))
    identity = encoder.identity
    predictor = predictor_of(material, trained)
    # Untrained, it takes as long as a trained one.
    matcher = Matcher(MatcherConfig(len(material.vocabulary))).eval()
    engine = choose_engine("auto", CPU)
    encoder.for_inference(engine)
    save_checkpoint(
        folder / "best.safetensors",
        Checkpoint(
            trained.decoder.config,
            trained.decoder.state_dict(),
            material.vocabulary,
            identity,
            predictor=predictor,
            matcher=matcher,
        ),
    )
    captioner = Captioner(
        encoder,
        trained.decoder.eval(),
        material.vocabulary,
        Reranker(predictor, matcher),
    )
    names = find_images(material.images)

    def extraction() -> int:
        extract(
            Extraction(
                ImageFolder(material.images),
                names,
                folder / "e.h5",
                ReadyEncoder(encoder),  # type: ignore[arg-type]
                inference_batch_size(CPU),
                default_workers(CPU),
                engine,
                force=True,
            )
        )
        return len(names)

    def captioning() -> int:
        return sum(1 for _ in captioner.stream([material.images / name for name in names]))

    result = interleave(
        "captioning", "image", {"extraction": extraction, "captioning": captioning}, rounds
    )
    result.compare(
        "captioning a folder, share of extraction's rate", "captioning", "extraction", 0.85
    )
    return result


def predictor_of(material: Material, trained: Trained) -> NgramPredictor | None:
    """Fit the n-gram predictor that a checkpoint has."""
    images = torch.arange(len(material.train))
    features = FeatureSet(material.train_cache, images, 2e9)
    return fit_predictor(
        trained.decoder.eval(),
        (features[some] for some in images.split(4096)),
        ngram_targets(encode_captions(material.train, material.vocabulary)),
    )


def compare_start(material: Material, folder: Path, rounds: int) -> Comparison:
    """How long the first answer takes, in whole processes."""
    image = str(min(material.images.iterdir()))
    model = ["--model", str(folder / "best.safetensors"), "--weights", material.weights]
    load = (
        "import sys, torch, torchvision; "
        "n = torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=False); "
        "sys.argv[1] == 'random' or n.load_state_dict(torch.load(sys.argv[1]), strict=False)"
    )
    commands = {
        "import torch and load the weights": (["-c", load, material.weights], 0),
        "caption.py of one image": (["caption.py", image, *model], 0),
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
                echo(f"  start: {name}: {seconds:.2f} s")
                rates[name].append(1 / seconds)
    result = Comparison("start", "run", rates)
    result.compare(
        "time to the first caption, relative to importing torch and loading the weights",
        "import torch and load the weights",
        "caption.py of one image",
        1.5,
    )
    for name in commands:
        result.facts[f"{name}, seconds"] = round(1 / result.median(name), 2)
    return result
