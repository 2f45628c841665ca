"""Stage 3: what learns and what does not, augmentation, resuming, the model it leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from commands import invoke
from drawn_run import DrawnRun
from same_weights import assert_same_weights
from torch import nn

import caption
import evaluate
import extract_features
import finetune_joint as command
from pipeline import Captioner
from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.images import read_square
from pipeline.features.cache import FeatureCache
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.training.finetune import may_flip, settings_to_start_from
from pipeline.training.joint_stage import _InThreads
from pipeline.training.run_folder import read_epochs
from pipeline.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny_inception")

FAST = ["--batch-size", "8", "--unfreeze-from", "Mixed_7c", "--device", "cpu"]


def finetune(drawn_run: DrawnRun, run: Path, *arguments: object, code: int = 0) -> Result:
    options = ["--start", drawn_run.run, "--run", run, *FAST, *arguments]
    return invoke(command.main, *options, code=code)


@pytest.fixture(scope="module")
def joint_run(drawn_run: DrawnRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of fine-tuning of the last block."""
    run = tmp_path_factory.mktemp("joint") / "run"
    finetune(drawn_run, run, "--epochs", 3)
    return run


def test_only_the_unfrozen_block_learns_and_statistics_stay(
    drawn_run: DrawnRun, joint_run: Path
) -> None:
    before = torch.load(drawn_run.weights, weights_only=True)
    after = load_checkpoint(joint_run / "last.safetensors").encoder_weights
    before = {name: value for name, value in before.items() if "num_batches" not in name}
    assert after is not None and after.keys() == before.keys()
    for name, value in before.items():
        changed = not torch.equal(value, after[name])
        frozen = not name.startswith("Mixed_7c") or "running_" in name
        assert changed != frozen, name


def test_log_begins_with_the_scores_of_the_start(drawn_run: DrawnRun, joint_run: Path) -> None:
    log = read_epochs(joint_run / "log.jsonl")
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    start = load_checkpoint(drawn_run.run).scores
    assert log[0]["val_loss"] == pytest.approx(start["val_loss"], abs=0.02)
    best = load_checkpoint(joint_run)
    assert best.scores["CIDEr-D"] == max(line["CIDEr-D"] for line in log)


def test_the_result_captions_by_itself(scenes: list[Path], joint_run: Path, tmp_path: Path) -> None:
    """No data set, no weights file, another folder."""
    model = tmp_path / "model.safetensors"
    shutil.copy(joint_run / "last.safetensors", model)
    image = shutil.copy(scenes[0], tmp_path)
    assert invoke(caption.main, "--model", model, image).stdout.startswith(f"{image}\t")


def test_reranking_uses_features_of_the_fine_tuned_encoder(
    drawn_run: DrawnRun, joint_run: Path
) -> None:
    """Predictor and matcher are made of features as the model's own encoder gives them."""
    before, after = load_checkpoint(drawn_run.run), load_checkpoint(joint_run)
    assert before.predictor is not None and after.predictor is not None
    assert torch.equal(after.predictor.keys, before.predictor.keys)
    table = read_captions(drawn_run.data)
    paths = [drawn_run.data / "Images" / Path(i.name).name for i in table.of_split("train")]
    captioner = Captioner.load(joint_run, device="cpu")
    features = torch.from_numpy(captioner.encoder.encode([read_square(path) for path in paths]))
    with torch.no_grad():
        images = captioner.decoder.embed_image(features)[0][:, 0]
    assert torch.allclose(images.mean(0), after.predictor.mean[0], atol=1e-2)
    assert after.matcher is not None
    assert torch.equal(after.matcher.feature_mean, captioner.decoder.feature_mean)


