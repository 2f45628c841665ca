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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.models.checkpoint_checks import check_training
from pipeline.training.ema import EMA
from pipeline.training.epoch_lines import epoch_line, sample_line, shows_sample
from pipeline.training.run_folder import LOG, SAMPLES, append_epoch, read_epochs, trim_epochs
from pipeline.training.stage import EpochCallback, Loss, LossError, Stage, TrainingConfig
from pipeline.training.validation import Validation
from pipeline.utils.devices import autocast
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError
from pipeline.utils.files import check_writable
from pipeline.utils.progress import progress_bar
from pipeline.utils.terminal import echo

# A stride between the seeds of epochs that no one's choice of seeds will cross, and one between
# those of processes.
SEED_STRIDE = 1_000_003
RANK_STRIDE = 2_654_435_761


@dataclass
class Progress:
    """Where a run stands after an epoch; kept in ``last.pt``."""

    epoch: int = 0
    best_epoch: int = 0
    best_cider: float = -math.inf
    best_loss: float = math.inf

    def take(self, scores: dict[str, float]) -> bool:
        """Take in the scores of ``epoch``, and tell whether they are the best so far.

        They are by CIDEr-D, and by val loss where that is equal: with a single val image
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
    callbacks: Sequence[EpochCallback] = (),
    world: World = SINGLE_PROCESS,
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
    ema = EMA(parameters, config.ema_decay)

    last = run / "last.pt"
    saved = world.broadcast(lambda: _read_training(last) if last.is_file() else None)
    if saved is not None:
        try:
            check_training(saved, asdict(progress), optimizer, ema.others)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{last}: the checkpoint is damaged ({error}); --force starts over"
            ) from error
        optimizer.load_state_dict(saved["optimizer"])
        ema.load(saved.get("weights", []), saved.get("steps", 0))
        progress = Progress(**saved["progress"])
        if progress.epoch:
            echo(f"{run}: going on after epoch {progress.epoch}", err=True)
    if world.rank == 0:
        check_writable(last)
    for name in (LOG, SAMPLES) if world.rank == 0 else ():
        trim_epochs(run / name, progress.epoch if saved is not None else -1)
    loss: Loss = stage.loss
    if world.size > 1:
        from pipeline.training.data_parallel import shared_loss

        loss = shared_loss(stage, parameters, world)

    def finish_epoch(record: dict[str, float]) -> None:
        """Score, save and report."""
        began = time.perf_counter()
        ema.exchange()  # from here to the end the model has the averaged weights
        stage.set_training(False)
        found = stage.validate()
        if not math.isfinite(found.scores["val_loss"]):
            raise LossError(
                f"the loss on val is {found.scores['val_loss']} after epoch {progress.epoch}; a "
                "lower learning rate may help"
            )
        better = progress.take(found.scores)
        if world.rank == 0:
            save_epoch(record, found, better, began)
        ema.exchange()

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
        for watch in callbacks:
            watch(record, found.samples)
        checkpoint.training = {
            "optimizer": optimizer.state_dict(),
            "progress": asdict(progress),
            "weights": ema.others,
            "steps": ema.steps,
        }
        save_checkpoint(last, checkpoint)
        log = read_epochs(run / LOG)
        echo(epoch_line(log, config.epochs, better), err=True)
        if found.samples and shows_sample(progress.epoch, config.epochs):
            echo(sample_line(found.samples, progress.epoch), err=True)

    try:
        if score_start and saved is None:
            finish_epoch({})
        while progress.epoch < config.epochs:
            if config.patience and progress.epoch - progress.best_epoch >= config.patience:
                echo(
                    f"no better CIDEr-D for {config.patience} epochs: stopped (--patience)",
                    err=True,
                )
                break
            progress.epoch += 1
            began = time.perf_counter()
            train_loss = train_epoch(stage, optimizer, config, progress.epoch, ema, world, loss)
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
    ema: EMA | None = None,
    world: World = SINGLE_PROCESS,
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
    steps = math.ceil(count / config.grad_accum_steps)  # an epoch
    step = before * steps
    torch.manual_seed(config.seed * SEED_STRIDE + epoch + world.rank * RANK_STRIDE)
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
        if ema is not None:
            ema.update()

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
        batch_loss, batch_tokens = world.all_reduce(loss.item(), tokens)
        loss_sum += batch_loss
        tokens_sum += batch_tokens
        if not math.isfinite(loss_sum):
            raise LossError(
                f"the loss is {loss_sum} in epoch {epoch}; a lower learning rate may help"
            )
        # The gradient of a job is the mean over its processes.
        (loss / ((phase.divisor or batch_tokens) / world.size)).backward()
        pending += 1
        if pending == config.grad_accum_steps:
            update(pending)
            step, pending = step + 1, 0
            bar.set_postfix(loss=f"{loss_sum / tokens_sum:.3f}", refresh=False)
    if pending:
        update(pending)
    if not tokens_sum:
        raise LossError("no training image could be read")
    return loss_sum / tokens_sum
