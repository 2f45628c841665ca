"""Everything that runs on a GPU, against the same on the CPU; skipped where torch finds none."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy
import pytest
import torch
from click.testing import Result
from commands import invoke
from conftest import REPOSITORY, draw
from drawn_run import DrawnRun
from small_data import make_small_data

import caption
import evaluate
import extract_features
import finetune_joint
import train_decoder
from pipeline.datasets.images import read_square
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.search import search
from pipeline.features.cache import FeatureCache
from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.encoder import load_encoder
from pipeline.training.decoder_stage import DecoderStage
from pipeline.training.run_folder import read_epochs
from pipeline.training.validation import Validation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU")

DEVICE = "cuda"
SMALL = "--embed-size 24 --hidden-size 24 --min-count 1 --batch-size 32"
SURE = "--dropout 0 --feature-dropout 0"


@pytest.fixture
def ieee_fp32() -> Iterator[None]:
    """Multiply fp32 numbers as they are; torch rounds them to 10 bits for cuDNN (TF32)."""
    usual = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = usual


def run(command: click.Command, options: str, device: str = DEVICE, code: int = 0) -> Result:
    return invoke(command, *options.split(), "--device", device, code=code)


def log_of(run: Path) -> list[dict[str, Any]]:
    return read_epochs(run / "log.jsonl")


@pytest.mark.parametrize(
    ("precision", "closest"), [("fp32", 0.9999), ("bf16", 0.99), ("fp16", 0.999)]
)
def test_features_are_those_of_the_cpu(tmp_path: Path, precision: str, closest: float) -> None:
    squares = [read_square(draw(tmp_path / f"{n}.png", n, (320, 240))) for n in range(6)]
    encoders = load_encoder("random"), load_encoder("random", precision).to(DEVICE)
    there, here = (torch.from_numpy(e.for_inference().encode(squares)) for e in encoders)
    assert torch.cosine_similarity(there, here).min() > closest


@pytest.mark.parametrize("workers", [1, 4])
def test_extraction_goes_on_and_a_image_is_where_it_belongs(tmp_path: Path, workers: int) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache.h5"
    for number in range(7):
        draw(data / f"{number}.png", number)
    (data / "broken.png").write_bytes(b"no image")
    options = f"--data {data} --weights random --batch-size 3 --workers {workers} --precision fp32"
    run(extract_features.main, f"{options} --output {cache}", code=1)
    for number in range(7, 10):
        draw(data / f"{number}.png", number)
    run(extract_features.main, f"{options} --output {cache}", code=1)
    run(extract_features.main, f"{options} --output {tmp_path / 'cpu.h5'}", "cpu", code=1)
    here, there = FeatureCache(cache), FeatureCache(tmp_path / "cpu.h5")
    names = [f"{number}.png" for number in range(10)]
    first, second = (torch.from_numpy(c.read(c.rows(names))) for c in (here, there))
    assert torch.cosine_similarity(first, second).min() > 0.9999
    assert int(here.rows(["broken.png"])[0]) >= 0


@pytest.mark.usefixtures("ieee_fp32")
def test_training_takes_the_steps_of_the_cpu(tmp_path: Path) -> None:
    data, features = make_small_data(tmp_path)
    options = f"--data {data} --features {features} --epochs 10 {SMALL} {SURE} --precision fp32"
    for device in (DEVICE, "cpu"):
        run(train_decoder.main, f"{options} --run {tmp_path / device}", device)
    for here, there in zip(log_of(tmp_path / DEVICE), log_of(tmp_path / "cpu"), strict=True):
        for name in ("train_loss", "val_loss"):
            assert here[name] == pytest.approx(there[name], abs=1e-4), (here["epoch"], name)


def test_a_run_in_bf16_learns_goes_on_and_is_read_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, features = make_small_data(tmp_path)
    options = (
        f"--data {data} --features {features} --embed-size 48 --hidden-size 48 --min-count 1 "
        "--batch-size 16 --lr 0.02 --epochs 14 --precision bf16 --self-critical-epochs 2"
    )
    run(train_decoder.main, f"{options} --run {tmp_path / 'whole'}")
    log = log_of(tmp_path / "whole")
    assert log[11]["train_loss"] < 0.75 * log[0]["train_loss"]
    assert log[13]["reward"] > 0

    whole = DecoderStage.validate
    calls = itertools.count(1)

    def validate(stage: DecoderStage) -> Validation:
        if next(calls) == 8:
            raise KeyboardInterrupt
        return whole(stage)

    monkeypatch.setattr(DecoderStage, "validate", validate)
    run(train_decoder.main, f"{options} --run {tmp_path / 'cut'}", code=130)
    ended = run(train_decoder.main, f"{options} --run {tmp_path / 'cut'}")
    assert "resuming after epoch 7" in ended.stderr
    for one, other in zip(log, log_of(tmp_path / "cut"), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)

    best = load_checkpoint(tmp_path / "cut")
    assert {value.device.type for value in best.decoder_weights.values()} == {"cpu"}
    here = run(evaluate.main, f"{tmp_path / 'cut'} --no-java")
    there = run(evaluate.main, f"{tmp_path / 'cut'} --no-java", "cpu")
    assert here.stdout == there.stdout


@pytest.mark.parametrize(
    "config",
    [
        SearchConfig(beam_size=1),
        SearchConfig(beam_size=3),
        SearchConfig(beam_size=4, sampling=True, temperature=0.7, top_p=0.9),
    ],
    ids=["greedy", "beam", "sampling"],
)
@pytest.mark.usefixtures("ieee_fp32")
def test_captions_are_those_of_the_cpu(drawn_run: DrawnRun, config: SearchConfig) -> None:
    decoder = load_checkpoint(drawn_run.run).build_decoder().eval()
    cache = FeatureCache(drawn_run.features)
    features = torch.from_numpy(cache.read(numpy.arange(len(cache))))
    expected = search(decoder, features, config)
    found = search(decoder.to(DEVICE), features.to(DEVICE), config)
    same = [
        [hypothesis.tokens for hypothesis in group] == [hypothesis.tokens for hypothesis in other]
        for group, other in zip(expected, found, strict=True)
    ]
    assert sum(same) >= 0.9 * len(same)  # a tie may fall the other way


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_moves_what_is_unfrozen_and_its_model_captions_on_both(
    drawn_run: DrawnRun, tmp_path: Path, precision: str
) -> None:
    joint = tmp_path / "joint"
    options = (
        f"--start {drawn_run.run} --weights {drawn_run.weights} --run {joint} --epochs 3 "
        f"--batch-size 8 --encoder-lr 1e-4 --unfreeze-from Mixed_7a --precision {precision}"
    )
    run(finetune_joint.main, options)
    assert all(2 < record["val_loss"] < 5 for record in log_of(joint))
    before = load_encoder(str(drawn_run.weights)).trunk.state_dict()
    after = load_checkpoint(joint / "last.safetensors").encoder_weights
    assert after is not None
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"Mixed_7a", "Mixed_7b", "Mixed_7c"}
    images = drawn_run.data / "Images"
    here = run(caption.main, f"{images} --model {joint}").stdout.splitlines()
    there = run(caption.main, f"{images} --model {joint}", "cpu")
    same = [one == two for one, two in zip(here, there.stdout.splitlines(), strict=True)]
    assert sum(same) >= 0.9 * len(same)


def test_the_model_in_the_box_says_the_same_on_both(tmp_path: Path) -> None:
    if not (REPOSITORY / "data" / "pretrained" / "captioner.safetensors").is_file():
        pytest.skip("data/pretrained/captioner.safetensors is not here")
    for number in range(4):
        draw(tmp_path / f"{number}.png", number, (320, 240))
    here = run(caption.main, str(tmp_path)).stdout
    assert here == run(caption.main, str(tmp_path), "cpu").stdout


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Over NCCL where there are two GPUs; on one, which both share, over gloo."""
    data, features = make_small_data(tmp_path)
    options = f"--data {data} --features {features} --epochs 3 {SMALL} {SURE} --precision fp32"
    run(train_decoder.main, f"{options} --run {tmp_path / 'one'}")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = [*options.split(), "--run", str(tmp_path / "job"), "--device", DEVICE]
    ended = subprocess.run(
        [*launcher, "--nproc-per-node", "2", "--", "train_decoder.py", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    for alone, world in zip(log_of(tmp_path / "one"), log_of(tmp_path / "job"), strict=True):
        assert world["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-3)  # TF32
