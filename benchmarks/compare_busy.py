"""Training and encoding beside other programs, with OpenMP's passive and default wait policies.

    python benchmarks/compare_busy.py 3.0       # prints the rates of one process as JSON

OpenMP reads ``OMP_WAIT_POLICY`` when torch loads, so each policy is measured in its own processes,
alone and beside one busy program per core.
"""

from __future__ import annotations

import torch  # before pipeline, which would set the policy

# isort: split
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy
from measure import ROOT, Comparison, echo

from pipeline.datasets.images import IMAGE_SIZE
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder import load_encoder

BATCH, LENGTH, WORDS = 128, 12, 2_500  # captions per step, tokens per caption, vocabulary
PLACES = ("alone", "beside")
POLICIES = ("default", "passive")


def compare_busy(rounds: int, seconds: float = 3.0) -> list[Comparison]:
    """Measure training steps and the encoder, each policy alone and beside busy programs."""
    sides = [f"{place}, {policy}" for place in PLACES for policy in POLICIES]
    units = {"training": "caption", "encoding": "image"}
    rates: dict[str, dict[str, list[float]]] = {work: {s: [] for s in sides} for work in units}
    for _ in range(rounds):
        for place in PLACES:
            with busy_programs() if place == "beside" else contextlib.nullcontext():
                for policy in POLICIES:
                    side = f"{place}, {policy}"
                    for work, rate in measure_once(policy, seconds).items():
                        echo(f"  wait policy: {work}: {side}: {rate:,.1f} {units[work]}/s")
                        rates[work][side].append(rate)
    found = []
    for work, unit in units.items():
        comparison = Comparison(f"wait policy, {work}", unit, rates[work])
        for place in PLACES:
            words = "alone" if place == "alone" else "beside one busy program per core"
            comparison.compare(
                f"{work} {words}, passive wait policy against OpenMP's default",
                f"{place}, passive",
                f"{place}, default",
            )
        found.append(comparison)
    return found


@contextlib.contextmanager
def busy_programs() -> Iterator[None]:
    """Keep every core busy with a program of its own."""
    command = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def measure_once(policy: str, seconds: float) -> dict[str, float]:
    """Measure the rates under a policy in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if policy != "default":
        environment["OMP_WAIT_POLICY"] = policy.upper()
    ended = subprocess.run(
        [sys.executable, __file__, str(seconds)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{__file__}: {ended.stderr}")
    rates: dict[str, float] = json.loads(ended.stdout)
    return rates


def rates_here(seconds: float) -> dict[str, float]:
    """Measure this process: captions/s of training steps and images/s of the encoder."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(WORDS))
    optimizer = torch.optim.AdamW(decoder.parameters(), fused=True)
    features = torch.randn(BATCH, decoder.config.feature_size)
    captions = torch.randint(4, WORDS, (BATCH, LENGTH))

    def step() -> None:
        loss, tokens = decoder.loss(features, captions)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    encoder = load_encoder("random").for_inference()
    squares = [*numpy.zeros((4, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=numpy.uint8)]
    return {
        "training": BATCH * calls_per_second(step, seconds),
        "encoding": len(squares) * calls_per_second(lambda: encoder.encode(squares), seconds),
    }


def calls_per_second(function: Callable[[], object], seconds: float) -> float:
    """Call a function for some seconds, at least twice, after one call that does not count."""
    function()
    began, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - began < seconds:
        function()
        calls += 1
    return calls / (time.perf_counter() - began)


if __name__ == "__main__":
    print(json.dumps(rates_here(float(sys.argv[1]))))
