"""evaluate.py: the table, the files it leaves, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from commands import invoke
from drawn_run import DrawnRun
from small_data import make_small_data

import evaluate as command
import finetune_joint
from pipeline import Captioner
from pipeline.cli import report
from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.tokenizers import tokenize_english
from pipeline.evaluation import Evaluation
from pipeline.metrics.coco import Scorer
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.reports.score_table import print_table
from pipeline.utils.errors import UserError


def evaluate(*words: object, code: int = 0) -> Result:
    more = () if "--compare" in words else ("--no-java", "--device", "cpu")
    return invoke(command.main, *words, *more, code=code)


def test_files_say_what_was_scored_and_the_scores_follow_from_the_predictions(
    drawn_run: DrawnRun, tmp_path: Path
) -> None:
    output = tmp_path / "predictions.json"
    result = evaluate(drawn_run.run, "--split", "test", "--beam-size", 2, "--output", output)
    table = read_captions(drawn_run.data)
    references = {i.name: [tokenize_english(c) for c in i.captions] for i in table.of_split("test")}
    predictions = {p["image_id"]: p["caption"] for p in json.loads(output.read_text())}
    assert predictions.keys() == references.keys()
    saved = json.loads((tmp_path / "scores.json").read_text())
    expected = Scorer(references).score({n: tokenize_english(c) for n, c in predictions.items()})
    for name, value in expected.items():
        assert saved["scores"][name] == pytest.approx(value)
    assert saved["split"] == "test" and saved["images"] == len(references)
    assert saved["split_sha256"] == table.split_hash("test")
    assert saved["search"]["beam_size"] == 2
    assert f"{expected['CIDEr-D']:.1f}" in result.stdout
    assert "distinct captions" in result.stdout and "copied from train" in result.stdout
    low, high = saved["intervals_95_percent"]["CIDEr-D"]
    assert low <= expected["CIDEr-D"] <= high
    assert f"CIDEr-D {low:.1f} to {high:.1f}" in result.stdout
    assert saved["seed"] == 0 and saved["options"]["epochs"] == 12


def test_without_a_cache_images_are_encoded_and_unreadable_ones_named(
    drawn_run: DrawnRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(drawn_run.data, tmp_path / "copy")
    state = torch.load(drawn_run.weights, weights_only=True)
    whole = replace(load_checkpoint(drawn_run.run), encoder_weights=state)
    save_checkpoint(tmp_path / "whole.safetensors", whole)
    names = [image.name for image in read_captions(drawn_run.data).of_split("val")]
    broken = next((tmp_path / "copy").rglob(names[1]))
    broken.write_bytes(broken.read_bytes()[:99])
    result = evaluate("whole.safetensors", "--data", "copy", "--output", "other.json", code=1)
    assert names[1] in result.stderr
    predictions = json.loads((tmp_path / "other.json").read_text())
    assert [p["image_id"] for p in predictions] == [n for n in names if n != names[1]]


def test_without_java_the_table_says_what_is_left_out(
    drawn_run: DrawnRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "predictions.json"
    result = invoke(command.main, drawn_run.run, "--output", output, "--device", "cpu")
    assert "METEOR is left out: it needs" in result.stderr
    assert len(json.loads((tmp_path / "scores.json").read_text())["left_out"]) == 2


def test_references_keep_the_words_that_the_vocabulary_lacks(
    drawn_run: DrawnRun, tmp_path: Path
) -> None:
    """A rare word in a reference must count against the model, not become <unk>."""
    data = shutil.copytree(drawn_run.data, tmp_path / "scenes")
    cache = ("--features", drawn_run.features)
    outputs = [tmp_path / name / "predictions.json" for name in "ab"]
    evaluate(drawn_run.run, "--data", data, *cache, "--output", outputs[0])
    captions = (data / "captions.csv").read_text().splitlines()
    (data / "captions.csv").write_text(
        "\n".join([captions[0], *(line.replace(" a ", " zyx ") for line in captions[1:])])
    )
    evaluate(drawn_run.run, "--data", data, *cache, "--output", outputs[1])
    scores = [
        json.loads((tmp_path / name / "scores.json").read_text())["scores"]["BLEU-1"]
        for name in "ab"
    ]
    assert scores[1] < scores[0] - 3
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_what_does_not_belong_together_is_refused(drawn_run: DrawnRun, tmp_path: Path) -> None:
    data, features = make_small_data(tmp_path)
    for arguments, message in (
        ((drawn_run.run, "--features", features), "not of the encoder"),
        ((drawn_run.run, "--features", tmp_path / "none.h5"), "extract_features.py"),
        ((tmp_path / "none",), "no such checkpoint"),
        ((drawn_run.run, "--data", tmp_path / "none"), "none"),
        ((drawn_run.run, "--data", data), "data/features/small.h5"),
    ):
        result = evaluate(*arguments, code=2)
        assert message in result.stderr


def test_several_runs_are_summed_up(drawn_run: DrawnRun, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(drawn_run.run, tmp_path / name)
    result = evaluate(tmp_path / "a", tmp_path / "b")
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == [
        *("| run", f"| {tmp_path / 'a'}", f"| {tmp_path / 'b'}", "| mean ± deviation")
    ]
    assert rows[1][1:] == rows[2][1:]
    assert rows[3][1] == f"{rows[1][1]} ± 0.0"
    assert f"{tmp_path / 'b'} (" in result.stdout
    assert result.stdout.count(", beam 10, consensus 3, matching 2): ") == 2
    assert (tmp_path / "a" / "scores.json").is_file() and (tmp_path / "b" / "scores.json").is_file()
    output = ("--output", tmp_path / "predictions.json")
    refused = evaluate(tmp_path / "a", tmp_path / "b", *output, code=2)
    assert "--output: is for one run" in refused.stderr


def test_comparing_two_predictions_files(drawn_run: DrawnRun, tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "predictions.json", tmp_path / "b.json"
    evaluate(drawn_run.run, "--split", "train", "--output", first)
    predictions = json.loads(first.read_text())
    for entry in predictions:
        entry["caption"] = "a zebra"
    second.write_text(json.dumps(predictions))
    options = ("--data", drawn_run.data, "--split", "train")
    result = evaluate("--compare", first, second, *options)
    scores = json.loads((tmp_path / "a" / "scores.json").read_text())["scores"]
    cells = next(line for line in result.stdout.splitlines() if line.startswith("| CIDEr-D"))
    assert f" {scores['CIDEr-D']:.1f} " in cells
    assert float(cells.split("|")[-2]) < 0.01
    same = evaluate("--compare", first, first, *options)
    assert same.stdout.count("| +0.0 | +0.0 to +0.0 | 1.0000 |") == 2

    (tmp_path / "text").write_text("no json")
    (tmp_path / "numbers").write_text("[1, 2]")
    (tmp_path / "fewer").write_text(json.dumps(predictions[1:]))
    (tmp_path / "other").write_text(json.dumps([{"image_id": "x.jpg", "caption": "a dog"}]))
    for arguments, message in (
        (("--compare", first, tmp_path / "none", *options), "none: cannot be read"),
        (("--compare", first, tmp_path / "text", *options), "not a predictions file"),
        (("--compare", tmp_path / "numbers", second, *options), "not a predictions file"),
        (("--compare", first, tmp_path / "fewer", *options), "not of the same images"),
        (("--compare", *[tmp_path / "other"] * 2, *options), "'x.jpg' is not in the train split"),
        (("--compare", first, second, drawn_run.run, *options), "give the runs to score, or"),
        ((), "give the runs to score, or --compare"),
    ):
        refused = evaluate(*arguments, code=2)
        assert message in refused.stderr


def test_coco_ids_are_written_and_compared(drawn_run: DrawnRun, tmp_path: Path) -> None:
    table = read_captions(drawn_run.data)
    files: list[object] = []
    for split in ("val", "test"):
        images = list(enumerate(table.of_split(split), 500))
        document = {
            "images": [{"id": number, "file_name": image.name} for number, image in images],
            "annotations": [
                {"image_id": number, "caption": text}
                for number, image in images
                for text in image.captions
            ],
        }
        path = tmp_path / f"captions_{split}.json"
        path.write_text(json.dumps(document), encoding="utf-16")
        files += ["--captions", path]
    options = ("--data", drawn_run.data, *files)
    output = tmp_path / "predictions.json"
    features = ("--features", drawn_run.features, "--encoding", "utf-8")
    result = evaluate(drawn_run.run, *options, *features, "--output", output)
    assert f"captions: {tmp_path}/captions_val.json (COCO JSON, 2 files)" in result.stderr
    written = [entry["image_id"] for entry in json.loads(output.read_text())]
    assert written == list(range(500, 500 + len(table.of_split("val"))))
    evaluate("--compare", output, output, *options)


def test_another_evaluation_leaves_the_run_files_alone(drawn_run: DrawnRun, tmp_path: Path) -> None:
    """Own files are those of the best checkpoint on val with the default search."""
    run = Path(shutil.copytree(drawn_run.run, tmp_path / "run"))
    evaluate(run)
    own = {name: (run / name).read_bytes() for name in ("predictions.json", "scores.json")}
    for arguments, name in (
        (("--split", "test"), "test"),
        (("--beam-size", 1, "--split", "test"), "test-beam-size-1"),
        (("--features", shutil.copy(drawn_run.features, tmp_path)), "other-data"),
    ):
        evaluate(run, *arguments)
        assert (run / f"predictions-{name}.json").is_file()
        scores = json.loads((run / f"scores-{name}.json").read_text())
        assert scores["predictions"] == f"predictions-{name}.json"
    last = shutil.copy(run / "best.safetensors", run / "other.safetensors")
    evaluate(last, "--search-passes", 2)
    assert (run / "scores-other-search-passes-2.json").is_file()
    evaluate(run, "--split", "test", "--output", run / "mine.json")
    assert json.loads((run / "scores-mine.json").read_text())["split"] == "test"
    refused = evaluate(run, "--split", "test", "--output", run / "predictions.json", code=2)
    assert "choose another name" in refused.stderr
    assert own == {name: (run / name).read_bytes() for name in own}


@pytest.mark.parametrize(
    "name, place",
    [
        ("data", "ftp://127.0.0.1:9/{0..1}.tar"),
        ("captions", r"\\host\captions.csv"),
        ("features", "//host/share/x.h5"),
    ],
)
def test_what_a_strangers_files_name_on_other_machines_is_not_opened(
    drawn_run: DrawnRun, tmp_path: Path, name: str, place: str
) -> None:
    run = Path(shutil.copytree(drawn_run.run, tmp_path / "run"))
    checkpoint = load_checkpoint(run)
    checkpoint.settings[name] = place
    save_checkpoint(run / "best.safetensors", checkpoint)
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, name: place}))
    results = [invoke(report.main, run), evaluate(run, code=2)]
    if name != "features":
        words = ("--start", run, "--unfreeze-from", "x")  # which is refused later
        results.append(invoke(finetune_joint.main, *words, code=2))
    for result in results:
        assert "was trained on remote data; to read them give --" in result.stderr
        assert f"'{place}'" in result.stderr


def test_no_path_in_a_checkpoint_outside_its_run_folder_is_opened(
    drawn_run: DrawnRun, tmp_path: Path
) -> None:
    """Such a file may be a stranger's. What the user names is opened."""
    alone = tmp_path / "best.safetensors"
    shutil.copy(drawn_run.run / "best.safetensors", alone)
    with pytest.raises(UserError, match="--weights FILE"):
        Captioner.load(alone, device="cpu")
    Captioner.load(alone, device="cpu", weights=str(drawn_run.weights))
    refused = evaluate(alone, code=2)
    assert "its data are unknown; give --data" in refused.stderr
    words = ("--start", alone, "--run", tmp_path / "run")
    refused = invoke(finetune_joint.main, *words, code=2)
    assert "data are unknown; give --data" in refused.stderr
    given = ("--data", drawn_run.data, "--features", drawn_run.features)
    evaluate(alone, *given)


