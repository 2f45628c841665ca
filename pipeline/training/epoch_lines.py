"""What the terminal shows of an epoch: losses and scores in a line, now and then a caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.utils.progress import duration

SAMPLE_EVERY = 5  # epochs, between captions


def shows_sample(epoch: int, epochs: int) -> bool:
    """Tell whether a caption is shown after ``epoch`` of ``epochs``."""
    return epoch in (1, epochs) or epoch % SAMPLE_EVERY == 0


def epoch_line(log: Sequence[Mapping[str, float]], epochs: int, better: bool) -> str:
    """Sum the last epoch of ``log`` up in one line for the terminal."""
    record = log[-1]
    parts = [f"epoch {record['epoch']:>{len(str(epochs))}.0f}/{epochs}"]
    if "reward" in record:
        parts.append(f"reward {record['reward']:9.1f}")
    elif "train_loss" in record:
        parts.append(f"train loss {record['train_loss']:.3f}")
    else:
        parts.append("before training ")
    parts.append(f"val loss {record['val_loss']:.3f}")
    parts += [f"{name} {record[name]:5.1f}" for name in ("BLEU-4", "CIDEr-D")]
    parts.append(f"{duration(_seconds(record)):>6}")
    # The last few alone: epochs may grow slower, by other work or when they get self-critical.
    recent = [_seconds(record) for record in log[-5:] if record["epoch"]]
    if recent:
        left = epochs - record["epoch"]
        seconds = left * sum(recent) / len(recent)
        parts[-1] += f", {duration(seconds):>5} left" if left else ", done"
    return "  ".join(parts) + ("  best so far" if better else "")


def _seconds(record: Mapping[str, float]) -> float:
    return record.get("seconds", 0.0) + record["validation_seconds"]


def sample_line(samples: Mapping[str, str], epoch: int) -> str:
    """Show the caption of one of the images, which take turns."""
    name, caption = list(samples.items())[epoch // SAMPLE_EVERY % len(samples)]
    return f'    {name}: "{caption}"'
