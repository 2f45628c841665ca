"""Load test: many images, a large page, many clients at once.

    python benchmarks/load.py                       # all, about 20 minutes on two cores
    python benchmarks/load.py --only server --clients 50 --seconds 120

extraction: --images links to a few hundred drawn scenes through extract_features.py, killed
(SIGKILL) after one third and two thirds, and resumed; compared with a tenth as many that run
undisturbed. Each row of the cache is compared with that of its scene.

page: a tenth of --images through caption.py --html --thumbnails beside, with five captions each,
compared with a tenth of those.

server: for --seconds, each of --clients sends caption.py --serve its next image as soon as the last
is answered. A client that is refused (503) tries again, as the page does.

In extraction and page, pixels replace the network's features (load_worker.py); page and server
caption with the pretrained model. Prints the table of docs/scale.md. Linux only.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy
from load_clients import serve_clients
from material import hard_links
from measure import ROOT, echo, memory_of

from pipeline.features.cache import PENDING, FeatureCache, partial_path

sys.path.insert(0, str(ROOT / "data"))
from draw_scenes import draw_scenes

PARTS = ("extraction", "page", "server")
SCENES = 300
WORKER = [sys.executable, "benchmarks/load_worker.py"]


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Parts to run; all if none.")
@click.option("--images", type=click.IntRange(min=100), default=100_000, help="Images to extract.")
@click.option("--clients", type=click.IntRange(min=1), default=50, help="Clients of the server.")
@click.option(
    "--seconds", type=click.IntRange(min=1), default=120, help="Duration of the server's load."
)
def main(only: tuple[str, ...], images: int, clients: int, seconds: int) -> None:
    """Run the parts one after the other and print a table."""
    lines = ["| load | found |", "|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_scenes(folder / "drawn", SCENES, 0)
        scenes = folder / "drawn" / "Images"
        for part in only or PARTS:
            if part == "extraction":
                found = load_extraction(scenes, folder, images)
            elif part == "page":
                found = load_page(scenes, folder, images // 10)
            else:
                found = serve_clients(sorted(scenes.iterdir()), folder, clients, seconds)
            lines += [f"| {what} | {figure} |" for what, figure in found.items()]
            echo("\n".join(lines[-len(found) :]))
    click.echo("\n".join(lines))


def load_extraction(scenes: Path, folder: Path, count: int) -> dict[str, str]:
    """Extract ``count`` images with two kills, and a tenth as many without."""
    few, many = folder / "few", folder / "many"
    hard_links(scenes, few, count // 10)
    hard_links(scenes, many, count)
    few_peak, few_seconds = extract(few, folder / "few.h5")
    peaks, seconds = [], 0.0
    for part in (1 / 3, 2 / 3, None):
        peak, took = extract(many, folder / "many.h5", None if part is None else int(part * count))
        peaks.append(peak)
        seconds += took
    extract(scenes, folder / "scenes.h5")
    wrong = compare_rows(FeatureCache(folder / "many.h5"), FeatureCache(folder / "scenes.h5"))
    if wrong:
        raise RuntimeError(f"{wrong} rows are not those of their scenes")
    each = ", ".join(f"{peak:.2f}" for peak in peaks)
    return {
        f"{count:,} images extracted (network left out), killed twice": f"{seconds:.0f} s",
        "rows that differ from those of their scenes": "0",
        f"peak memory, up to each kill and at the end, GB; of {count // 10:,}": (
            f"{each}; {few_peak:.2f} ({few_seconds:.0f} s)"
        ),
    }


def extract(data: Path, output: Path, kill_at: int | None = None) -> tuple[float, float]:
    """Extract a folder, killed at ``kill_at`` rows; return peak memory (GB) and seconds."""
    how = "--device cpu --precision fp32 --engine torch".split()
    began = time.monotonic()
    process = start("extract_features.py", "--data", str(data), "--output", str(output), *how)
    partial = partial_path(output)
    if kill_at is not None:
        while not partial.is_file() or (FeatureCache(partial).status != PENDING).sum() < kill_at:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args!r}: ended with {process.returncode}")
            time.sleep(0.2)
        peak = memory_of(process.pid, "VmHWM")
        process.send_signal(signal.SIGKILL)
        process.wait()
    else:
        peak = printed_memory(process)
    seconds = time.monotonic() - began
    echo(f"  extraction: {data.name}, to {kill_at or 'the end'}: {seconds:.0f} s, {peak:.2f} GB")
    return peak, seconds


def start(*command: str) -> subprocess.Popen[str]:
    """Start one of the commands with pixels for features."""
    return subprocess.Popen(
        [*WORKER, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def printed_memory(process: subprocess.Popen[str]) -> float:
    """Wait for a process to succeed; return the peak memory that it prints last, in GB."""
    printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args!r}: ended with {process.returncode}")
    return float(printed.splitlines()[-1])


def compare_rows(cache: FeatureCache, scenes: FeatureCache) -> int:
    """Count rows of ``cache``, whose images link to the scenes in turn, that differ from these."""
    expected = scenes.read(numpy.arange(len(scenes)))
    if len(numpy.unique(expected, axis=0)) < len(scenes):
        raise RuntimeError("some scenes have the same features, so equal rows would prove nothing")
    wrong = 0
    for start in range(0, len(cache), 10_000):
        rows = numpy.arange(start, min(start + 10_000, len(cache)))
        wrong += int((cache.read(rows) != expected[rows % len(scenes)]).any(axis=1).sum())
    return wrong + len(cache.damaged_rows())


def load_page(scenes: Path, folder: Path, count: int) -> dict[str, str]:
    """Make a page of ``count`` images, and one of a tenth of them."""
    made = []
    for size in (count // 10, count):
        data, page = folder / f"page-{size}", folder / f"page-{size}.html"
        hard_links(scenes, data, size)
        output = ["--html", str(page), "--output", str(page.with_suffix(".csv"))]
        how = "--thumbnails beside --model pretrained --device cpu --beam-size 5".split()
        how += "--consensus 0 --matching 0".split()
        began = time.monotonic()
        peak = printed_memory(start("caption.py", str(data), *output, *how))
        seconds = time.monotonic() - began
        shown = page.read_text(encoding="utf-8").count('<script type="application/json">')
        if shown != size:
            raise RuntimeError(f"{page}: {shown} images, not {size}")
        echo(f"  page: {size}: {seconds:.0f} s, {peak:.2f} GB, {page.stat().st_size / 1e6:.1f} MB")
        made.append((peak, seconds, page.stat().st_size / 1e6))
    (less, _, _), (peak, seconds, megabytes) = made
    return {
        f"page of {count:,} images (network left out)": f"{seconds:.0f} s, {megabytes:.1f} MB",
        f"peak memory, GB; of {count // 10:,}": f"{peak:.2f}; {less:.2f}",
    }


if __name__ == "__main__":
    main()
