"""Training by several processes, with torchrun itself, against the same run of one process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from commands import invoke
from conftest import REPOSITORY
from drawn_run import DrawnRun
from drawn_run import run as run_here
from faulty_training import fixed_draws, with_faults
from forked import run_job
from small_data import make_small_data
from torch import Tensor

import train_decoder
from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.checkpoint_file import read_tensors
from pipeline.training import self_critical
from pipeline.training.decoder_stage import DecoderStage
from pipeline.training.run_folder import LOG, read_epochs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun's rendezvous needs libuv there")

FAULTY = Path("tests") / "helpers" / "faulty_training.py"
# No dropout, whose numbers each process draws for itself. 72 captions: the last batch of an
# epoch has a single one, and so the share of a second process is empty.
SMALL = (
    "--batch-size 71 --embed-size 24 --hidden-size 24 --min-count 1 --dropout 0 "
    "--feature-dropout 0 --device cpu --precision fp32"
).split()


def torchrun(processes: int, *options: str) -> list[str]:
    """Begin a command line; --, as torchrun would take --run for one of its own options."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(processes), *options, "--"]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(more or {})}


def run_command(
    launcher: list[str], script: str | Path, *arguments: str | Path, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, str(script), *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        env=environment(more),
    )


def losses(run: Path) -> dict[str, list[float]]:
    log = read_epochs(run / LOG)
    return {name: [record.get(name, 0.0) for record in log] for name in ("train_loss", "val_loss")}


def squares(state: dict[str, Tensor]) -> float:
    """Sum up Adam's means of the squares of gradients."""
    return sum(float(t.sum()) for name, t in state.items() if name.endswith("exp_avg_sq"))


def assert_close(
    one: Mapping[str, Tensor] | None, two: Mapping[str, Tensor] | None, tolerance: float, few: float
) -> None:
    """Compare tensors by name; a share ``few`` of the numbers may differ more, by ten times."""
    assert (one or {}).keys() == (two or {}).keys()
    if one and two:
        apart = torch.cat([(one[n].double() - two[n].double()).abs().flatten() for n in one])
        assert float((~(apart <= tolerance)).double().mean()) <= few
        assert float(apart.max()) <= (10 if few else 1) * tolerance


def assert_same_training(run: Path, other: Path, tolerance: float, few: float = 0.0) -> None:
    """Compare losses and scores of all epochs, all weights, and the optimizers' states.

    Where a gradient is rounding noise, Adam's step may have either sign, at the full learning
    rate: ``few`` is the share of weights that may differ by more than ``tolerance``.
    """
    for name, values in losses(run).items():
        assert values == pytest.approx(losses(other)[name], abs=tolerance), name
    for file in ("last.safetensors", "best.safetensors"):
        one, two = load_checkpoint(run / file), load_checkpoint(other / file)
        assert one.epoch == two.epoch
        for first, second in (
            (one.decoder_weights, two.decoder_weights),
            (one.encoder_weights, two.encoder_weights),
        ):
            assert_close(first, second, tolerance, few)
    states = [read_tensors(folder / "resume.safetensors") for folder in (run, other)]
    assert states[0][1].keys() == states[1][1].keys()
    assert_close(states[0][0], states[1][0], tolerance, few)
    # Adam's steps are the same for larger gradients; these would be seen here.
    assert squares(states[0][0]) == pytest.approx(squares(states[1][0]), rel=1e-3)


def assert_same_scores(run: Path, other: Path) -> None:
    scores = ("BLEU-4", "ROUGE-L", "CIDEr-D", "distinct")
    for one, two in zip(read_epochs(run / LOG), read_epochs(other / LOG), strict=True):
        assert [one[name] for name in scores] == [two[name] for name in scores]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    data, features = make_small_data(tmp_path_factory.mktemp("small"))
    return ("--data", data, "--features", features, *SMALL)