def test_a_kill_before_the_matcher_is_trained_is_made_good(
    drawn_run: DrawnRun, joint_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(joint_run, tmp_path / "run")
    whole = load_checkpoint(run)
    save_checkpoint(run / "best.safetensors", replace(whole, predictor=None, matcher=None))
    assert "finished with epoch 3" in finetune(drawn_run, run, "--epochs", 3).stderr
    again = load_checkpoint(run)
    assert whole.matcher is not None and again.matcher is not None
    assert_same_weights(whole.matcher.state_dict(), again.matcher.state_dict())
    assert whole.predictor is not None and again.predictor is not None
    assert torch.equal(whole.predictor.weights, again.predictor.weights)


def test_evaluate_encodes_with_the_model_or_reads_its_own_cache(
    drawn_run: DrawnRun, joint_run: Path, tmp_path: Path
) -> None:
    """Scores from images equal those from a cache that the tuned encoder made."""
    last, features = joint_run / "last.safetensors", tmp_path / "tuned.h5"
    common = ["--weights", last, "--output", features, "--device", "cpu"]
    invoke(extract_features.main, "--data", drawn_run.data, *common)
    assert FeatureCache(features).identity.mismatch(load_checkpoint(last).encoder) is None
    scores: list[dict[str, float]] = []
    for more in ([], ["--features", features]):
        output = tmp_path / str(len(scores)) / "predictions.json"
        words = [last, "--output", output, "--device", "cpu", "--no-java", *more]
        invoke(evaluate.main, *words)
        scores.append(json.loads((output.parent / "scores.json").read_text())["scores"])
    assert scores[0]["CIDEr-D"] == pytest.approx(scores[1]["CIDEr-D"], abs=0.5)


def test_stopped_and_resumed_equals_undisturbed(
    drawn_run: DrawnRun, joint_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.training.joint_stage as joint

    run = tmp_path / "run"
    original = joint.JointStage.loss
    calls = 0

    def failing(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the second epoch of three batches
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(joint.JointStage, "loss", failing)
    finetune(drawn_run, run, "--epochs", 3, code=130)
    assert load_checkpoint(run / "last.safetensors").epoch == 1
    monkeypatch.setattr(joint.JointStage, "loss", original)
    finetune(drawn_run, run, "--epochs", 3)
    for name in ("last.safetensors", "best.safetensors"):
        whole, resumed = load_checkpoint(joint_run / name), load_checkpoint(run / name)
        assert whole.encoder_weights is not None and resumed.encoder_weights is not None
        assert_same_weights(whole.encoder_weights, resumed.encoder_weights)
        assert_same_weights(whole.decoder_weights, resumed.decoder_weights)


@pytest.mark.parametrize("number", [0, 8])
def test_a_broken_image_is_left_out_and_named(
    drawn_run: DrawnRun, tmp_path: Path, number: int
) -> None:
    """Number 0 is in train, number 8 in val."""
    data = shutil.copytree(drawn_run.data, tmp_path / "scenes")
    broken = sorted((data / "Images").iterdir())[number]
    broken.write_bytes(broken.read_bytes()[:500])
    result = finetune(drawn_run, tmp_path / "run", "--epochs", 1, "--data", data, code=1)
    assert f"failed: {broken}: " in result.stderr


def test_a_run_in_progress_does_not_need_the_run_it_started_from(joint_run: Path) -> None:
    settings = settings_to_start_from(joint_run, ["gone"], force=False)
    assert settings["unfreeze_from"] == "Mixed_7c"
    with pytest.raises(UserError, match="gone"):
        settings_to_start_from(joint_run, ["gone"], force=True)


def test_wrong_commands(drawn_run: DrawnRun, tmp_path: Path) -> None:
    for arguments, message in (
        (["--unfreeze-from", "Mixed_9z"], "Mixed_7a"),
        (["--data", tmp_path], "caption"),
        (["--start", tmp_path / "none"], "no such checkpoint"),
        (["--run", drawn_run.run, "--force"], "give another folder"),
    ):
        assert message in finetune(drawn_run, tmp_path / "run", *arguments, code=2).stderr
    assert not (tmp_path / "run").exists()
    assert (drawn_run.run / "best.safetensors").is_file()


def test_an_image_whose_captions_mention_sides_is_not_flipped() -> None:
    assert may_flip(["a dog runs", "brightly coloured birds"])
    assert not may_flip(["a dog runs", "A dog on the LEFT of a man"])
    assert not may_flip(["the man right of the car"])
    assert not may_flip(["a right-handed pitcher", "a man"])


def test_parts_in_threads_have_the_gradients_of_the_whole() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)).double()
    pixels = torch.randn(7, 3, 5, 5).double()
    trained = list(layers.parameters())
    gradients = []
    for features in (layers(pixels), _InThreads.apply(layers, pixels.split(3), *trained)):
        gradients.append(torch.autograd.grad(features.square().sum(), trained))
    torch.testing.assert_close(*gradients)
