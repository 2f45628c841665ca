"""Search, captioning a folder, and the time to the first answer."""

from __future__ import annotations

import statistics
from pathlib import Path

import baselines
import torch
from compare_extraction import ReadyEncoder
from compare_training import SIZE, Trained
from material import Material
from measure import Comparison, interleave, run_command, say

from pipeline.captioner import Captioner
from pipeline.checkpoint import Checkpoint, save_checkpoint
from pipeline.consensus import Consensus, Neighbours, choose_neighbours, sampled_pictures
from pipeline.dataset import PictureFeatures, encode_captions
from pipeline.devices import (
    choose_precision,
    default_workers,
    inference_batch_size,
)
from pipeline.encoder import load_encoder
from pipeline.extraction import Extraction, extract
from pipeline.images import find_images
from pipeline.matching import Matcher, MatcherConfig
from pipeline.openvino_engine import choose_engine
from pipeline.picture_sources import PictureFolder
from pipeline.reranking import Reranker
from pipeline.search import SearchConfig, search

CPU = torch.device("cpu")


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
    neighbours = neighbours_of(material, trained)
    matcher = Matcher(
        MatcherConfig(len(material.vocabulary))
    ).eval()  # takes its time, untrained too
    engine = choose_engine("auto", CPU)
    encoder.for_inference(engine)
    save_checkpoint(
        folder / "best.pt",
        Checkpoint(
            trained.decoder.config,
            trained.decoder.state_dict(),
            material.vocabulary,
            identity,
            neighbours=neighbours,
            matcher=matcher,
        ),
    )
    captioner = Captioner(
        encoder,
        trained.decoder.eval(),
        material.vocabulary,
        Reranker(Consensus(neighbours), matcher),
    )
    names = find_images(material.pictures)

    def extraction() -> int:
        extract(
            Extraction(
                *(PictureFolder(material.pictures), names, folder / "e.h5", ReadyEncoder(encoder)),  # type: ignore[arg-type]
                *(inference_batch_size(CPU), default_workers(CPU), engine),
                force=True,
            )
        )
        return len(names)

    def captioning() -> int:
        return sum(1 for _ in captioner.stream([material.pictures / name for name in names]))

    result = interleave(
        "captioning", "picture", {"extraction": extraction, "captioning": captioning}, rounds
    )
    result.compare("captioning a folder, of extraction's rate", "captioning", "extraction", 0.85)
    return result


def neighbours_of(material: Material, trained: Trained) -> Neighbours:
    """Take the training pictures to compare with, as a checkpoint has them."""
    kept = sampled_pictures(len(material.train))
    features = PictureFeatures(material.train_cache, torch.arange(len(material.train)), 2e9)
    return choose_neighbours(
        trained.decoder.eval(),
        kept,
        (features[pictures] for pictures in kept.split(4096)),
        encode_captions(material.train, material.vocabulary),
    )


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
