"""train_decoder.py for tests, with what cannot be had from outside: faults at a given moment.

The environment says which: ``KILL`` and ``FAIL`` are RANK:EPOCH, or several of them, with commas;
the process of that rank kills itself, or raises an error, after the first batch of that epoch, and
leaves a file in ``FAULTS_DONE`` so as to do it once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_decoder
from pipeline.decoding.hypothesis import Hypothesis
from pipeline.decoding.options import SearchConfig
from pipeline.training.decoder_stage import DecoderStage
from pipeline.utils.errors import UserError

batches = DecoderStage.batches


def with_faults(stage: DecoderStage, epoch: int) -> Iterator[Any]:
    for number, batch in enumerate(batches(stage, epoch)):
        if number == 1:
            fault("KILL", stage.world.rank, epoch)
            fault("FAIL", stage.world.rank, epoch)
        yield batch


def fault(kind: str, rank: int, epoch: int) -> None:
    moment = f"{rank}:{epoch}"
    if moment not in os.environ.get(kind, "").split(","):
        return
    done = Path(os.environ["FAULTS_DONE"]) / f"{kind}-{rank}-{epoch}"
    if done.exists():
        return
    done.touch()
    if kind == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError(f"rank {rank} spoiled epoch {epoch}")


def fixed_draws(
    decoder: Any, features: Tensor, count: int, config: SearchConfig
) -> list[list[Hypothesis]]:
    """Draw captions that depend on the image alone, not on the process that draws them."""
    groups = []
    for row in features:
        generator = torch.Generator().manual_seed(int(row.double().sum() * 1e6))
        lengths = torch.randint(1, 6, (count,), generator=generator).tolist()
        words = [torch.randint(4, 10, (n,), generator=generator).tolist() for n in lengths]
        groups.append([Hypothesis(tokens, 0.0, 0.0) for tokens in words])
    return groups


if __name__ == "__main__":
    DecoderStage.batches = with_faults  # type: ignore[assignment, method-assign]
    train_decoder.main()
