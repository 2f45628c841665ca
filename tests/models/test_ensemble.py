"""Several decoders that caption together: their probabilities, their files, the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import invoke
from drawn_run import DrawnRun
from same_weights import assert_same_weights

import caption
import evaluate
import finetune_joint
from pipeline.datasets.vocabulary import END_ID, START_ID
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.search import search
from pipeline.models.checkpoint import load_checkpoint, load_ensemble, save_checkpoint
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.models.ensemble import Ensemble, make_decoder
from pipeline.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny_inception")

CONFIG = DecoderConfig(
    30,
    embed_size=8,
    hidden_size=12,
    feature_size=6,
    init_state_from_image=True,
    tie_embeddings=True,
    members=3,
)

SAME = ["--device", "cpu", "--beam-size", "10"]  # several decoders have more beams by default


def make_ensemble() -> Ensemble:
    torch.manual_seed(0)
    ensemble = make_decoder(CONFIG).eval()
    assert isinstance(ensemble, Ensemble)
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.mul_(3.0)  # surer of what they say
    return ensemble


@pytest.mark.parametrize("beams", [1, 3])
def test_probabilities_are_the_members_geometric_mean(beams: int) -> None:
    """Teacher-forced, member by member: another path to the same log-probability."""
    ensemble = make_ensemble()
    features = torch.randn(4, 6)
    found = search(ensemble, features, SearchConfig(beams, max_length=8))
    differs = False
    for image, hypotheses in zip(features, found, strict=True):
        for hypothesis in hypotheses:
            tokens = torch.tensor([[START_ID, *hypothesis.tokens]])
            told = torch.tensor([*hypothesis.tokens, END_ID]).unsqueeze(1)
            logs = []
            for member in ensemble.decoders:
                logits = member.project(member(image.unsqueeze(0), tokens))[0]
                logs.append(logits.log_softmax(-1))
            mean = torch.stack(logs).mean(0).log_softmax(-1).gather(1, told).sum().item()
            assert hypothesis.log_probability == pytest.approx(mean, abs=1e-3)
            differs |= abs(mean - logs[0].gather(1, told).sum().item()) > 0.1
    assert differs  # or the test could not fail


def test_every_member_learns_as_if_alone() -> None:
    """The gradient is each member's own, over their number."""
    ensemble = make_ensemble().train(False)
    features = torch.randn(2, 6)
    captions = torch.tensor([[START_ID, 5, 6, END_ID], [START_ID, 7, END_ID, 0]])
    loss, tokens = ensemble.loss(features, captions)
    assert tokens == 5
    for member in ensemble.decoders:
        weights = list(member.parameters())
        got = torch.autograd.grad(3 * loss, weights, retain_graph=True)
        alone = torch.autograd.grad(member.loss(features, captions)[0], weights)
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def other_run(drawn_run: DrawnRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same recipe whose weights differ a little."""
    first = load_checkpoint(drawn_run.run)
    with torch.no_grad():
        noisy = {k: v + 0.01 * torch.randn_like(v) for k, v in first.decoder_weights.items()}
    noisy["projection.weight"] = noisy["word_embedding.weight"]  # as they are tied
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_checkpoint(path, replace(first, decoder_weights=noisy))
    return path


def test_models_of_one_recipe_become_one_file(
    drawn_run: DrawnRun, other_run: Path, tmp_path: Path
) -> None:
    first, other = (load_checkpoint(path) for path in (drawn_run.run, other_run))
    two = load_ensemble([drawn_run.run, other_run])
    save_checkpoint(tmp_path / "two.safetensors", two)
    three = load_ensemble([tmp_path / "two.safetensors", drawn_run.run])
    assert (two.decoder_config.members, three.decoder_config.members) == (2, 3)
    ensemble = three.build_decoder()
    assert isinstance(ensemble, Ensemble)
    for member, model in zip(ensemble.decoders, (first, other), strict=False):
        assert_same_weights(member.state_dict(), model.decoder_weights)
    assert three.predictor is not None
    assert three.predictor.mean.shape == (3, first.decoder_config.embed_size)
    assert three.settings["seeds"] == [0, 0]


def test_models_that_do_not_belong_together_are_refused(
    drawn_run: DrawnRun, tmp_path: Path
) -> None:
    first = load_checkpoint(drawn_run.run)
    path = tmp_path / "other.safetensors"
    words = list(first.vocabulary.words)
    unlike = {
        "not of the same encoder": {
            "encoder": EncoderIdentity(**{**vars(first.encoder), "weights_sha256": "1" * 64})
        },
        "has another vocabulary": {
            "vocabulary": type(first.vocabulary)([*words[:-2], words[-1], words[-2]])
        },
    }
    for message, change in unlike.items():
        save_checkpoint(path, replace(first, **change))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            load_ensemble([drawn_run.run, path])
    config = replace(first.decoder_config, hidden_size=8)
    weights = Decoder(config).state_dict()
    save_checkpoint(path, replace(first, decoder_config=config, decoder_weights=weights))
    with pytest.raises(UserError, match="has other sizes"):
        load_ensemble([drawn_run.run, path])


def test_commands_take_several_models(
    drawn_run: DrawnRun, scenes: list[Path], tmp_path: Path
) -> None:
    """A model together with itself says what it says alone."""
    run = drawn_run.run
    lines = [
        invoke(caption.main, scenes[0], *SAME, *models).stdout
        for models in (["--model", run], ["--ensemble", "--model", run, "--model", run])
    ]
    assert lines[0] and lines[0] == lines[1]
    outputs = [tmp_path / "one" / "predictions.json", tmp_path / "two" / "predictions.json"]
    for output, more in zip(outputs, ([], [run, "--ensemble"]), strict=True):
        output.parent.mkdir()
        invoke(evaluate.main, run, *more, "--output", output, "--no-java", *SAME)
    assert outputs[0].read_text() == outputs[1].read_text()
    facts = [json.loads((output.parent / "scores.json").read_text()) for output in outputs]
    assert [fact["decoders"] for fact in facts] == [1, 2]
    assert [fact["seed"] for fact in facts] == [0, [0, 0]]


def test_stage_3_trains_all_members_on_one_encoder(
    drawn_run: DrawnRun, other_run: Path, tmp_path: Path
) -> None:
    starts = ["--start", drawn_run.run, "--start", other_run]
    options = ["--run", tmp_path / "joint", "--unfreeze-from", "Mixed_7c", "--device", "cpu"]
    words = [*starts, *options, "--batch-size", 8, "--epochs", 1]
    invoke(finetune_joint.main, *words)
    last = load_checkpoint(tmp_path / "joint" / "last.safetensors")
    assert last.decoder_config.members == 2 and last.encoder_weights is not None
    for number, path in enumerate((drawn_run.run, other_run)):
        before = load_checkpoint(path).decoder_weights
        for name in ("lstm.weight_hh_l0", "image_embedding.weight"):
            after = last.decoder_weights[f"members.{number}.{name}"]
            assert 0 < (after - before[name]).abs().max() < 0.1, name
    # The same command finds that all is done.
    assert "finished with epoch 1" in invoke(finetune_joint.main, *words).stderr
