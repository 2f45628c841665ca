"""How the benchmark measures: sides in turn, ratios round by round, memory from outside."""

from __future__ import annotations

import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Ratio:
    """How many times as fast one side is as another, over the rounds.

    Attributes:
        median, low, high: over the rounds, in each of which the two sides run one after the other.
        goal: the target, or None.
    """

    median: float
    low: float
    high: float
    goal: float | None = None


@dataclass
class Comparison:
    """Rates of several sides that did the same work in turn.

    Attributes:
        name: what was done.
        unit: what is counted per second.
        rates: each side's rate in each round.
        ratios: ratios of two sides, by their description.
        facts: other measurements, by their description.
    """

    name: str
    unit: str
    rates: dict[str, list[float]]
    ratios: dict[str, Ratio] = field(default_factory=dict)
    facts: dict[str, float | str] = field(default_factory=dict)

    def median(self, side: str) -> float:
        """Return the median rate of one side."""
        return statistics.median(self.rates[side])

    def compare(
        self, description: str, side: str, other: str, goal: float | None = None
    ) -> Comparison:
        """Add the ratio of two sides, taken round by round."""
        pairs = zip(self.rates[side], self.rates[other], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        self.ratios[description] = Ratio(statistics.median(ratios), min(ratios), max(ratios), goal)
        return self


def interleave(
    name: str, unit: str, sides: Mapping[str, Callable[[], int]], rounds: int
) -> Comparison:
    """Run all sides in turn, ``rounds`` times, after one round that does not count.

    Each side returns how many units it has done. The machine's speed drifts, so only rates
    of the same round are compared.
    """
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, work in sides.items():
            began = time.perf_counter()
            units = work()
            rate = units / (time.perf_counter() - began)
            echo(f"  {name}: {side}: {rate:,.1f} {unit}/s" + ("" if number else " (warm-up)"))
            if number:
                rates[side].append(rate)
    return Comparison(name, unit, rates)


def run_command(arguments: Sequence[str]) -> tuple[float, int]:
    """Run Python with ``arguments`` in this project's folder; return wall seconds and exit code."""
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return time.perf_counter() - began, ended.returncode


def peak_memory() -> float:
    """Return this process's peak memory in GB."""
    if Path("/proc/self/status").is_file():
        # Linux's other figure, ru_maxrss, begins with that of the process that started this one.
        return memory_of("self", "VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


def memory_of(process: int | str, figure: str) -> float:
    """Return a process's memory in GB on Linux: VmRSS, what it has, or VmHWM, the most it had."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(figure))
    return int(line.split()[1]) * 1024 / 1e9


def run_script_and_tell_memory(script: str, *arguments: str) -> None:
    """Run a script of this project in this process, and print its peak memory in GB."""
    sys.path.insert(0, str(ROOT))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        print(peak_memory())


def echo(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script_and_tell_memory(*sys.argv[1:])
