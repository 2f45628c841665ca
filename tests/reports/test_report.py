"""Sample captions, curves and report of a training."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from commands import invoke
from drawn_run import DrawnRun
from html_page import HtmlPage
from small_data import make_small_data

import evaluate
import finetune_joint
import train_decoder
from pipeline.cli.report import main
from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.encoded_captions import tokenized
from pipeline.datasets.tokenizers import tokenize_english
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.features.cache import FeatureCache
from pipeline.metrics.coco import Scorer
from pipeline.models.checkpoint import load_checkpoint
from pipeline.reports.curves import best_record, draw_curves, read_svg, write_curves
from pipeline.reports.report_data import read_data
from pipeline.reports.training_report import describe_settings, epoch_reporter, write_report
from pipeline.training.run_folder import append_epoch, read_epochs, split_hashes
from pipeline.training.validation import Validator, sample_names
from pipeline.utils.html import tidy

pytestmark = pytest.mark.usefixtures("tiny_inception")

HOSTILE = "<script>alert(1)</script>.jpg"


def record(epoch: int, **values: float) -> dict[str, float]:
    scores = {"BLEU-4": 10.0, "CIDEr-D": 20.0, "val_loss": 3.0, "validation_seconds": 1.0}
    return {"epoch": epoch, **scores, **values}


def drawn_values(log: list[dict[str, float]]) -> dict[str, list[float]]:
    """Return the values of every curve by its label."""
    figure = draw_curves(log)
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return {
        str(line.get_label()): [float(y) for y in numpy.asarray(line.get_ydata())]
        for line in lines
        if not str(line.get_label()).startswith("_")
    }


# The samples


def test_samples_are_spread_over_the_sorted_names_whatever_their_order() -> None:
    names = [f"{number:03d}.jpg" for number in range(100)]
    chosen = sample_names(reversed(names))
    assert chosen == sample_names(names) == sorted(chosen)
    numbers = [names.index(name) for name in chosen]
    assert len(numbers) == 8
    assert {b - a for a, b in itertools.pairwise(numbers)} <= {12, 13}
    assert sample_names(["b", "a"]) == ["a", "b"] and sample_names([]) == []


def test_samples_are_the_captions_that_are_scored(drawn_run: DrawnRun) -> None:
    """The last line agrees with a validation of the last epoch's weights, made anew."""
    table = read_captions(drawn_run.data)
    val = tokenized(table.of_split("val"))
    samples = read_epochs(drawn_run.run / "samples.jsonl")
    assert [line["epoch"] for line in samples] == list(range(1, 13))
    assert all(list(line["captions"]) == sample_names(val) for line in samples)
    last = load_checkpoint(drawn_run.run / "last.safetensors")
    cache = FeatureCache(drawn_run.features)
    rows = cache.rows([f"Images/{Path(name).name}" for name in val])
    found = Validator(val, last.vocabulary).validate(
        last.build_decoder(), torch.from_numpy(cache.read(rows))
    )
    assert found.samples == samples[-1]["captions"]
    assert found.scores["CIDEr-D"] == pytest.approx(last.scores["CIDEr-D"])


# The curves


def test_curves_show_the_log_and_mark_the_best_epoch() -> None:
    log = [
        record(epoch, train_loss=5.0 - epoch, learning_rate=0.1 * epoch) for epoch in range(1, 5)
    ]
    log[1]["CIDEr-D"], log[2]["CIDEr-D"] = 40.5, 40.0
    log[2]["val_loss"] = 2.5  # nearly equal in CIDEr-D, and so the epoch that is kept
    assert drawn_values(log) == {
        "train": [4.0, 3.0, 2.0, 1.0],
        "val": [3.0, 3.0, 2.5, 3.0],
        "CIDEr-D": [20.0, 40.5, 40.0, 20.0],
        "BLEU-4": [10.0] * 4,
        "learning rate": pytest.approx([0.1, 0.2, 0.3, 0.4]),
    }
    figure = draw_curves(log)
    marks = [axes.get_lines()[0].get_xdata() for axes in figure.axes]
    assert all(list(numpy.asarray(mark)) == [3, 3] for mark in marks)
    assert figure.axes[0].get_title("right") == "best: epoch 3, CIDEr-D 40.0"


