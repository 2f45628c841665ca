"""The training loop: schedule, saving, resuming to the bit, and the whole command."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import invoke
from same_weights import assert_same_weights
from small_data import IDENTITY, make_small_data
from torch import Tensor, nn

import train_decoder as command
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.models.checkpoint import Checkpoint, load_checkpoint
from pipeline.models.checkpoint_file import read_tensors, write_tensors
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.reports.tensorboard import tensorboard_writer
from pipeline.training.loop import (
    Progress,
    default_patience,
    learning_rate_factor,
    print_epoch,
    train,
)
from pipeline.training.options import TrainingOptions
from pipeline.training.run_folder import append_epoch, open_run, read_epochs, trim_epochs
from pipeline.training.stage import Phase, Stage
from pipeline.training.validation import Validation
from pipeline.utils.errors import UserError

CHECKPOINTS = ("last.safetensors", "best.safetensors")
WORDS = Vocabulary.build([["a", "b", "c"]], min_count=1)


class ScriptedStage(Stage):
    """A stage with a tiny decoder, given batches, and the CIDEr-D of each epoch (or else 0)."""

    decoder: Decoder
    vocabulary = WORDS
    device = torch.device("cpu")

    def __init__(
        self,
        epochs: int = 3,
        ciders: Sequence[float] = (),
        batch_sizes: Sequence[int] = (4, 4),
        fail_in_epoch: int = 0,
        dropout: float = 0.3,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.decoder = Decoder(DecoderConfig(len(WORDS), 4, 4, dropout=dropout, feature_size=3))
        self.options = TrainingOptions(data="", features="", precision="fp32", **options)
        self.epochs, self.batch_sizes, self.fail_in_epoch = epochs, batch_sizes, fail_in_epoch
        self.ciders = iter(ciders)
        self.validations = 0

    def phases(self) -> Sequence[Phase]:
        return [Phase(self.epochs)]

    def parameter_groups(self) -> list[tuple[Iterable[nn.Parameter], float]]:
        return [(self.decoder.parameters(), 0.1)]

    def batches_per_epoch(self, epoch: int) -> int:
        return len(self.batch_sizes)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(epoch)
        for number, size in enumerate(self.batch_sizes):
            if epoch == self.fail_in_epoch and number == 1:
                raise KeyboardInterrupt
            features = torch.randn(size, 3, generator=generator)
            yield features, torch.tensor([[1, 4, 5, 2]] * size)

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return self.decoder.loss(*batch)

    def validate(self) -> Validation:
        self.validations += 1
        samples = {name: f"{name} in {self.validations}" for name in ("a.jpg", "b.jpg")}
        scores = {"val_loss": 1.0, "BLEU-4": 0.0, "CIDEr-D": next(self.ciders, 0.0)}
        return Validation(scores, samples)

    def checkpoint(self, epoch: int, scores: dict[str, float]) -> Checkpoint:
        return self._checkpoint(epoch, scores, IDENTITY)


def weights(path: Path) -> dict[str, Tensor]:
    return load_checkpoint(path).decoder_weights


def log_of(run: Path) -> list[dict[str, Any]]:
    return read_epochs(run / "log.jsonl")


def test_learning_rate_rises_and_falls_to_zero() -> None:
    factors = [learning_rate_factor(step, 500) for step in range(500)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[255] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))
    assert 0 < factors[-1] < 0.001


def test_every_phase_has_its_own_rise_and_fall(tmp_path: Path) -> None:
    class Watched(ScriptedStage):
        def phases(self) -> Sequence[Phase]:
            return Phase(3), Phase(2, lr_scale=0.1)

        def extra_metrics(self) -> dict[str, float]:
            return {"reward": 50.0}

    train(Watched(), tmp_path)
    log = log_of(tmp_path)
    # The rate of each epoch's last step: 2 batches per epoch, the stage's full rate is 0.1.
    last = [learning_rate_factor(step, 6) for step in (1, 3, 5)]
    last += [0.1 * learning_rate_factor(step, 4) for step in (1, 3)]
    assert [line["learning_rate"] for line in log] == pytest.approx([0.1 * f for f in last])
    assert [line["reward"] for line in log] == [50.0] * 5


def test_a_fixed_divisor_weighs_words_of_all_batches_alike(tmp_path: Path) -> None:
    class Divisor(ScriptedStage):
        def phases(self) -> Sequence[Phase]:
            return [Phase(2, tokens_per_batch=12.0)]

    class Equal(ScriptedStage):
        """Reports 12 tokens for every batch, as many as the larger one has."""

        def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
            return super().loss(batch)[0], 12

    for kind in (Divisor, Equal, ScriptedStage):
        train(kind(2, batch_sizes=(4, 2)), tmp_path / kind.__name__)
    divisor, equal, plain = (
        weights(tmp_path / name / "last.safetensors")
        for name in ("Divisor", "Equal", "ScriptedStage")
    )
    assert_same_weights(divisor, equal)
    assert any(not torch.equal(divisor[name], plain[name]) for name in plain)


def test_the_averaged_weights_are_the_model_and_the_trained_ones_go_on(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watched(ScriptedStage):
        def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in super().batches(epoch):
                seen.append(self.decoder.projection.weight.detach().clone())
                yield batch
            seen.append(self.decoder.projection.weight.detach().clone())

    stage, plain = Watched(2, ema_decay=0.6), ScriptedStage(2)
    mean = stage.decoder.projection.weight.detach().clone()
    train(stage, tmp_path / "mean")
    train(plain, tmp_path / "plain")
    # Averaging changes nothing of the training itself.
    assert torch.equal(stage.decoder.projection.weight, plain.decoder.projection.weight)
    trained = [seen[1], seen[2], seen[4], seen[5]]  # after each of the four steps
    for step, value in enumerate(trained, start=1):
        decay = min(0.6, step / (step + 9))
        mean = decay * mean + (1 - decay) * value
    saved = weights(tmp_path / "mean/last.safetensors")["projection.weight"]
    assert torch.allclose(saved, mean, atol=1e-6)
    assert not torch.allclose(mean, trained[-1], atol=1e-3)


def test_the_best_epoch_is_kept_beside_the_last(tmp_path: Path) -> None:
    progress = train(ScriptedStage(ciders=[10.0, 30.0, 20.0]), tmp_path)
    assert (progress.best_epoch, progress.best_cider) == (2, 30.0)
    assert load_checkpoint(tmp_path).epoch == 2
    assert load_checkpoint(tmp_path / "last.safetensors").epoch == 3
    log = log_of(tmp_path)
    assert [(line["epoch"], line["CIDEr-D"]) for line in log] == [(1, 10), (2, 30), (3, 20)]
    assert log[0]["train_loss"] > log[2]["train_loss"]


@pytest.mark.parametrize(
    ("ciders", "losses", "best"),
    [
        ([40.0, 44.0, 43.0, 43.0], [3.2, 3.0, 2.9, 2.95], 3),  # nearly equal: the lowest loss
        ([40.0, 44.0, 41.0], [3.2, 3.0, 2.9], 2),  # far lower
        ([10.0, 20.0, 30.0], [3.0, 3.1, 3.2], 3),  # higher, though the loss rises: few images
        ([10.0, 10.4, 10.8], [3.0, 3.1, 3.2], 3),  # the first is no longer nearly equal
        ([0.0, 0.0, 0.0], [3.0, 2.0, 2.5], 2),  # CIDEr-D of a single val image is always 0
    ],
)
def test_nearly_equal_cider_is_decided_by_the_loss(
    ciders: list[float], losses: list[float], best: int
) -> None:
    progress = Progress()
    for epoch, (cider, loss) in enumerate(zip(ciders, losses, strict=True), start=1):
        progress.epoch = epoch
        better = progress.update({"CIDEr-D": cider, "val_loss": loss})
        assert better == (progress.best_epoch == epoch)
    assert progress.best_epoch == best


def test_patience_stops_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    progress = train(ScriptedStage(5, [5.0, 9.0, 8.0, 7.0, 99.0], patience=2), tmp_path)
    assert progress.epoch == 4 and progress.best_epoch == 2


def test_by_default_patience_depends_on_the_batches_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (default_patience(235), default_patience(4)) == (15, 500)
    monkeypatch.setattr("pipeline.training.loop.default_patience", lambda batches: batches)
    assert train(ScriptedStage(5, [5.0, 9.0, 8.0, 7.0, 99.0]), tmp_path).epoch == 4


def test_patience_does_not_run_out_before_the_self_critical_epochs(tmp_path: Path) -> None:
    class Phases(ScriptedStage):
        def phases(self) -> Sequence[Phase]:
            return Phase(4), Phase(3)

    stage = Phases(7, [9.0, 8.0, 8.0, 8.0, 7.0, 7.0, 99.0], patience=2)
    assert train(stage, tmp_path).epoch == 6


def test_start_is_scored_when_asked_and_kept_when_better(tmp_path: Path) -> None:
    stage = ScriptedStage(2, [50.0, 40.0, 45.0])
    start = {k: v.clone() for k, v in stage.decoder.state_dict().items()}
    assert train(stage, tmp_path, score_start=True).best_epoch == 0
    assert_same_weights(weights(tmp_path / "best.safetensors"), start)


@pytest.mark.parametrize("epoch", [1, 2, 4])
@pytest.mark.parametrize("ema_decay", [0.0, 0.6])
def test_interrupted_and_resumed_equals_undisturbed(
    tmp_path: Path, epoch: int, ema_decay: float
) -> None:
    scores = [1.0, 4.0, 3.0, 5.0]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(ScriptedStage(4, scores, ema_decay=ema_decay), whole)
    with pytest.raises(KeyboardInterrupt):
        train(ScriptedStage(4, scores, fail_in_epoch=epoch, ema_decay=ema_decay), broken)
    train(ScriptedStage(4, scores[epoch - 1 :], ema_decay=ema_decay), broken)
    for name in CHECKPOINTS:
        assert_same_weights(weights(whole / name), weights(broken / name))
    assert [line["epoch"] for line in log_of(broken)] == [1, 2, 3, 4]


def test_a_kill_before_the_training_state_is_written_repeats_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [1.0, 4.0, 3.0]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(ScriptedStage(ciders=scores, ema_decay=0.9), whole)
    written = []

    def killed(path: Path, *content: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        write_tensors(path, *content)

    monkeypatch.setattr("pipeline.training.loop.write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        train(ScriptedStage(ciders=scores, ema_decay=0.9), broken)
    assert load_checkpoint(broken / "last.safetensors").epoch == 2
    train(ScriptedStage(ciders=scores[1:], ema_decay=0.9), broken)
    for name in (*CHECKPOINTS, "resume.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


@pytest.mark.parametrize("change", ["shape", "nan", "missing", "progress"])
def test_a_damaged_training_state_is_one_line(tmp_path: Path, change: str) -> None:
    train(ScriptedStage(1), tmp_path)
    path = tmp_path / "resume.safetensors"
    tensors, document = read_tensors(path)
    if change == "shape":
        tensors["0.exp_avg"] = torch.zeros(2)
    elif change == "nan":
        tensors["0.weight"].fill_(torch.nan)
    elif change == "missing":
        del tensors["0.exp_avg_sq"]
    else:
        document["progress"] = {"era": 3}
    write_tensors(path, tensors, document)
    with pytest.raises(UserError, match=r"resume\.safetensors: the training state is damaged"):
        train(ScriptedStage(1), tmp_path)


def test_an_epoch_logged_but_not_saved_is_not_logged_twice(tmp_path: Path) -> None:
    train(ScriptedStage(2), tmp_path)
    files = [tmp_path / name for name in ("log.jsonl", "samples.jsonl")]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.write_text(file.read_text() + json.dumps({"epoch": 3, "captions": {}}) + "\n")
    train(ScriptedStage(2), tmp_path)
    assert [file.read_bytes() for file in files] == before


def test_the_terminal_shows_every_epoch_and_some_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(ScriptedStage(12, [float(epoch) for epoch in range(12)]), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line[:11] for line in epochs[8:]] == [
        "epoch  9/12",
        *(f"epoch {epoch}/12" for epoch in (10, 11, 12)),
    ]
    assert len({line.index("CIDEr-D") for line in epochs}) == 1, "in columns"
    assert all(line.endswith(" left  best so far") for line in epochs[:-1])
    assert " done" in epochs[-1]
    captions = [line for line in lines if not line.startswith("epoch")]
    assert captions == [
        '    a.jpg: "a.jpg in 1"',
        '    b.jpg: "b.jpg in 5"',
        '    a.jpg: "a.jpg in 10"',
        '    a.jpg: "a.jpg in 12"',
    ]


def test_an_epoch_that_takes_no_time_is_not_the_last_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = {"val_loss": 1.0, "BLEU-4": 2.0, "CIDEr-D": 3.0}
    log = [{"epoch": 1, "seconds": 0.0, "validation_seconds": 0.0, **scores}]
    print_epoch(log, 2, better=False, samples={})
    print_epoch(log, 1, better=False, samples={})
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith("0.0 s left") and last.endswith("done")


def test_callbacks_see_every_epoch_before_it_is_saved(tmp_path: Path) -> None:
    """So a kill in one repeats the epoch, and no epoch is left out."""
    seen: list[tuple[float, str, int]] = []

    def watch(record: Mapping[str, float], samples: Mapping[str, str]) -> None:
        last = tmp_path / "last.safetensors"
        saved = load_checkpoint(last).epoch if last.is_file() else 0
        seen.append((record["epoch"], samples["a.jpg"], saved))

    train(ScriptedStage(), tmp_path, callbacks=[watch])
    assert seen == [(epoch, f"a.jpg in {epoch}", epoch - 1) for epoch in (1, 2, 3)]


def test_accumulated_small_batches_equal_one_large_batch(tmp_path: Path) -> None:
    class Halves(ScriptedStage):
        grad_accum_steps = 2

        def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            for features, captions in super().batches(epoch):
                yield from zip(features.split(4), captions.split(4), strict=True)

        def batches_per_epoch(self, epoch: int) -> int:
            return 2 * len(self.batch_sizes)

    for kind in (ScriptedStage, Halves):
        train(kind(2, batch_sizes=(8, 8), dropout=0.0), tmp_path / kind.__name__)
    large, small = (
        weights(tmp_path / name / "last.safetensors") for name in ("ScriptedStage", "Halves")
    )
    for name in large:
        assert torch.allclose(large[name], small[name], atol=1e-5), name


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", "the loss is inf in epoch 2"),
        ("gradient", "the gradient is nan in epoch 2"),
        ("val", "the loss on val is nan after epoch 2"),
    ],
)
@pytest.mark.parametrize("accumulated", [1, 3])  # 3: more than an epoch has batches
def test_what_is_no_number_stops_the_run_with_the_last_good_weights(
    tmp_path: Path, where: str, message: str, accumulated: int
) -> None:
    class Spoilt(ScriptedStage):
        """Spoils something in its second epoch, at the last batch."""

        grad_accum_steps = accumulated
        epoch = 0

        def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            self.epoch, self.number = epoch, itertools.count()
            return super().batches(epoch)

        def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
            loss, tokens = super().loss(batch)
            if self.epoch == 2 and next(self.number) == 1:
                if where == "gradient":
                    loss = loss.clone()
                    loss.register_hook(lambda gradient: gradient * float("nan"))
                elif where == "loss":
                    loss = loss / 0
            return loss, tokens

        def validate(self) -> Validation:
            found = super().validate()
            if where == "val" and self.epoch == 2:
                found.scores["val_loss"] = float("nan")
            return found

    class Sound(ScriptedStage):
        grad_accum_steps = accumulated

    run, whole = tmp_path / "run", tmp_path / "whole"
    with pytest.raises(
        UserError, match=f"{message}; a lower learning rate may help. Earlier epochs are saved"
    ):
        train(Spoilt(), run)
    assert load_checkpoint(run / "last.safetensors").epoch == 1
    for name in CHECKPOINTS:
        assert all(torch.isfinite(tensor).all() for tensor in weights(run / name).values())
    assert [line["epoch"] for line in log_of(run)] == [1]
    train(Sound(), run)
    train(Sound(), whole)
    assert_same_weights(weights(run / "last.safetensors"), weights(whole / "last.safetensors"))


# The run folder


def test_other_settings_are_refused_unless_forced(tmp_path: Path) -> None:
    settings = {"epochs": 2, "seed": 0}
    open_run(tmp_path, settings, force=False)
    train(ScriptedStage(1), tmp_path)
    open_run(tmp_path, settings, force=False)
    with pytest.raises(UserError, match=r"seed 0, not 1.*--run.*--force"):
        open_run(tmp_path, {**settings, "seed": 1}, force=False)
    # An option that the run's version of the program lacked has its default.
    open_run(tmp_path, {**settings, "patience": None}, force=False)
    (tmp_path / "config.json").write_text('{"epochs": 2, "seed": 0}')
    with pytest.raises(UserError, match="patience the default, not 3"):
        open_run(tmp_path, {**settings, "patience": 3}, force=False)
    for content in ("{", "[1]", "3"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config.json: not readable.*--force"):
            open_run(tmp_path, settings, force=False)
    for name in ("curves.svg", "curves.png", "report.html", "scores.json", "tensorboard/events"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    open_run(tmp_path, settings, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("force", [False, True])
def test_the_config_of_another_program_is_not_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"config\.json: is not of a training run; choose another"):
        open_run(tmp_path, {"epochs": 2}, force)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "bert"}'


def test_the_same_start_may_be_written_in_two_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"epochs": 1, "unfreeze_from": "Mixed_7a", "start": ("runs/a",)}
    open_run(tmp_path, settings, force=False)
    train(ScriptedStage(1), tmp_path)
    open_run(tmp_path, {**settings, "start": (str(tmp_path / "runs/a"),)}, force=False)
    with pytest.raises(UserError, match=r"start \[.*runs/a'\], not \['runs/b'\]"):
        open_run(tmp_path, {**settings, "start": ("runs/b",)}, force=False)


def test_epochs_are_added_and_dropped_whole(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for epoch in range(3):
        append_epoch(path, {"epoch": epoch, "captions": {"ä.jpg": "a line\u2028b"}})
    assert [line["epoch"] for line in read_epochs(path)] == [0, 1, 2]
    for last in (1, -1):
        trim_epochs(path, last)
        assert [line["epoch"] for line in read_epochs(path)] == list(range(last + 1))


# The command


def arguments(data: Path, features: Path, run: Path, *more: str) -> list[str]:
    """A command that trains in a second or two."""
    options = {
        "--data": data,
        "--features": features,
        "--run": run,
        "--epochs": 6,
        "--batch-size": 8,
        "--lr": 0.01,
        "--embed-size": 24,
        "--hidden-size": 24,
        "--dropout": 0.2,
        "--min-count": 1,
        "--device": "cpu",
    }
    return [str(part) for pair in options.items() for part in pair] + list(more)


def test_the_command_trains_to_good_captions_and_says_when_it_is_done(tmp_path: Path) -> None:
    data, features = make_small_data(tmp_path)
    run = tmp_path / "run"
    command_line = arguments(data, features, run, "--epochs", "40", "--seed", "1")
    invoke(command.main, *command_line)
    scores = json.loads((run / "scores.json").read_text())
    assert scores["split"] == "val" and scores["images"] == 12
    assert scores["scores"]["BLEU-2"] > 95, "colour and thing should be learned"
    predictions = json.loads((run / "predictions.json").read_text())
    assert {p["image_id"] for p in predictions} == {f"{n:04d}.jpg" for n in range(60) if n % 5 == 4}
    settings = json.loads((run / "config.json").read_text())
    assert settings["hidden_size"] == 24
    log = (run / "log.jsonl").read_text()
    assert "finished with epoch 40" in invoke(command.main, *command_line).output
    assert (run / "log.jsonl").read_text() == log
    other = arguments(data, features, run, "--epochs", "41")
    assert "epochs 40, not 41" in invoke(command.main, *other, code=2).output


def test_missing_things_are_named_in_one_line(tmp_path: Path) -> None:
    data, features = make_small_data(tmp_path)
    run = tmp_path / "run"
    for changed, message in (
        (arguments(tmp_path / "none", features, run), "none"),
        (arguments(data, tmp_path / "none.h5", run), "make it with extract_features.py"),
        (arguments(data, features, run, "--device", "cuda:9"), "--device"),
        (arguments(data, features, run, "--min-count", "1000"), "--min-count"),
        (arguments(data, features, run, "--self-critical-epochs", "6"), "--self-critical-epochs 6"),
    ):
        result = invoke(command.main, *changed, code=2)
        errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and message in errors[0]
        assert not (run / "last.safetensors").exists()


def test_tensorboard_gets_scores_and_captions_once_when_asked(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        train(
            ScriptedStage(ciders=[10.0, 30.0], fail_in_epoch=3),
            tmp_path,
            callbacks=[tensorboard_writer(tmp_path)],
        )
    # As if killed before the second epoch was saved: it comes again.
    tensorboard = tensorboard_writer(tmp_path)
    tensorboard({"epoch": 2, "CIDEr-D": 20.0}, {"a.jpg": "<b>again</b>"})
    train(ScriptedStage(ciders=[20.0]), tmp_path, callbacks=[tensorboard])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("CIDEr-D")]
    assert found == [(1, 10.0), (2, 20.0), (3, 20.0)]
    texts = {  # the last of a step; this reader purges no texts
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("captions/a.jpg/text_summary")
    }
    assert texts == {1: "a.jpg in 1", 2: "<b>again</b>", 3: "a.jpg in 1"}


def test_the_command_writes_for_tensorboard_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, features = make_small_data(tmp_path)
    run = tmp_path / "run"
    command_line = arguments(data, features, run, "--epochs", "1", "--tensorboard")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        result = invoke(command.main, *command_line, code=2)
    assert "--tensorboard: not installed; pip" in result.output
    assert not run.exists()
    pytest.importorskip("tensorboard")
    invoke(command.main, *command_line)
    assert len(list((run / "tensorboard").iterdir())) == 1