def test_two_processes_train_as_one(
    small: tuple[str | Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty steps on people's captions, and twenty on drawn ones; alone in this process."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--epochs", "17", "--self-critical-epochs", "2", "--cross-entropy-weight", "0")
    options = [*map(str, small), *more, "--run"]
    monkeypatch.setattr(self_critical, "sample", fixed_draws)
    alone = invoke(train_decoder.main, *options, one)
    assert not torch.distributed.is_initialized(), "a plain run joins no job"
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    codes = run_job(lambda: train_decoder.main([*options, str(two)]), logs)
    said = logs[0].read_text(encoding="utf-8")
    assert codes == [0, 0], said
    assert_same_training(one, two, 1e-5)
    assert_same_scores(one, two)
    assert losses(one)["train_loss"][0] - losses(one)["train_loss"][14] > 0.1, "it learns"
    epochs = [read_epochs(run / LOG)[15:] for run in (one, two)]
    rewards = [[record.get("reward") for record in log] for log in epochs]
    assert rewards[0] == pytest.approx(rewards[1]) and all(rewards[0])
    # The run folder is that of one process, and what is said is said once.
    assert sorted(path.name for path in two.iterdir()) == sorted(p.name for p in one.iterdir())
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
    assert (one / "predictions.json").read_bytes() == (two / "predictions.json").read_bytes()
    assert logs[1].read_text(encoding="utf-8") == ""
    printed = alone.stdout.splitlines()
    assert [line for line in said.splitlines() if line in printed] == printed
    assert [line[:12] for line in said.splitlines() if line.startswith("epoch")] == [
        f"epoch {epoch:2}/17 " for epoch in range(1, 18)
    ]


def test_an_error_of_one_process_is_shown_once(
    small: tuple[str | Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process loses its connection; what was saved is kept."""
    run = tmp_path / "run"
    monkeypatch.setenv("FAIL", "1:2")
    monkeypatch.setenv("FAULTS_DONE", str(tmp_path))
    monkeypatch.setattr(DecoderStage, "batches", with_faults)
    options = [*map(str, small), "--run", str(run), "--epochs", "3"]
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    assert run_job(lambda: train_decoder.main(options), logs) == [2, 2]
    said = [log.read_text(encoding="utf-8") for log in logs]
    assert said[1] == "Error: rank 1 spoiled epoch 2\n"
    assert "Error" not in said[0] and "Traceback" not in said[0]
    assert load_checkpoint(run / "last.safetensors").epoch == 1


def assert_one_error(ended: subprocess.CompletedProcess[str], message: str) -> None:
    assert ended.returncode == 1
    errors = re.findall(r"^Error: .*", ended.stderr, re.MULTILINE)
    assert len(errors) == 1 and message in errors[0], ended.stderr
    assert re.search(r"exitcode *: 2", ended.stderr)
    # torchrun's own traceback is the only one.
    assert 'faulty_training.py", line' not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name, value", [("--epochs", "many"), ("--min-count", "99")])
def test_an_error_of_all_processes_is_shown_once(
    small: tuple[str | Path, ...], tmp_path: Path, name: str, value: str
) -> None:
    ended = run_command(torchrun(2), FAULTY, *small, "--run", tmp_path / "run", name, value)
    assert_one_error(ended, name)


def wait_for_epochs(run: Path, epochs: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while len(read_epochs(run / LOG)) < epochs:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(1, 2), (3, 2)])
def test_another_number_of_processes_goes_on_with_a_run(
    small: tuple[str | Path, ...], tmp_path: Path, first: int, then: int
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    more = ("--epochs", "60")
    alone = run_command([sys.executable], "train_decoder.py", *small, *more, "--run", whole)
    assert alone.returncode == 0, alone.stderr
    launchers = {n: torchrun(n) if n > 1 else [sys.executable] for n in (first, then)}
    arguments = ["train_decoder.py", *map(str, small), *more, "--run", str(run)]
    process = subprocess.Popen(
        [*launchers[first], *arguments],
        cwd=REPOSITORY,
        env=environment(),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_for_epochs(run, 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    # Written last: a kill may come when last.safetensors is of the next epoch already.
    done = read_tensors(run / "resume.safetensors")[1]["progress"]["epoch"]
    ended = run_command(launchers[then], *arguments)
    assert ended.returncode == 0, ended.stderr
    assert 5 <= done + 1 < 60 and f"resuming after epoch {done}\n" in ended.stderr
    assert_same_training(whole, run, 1e-5)


@pytest.mark.slow
def test_killed_processes_are_restarted_and_end_as_undisturbed_to_the_bit(
    small: tuple[str | Path, ...], tmp_path: Path
) -> None:
    """With dropout and self-critical epochs, and with --force, which must not count again."""
    more = (
        "--epochs 12 --batch-size 8 --dropout 0.3 --ema-decay 0.9 --self-critical-epochs 4 --force"
    ).split()
    runs = [tmp_path / "whole", tmp_path / "killed"]
    for run, kill in zip(runs, ("", "1:4,0:7,2:10"), strict=True):
        faults = tmp_path / f"faults-{run.name}"
        faults.mkdir()
        ended = run_command(
            torchrun(3, "--max-restarts", "3"),
            *(FAULTY, *small, *more, "--run", run),
            KILL=kill,
            FAULTS_DONE=str(faults),
        )
        assert ended.returncode == 0, ended.stderr
        assert len(list(faults.iterdir())) == kill.count(":")
        for epoch in (3, 6, 9):
            assert (f"resuming after epoch {epoch}\n" in ended.stderr) == bool(kill)
    assert_same_training(runs[0], runs[1], 0.0)
    assert_same_scores(runs[0], runs[1])
    for name in ("samples.jsonl", "predictions.json", "scores.json", "curves.svg"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_fine_tune_as_one(drawn_run: DrawnRun, tmp_path: Path) -> None:
    """With broken images in train and val; three val images, for two processes."""
    start = tmp_path / "start"
    run_here(
        train_decoder.main,
        f"--data {drawn_run.data} --features {drawn_run.features} {' '.join(SMALL)} --epochs 3 "
        f"--run {start}",
    )
    data = tmp_path / "scenes"
    subprocess.run(["cp", "-r", str(drawn_run.data), str(data)], check=True)
    images = sorted((data / "Images").iterdir())
    for number in (0, 8):  # of train and of val
        images[number].write_bytes(images[number].read_bytes()[:500])
    common = (
        f"--start {start} --data {data} --epochs 2 --batch-size 5 --grad-accum-steps 2 "
        "--unfreeze-from Mixed_7c --device cpu --precision fp32"
    ).split()
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run_command([sys.executable], "finetune_joint.py", *common, "--run", one)
    ended = run_command(torchrun(2), "finetune_joint.py", *common, "--run", two)
    assert (alone.returncode, ended.returncode) == (1, 1), ended.stderr
    failed = [
        [line for line in shown.stderr.splitlines() if line.startswith("failed: /")]
        for shown in (alone, ended)
    ]
    assert len(failed[0]) == 2 and failed[0] == failed[1]
    assert_same_training(one, two, 1e-4, few=1e-5)
    assert_same_scores(one, two)
    matchers = [load_checkpoint(run).matcher for run in (one, two)]
    assert matchers[0] is not None and matchers[1] is not None
    assert sorted(path.name for path in two.iterdir()) == sorted(p.name for p in one.iterdir())
