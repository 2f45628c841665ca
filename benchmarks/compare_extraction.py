"""Stage 1 against a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import baselines
import numpy
import torch
from material import Material, inception_weights
from measure import Comparison, interleave

from pipeline.datasets.find_images import find_images
from pipeline.datasets.image_sources import ImageFolder
from pipeline.datasets.images import read_square
from pipeline.features.extraction import Extraction, extract
from pipeline.models.encoder import Encoder, load_encoder
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.models.openvino import choose_engine
from pipeline.utils.devices import (
    choose_precision,
    default_workers,
    inference_batch_size,
    threads_per_worker,
)
from pipeline.utils.threads import prefetch

CPU = torch.device("cpu")


def compare_extraction(material: Material, folder: Path, rounds: int) -> Comparison:
    """JPEG files to a finished cache, and the network alone and decoding alone as its limits."""
    weights = inception_weights(material.weights)
    network = baselines.plain_inception(weights)
    names = find_images(material.images)
    paths = [material.images / name for name in names]
    precision = choose_precision("auto", CPU)
    workers, batch = default_workers(CPU), inference_batch_size(CPU)
    squares = [read_square(path) for path in paths[:40]]
    found: dict[str, numpy.ndarray] = {}

    def baseline() -> int:
        found["baseline"] = baselines.extract(network, paths, folder / "baseline.h5")
        return len(paths)

    sides: dict[str, Callable[[], int]] = {"baseline": baseline}
    variants = {"torch": ("torch", precision)}
    if choose_engine("auto", CPU) == "openvino":
        variants |= {"openvino": ("openvino", precision), "openvino int8": ("openvino", "int8")}
    for name, (engine, arithmetic) in variants.items():
        ready = load_encoder(material.weights, arithmetic).for_inference(engine)

        def ours(name: str = name, engine: str = engine, ready: Encoder = ready) -> int:
            output = folder / f"{name}.h5"
            task = Extraction(
                ImageFolder(material.images),
                names,
                output,
                ReadyEncoder(ready),  # type: ignore[arg-type]
                batch,
                workers,
                engine,
                force=True,
            )
            result = extract(task)
            found[name] = result.cache.read(result.cache.rows(names))
            return len(names)

        def network_alone(ready: Encoder = ready) -> int:
            groups = [squares[start : start + batch] for start in range(0, len(squares), batch)]
            run_side_by_side(ready.encode, groups, workers)
            return len(squares)

        sides[name] = ours
        sides[f"{name}, network alone"] = network_alone

    def decoding_alone() -> int:
        run_side_by_side(read_square, paths, workers)
        return len(paths)

    sides["decoding alone"] = decoding_alone
    result = interleave("extraction", "image", sides, rounds)
    for name, (engine, arithmetic) in variants.items():
        alone, decoding = result.rates[f"{name}, network alone"], result.rates["decoding alone"]
        ceiling = [1 / (1 / a + 1 / d) for a, d in zip(alone, decoding, strict=True)]
        result.rates[f"{name}, ceiling"] = ceiling
        goal = {"fp32": 2.0}.get(arithmetic, 5.0 if engine == "torch" else 10.0)
        result.compare(f"extraction, {engine} {arithmetic}", name, "baseline", goal)
        result.compare(
            f"share of the limit set by network and decoding, {name}",
            name,
            f"{name}, ceiling",
            0.85,
        )
        reference, features = found["baseline"], found[name]
        norms = numpy.linalg.norm(reference, axis=1) * numpy.linalg.norm(features, axis=1)
        cosines = (reference * features).sum(axis=1) / norms
        result.facts[f"lowest cosine to the baseline's features, {name}"] = round(
            float(cosines.min()), 6
        )
    return result


class ReadyEncoder:
    """An encoder that is already folded and compiled, so that no round includes that time."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.engine = encoder.engine
        self.encode = encoder.encode

    @property
    def identity(self) -> EncoderIdentity:
        """Return the identity of the encoder."""
        return self.encoder.identity

    def for_inference(self, engine: str) -> ReadyEncoder:
        """Do nothing: it is ready."""
        return self


def run_side_by_side(function: Callable, items: list, workers: int) -> None:
    """Call a function on every item, in as many threads as extraction uses."""
    with threads_per_worker(workers) as share:
        for _ in prefetch(
            function, items, workers, workers, start=lambda: torch.set_num_threads(share)
        ):
            pass