def test_scores_of_next_to_nothing_are_a_flat_line() -> None:
    figure = draw_curves([record(n, **{"CIDEr-D": 0.0, "BLEU-4": n * 1e-8}) for n in (1, 2)])
    assert figure.axes[1].get_ylim()[1] == 1


def test_values_that_are_missing_or_not_finite_leave_gaps() -> None:
    """Stage 3 has no train loss before its first epoch; a self-critical one has a reward."""
    assert list(drawn_values([record(0)])) == ["val", "CIDEr-D", "BLEU-4"]
    found = drawn_values(
        [
            record(0),
            record(1, train_loss=4.0),
            record(2, train_loss=float("nan"), val_loss=float("inf")),
            record(3, train_loss=-7.0, reward=60.0),
        ]
    )
    nan = float("nan")
    assert found["train"] == pytest.approx([nan, 4.0, nan, nan], nan_ok=True)
    assert found["val"] == pytest.approx([3.0, 3.0, nan, 3.0], nan_ok=True)
    assert found["reward of sampled captions"] == pytest.approx([nan] * 3 + [60.0], nan_ok=True)


def test_equal_logs_give_equal_files(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        append_epoch(tmp_path / name / "log.jsonl", record(1, train_loss=5.0))
        write_curves(tmp_path / name)
        files.append([(tmp_path / name / f"curves.{kind}").read_bytes() for kind in ("svg", "png")])
    assert files[0] == files[1]
    svg = read_svg(tmp_path / "one")
    assert "<title>epoch 1\ntrain 5\nval 3\nCIDEr-D 20\nBLEU-4 10</title>" in svg
    assert b"<text" in files[0][0] and files[0][1].startswith(b"\x89PNG")


# The report


def test_the_report_of_a_training_has_every_part(drawn_run: DrawnRun) -> None:
    page = HtmlPage(drawn_run.run / "report.html")
    headings = "curves scores captions predictions words data time settings"
    assert page.headings == headings.split()
    log = read_epochs(drawn_run.run / "log.jsonl")
    best = max(log, key=lambda line: line["CIDEr-D"])
    assert f"best: epoch {best['epoch']}, CIDEr-D {best['CIDEr-D']:.1f}" in page.text
    scores = json.loads((drawn_run.run / "scores.json").read_text())
    for name, (low, high) in scores["intervals_95_percent"].items():
        assert f"{low:.1f} to {high:.1f}" in page.text, name
    for score in scores["scores"]["ROUGE-L"], best["ROUGE-L"]:
        assert f"{score:.1f}" in page.text
    assert f"CIDEr-D on val{scores['scores']['CIDEr-D']:.1f}final, beam 10" in page.text
    assert f"during training, beam 3: {best['CIDEr-D']:.1f}" in page.text
    (session,) = read_epochs(drawn_run.run / "sessions.jsonl")
    assert all(session[name] in page.text for name in ("command", "started", "versions"))
    for line in read_epochs(drawn_run.run / "samples.jsonl")[-1:]:
        for name, caption in line["captions"].items():
            assert name in page.text and caption in page.text
    references = next(i.captions for i in read_captions(drawn_run.data).of_split("val"))
    assert all(tidy(reference) in page.text for reference in references)
    settings = json.loads((drawn_run.run / "config.json").read_text())
    assert settings["val_images"] in page.text and settings["train_images"] in page.text
    assert len(page.all("tr", "changed")) >= 5, "settings that are not the defaults"


def test_an_evaluation_renews_the_report(drawn_run: DrawnRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(drawn_run.run, tmp_path / "run"))
    options = ["--split", "test", "--no-java", "--device", "cpu", "--html", run / "test.html"]
    invoke(evaluate.main, run, *options)
    scores = json.loads((run / "scores-test.json").read_text())["scores"]
    report = HtmlPage(run / "report.html")
    row = report.text[report.text.index("scores-test.json") :].split("\n", 2)
    assert row[0] == "scores-test.jsontest, beam 10, consensus 3, matching 2images"
    assert row[1].startswith(f"{scores['CIDEr-D']:.1f}")
    assert [a["href"] for a in report.all("a")].count("test.html") == 1
    assert f"CIDEr-D on test{scores['CIDEr-D']:.1f}" not in report.text


def test_a_report_reloads_while_the_training_runs(drawn_run: DrawnRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(drawn_run.run, tmp_path / "run"))
    epoch_reporter(run)({}, {})
    for page, reloads in ((run, True), (drawn_run.run, False)):
        metas = [a.get("http-equiv") for a in HtmlPage(page / "report.html").all("meta")]
        assert ("refresh" in metas) == reloads


def test_worst_and_best_are_those_of_the_lowest_and_highest_scores(drawn_run: DrawnRun) -> None:
    val = tokenized(read_captions(drawn_run.data).of_split("val"))
    captions = {
        p["image_id"]: p["caption"]
        for p in json.loads((drawn_run.run / "predictions.json").read_text())
    }
    found = Scorer(val).per_image_cider({n: tokenize_english(text) for n, text in captions.items()})
    text = HtmlPage(drawn_run.run / "report.html").text
    shown = {
        title: [float(value) for value in re.findall(r"CIDEr-D (\d+\.\d)", part)]
        for title, part in re.findall(
            r"\n(Worst|Best)\n(.*?)(?=\nBest\n|\nWords\n)", text, re.DOTALL
        )
    }
    ordered = [round(value, 1) for value in sorted(found.values())]
    half = len(ordered) // 2
    assert half and shown == {"Worst": ordered[:half], "Best": ordered[::-1][:half]}


def test_the_page_loads_nothing_and_runs_nothing(drawn_run: DrawnRun) -> None:
    page = HtmlPage(drawn_run.run / "report.html")
    policy = next(a["content"] or "" for a in page.all("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    assert not page.all("script") and not page.all("link")
    sources = [a["src"] or "" for a in page.all("img")]
    assert sources and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert all((a["href"] or "").startswith("#") for a in page.all("a"))
    assert not [name for name in page.attributes if name.startswith("on")]
    anchors = {(a["href"] or "")[1:] for a in page.all("a")}
    assert anchors == set(page.headings)


def test_a_run_of_stage_3_with_the_scores_of_its_start(drawn_run: DrawnRun, tmp_path: Path) -> None:
    run = tmp_path / "joint"
    options = "--epochs 1 --batch-size 8 --device cpu --unfreeze-from Mixed_7c".split()
    result = invoke(finetune_joint.main, "--start", drawn_run.run, "--run", run, *options)
    assert f"report: {run / 'report.html'}" in result.stderr
    assert re.search(
        r"^epoch 0/1  before training +val loss [^,]* s  best so far$", result.stderr, re.M
    )
    kept = best_record(read_epochs(run / "log.jsonl"))["epoch"] == 0
    assert kept == ("the model is the start, unchanged" in result.stderr)
    assert [line["epoch"] for line in read_epochs(run / "samples.jsonl")] == [0, 1]
    page = HtmlPage(run / "report.html")
    assert "Stage 3" in page.text and "epoch 0, before training" in page.text
    assert page.headings[2:4] == ["captions", "predictions"]


def test_a_run_whose_data_are_gone_or_moved_or_others(drawn_run: DrawnRun, tmp_path: Path) -> None:
    run = Path(shutil.copytree(drawn_run.run, tmp_path / "copy"))
    for name in ("report.html", "curves.svg"):
        (run / name).unlink()
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "data": str(tmp_path / "gone")}))
    result = invoke(main, run)
    assert "without images and references" in result.stderr and "gone" in result.stderr
    page = HtmlPage(run / "report.html")
    assert page.headings == ["curves", "scores", "captions", "data", "time", "settings"]
    assert not page.all("img")
    assert (run / "curves.svg").read_bytes() == (drawn_run.run / "curves.svg").read_bytes()
    assert "without" not in invoke(main, run, "--data", drawn_run.data).stderr
    assert "words" in HtmlPage(run / "report.html").headings
    other = shutil.copytree(drawn_run.data, tmp_path / "other")
    lines = (other / "captions.csv").read_text().splitlines()
    (other / "captions.csv").write_text("\n".join(lines[:-40]))
    result = invoke(main, run, "--data", other)
    assert "not the captions and images that the run was trained with" in result.stderr
    assert "words" not in HtmlPage(run / "report.html").headings


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for two epochs with captions and a folder name that are markup."""
    folder = tmp_path_factory.mktemp("hostile")
    data, features = make_small_data(folder)
    text = (data / "captions.csv").read_text()
    marked = text.replace("A red dog.", "A </bdi><img src=x onerror=alert(1)> red & dog")
    (data / "captions.csv").write_text(marked)
    run = folder / 'a"<b>run'
    small = "--epochs 2 --min-count 1 --embed-size 8 --hidden-size 8 --device cpu".split()
    invoke(train_decoder.main, "--data", data, "--features", features, "--run", run, *small)
    return run


def test_hostile_names_and_captions_are_text(hostile_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(hostile_run, tmp_path / hostile_run.name)
    samples = read_epochs(run / "samples.jsonl")
    for line in samples:
        _first, *others = line["captions"]
        line["captions"] = {HOSTILE: "<b onclick='x'>&amp;", **dict.fromkeys(others, "")}
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    write_report(run)
    page = HtmlPage(run / "report.html")
    assert HOSTILE in page.text and "<b onclick='x'>&amp;" in page.text
    assert "A </bdi><img src=x onerror=alert(1)> red & dog" in page.text
    assert 'a"<b>run' in page.text
    assert not page.all("img"), "there are no images"
    assert not page.all("script")
    assert not page.attributes & {"onclick", "onerror"}
    assert page.text.count("(no word)") >= len(others)


def test_epochs_with_the_same_caption_share_a_line(hostile_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(hostile_run, tmp_path / "run")
    log = [record(epoch, train_loss=1.0, seconds=2.0) for epoch in range(1, 41)]
    log[19]["CIDEr-D"] = 50.0
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    samples = [
        {"epoch": epoch, "captions": {"calm.jpg": "same", "wild.jpg": f"caption {epoch}"}}
        for epoch in range(1, 41)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    write_report(run)
    page = HtmlPage(run / "report.html")
    assert "1–40 same" in " ".join(page.text.split())
    assert len(page.all("li", "best")) == 2
    assert "80 s of training and 40 s of validation" in page.text


def test_words_that_the_vocabulary_lacks_are_counted(tmp_path: Path) -> None:
    data, features = make_small_data(tmp_path)
    table = read_captions(data)
    settings = {"data": str(data), "captions": None, "features": str(features)}
    words = ["a", "there", "is", "it", "red", "dog", "blue", "green", "white", "car"]
    described = read_data(
        {**settings, **split_hashes(table)}, None, Vocabulary.build([words], min_count=1)
    )
    assert list(described.val) == [image.name for image in table.of_split("val")]
    houses = sum("house" in caption for i in table.of_split("val") for caption in i.captions)
    facts = described.splits["val"]
    assert facts.coverage.unknown == {"house": houses}
    assert facts.coverage.affected == houses
    assert facts.coverage.captions == 2 * facts.images == 24
    assert facts.lengths == (5.0, 5.0, 7), "three words, and seven"
    assert (described.vocabulary_size, described.train_words) == (10, 11)


def test_settings_that_differ_from_their_defaults_come_first() -> None:
    train = describe_settings(
        {"hidden_size": 64, "lr": 1e-3, "tie_embeddings": False, "precision": "fp32"}
    )
    assert [(s.name, s.value, s.default) for s in train] == [
        ("--hidden-size", "64", "512"),
        ("--tie-embeddings", "no", "yes"),
        ("--precision", "fp32", ""),
        ("--lr", "0.001", ""),
    ]
    joint = describe_settings({"unfreeze_from": "Mixed_6a", "lr": 1, "start": ["a", "b"]})
    assert [(s.name, s.value, s.default) for s in joint] == [
        ("--start", "a, b", ""),
        ("--unfreeze-from", "Mixed_6a", ""),
    ]


def test_curves_and_reports_of_epochs_take_no_more_than_their_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.reports.training_report as report

    now, written = 0.0, []

    def write(*arguments: Any, **more: Any) -> None:
        nonlocal now
        now += 2.0
        written.append(now)

    monkeypatch.setattr(report, "_write_page", write)
    monkeypatch.setattr(report, "write_curves", lambda run: None)
    monkeypatch.setattr(report.time, "monotonic", lambda: now)
    callback = epoch_reporter(tmp_path)
    for _ in range(100):
        now += 10.0
        callback({}, {})
    assert 4 <= len(written) <= 6, "2 s each of about 1,000 s"


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    assert f"{tmp_path}: no run of" in invoke(main, tmp_path, code=2).stderr
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text("[]\n")
    result = invoke(main, tmp_path, code=2)
    assert "log.jsonl: not a file of one JSON object" in result.stderr
