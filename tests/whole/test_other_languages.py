"""A model of captions in another language, from training to scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import Result
from commands import invoke
from drawn_run import DrawnRun
from example_layouts import chinese_captions, scenes_of, write_translated

import caption
import evaluate
import finetune_joint
import train_decoder
from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.tokenizers import tokenize_characters
from pipeline.datasets.vocabulary import UNKNOWN, Vocabulary
from pipeline.metrics.coco import Scorer
from pipeline.models.checkpoint import load_checkpoint, load_ensemble, save_checkpoint
from pipeline.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny_inception")


def command(main: click.Command, *arguments: object, code: int = 0, **options: object) -> Result:
    """Run a command; each keyword is an option."""
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
    device = () if "--compare" in arguments else ("--device", "cpu")
    words = (word for pair in pairs for word in pair)
    return invoke(main, *arguments, *words, *device, code=code)


@pytest.fixture(scope="module")
def chinese(drawn_run: DrawnRun, tmp_path_factory: pytest.TempPathFactory) -> DrawnRun:
    """Train two epochs on drawn scenes with Chinese captions, through the commands."""
    folder = tmp_path_factory.mktemp("chinese")
    data = folder / "scenes"
    write_translated(drawn_run.data, data, scenes_of(30, 0), chinese_captions)
    made = DrawnRun(data, drawn_run.weights, drawn_run.features, folder / "run")
    command(
        train_decoder.main,
        data=data,
        features=made.features,
        run=made.run,
        tokenizer="characters",
        epochs=2,
        self_critical_epochs=1,
        batch_size=16,
        embed_size=48,
        hidden_size=48,
        min_count=1,
        lr=0.02,
        ema_decay=0.5,
        precision="fp32",
    )
    return made


def test_the_checkpoint_names_its_tokenizer(chinese: DrawnRun, drawn_run: DrawnRun) -> None:
    vocabulary = load_checkpoint(chinese.run).vocabulary
    assert vocabulary.tokenizer.name == "characters"
    assert "狗" in vocabulary and all(len(word) == 1 for word in vocabulary.words[4:])
    assert json.loads((chinese.run / "config.json").read_text())["tokenizer"] == "characters"
    assert load_checkpoint(drawn_run.run).vocabulary.tokenizer.name == "english"


def test_captions_have_no_spaces(chinese: DrawnRun) -> None:
    image = next((chinese.data / "Images").glob("*.jpg"))
    result = command(caption.main, image, model=chinese.run, weights=chinese.weights)
    said = result.stdout.split("\t")[1].strip()
    assert said and " " not in said and UNKNOWN not in said
    vocabulary = load_checkpoint(chinese.run).vocabulary
    assert all(token in vocabulary for token in vocabulary.tokenize(said))


def test_scores_are_of_characters_and_say_so(chinese: DrawnRun, tmp_path: Path) -> None:
    output = tmp_path / "predictions.json"
    result = command(evaluate.main, chinese.run, split="train", output=output)
    assert "tokenizer characters" in result.stdout
    assert "METEOR and SPICE are left out: they are made for English" in result.stderr
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["tokenizer"] == "characters" and "characters" in saved["scorer"]
    predictions = {p["image_id"]: p["caption"] for p in json.loads(output.read_text())}
    table = read_captions(chinese.data)
    expected = Scorer(
        {i.name: [tokenize_characters(c) for c in i.captions] for i in table.of_split("train")}
    ).score({name: tokenize_characters(text) for name, text in predictions.items()})
    for name, value in expected.items():
        assert saved["scores"][name] == pytest.approx(value)
    # Split as English these captions would be single words, and not a four-gram among them.
    assert saved["scores"]["mean_length"] > 1.5


def test_comparing_takes_the_tokenizer_of_the_scores(chinese: DrawnRun, tmp_path: Path) -> None:
    for name, beam_size in (("a", 1), ("b", 3)):
        output = tmp_path / name / "predictions.json"
        command(evaluate.main, chinese.run, split="train", beam_size=beam_size, output=output)
    first, second = (tmp_path / name / "predictions.json" for name in "ab")
    compare = ("--compare", first, second, "--data", chinese.data, "--split", "train")
    own = command(evaluate.main, *compare).stdout
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())["scores"]
    assert f"| CIDEr-D | {scores['CIDEr-D']:.1f} |" in own
    assert command(evaluate.main, *compare, "--tokenizer", "characters").stdout == own
    assert command(evaluate.main, *compare, "--tokenizer", "english").stdout != own
    scores_file = tmp_path / "b" / "scores.json"
    scores_file.write_text(json.dumps({"tokenizer": "words"}))
    refused = command(evaluate.main, *compare, code=2)
    assert "scored with different tokenizers; choose one with --tokenizer" in refused.stderr
    scores_file.unlink()
    assert command(evaluate.main, *compare).stdout == own
    refused = command(evaluate.main, chinese.run, "--tokenizer", "words", code=2)
    assert "--tokenizer: is for --compare" in refused.stderr


def test_models_of_different_tokenizers_do_not_caption_together(
    chinese: DrawnRun, tmp_path: Path
) -> None:
    first = load_checkpoint(chinese.run)
    words = list(first.vocabulary.words)
    other = replace(first, vocabulary=Vocabulary(words, "words"))
    save_checkpoint(tmp_path / "other.safetensors", other)
    with pytest.raises(
        UserError, match=r"other.safetensors: has the tokenizer words, .* has characters"
    ):
        load_ensemble([chinese.run, tmp_path / "other.safetensors"])


def test_stage_3_goes_on_with_the_tokenizer_and_flips_nothing(
    chinese: DrawnRun, tmp_path: Path
) -> None:
    """Which words say left and right is known for English alone."""
    result = command(
        finetune_joint.main,
        start=chinese.run,
        weights=chinese.weights,
        run=tmp_path / "joint",
        data=chinese.data,
        epochs=1,
        batch_size=8,
        unfreeze_from="Mixed_7c",
    )
    assert "images are not flipped" in result.stderr
    assert load_checkpoint(tmp_path / "joint").vocabulary.tokenizer.name == "characters"
    assert "tokenizer characters" in result.stdout


def test_stage_3_refuses_captions_of_another_language(
    chinese: DrawnRun, drawn_run: DrawnRun, tmp_path: Path
) -> None:
    result = command(
        finetune_joint.main,
        start=drawn_run.run,
        data=chinese.data,
        run=tmp_path / "joint",
        epochs=1,
        code=2,
    )
    assert f"100 % of its words are unknown to --start {drawn_run.run}" in result.stderr
    assert not (tmp_path / "joint" / "best.safetensors").exists()
