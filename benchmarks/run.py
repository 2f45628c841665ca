"""Measure every stage against plain PyTorch loops, in one run on this machine.

    make benchmark                       # all of it, 17 to 35 minutes on two cores
    python benchmarks/run.py --only extraction --only captioning

Both sides of a comparison run alternately, several times, and only rates of the same round are
compared. Writes ``benchmarks/results.json`` and ``benchmarks/growth.svg``, and puts the table
into docs/speed.md. With --only nothing is written.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import growth
import torch
import torchvision
from compare_busy import compare_busy
from compare_captioning import compare_captioning, compare_search, compare_start
from compare_extraction import compare_extraction
from compare_training import compare_decoder_training, compare_joint, compare_whole_job
from material import prepare
from measure import ROOT, Comparison, echo
from memory import measure_memory

from pipeline.utils.devices import cpu_has_amx
from pipeline.utils.files import atomic_write

RESULTS = ROOT / "benchmarks" / "results.json"
PLOT = ROOT / "benchmarks" / "growth.svg"
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- made by make benchmark -->", "<!-- end -->"
PARTS = (
    "extraction",
    "decoder",
    "whole-job",
    "search",
    "captioning",
    "start",
    "joint",
    "busy",
    "memory",
    "growth",
)
# Parts that must be measured before a part.
NEEDS = {
    "whole-job": {"extraction", "decoder"},
    "search": {"decoder"},
    "captioning": {"decoder"},
    "start": {"decoder", "captioning"},
}
PICTURES = 80


@click.command(context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=1), default=4, help="Runs of each side.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="Parts to run; all if none.")
def main(rounds: int, only: tuple[str, ...]) -> None:
    """Run the comparisons and print their ratios."""
    wanted = set(only or PARTS)
    for part in only:
        wanted |= NEEDS.get(part, set())
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(name), wanted, rounds)
    results["minutes"] = round((time.monotonic() - began) / 60, 1)
    click.echo(table(results))
    if not only:
        write_json(RESULTS, results)
        growth.plot_growth(results["growth"], PLOT)
        put_into_page(table(results))
        echo(f"written: {RESULTS}, {PLOT}, {PAGE}")
    echo(f"{results['minutes']} minutes")


def measure(folder: Path, wanted: set[str], rounds: int) -> dict[str, Any]:
    """Run the wanted parts in order."""
    material = prepare(folder, PICTURES)
    echo(material.description)
    found: list[Comparison] = []
    if "extraction" in wanted:
        extraction = compare_extraction(material, folder, rounds)
        found.append(extraction)
    if "decoder" in wanted:
        training, trained = compare_decoder_training(material, rounds)
        found.append(training)
    if "whole-job" in wanted:
        found.append(compare_whole_job(material, extraction, trained, rounds))
    if "search" in wanted:
        found.append(compare_search(material, trained, rounds))
    if "captioning" in wanted:
        found.append(compare_captioning(material, trained, folder, rounds))
    if "start" in wanted:
        found.append(compare_start(material, folder, rounds))
    if "joint" in wanted:
        found.append(compare_joint(material, rounds))
    if "busy" in wanted:
        found += compare_busy(max(1, rounds // 2))
    return {
        "machine": describe_machine(),
        "material": material.description,
        "rounds": rounds,
        "comparisons": [asdict(comparison) for comparison in found],
        "peak_memory_gb": (measure_memory(material, folder) if "memory" in wanted else {}),
        "growth": growth.measure_growth(folder) if "growth" in wanted else [],
    }


def describe_machine() -> dict[str, Any]:
    """Describe what speed depends on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "amx": cpu_has_amx(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def table(results: dict[str, Any]) -> str:
    """Put the results into Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['cores']} cores of {machine['processor']} "
        f"({'with' if machine['amx'] else 'without'} AMX), torch {machine['torch']}; "
        f"{results['material']}. Medians of {results['rounds']} rounds, lowest and highest in "
        "brackets.",
        "",
        "| what | ratio | goal |",
        "|---|---:|---:|",
    ]
    facts = []
    for comparison in results["comparisons"]:
        for description, ratio in comparison["ratios"].items():
            goal = "" if ratio["goal"] is None else f"{ratio['goal']:g}"
            figures = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            lines.append(f"| {description} | {figures} | {goal} |")
        facts += list(comparison["facts"].items())
    lines += ["", "| other measurements | |", "|---|---:|"]
    lines += [f"| {description} | {value} |" for description, value in facts]
    for script, peak in results["peak_memory_gb"].items():
        lines.append(f"| peak memory of {script}, GB | {peak} |")
    return "\n".join(lines)


def put_into_page(text: str) -> None:
    """Replace the text between the marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    with atomic_write(PAGE) as handle:
        handle.write(f"{before}{BEGIN}\n{text}\n{END}{after}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the results."""
    with atomic_write(path) as handle:
        json.dump(content, handle, indent=2)
        handle.write("\n")


if __name__ == "__main__":
    main()
