"""evaluate.py: the table, the files it leaves, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from drawn_run import DrawnRun

import evaluate as command
from pipeline.captions import read_captions
from pipeline.metrics import Scorer
from pipeline.vocabulary import tokenize


def evaluate(*arguments: object) -> Result:
    words = [str(argument) for argument in (*arguments, "--no-java", "--device", "cpu")]
    return CliRunner().invoke(command.main, words)


@pytest.mark.parametrize("split", ["val", "test", "train"])
def test_files_say_what_was_scored_and_the_scores_follow_from_the_predictions(
    drawn_run: DrawnRun, tmp_path: Path, split: str
) -> None:
    output = tmp_path / "predictions.json"
    result = evaluate(drawn_run.run, "--split", split, "--beam-size", 2, "--output", output)
    assert result.exit_code == 0, result.output
    table = read_captions(drawn_run.data)
    references = {i.name: [tokenize(c) for c in i.captions] for i in table.of_split(split)}
    predictions = {p["image_id"]: p["caption"] for p in json.loads(output.read_text())}
    assert predictions.keys() == references.keys()
    saved = json.loads((tmp_path / "scores.json").read_text())
    expected = Scorer(references).score({n: tokenize(c) for n, c in predictions.items()})
    for name, value in expected.items():
        assert saved["scores"][name] == pytest.approx(value)
    assert saved["split"] == split and saved["images"] == len(references)
    assert saved["split_sha256"] == table.split_hash(split)
    assert saved["search"]["beam_size"] == 2
    assert f"{expected['CIDEr-D']:.1f}" in result.stdout
    assert "distinct captions" in result.stdout and "copied from train" in result.stdout


def test_without_java_the_table_says_what_is_left_out(
    drawn_run: DrawnRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "predictions.json"
    words = [str(drawn_run.run), "--output", str(output), "--device", "cpu"]
    result = CliRunner().invoke(command.main, words)
    assert result.exit_code == 0, result.output
    assert "METEOR is left out: it needs" in result.stderr
    assert len(json.loads((tmp_path / "scores.json").read_text())["left_out"]) == 2


def test_references_keep_the_words_that_the_vocabulary_lacks(
    drawn_run: DrawnRun, tmp_path: Path
) -> None:
    """A rare word in a reference must count against the model, not become <unk>."""
    data = tmp_path / "scenes"
    shutil.copytree(drawn_run.data, data)
    cache = ("--features", drawn_run.features)
    before = evaluate(drawn_run.run, "--data", data, *cache, "--output", tmp_path / "a" / "p.json")
    captions = (data / "captions.csv").read_text().splitlines()
    (data / "captions.csv").write_text(
        "\n".join([captions[0], *(line.replace(" a ", " zyx ") for line in captions[1:])])
    )
    after = evaluate(drawn_run.run, "--data", data, *cache, "--output", tmp_path / "b" / "p.json")
    assert before.exit_code == after.exit_code == 0
    scores = [
        json.loads((tmp_path / name / "scores.json").read_text())["scores"]["BLEU-1"]
        for name in "ab"
    ]
    assert scores[1] < scores[0] - 3
    assert (tmp_path / "a/p.json").read_bytes() == (tmp_path / "b/p.json").read_bytes()


def test_what_does_not_belong_together_is_refused(drawn_run: DrawnRun, tmp_path: Path) -> None:
    from small_data import make_small_data

    data, features = make_small_data(tmp_path)
    for arguments, message in (
        ((drawn_run.run, "--features", features), "not of the encoder"),
        ((drawn_run.run, "--features", tmp_path / "none.h5"), "extract_features.py"),
        ((tmp_path / "none",), "no such checkpoint"),
        ((drawn_run.run, "--data", tmp_path / "none"), "none"),
        ((drawn_run.run, "--data", data), "data/features/small.h5"),
    ):
        result = evaluate(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr and "Traceback" not in result.output
