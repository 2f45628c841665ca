"""How cost grows with size: memory and time of each stage, each size in a process of its own.

    python benchmarks/growth.py extraction 8000 FOLDER
    python benchmarks/growth.py training 1000000 FOLDER
    python benchmarks/growth.py captioning 100000 FOLDER

prints a line of JSON. Extraction and captioning run with small stand-ins for the networks,
whose cost per image the other comparisons measure: what might grow is the code around them.
Training steps are real.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from material import hard_links, write_cache
from measure import ROOT, echo, peak_memory

from pipeline.datasets.encoded_captions import EncodedCaptions, bucketed_batches
from pipeline.datasets.find_images import find_images
from pipeline.datasets.image_sources import ImageFolder
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.reranking import Reranker, best_captions
from pipeline.features.extraction import Extraction, extract
from pipeline.features.feature_set import FeatureSet
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder import Encoder
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity
from pipeline.utils.devices import default_workers

SIZES = {
    "extraction": (1_000, 2_000, 4_000, 8_000),
    "training": (10_000, 100_000, 1_000_000),
    "captioning": (1_000, 10_000, 100_000),
}
# Bytes of features that training may hold here: 10,000 rows fit, more are read as needed.
FEATURE_MEMORY = 100e6


class PixelEncoder:
    """Pixels of the whole image as features: extraction without the network."""

    engine = "torch"
    identity = EncoderIdentity("pixels", "0" * 64, "squeeze-299-bilinear", "fp32", "random", "0")

    def for_inference(self, engine: str) -> PixelEncoder:
        """Do nothing."""
        return self

    def encode(self, images: Sequence[numpy.ndarray]) -> numpy.ndarray:
        """Return float32 (B, 2048)."""
        values = [numpy.resize(p.reshape(-1)[::131], FEATURE_SIZE) for p in images]
        return numpy.stack(values).astype("f4") / 255


def grow_extraction(count: int, folder: Path) -> float:
    """Decode images and fill a cache; return milliseconds per image."""
    data = folder / f"links-{count}"
    hard_links(folder / "images", data, count)
    began = time.perf_counter()
    names = find_images(data)
    encoder = cast(Encoder, PixelEncoder())
    output = folder / f"{count}.h5"
    extract(
        Extraction(
            ImageFolder(data), names, output, encoder, 4, default_workers(torch.device("cpu"))
        )
    )
    return (time.perf_counter() - began) / count * 1e3


def grow_training(count: int, folder: Path) -> float:
    """Train some steps on a cache of ``count`` rows; return milliseconds per step."""
    rng = numpy.random.default_rng(0)
    block = rng.standard_normal((min(count, 20_000), FEATURE_SIZE), dtype=numpy.float32)
    cache = write_cache(folder / "large.h5", block.astype("f2"), count)
    del block
    features = FeatureSet(cache, torch.arange(count), FEATURE_MEMORY)
    torch.manual_seed(0)
    lengths = torch.randint(8, 18, (count,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = torch.randint(4, 2000, (int(offsets[-1]),), dtype=torch.int32)
    captions = EncodedCaptions(torch.arange(count), tokens, offsets)
    decoder = Decoder(DecoderConfig(2000))
    optimizer = torch.optim.AdamW(decoder.parameters(), fused=True)
    times = []
    batches = bucketed_batches(captions.lengths, 128, torch.Generator().manual_seed(0))
    for indices in itertools.islice(batches, 50):
        began = time.perf_counter()
        loss, words = decoder.loss(features[captions.images[indices]], captions.padded(indices))
        (loss / words).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    cache.path.unlink()
    return float(numpy.median(times[5:])) * 1e3


def grow_captioning(count: int, folder: Path) -> float:
    """Caption a cache of ``count`` rows with a small decoder; return milliseconds per image."""
    rng = numpy.random.default_rng(0)
    block = rng.standard_normal((1_000, FEATURE_SIZE), dtype=numpy.float32)
    cache = write_cache(folder / "large.h5", block, count)
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(500, 32, 32)).eval()
    features = FeatureSet(cache, torch.arange(count), 0.0)
    began = time.perf_counter()
    batches = (features[images] for images in torch.arange(count).split(256))
    search = SearchConfig(max_length=8)
    found = sum(len(best_captions(decoder, batch, search, Reranker())) for batch in batches)
    assert found == count
    cache.path.unlink()
    return (time.perf_counter() - began) / count * 1e3


def measure_growth(folder: Path) -> list[dict[str, Any]]:
    """Run every stage in every size; ``folder`` holds ``images``."""
    lines = []
    for stage, sizes in SIZES.items():
        for size in sizes:
            command = [sys.executable, __file__, stage, str(size), str(folder)]
            ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise RuntimeError(f"{' '.join(command)}: {ended.stderr}")
            line = json.loads(ended.stdout)
            echo(f"  growth: {stage}, {size:,}: {line['milliseconds']} ms, {line['peak_gb']} GB")
            lines.append(line)
    return lines


def plot_growth(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory against size."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "growth", "svg.fonttype": "none"})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    labels = {
        "extraction": "extraction, per image (without the network)",
        "training": "training, per step",
        "captioning": "captioning, per image (small decoder)",
    }
    for stage, label in labels.items():
        own = [line for line in lines if line["stage"] == stage]
        sizes = [line["size"] for line in own]
        left.plot(sizes, [line["milliseconds"] for line in own], "o-", label=label)
        right.plot(sizes, [line["peak_gb"] for line in own], "o-", label=label)
    left.set(xscale="log", yscale="log", xlabel="images", ylabel="milliseconds", title="Time")
    right.set(xscale="log", ylim=(0, None), xlabel="images", ylabel="GB", title="Peak memory")
    right.legend(fontsize=7, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    stage, size, place = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    grow = {
        "extraction": grow_extraction,
        "training": grow_training,
        "captioning": grow_captioning,
    }[stage]
    milliseconds = grow(size, place)
    line = {"stage": stage, "size": size, "milliseconds": round(milliseconds, 3)}
    print(json.dumps({**line, "peak_gb": round(peak_memory(), 3)}))
