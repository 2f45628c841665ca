"""The training loop that stages 2 and 3 share; what it writes is told in ``run_folder``.

All randomness of an epoch (order, dropout, augmentation) follows from the seed and the
epoch's number alone. A run that was killed therefore goes on from ``last.pt`` exactly as if
it had never stopped; on a CPU the weights are identical to the bit.

Several processes (``distributed``) each take a share of every batch, and all take the same steps:
those of one process, but for rounding, and for dropout, which draws other numbers in each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.checkpoint_checks import check_training
from pipeline.curves import write_curves
from pipeline.devices import autocast
from pipeline.distributed import ALONE, Job
from pipeline.epoch_lines import epoch_line, sample_line, shows_sample
from pipeline.errors import UserError
from pipeline.files import check_writable
from pipeline.progress import progress_bar
from pipeline.run_folder import LOG, SAMPLES, append_epoch, read_epochs, trim_epochs
from pipeline.terminal import say
from pipeline.training_config import TrainingConfig
from pipeline.validation import Validation
from pipeline.weight_average import WeightAverage

# A stride between the seeds of epochs that no one's choice of seeds will cross, and one between
# those of processes.
SEED_STRIDE = 1_000_003
RANK_STRIDE = 2_654_435_761


# What is called after every epoch with its line of the log and its sample captions by name.
Watcher = Callable[[Mapping[str, float], Mapping[str, str]], None]

# ``Stage.loss``, or the same in a job of several processes.
Loss = Callable[[Any], tuple[Tensor, int]]


class LossError(Exception):
    """A loss that cannot be trained with; the text says why."""


class Stage(Protocol):
    """What the loop needs to know of a stage.

    In a job of several processes each has the stage, with the same weights.
    """

    device: torch.device

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the optimizer's groups, each with ``params``, ``lr`` and ``weight_decay``."""

    def batches_per_epoch(self, epoch: int) -> int:
        """Say how many batches ``batches`` gives."""

    def batches(self, epoch: int) -> Iterator[Any]:
        """Give the batches of an epoch, in an order that depends on seed and epoch alone.

        Each process gives its share of every batch, or None where that is empty.
        """

    def set_training(self, training: bool) -> None:
        """Switch dropout and the like on or off."""

    def loss(self, batch: Any) -> tuple[Tensor, int]:
        """Give the summed loss of a batch, and of how many tokens or captions it is."""

    def facts(self) -> dict[str, float]:
        """Give what else is to be logged of the epoch that was trained last, of all processes."""

    def validate(self) -> Validation:
        """Score the present weights on val; one of the scores is ``CIDEr-D``.

        Processes may share the work; all of them get the same.
        """

    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        """Describe the present weights, without what is needed to go on training."""


