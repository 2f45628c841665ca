"""The training loop of stages 2 and 3: ``train`` runs epochs, validates, saves and reports.

All randomness of an epoch (order, dropout, augmentation) depends only on the seed and the epoch
number. A killed run therefore resumes from its last epoch exactly as if it had never stopped; on a
CPU the weights are bit-identical.

Several processes (``distributed``) each take a share of every batch, and all take the same steps as
one process would, except for rounding and for dropout, which differs per process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.models.checkpoint import save_checkpoint
from pipeline.models.checkpoint_file import read_tensors, write_tensors
from pipeline.models.pretrained import BEST, LAST
from pipeline.training.ema import EMA, restore_training_state, training_state
from pipeline.training.run_folder import (
    LOG,
    RESUME,
    SAMPLES,
    append_epoch,
    read_epochs,
    record_session,
    trim_epochs,
)
from pipeline.training.stage import SEED_STRIDE, EpochCallback, Loss, LossError, Phase, Stage
from pipeline.training.validation import Validation
from pipeline.utils.devices import autocast
from pipeline.utils.errors import UserError
from pipeline.utils.files import check_writable
from pipeline.utils.progress import duration, progress_bar
from pipeline.utils.terminal import echo

WARMUP = 0.02  # share of a phase's steps over which the learning rate rises from zero
MAX_GRAD_NORM = 5.0  # gradients are clipped to it
RANK_STRIDE = 2_654_435_761  # between the random seeds of processes
SAMPLE_EVERY = 5  # epochs between the captions shown on the terminal
# Epochs whose CIDEr-D is below the highest by at most this fraction count as equal: on 1,000 images
# its standard error is 3.5 %.
CIDER_TOLERANCE = 0.05


@dataclass
class Progress:
    """Where a run stands after an epoch; saved for resuming."""

    epoch: int = 0
    best_epoch: int = 0
    best_cider: float = -math.inf
    best_loss: float = math.inf
    highest_cider: float = 0.0

    def update(self, scores: Mapping[str, float]) -> bool:
        """Record the scores of ``epoch``; return True if they are the best so far.

        Among epochs with nearly the highest CIDEr-D, the one with the lowest val loss is best: the
        loss is less noisy, and says more about the hypotheses that reranking chooses from.
        """
        cider, loss = scores["CIDEr-D"], scores["val_loss"]
        self.highest_cider = max(self.highest_cider, cider)
        enough = (1 - CIDER_TOLERANCE) * self.highest_cider
        better = cider >= enough and (loss < self.best_loss or self.best_cider < enough)
        if better:
            self.best_epoch, self.best_cider, self.best_loss = self.epoch, cider, loss
        return better


def learning_rate_factor(step: int, total: int) -> float:
    """Return the learning rate factor at ``step`` of ``total``, counted from 0.

    Linear warm-up, then half a cosine down to zero (Loshchilov and Hutter, arXiv 1608.03983).
    """
    rise = max(1, round(total * WARMUP))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


class Training:
    """A stage being trained in the folder ``run``."""

    def __init__(self, stage: Stage, run: Path, callbacks: Sequence[EpochCallback] = ()) -> None:
        self.stage, self.run, self.callbacks = stage, run, callbacks
        self.options, self.world = stage.options, stage.world
        self.phases = stage.phases()
        self.epochs = sum(phase.epochs for phase in self.phases)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(parameters), "lr": lr, "initial_lr": lr}
                for parameters, lr in stage.parameter_groups()
            ],
            weight_decay=self.options.weight_decay,
            fused=stage.device.type in ("cpu", "cuda"),
        )
        self.parameters: list[nn.Parameter] = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]
        self.ema = EMA(self.parameters, self.options.ema_decay)
        self.progress = Progress()
        self.loss: Loss = stage.loss
        if self.world.size > 1:
            from pipeline.training.data_parallel import shared_loss

            self.loss = shared_loss(stage.loss, self.parameters, stage.device, self.world)

    def resume(self) -> bool:
        """Restore the state after the last saved epoch; return False if there is none."""
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
                done = self.progress.epoch >= self.epochs
                state = "finished with" if done else "resuming after"
                echo(f"{self.run}: {state} epoch {self.progress.epoch}", err=True)
        if self.world.rank == 0:
            check_writable(path)
            for name in (LOG, SAMPLES):
                trim_epochs(self.run / name, -1 if saved is None else self.progress.epoch)
            if self.progress.epoch < self.epochs:
                record_session(self.run, self.progress.epoch, self.stage.device)
        return saved is not None

    def train_epoch(self, epoch: int) -> float:
        """Train on all captions once; return the mean loss per token, in nats.

        Raises:
            LossError: the loss or its gradient is not finite, or there was no batch.
        """
        stage, world = self.stage, self.world
        torch.manual_seed(self.options.seed * SEED_STRIDE + epoch + world.rank * RANK_STRIDE)
        stage.decoder.train()
        count = stage.batches_per_epoch(epoch)
        phase, factors = self._schedule(epoch, math.ceil(count / stage.grad_accum_steps))
        loss_sum, tokens_sum, pending = 0.0, 0.0, 0
        bar = progress_bar(
            stage.batches(epoch), total=count, desc=f"epoch {epoch}", unit="batch", leave=False
        )
        for batch in bar:
            with autocast(stage.device, self.options.precision):
                loss, tokens = self.loss(batch)
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
            if pending == stage.grad_accum_steps:
                self._optimizer_step(epoch, next(factors), pending)
                pending = 0
                bar.set_postfix(loss=f"{loss_sum / tokens_sum:.3f}", refresh=False)
        if pending:
            self._optimizer_step(epoch, next(factors), pending)
        if not tokens_sum:
            raise LossError("no training image could be read")
        return loss_sum / tokens_sum

    def _schedule(self, epoch: int, steps: int) -> tuple[Phase, Iterator[float]]:
        """Return the phase of an epoch, and the learning rate factor of each of its steps."""
        before = epoch - 1
        phases = iter(self.phases)
        phase = next(phases)
        while before >= phase.epochs:
            before -= phase.epochs
            phase = next(phases)
        return phase, (
            phase.lr_scale * learning_rate_factor(step, steps * phase.epochs)
            for step in range(before * steps, (before + 1) * steps)
        )

    def _optimizer_step(self, epoch: int, factor: float, batches: int) -> None:
        """Take one step with the mean gradient of this many batches."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        for parameter in self.parameters if batches > 1 else ():
            if parameter.grad is not None:
                parameter.grad /= batches
        norm = nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM).item()
        if not math.isfinite(norm):  # the step would spoil the weights
            raise LossError(
                f"the gradient is {norm} in epoch {epoch}; a lower learning rate may help"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()

    def finish_epoch(self, record: dict[str, float]) -> None:
        """Validate the averaged weights, save and report."""
        began = time.perf_counter()
        self.ema.swap()
        self.stage.decoder.eval()
        found = self.stage.validate()
        if not math.isfinite(found.scores["val_loss"]):
            raise LossError(
                f"the loss on val is {found.scores['val_loss']} after epoch "
                f"{self.progress.epoch}; a lower learning rate may help"
            )
        better = self.progress.update(found.scores)
        if self.world.rank == 0:
            self._save(record, found, better, began)
        self.ema.swap()

    def _save(
        self, record: dict[str, float], found: Validation, better: bool, began: float
    ) -> None:
        """Save an epoch; the resume state is written last, so a run killed here repeats it."""
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
        print_epoch(read_epochs(self.run / LOG), self.epochs, better, found.samples)


def default_patience(batches: int) -> int:
    """Return how many epochs of ``batches`` batches a run may go without a better score.

    On Flickr8k (235 batches), the best of 50 epochs was the 24th. With few images, scores stay
    flat for many short epochs at first, and stopping early saves little time.
    """
    return max(15, 2000 // batches)


def train(
    stage: Stage,
    run: Path,
    score_start: bool = False,
    callbacks: Sequence[EpochCallback] = (),
) -> Progress:
    """Train ``stage`` in the folder ``run``, from the start or from where it stopped.

    Every process of ``stage.world`` must call this; only rank 0 reads and writes the folder.

    Args:
        stage: model, data and loss.
        run: the run folder.
        score_start: also score the initial weights, as epoch 0, so that they remain the best
            checkpoint if training does not help.
        callbacks: called on rank 0 after every epoch, before it is saved for resuming.

    Raises:
        UserError: the loss is not finite; the state to resume from is damaged; the folder cannot
            be written, or is gone.
    """
    training = Training(stage, run, callbacks)
    resumed = training.resume()
    progress, patience = training.progress, stage.options.patience
    if patience is None:
        patience = default_patience(stage.batches_per_epoch(1))
    last_phase = training.epochs - [p.epochs for p in training.phases if p.epochs][-1]
    try:
        if score_start and not resumed:
            training.finish_epoch({})
        while progress.epoch < training.epochs:
            if patience and progress.epoch - max(progress.best_epoch, last_phase) >= patience:
                echo(f"no better epoch for {patience} epochs: stopped (--patience)", err=True)
                break
            progress.epoch += 1
            began = time.perf_counter()
            train_loss = training.train_epoch(progress.epoch)
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


def print_epoch(
    log: Sequence[Mapping[str, float]], epochs: int, better: bool, samples: Mapping[str, str]
) -> None:
    """Print the last epoch of ``log`` as one line, and occasionally a sample caption."""
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
    # Only the last few: epochs slow down when they become self-critical or the machine is busy.
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
