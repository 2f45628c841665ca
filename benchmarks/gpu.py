"""The speed of a GPU at each step, and what limits it: the GPU figures of docs/scale.md.

    python benchmarks/gpu.py --images photos
    python benchmarks/gpu.py --data data/flickr8k --features data/features/flickr8k.h5

Measures the encoder alone, at several precisions and batch sizes, on images in GPU memory and on
images in main memory; the decoding of --images by several numbers of threads; and,
with --data and --features, epochs of train_decoder.py in both precisions. Prints a table.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import click
import torch
from compare_extraction import run_side_by_side
from compare_training import default_options
from measure import echo

from pipeline.datasets.find_images import find_images
from pipeline.datasets.images import IMAGE_SIZE, read_square
from pipeline.models.encoder import load_encoder
from pipeline.training.decoder_stage import prepare_stage
from pipeline.training.loop import Training
from pipeline.utils.devices import choose_device, cpu_has_amx

PRECISIONS = ("fp32", "bf16", "fp16")
THREADS = (1, 8, 16)
EPOCHS = 3


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option(
    "--images", type=click.Path(path_type=Path), help="Images to decode; not measured by default."
)
@click.option("--data", help="Captions to train on; not measured by default.")
@click.option("--features", help="Their feature cache.")
@click.option("--batch", type=click.IntRange(min=1), multiple=True, default=(64, 256))
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=1.5, help="Duration of each measurement."
)
@click.option("--device", default="cuda")
def main(
    images: Path | None,
    data: str | None,
    features: str | None,
    batch: tuple[int, ...],
    seconds: float,
    device: str,
) -> None:
    """Measure, and print a table."""
    chosen = choose_device(device)
    rows = [*network_rates(chosen, batch, seconds)]
    if images is not None:
        rows += decoding_rates(images)
    if data is not None and features is not None:
        rows += training_rates(chosen, data, features)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type
    click.echo(f"{name}, torch {torch.__version__}\n\n| what | rate |\n|---|---:|")
    for what, rate, unit in rows:
        click.echo(f"| {what} | {rate:,.0f} {unit}/s |")


def network_rates(
    device: torch.device, batches: tuple[int, ...], seconds: float
) -> Iterator[tuple[str, float, str]]:
    """Encode random pixels, on the device and from memory."""
    for precision in PRECISIONS if device.type == "cuda" else ("fp32",):
        encoder = load_encoder("random", precision).to(device).for_inference()
        for size in batches:
            shape = (size, IMAGE_SIZE, IMAGE_SIZE, 3)
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
            squares = [*pixels.cpu().numpy()]
            with torch.inference_mode():
                alone = rate(lambda: encoder(pixels), device, seconds)  # noqa: B023
            whole = rate(lambda: encoder.encode(squares), device, seconds)  # noqa: B023
            yield f"InceptionV3, {precision}, batches of {size}", size * alone, "image"
            yield (
                f"the same, including transfers to and from the GPU, {size}",
                size * whole,
                "image",
            )


def rate(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Count calls per second, after two that do not count."""
    calls = 0
    for warm in (True, False):
        began = time.perf_counter()
        calls = 0
        while calls < 2 or (not warm and time.perf_counter() - began < seconds):
            function()
            calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return calls / (time.perf_counter() - began)


def decoding_rates(folder: Path) -> Iterator[tuple[str, float, str]]:
    """Decode and resize images, in several numbers of threads."""
    names = find_images(folder)
    for threads in THREADS:
        files = [folder / name for name in itertools.islice(itertools.cycle(names), 200 * threads)]
        began = time.perf_counter()
        run_side_by_side(read_square, files, threads)
        yield f"decoding, {threads} threads", len(files) / (time.perf_counter() - began), "image"


def training_rates(
    device: torch.device, data: str, features: str
) -> Iterator[tuple[str, float, str]]:
    """Train some epochs with the defaults; the fastest counts, as the first one warms up."""
    defaults = replace(default_options(), data=data, features=features)
    sizes = sorted({defaults.batch_size, 4 * defaults.batch_size})
    fast = device.type == "cuda" or cpu_has_amx()
    precisions = ("fp32", "bf16") if fast else ("fp32",)
    for size, precision in itertools.product(sizes, precisions):
        options = replace(defaults, batch_size=size, precision=precision)
        with tempfile.TemporaryDirectory() as run:
            stage = prepare_stage(options, Path(run), device, 2e9, force=True)
        training = Training(stage, Path())
        seconds = []
        for _ in range(EPOCHS):
            began = time.perf_counter()
            training.train_epoch(1)
            seconds.append(time.perf_counter() - began)
        echo(f"  {precision}, batches of {size}: {min(seconds):.2f} s an epoch")
        yield (
            f"train_decoder.py, {precision}, batches of {size}",
            len(stage.captions) / min(seconds),
            "caption",
        )


if __name__ == "__main__":
    main()