@dataclass
class Progress:
    """Where a run stands after an epoch; kept in ``last.pt``."""

    epoch: int = 0
    best_epoch: int = 0
    best_cider: float = -math.inf
    best_loss: float = math.inf

    def take(self, scores: dict[str, float]) -> bool:
        """Take in the scores of ``epoch``, and tell whether they are the best so far.

        They are by CIDEr-D, and by val loss where that is equal: with a single val picture
        CIDEr-D is always 0, as no word is rarer than another.
        """
        better = (scores["CIDEr-D"], -scores["val_loss"]) > (self.best_cider, -self.best_loss)
        if better:
            self.best_epoch = self.epoch
            self.best_cider, self.best_loss = scores["CIDEr-D"], scores["val_loss"]
        return better


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Give the share of the full learning rate at ``step`` of ``total``, counted from 0.

    A linear rise over the first ``warmup`` share, then half a cosine down to zero
    (Loshchilov and Hutter, arXiv 1608.03983).
    """
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def train(
    stage: Stage,
    run: Path,
    config: TrainingConfig,
    score_start: bool = False,
    watchers: Sequence[Watcher] = (),
    job: Job = ALONE,
) -> Progress:
    """Train ``stage`` in the folder ``run``, from its beginning or from where it stopped.

    Of a job's processes rank 0 alone reads and writes the folder.

    Args:
        stage: model, data and loss.
        run: the run folder.
        config: how to train.
        score_start: score the weights before the first epoch too, as epoch 0, so that
            ``best.pt`` is never worse than what the stage started from.
        watchers: are shown every epoch, in rank 0.
        job: the processes that train together; each has to call this.

    Returns:
        The state at the end.

    Raises:
        UserError: the loss is no longer a number; what is there to go on from is damaged; the
            folder cannot be written, or is gone.
    """
    optimizer = make_optimizer(stage)
    parameters = _parameters(optimizer)
    progress = Progress()
    average = WeightAverage(parameters, config.average)

    last = run / "last.pt"
    saved = job.from_first(lambda: _read_training(last) if last.is_file() else None)
    if saved is not None:
        try:
            check_training(saved, asdict(progress), optimizer, average.others)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{last}: the checkpoint is damaged ({error}); --force starts over"
            ) from error
        optimizer.load_state_dict(saved["optimizer"])
        average.load(saved.get("weights", []), saved.get("steps", 0))
        progress = Progress(**saved["progress"])
        if progress.epoch:
            say(f"{run}: going on after epoch {progress.epoch}", err=True)
    if job.rank == 0:
        check_writable(last)
    for name in (LOG, SAMPLES) if job.rank == 0 else ():
        trim_epochs(run / name, progress.epoch if saved is not None else -1)
    loss: Loss = stage.loss
    if job.size > 1:
        from pipeline.data_parallel import shared_loss

        loss = shared_loss(stage, parameters, job)

    def finish_epoch(record: dict[str, float]) -> None:
        """Score, save and report."""
        began = time.perf_counter()
        average.exchange()  # from here to the end the model has the averaged weights
        stage.set_training(False)
        found = stage.validate()
        if not math.isfinite(found.scores["val_loss"]):
            raise LossError(
                f"the loss on val is {found.scores['val_loss']} after epoch {progress.epoch}; a "
                "lower learning rate may help"
            )
        better = progress.take(found.scores)
        if job.rank == 0:
            save_epoch(record, found, better, began)
        average.exchange()

    def save_epoch(record: dict[str, float], found: Validation, better: bool, began: float) -> None:
        """Save and report; ``last.pt`` is written last, so a kill repeats the epoch."""
        if not run.is_dir():  # a new one would lack what was in it
            raise UserError(f"{run}: is gone; the same command begins the run anew")
        checkpoint = stage.checkpoint(progress.epoch, found.scores)
        if better:
            save_checkpoint(run / "best.pt", checkpoint)
        record = {"epoch": progress.epoch, **record, **found.scores}
        record["validation_seconds"] = round(time.perf_counter() - began, 2)
        append_epoch(run / LOG, record)
        append_epoch(run / SAMPLES, {"epoch": progress.epoch, "captions": found.samples})
        write_curves(run)
        for watch in watchers:
            watch(record, found.samples)
        checkpoint.training = {
            "optimizer": optimizer.state_dict(),
            "progress": asdict(progress),
            "weights": average.others,
            "steps": average.steps,
        }
        save_checkpoint(last, checkpoint)
        log = read_epochs(run / LOG)
        say(epoch_line(log, config.epochs, better), err=True)
        if found.samples and shows_sample(progress.epoch, config.epochs):
            say(sample_line(found.samples, progress.epoch), err=True)

    try:
        if score_start and saved is None:
            finish_epoch({})
        while progress.epoch < config.epochs:
            if config.patience and progress.epoch - progress.best_epoch >= config.patience:
                say(
                    f"no better CIDEr-D for {config.patience} epochs: stopped (--patience)",
                    err=True,
                )
                break
            progress.epoch += 1
            began = time.perf_counter()
            train_loss = train_epoch(stage, optimizer, config, progress.epoch, average, job, loss)
            finish_epoch(
                {
                    "train_loss": train_loss,
                    **stage.facts(),
                    "learning_rate": optimizer.param_groups[0]["lr"],
                    "seconds": round(time.perf_counter() - began, 2),
                }
            )
    except LossError as error:
        raise UserError(f"{run}: {error}. What was saved before is kept") from error
    return progress


def _read_training(last: Path) -> dict[str, Any]:
    """Read what ``last.pt`` holds to go on from."""
    training = load_checkpoint(last).training
    if training is None:
        raise UserError(f"{last}: holds nothing to go on from; --force starts over")
    return training


def make_optimizer(stage: Stage) -> torch.optim.Optimizer:
    """Make AdamW for a stage; each group keeps its full learning rate as ``initial_lr``."""
    groups = [{**group, "initial_lr": group["lr"]} for group in stage.parameter_groups()]
    fused = stage.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=fused)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def train_epoch(
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    epoch: int,
    average: WeightAverage | None = None,
    job: Job = ALONE,
    compute_loss: Loss | None = None,
) -> float:
    """Pass once over the training captions; returns the mean loss a token, in nats.

    ``compute_loss`` is that of the stage, or that of ``job``: see ``data_parallel``.

    Raises:
        LossError: the loss or its gradient is no longer a number, or there was nothing to train on.
    """
    parameters = _parameters(optimizer)
    phase, before = config.phase_of(epoch)
    count = stage.batches_per_epoch(epoch)
    steps = math.ceil(count / config.accumulate)  # an epoch
    step = before * steps
    torch.manual_seed(config.seed * SEED_STRIDE + epoch + job.rank * RANK_STRIDE)
    stage.set_training(True)
    compute_loss = compute_loss or stage.loss

    def update(batches: int) -> None:
        """Take one step with the gradients of so many batches."""
        factor = phase.rate * learning_rate_factor(step, steps * phase.epochs, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        for parameter in parameters if batches > 1 else ():
            if parameter.grad is not None:
                parameter.grad /= batches
        norm = nn.utils.clip_grad_norm_(parameters, config.clip).item()
        if not math.isfinite(norm):  # a step along it would spoil the weights
            raise LossError(
                f"the gradient is {norm} in epoch {epoch}; a lower learning rate may help"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update()

    loss_sum, tokens_sum, pending = 0.0, 0.0, 0
    bar = progress_bar(
        stage.batches(epoch),
        total=count,
        desc=f"epoch {epoch}",
        unit="batch",
        leave=False,
    )
    for batch in bar:
        with autocast(stage.device, config.precision):
            loss, tokens = compute_loss(batch)
        batch_loss, batch_tokens = job.add_up(loss.item(), tokens)
        loss_sum += batch_loss
        tokens_sum += batch_tokens
        if not math.isfinite(loss_sum):
            raise LossError(
                f"the loss is {loss_sum} in epoch {epoch}; a lower learning rate may help"
            )
        # The gradient of a job is the mean over its processes.
        (loss / ((phase.divisor or batch_tokens) / job.size)).backward()
        pending += 1
        if pending == config.accumulate:
            update(pending)
            step, pending = step + 1, 0
            bar.set_postfix(loss=f"{loss_sum / tokens_sum:.3f}", refresh=False)
    if pending:
        update(pending)
    if not tokens_sum:
        raise LossError("no training picture could be read")
    return loss_sum / tokens_sum
