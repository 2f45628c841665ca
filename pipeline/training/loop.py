"""The training loop of stages 2 and 3: ``train`` runs epochs, validates, saves and reports.

All randomness of an epoch (order, dropout, augmentation) depends on the seed and the epoch's number
alone. A run that was killed therefore resumes from its last epoch exactly as if it had never
stopped; on a CPU the weights are bit-identical.

Several processes (``distributed``) each take a share of every batch, and all take the same steps:
those of one process, except for rounding, and for dropout, which differs per process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.models.checkpoint import BEST, LAST, save_checkpoint
from pipeline.models.checkpoint_file import read_tensors, write_tensors
from pipeline.training.ema import EMA, parameters_of, restore_training_state, training_state
from pipeline.training.run_folder import (
    LOG,
    RESUME,
    SAMPLES,
    append_epoch,
    read_epochs,
    trim_epochs,
)
from pipeline.training.stage import (
    SEED_STRIDE,
    EpochCallback,
    Loss,
    LossError,
    Stage,
    TrainingConfig,
)
from pipeline.training.validation import Validation
from pipeline.utils.devices import autocast
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError
from pipeline.utils.files import check_writable
from pipeline.utils.progress import duration, progress_bar
from pipeline.utils.terminal import echo

RANK_STRIDE = 2_654_435_761  # between the random seeds of processes
SAMPLE_EVERY = 5  # epochs between the captions shown on the terminal


@dataclass
class Progress:
    """Where a run stands after an epoch; saved for resuming."""

    epoch: int = 0
    best_epoch: int = 0
    best_cider: float = -math.inf
    best_loss: float = math.inf

    def update(self, scores: Mapping[str, float]) -> bool:
        """Record the scores of ``epoch``; returns whether they are the best so far.

        Equal CIDEr-D is decided by val loss: with a single val image CIDEr-D is always 0, as no
        word is rarer than another.
        """
        better = (scores["CIDEr-D"], -scores["val_loss"]) > (self.best_cider, -self.best_loss)
        if better:
            self.best_epoch = self.epoch
            self.best_cider, self.best_loss = scores["CIDEr-D"], scores["val_loss"]
        return better


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """Return the factor on the learning rate at ``step`` of ``total``, counted from 0.

    Linear warm-up over the first ``warmup`` share, then half a cosine down to zero (Loshchilov and
    Hutter, arXiv 1608.03983).
    """
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


@dataclass
class Training:
    """The state of a running training, in the folder ``run``."""

    stage: Stage
    run: Path
    config: TrainingConfig
    callbacks: Sequence[EpochCallback]
    world: World

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.stage)
        self.parameters = parameters_of(self.optimizer)
        self.ema = EMA(self.parameters, self.config.ema_decay)
        self.progress = Progress()

    def resume(self) -> bool:
        """Restore optimizer, EMA and progress of the last epoch, if one was saved."""
        path = self.run / RESUME
        saved = self.world.broadcast(lambda: read_tensors(path) if path.is_file() else None)
        if saved is not None:
            tensors, document = saved
            try:
                self.progress = Progress(**document["progress"])
                steps = int(document["ema_steps"])
                restore_training_state(tensors, steps, self.optimizer, self.ema)
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(
                    f"{path}: the training state is damaged ({error}); --force starts over"
                ) from error
            if self.progress.epoch:
                echo(f"{self.run}: resuming after epoch {self.progress.epoch}", err=True)
        if self.world.rank == 0:
            check_writable(path)
            for name in (LOG, SAMPLES):
                trim_epochs(self.run / name, -1 if saved is None else self.progress.epoch)
        return saved is not None

    def finish_epoch(self, record: dict[str, float]) -> None:
        """Validate the averaged weights, save and report."""
        began = time.perf_counter()
        self.ema.swap()
        self.stage.set_training(False)
        found = self.stage.validate()
        if not math.isfinite(found.scores["val_loss"]):
            raise LossError(
                f"the loss on val is {found.scores['val_loss']} after epoch "
                f"{self.progress.epoch}; a lower learning rate may help"
            )
        better = self.progress.update(found.scores)
        if self.world.rank == 0:
            self.save(record, found, better, began)
        self.ema.swap()

    def save(self, record: dict[str, float], found: Validation, better: bool, began: float) -> None:
        """Save an epoch; what resuming reads is written last, so that a kill repeats the epoch."""
        if not self.run.is_dir():  # a new folder would lack the earlier files
            raise UserError(f"{self.run}: is gone; the same command starts the run anew")
        epoch = self.progress.epoch
        checkpoint = self.stage.checkpoint(epoch, found.scores)
        if better:
            save_checkpoint(self.run / BEST, checkpoint)
        record = {"epoch": epoch, **record, **found.scores}
        record["validation_seconds"] = round(time.perf_counter() - began, 2)
        append_epoch(self.run / LOG, record)
        append_epoch(self.run / SAMPLES, {"epoch": epoch, "captions": found.samples})
        for callback in self.callbacks:
            callback(record, found.samples)
        save_checkpoint(self.run / LAST, checkpoint)
        write_tensors(
            self.run / RESUME,
            training_state(self.optimizer, self.ema),
            {"progress": asdict(self.progress), "ema_steps": self.ema.steps},
        )
        print_epoch(read_epochs(self.run / LOG), self.config.epochs, better, found.samples)


def train(
    stage: Stage,
    run: Path,
    config: TrainingConfig,
    score_start: bool = False,
    callbacks: Sequence[EpochCallback] = (),
    world: World = SINGLE_PROCESS,
) -> Progress:
    """Train ``stage`` in the folder ``run``, from the start or from where it stopped.

    Args:
        stage: model, data and loss.
        run: the run folder, which rank 0 alone reads and writes.
        config: how long and how fast to train.
        score_start: score the initial weights too, as epoch 0, so that the best checkpoint is
            never worse than the start.
        callbacks: called in rank 0 after every epoch, before it is saved for resuming.
        world: the processes that train together; each has to call this.

    Returns:
        The state at the end.

    Raises:
        UserError: the loss is not finite; the state to resume from is damaged; the folder cannot
            be written, or is gone.
    """
    training = Training(stage, run, config, callbacks, world)
    resumed = training.resume()
    progress = training.progress
    loss: Loss = stage.loss
    if world.size > 1:
        from pipeline.training.data_parallel import shared_loss

        loss = shared_loss(stage.loss, training.parameters, stage.device, world)
    try:
        if score_start and not resumed:
            training.finish_epoch({})
        while progress.epoch < config.epochs:
            if config.patience and progress.epoch - progress.best_epoch >= config.patience:
                echo(
                    f"no better CIDEr-D for {config.patience} epochs: stopped (--patience)",
                    err=True,
                )
                break
            progress.epoch += 1
            began = time.perf_counter()
            train_loss = train_epoch(
                stage, training.optimizer, config, progress.epoch, training.ema, world, loss
            )
            training.finish_epoch(
                {
                    "train_loss": train_loss,
                    **stage.extra_metrics(),
                    "learning_rate": training.optimizer.param_groups[0]["lr"],
                    "seconds": round(time.perf_counter() - began, 2),
                }
            )
    except LossError as error:
        raise UserError(f"{run}: {error}. Earlier epochs are saved") from error
    return progress


def make_optimizer(stage: Stage) -> torch.optim.Optimizer:
    """Return AdamW for a stage; each group keeps its full learning rate as ``initial_lr``."""
    groups = [{**group, "initial_lr": group["lr"]} for group in stage.parameter_groups()]
    fused = stage.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=fused)


def train_epoch(
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    epoch: int,
    ema: EMA | None = None,
    world: World = SINGLE_PROCESS,
    compute_loss: Loss | None = None,
) -> float:
    """Train on all captions once; returns the mean loss per token, in nats.

    ``compute_loss`` is the stage's, or for several processes that of ``data_parallel``.

    Raises:
        LossError: the loss or its gradient is not finite, or there was no batch.
    """
    parameters = parameters_of(optimizer)
    phase, before = config.phase_of(epoch)
    count = stage.batches_per_epoch(epoch)
    steps = math.ceil(count / config.grad_accum_steps)  # per epoch
    step = before * steps
    torch.manual_seed(config.seed * SEED_STRIDE + epoch + world.rank * RANK_STRIDE)
    stage.set_training(True)
    compute_loss = compute_loss or stage.loss

    def optimizer_step(batches: int) -> None:
        """Take one step with the mean gradient of this many batches."""
        factor = phase.lr_scale * learning_rate_factor(step, steps * phase.epochs, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        for parameter in parameters if batches > 1 else ():
            if parameter.grad is not None:
                parameter.grad /= batches
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        if not math.isfinite(norm):  # the step would spoil the weights
            raise LossError(
                f"the gradient is {norm} in epoch {epoch}; a lower learning rate may help"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update()

    loss_sum, tokens_sum, pending = 0.0, 0.0, 0
    batches = stage.batches(epoch)
    bar = progress_bar(batches, total=count, desc=f"epoch {epoch}", unit="batch", leave=False)
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
        # With several processes the gradient is the mean over them.
        (loss / ((phase.tokens_per_batch or batch_tokens) / world.size)).backward()
        pending += 1
        if pending == config.grad_accum_steps:
            optimizer_step(pending)
            step, pending = step + 1, 0
            bar.set_postfix(loss=f"{loss_sum / tokens_sum:.3f}", refresh=False)
    if pending:
        optimizer_step(pending)
    if not tokens_sum:
        raise LossError("no training image could be read")
    return loss_sum / tokens_sum


def print_epoch(
    log: Sequence[Mapping[str, float]], epochs: int, better: bool, samples: Mapping[str, str]
) -> None:
    """Print the last epoch of ``log`` as one line, and now and then a sample caption."""
    record = log[-1]
    epoch = int(record["epoch"])
    parts = [f"epoch {epoch:>{len(str(epochs))}}/{epochs}"]
    if "reward" in record:
        parts.append(f"reward {record['reward']:9.1f}")
    elif "train_loss" in record:
        parts.append(f"train loss {record['train_loss']:.3f}")
    else:
        parts.append("before training ")
    parts.append(f"val loss {record['val_loss']:.3f}")
    parts += [f"{name} {record[name]:5.1f}" for name in ("BLEU-4", "CIDEr-D")]
    parts.append(f"{duration(_seconds(record)):>6}")
    # Only the last few: epochs slow down when they become self-critical, or beside other work.
    recent = [_seconds(line) for line in log[-5:] if line["epoch"]]
    if recent:
        left = (epochs - epoch) * sum(recent) / len(recent)
        parts[-1] += f", {duration(left):>5} left" if epoch < epochs else ", done"
    echo("  ".join(parts) + ("  best so far" if better else ""), err=True)
    if samples and (epoch in (1, epochs) or epoch % SAMPLE_EVERY == 0):
        name, caption = list(samples.items())[epoch // SAMPLE_EVERY % len(samples)]
        echo(f'    {name}: "{caption}"', err=True)


def _seconds(record: Mapping[str, float]) -> float:
    return record.get("seconds", 0.0) + record["validation_seconds"]