def test_weights_that_a_checkpoint_names_on_another_machine_are_not_looked_for(
    drawn_run: DrawnRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(drawn_run.run)
    identity = replace(checkpoint.encoder, weights_source=r"\\host\weights.pth")
    save_checkpoint(tmp_path / "x.safetensors", replace(checkpoint, encoder=identity))
    is_file = Path.is_file

    def watched(path: Path) -> bool:
        assert "host" not in str(path)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", watched)
    with pytest.raises(UserError, match="--weights FILE"):
        Captioner.load(tmp_path / "x.safetensors", device="cpu")


@pytest.mark.parametrize(
    "option",
    ["--beam-size 2", "--features x", "--consensus 0", "--ensemble", "--no-java", "--device cpu"],
)
def test_options_without_effect_on_a_comparison_are_refused(option: str) -> None:
    refused = evaluate("--compare", "a.json", "b.json", *option.split(), code=2)
    name = option.split()[0].replace("--no-java", "--java")
    assert f"{name}: has no effect with --compare" in refused.stderr


def test_a_score_that_one_run_lacks_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {
        "split": "val",
        "split_sha256": "0",
        "images": 1,
        "references": 5,
        "search": {"beam_size": 3, "consensus": 0, "matching": 0},
        "tokenizer": "english",
    }
    counts = dict.fromkeys(("distinct_captions", "distinct_words", "copied_from_train"), 1) | {
        "copied_from_train_percent": 0.0,
        "mean_length": 9.0,
    }
    results = {
        name: Evaluation({}, {"BLEU-4": 10.0, **more, **counts}, [], {}, facts, [], {})
        for name, more in (("a", {}), ("b", {"METEOR": 20.0}))
    }
    print_table(results)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == "| run | BLEU-4 | METEOR |"
    assert rows[2:] == [
        "| a | 10.0 | - |",
        "| b | 10.0 | 20.0 |",
        "| mean ± deviation | 10.0 ± 0.0 | - |",
    ]
