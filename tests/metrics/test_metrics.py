"""Tests of the scores. All captions here are made up."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conftest import SHARED

from pipeline.datasets.vocabulary import END, PAD, START, UNKNOWN
from pipeline.metrics.coco import Scorer, diversity
from pipeline.metrics.java import java_metrics
from pipeline.utils.errors import UserError

SCORING = SHARED / "scoring"

References = dict[str, list[list[str]]]
Predictions = dict[str, list[str]]


def words(caption: str) -> list[str]:
    return caption.split()


REFERENCES: References = {
    "kite.jpg": [
        words("a girl flies a red kite on the beach"),
        words("a red kite is flying above a girl"),
        words("the girl runs along the sand with her kite"),
    ],
    "tea.jpg": [
        words("two women drink tea at a small table"),
        words("women sit at a table and drink tea"),
    ],
    "goat.jpg": [
        words("a goat stands on a roof"),
        words("a white goat on top of a barn roof"),
        words("the goat is on the roof"),
        words("a goat"),
    ],
    "boat.jpg": [words("a boat is tied to the pier")],
}
PREDICTIONS: Predictions = {
    "kite.jpg": words("a girl flies a kite on the beach"),
    "tea.jpg": words("two women sit at a table"),
    "goat.jpg": words("a a a goat on a roof of the barn"),
    "boat.jpg": ["kite"],
}
# What pycocoevalcap 1.2 says of them (times 100): its Bleu(4), Rouge and Cider classes,
# called with these captions joined by spaces.
EXPECTED = {
    "BLEU-1": 66.50896924278312,
    "BLEU-2": 59.92042199586173,
    "BLEU-3": 49.4069734795339,
    "BLEU-4": 39.48505594490087,
    "ROUGE-L": 58.42367668671324,
    "CIDEr-D": 220.97923799169737,
}
EXPECTED_CIDER = {
    "kite.jpg": 298.16097483176793,
    "tea.jpg": 413.2899436414255,
    "goat.jpg": 172.46603349359603,
    "boat.jpg": 0.0,
}


def coco_scores(
    references: Mapping[str, Sequence[Sequence[str]]], predictions: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return what pycocoevalcap says: the scores, and CIDEr-D by image, in percent."""
    bleu_module = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge_module = pytest.importorskip("pycocoevalcap.rouge.rouge")
    cider_module = pytest.importorskip("pycocoevalcap.cider.cider")
    truth = {name: [" ".join(tokens) for tokens in references[name]] for name in references}
    guess = {name: [" ".join(predictions[name])] for name in references}
    bleu, _ = bleu_module.Bleu(4).compute_score(truth, guess, verbose=0)
    rouge, _ = rouge_module.Rouge().compute_score(truth, guess)
    cider, by_image = cider_module.Cider().compute_score(truth, guess)
    scores = {f"BLEU-{n + 1}": 100 * float(value) for n, value in enumerate(bleu)}
    scores |= {"ROUGE-L": 100 * float(rouge), "CIDEr-D": 100 * float(cider)}
    return scores, {name: 100 * float(value) for name, value in zip(truth, by_image, strict=True)}


def random_captions(seed: int, images: int) -> tuple[References, Predictions]:
    """Return captions that hold the difficult cases: empty, one word, repeated, unseen."""
    draw = random.Random(seed)
    names = [f"w{number}" for number in range(draw.choice([2, 6, 40]))]
    longest = draw.choice([1, 4, 12, 40])
    references: References = {}
    predictions: Predictions = {}
    for number in range(images):
        name = f"{number}.jpg"
        references[name] = [
            draw.choices(names, k=draw.randint(1, longest)) for _ in range(draw.randint(1, 6))
        ]
        predictions[name] = draw.choice(
            [
                [],
                [draw.choice(names)],
                [names[0]] * draw.randint(1, 30),
                ["unseen", "unseen"],
                draw.choice(references[name]),
                draw.choices([*names, "unseen"], k=draw.randint(1, longest)),
            ]
        )
    return references, predictions


def test_scores_equal_stored_numbers_of_pycocoevalcap() -> None:
    scorer = Scorer(REFERENCES)
    assert scorer.score(PREDICTIONS) == pytest.approx(EXPECTED, abs=1e-9)
    assert list(scorer.score(PREDICTIONS)) == list(EXPECTED)
    assert scorer.per_image_cider(PREDICTIONS) == pytest.approx(EXPECTED_CIDER, abs=1e-9)


@pytest.mark.parametrize("images", [1, 2, 3, 30])
def test_scores_equal_pycocoevalcap(images: int) -> None:
    for seed in range(25):
        references, predictions = random_captions(seed, images)
        scorer = Scorer(references)
        scores, by_image = coco_scores(references, predictions)
        assert scorer.score(predictions) == pytest.approx(scores, abs=1e-6), seed
        assert scorer.per_image_cider(predictions) == pytest.approx(by_image, abs=1e-6), seed


def read_scoring() -> tuple[References, Predictions, dict[str, float]]:
    """Return nlg-eval's captions and the scores it published for them, in percent."""
    lines = {
        name: [line.split() for line in (SCORING / f"{name}.txt").read_text().splitlines()]
        for name in ("hyp", "ref1", "ref2")
    }
    references = {
        str(number): list(both)
        for number, both in enumerate(zip(lines["ref1"], lines["ref2"], strict=True))
    }
    predictions = {str(number): tokens for number, tokens in enumerate(lines["hyp"])}
    table = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in (SCORING / "README.md").read_text().splitlines()
        if line.startswith("|")
    ]
    published = {name: 100 * float(value) for name, value in zip(table[0], table[2], strict=True)}
    published["CIDEr-D"] = published.pop("CIDEr")
    return references, predictions, published


@pytest.mark.shared("scoring")
def test_scores_equal_published_ones() -> None:
    references, predictions, published = read_scoring()
    del published["METEOR"]
    assert len(published) == 6
    assert Scorer(references).score(predictions) == pytest.approx(published, abs=1e-4)


def test_bleu_takes_the_shorter_of_two_equally_close_references() -> None:
    # Five words lie between references of four and six; with six, a brevity penalty follows.
    references = {"a.jpg": [words("a b c d e f"), words("a b c d")]}
    assert Scorer(references).score({"a.jpg": words("a b c d e")})["BLEU-1"] == pytest.approx(100)


def test_cider_of_a_single_image_is_zero() -> None:
    references = {"a.jpg": [words("a fox runs"), words("the fox")]}
    scores = Scorer(references).score({"a.jpg": words("a fox runs")})
    assert scores["CIDEr-D"] == 0  # log(1) = 0: with one image, every n-gram is everywhere
    assert scores["BLEU-1"] == pytest.approx(100)


def test_captions_without_words_score_zero() -> None:
    nothing: Predictions = {name: [] for name in REFERENCES}
    assert Scorer(REFERENCES).score(nothing) == dict.fromkeys(EXPECTED, 0.0)
    empty: References = {"a.jpg": [[]], "b.jpg": [[], []]}
    assert Scorer(empty).score({"a.jpg": [], "b.jpg": ["fox"]}) == pytest.approx(
        dict.fromkeys(EXPECTED, 0.0), abs=1e-6
    )


def test_scores_of_images_are_in_the_order_of_the_references() -> None:
    """So that those of two sets of predictions can be compared image by image."""
    turned = dict(reversed(PREDICTIONS.items()))
    assert [*Scorer(REFERENCES).per_image_cider(turned)] == [*REFERENCES]


@pytest.mark.parametrize("special", [START, END, PAD])
def test_special_tokens_never_reach_a_scorer(special: str) -> None:
    references = {**REFERENCES, "tea.jpg": [["tea"], ["tea", special]]}
    predictions = {**PREDICTIONS, "tea.jpg": [*PREDICTIONS["tea.jpg"], special]}
    scorer = Scorer(REFERENCES)
    for refused in (
        lambda: Scorer(references),
        lambda: scorer.score(predictions),
        lambda: scorer.per_image_cider(predictions),
        lambda: java_metrics(REFERENCES, predictions),
        lambda: java_metrics(references, PREDICTIONS),
    ):
        with pytest.raises(ValueError, match=rf"tea\.jpg.*{special}"):
            refused()


def test_unknown_words_are_for_predictions_only() -> None:
    # A prediction may hold <unk>, which matches nothing; in a reference it would match it.
    unknown = {**PREDICTIONS, "boat.jpg": [UNKNOWN]}
    assert Scorer(REFERENCES).score(unknown)["BLEU-1"] == pytest.approx(EXPECTED["BLEU-1"])
    with pytest.raises(ValueError, match=UNKNOWN):
        Scorer({"a.jpg": [["a", UNKNOWN]]})


def test_strings_in_place_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="not a string"):
        Scorer({"a.jpg": ["a fox runs"]})
    with pytest.raises(ValueError, match="not a string"):
        Scorer({"a.jpg": [["fox"]]}).score({"a.jpg": "a fox runs"})


def test_images_must_be_the_same() -> None:
    scorer = Scorer(REFERENCES)
    two_missing = {name: PREDICTIONS[name] for name in ("goat.jpg", "boat.jpg")}
    with pytest.raises(UserError, match=r"2 images \(such as 'kite\.jpg'\).*without a prediction"):
        scorer.score(two_missing)
    one_more = {**PREDICTIONS, "more.jpg": ["a"]}
    with pytest.raises(UserError, match=r"1 image \('more\.jpg'\).*without references"):
        scorer.per_image_cider(one_more)
    with pytest.raises(UserError, match=r"1 image \('more\.jpg'\).*without references"):
        java_metrics(REFERENCES, one_more)
    with pytest.raises(UserError, match="no references"):
        Scorer({})
    with pytest.raises(UserError, match=r"'a\.jpg'.*without a reference"):
        Scorer({"a.jpg": []})


def test_scoring_a_thousand_images_is_quick() -> None:
    draw = random.Random(0)
    names = [f"w{number}" for number in range(2000)]
    references = {
        str(number): [draw.choices(names, k=11) for _ in range(5)] for number in range(1000)
    }
    predictions = {name: draw.choices(names, k=10) for name in references}
    scorer = Scorer(references)
    start = time.process_time()
    scorer.score(predictions)
    assert time.process_time() - start < 1.5  # 0.1 here


def test_diversity() -> None:
    predictions = {"a.jpg": ["a", "fox"], "b.jpg": ["a", "fox"], "c.jpg": ["hens"], "d.jpg": []}
    assert diversity(predictions, iter([["a", "fox"], ["a", "hen"]])) == {
        "distinct_captions": 3,
        "distinct_words": 3,
        "copied_from_train": 2,
        "copied_from_train_percent": 50.0,
        "mean_length": 1.25,
    }
    assert diversity({}, [])["mean_length"] == 0


@pytest.fixture
def pycocoevalcap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a pycocoevalcap that has only its folders, so that the tests need no real one."""
    package = tmp_path / "site" / "pycocoevalcap"
    (package / "meteor").mkdir(parents=True)
    (package / "spice" / "lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(package.parent))
    # A package in sys.modules would be found before the path is searched.
    for name in [name for name in sys.modules if name.split(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    (package / "__init__.py").touch()
    return package


def fake_java(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Put a Python program on the PATH as the one and only java."""
    if os.name == "nt":
        pytest.skip("a script cannot stand in for java.exe")
    folder.mkdir()
    script = folder / "java"
    script.write_text(f"#!{sys.executable}\nimport sys\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def add_stanford_models(package: Path) -> None:
    for jar in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (package / "spice" / "lib" / jar).touch()


@pytest.mark.parametrize("missing", ["Java", "pycocoevalcap"])
def test_without_java_or_pycocoevalcap_the_rest_goes_on(
    pycocoevalcap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    add_stanford_models(pycocoevalcap)
    monkeypatch.setenv("PATH", str(tmp_path))
    if missing == "pycocoevalcap":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    scores, left_out = java_metrics(REFERENCES, PREDICTIONS)
    assert scores == {}
    assert [reason.split()[0] for reason in left_out] == ["METEOR", "SPICE"]
    assert all(missing in reason for reason in left_out)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("sys.stdin.close(); sys.exit('out of memory')", "exit code 1 (out of memory)"),
        ("sys.exit(0)", "exit code 0 (no message)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit code -9"),
        ("import time; time.sleep(60)", "took more than"),
        ("print('what?\\n' * 9)", "no number"),
    ],
)
def test_a_failing_java_is_a_sentence(
    pycocoevalcap: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    program: str,
    reason: str,
) -> None:
    fake_java(tmp_path / "bin", monkeypatch, program)
    monkeypatch.setattr("pipeline.metrics.java.JAVA_TIMEOUT", 1.0)
    many = {**REFERENCES, "many.jpg": [["fox"] * 100_000]}  # more than a pipe holds
    scores, left_out = java_metrics(many, {**PREDICTIONS, "many.jpg": ["fox"]})
    assert scores == {}
    assert left_out[0].startswith("METEOR is left out: ") and reason in left_out[0]
    assert left_out[0].endswith(".") and "\n" not in left_out[0]
    assert capfd.readouterr() == ("", "")


def test_meteor_sees_the_tokens(
    pycocoevalcap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Answers a SCORE line with its last field's length, EVAL with the fields' sum.
    program = (
        "for line in sys.stdin:\n"
        "    fields = line.rstrip('\\n').split(' ||| ')\n"
        "    if fields[0] == 'SCORE':\n"
        "        print(len(fields[-1].split()), flush=True)\n"
        "    else:\n"
        "        [print(0.0) for _ in fields[1:]]\n"
        "        print(sum(map(float, fields[1:])) / 100, flush=True)\n"
    )
    fake_java(tmp_path / "bin", monkeypatch, program)
    scores, left_out = java_metrics(
        REFERENCES, {**PREDICTIONS, "boat.jpg": [], "tea.jpg": ["a", "|||", "b"]}
    )
    assert scores == {"METEOR": pytest.approx(8 + 2 + 10 + 0)}
    assert len(left_out) == 1


def test_spice_never_starts_a_download(
    pycocoevalcap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = tmp_path / "called"
    fake_java(tmp_path / "bin", monkeypatch, f"open({str(called)!r}, 'a').write(str(sys.argv))")
    _, left_out = java_metrics(REFERENCES, PREDICTIONS)
    assert "stanford-corenlp-3.6.0.jar" in left_out[1]
    assert "spice-1.0.jar" not in called.read_text()  # METEOR's call alone


@pytest.mark.parametrize("value", ["0.25", "null"])
def test_spice_with_the_models_there(
    pycocoevalcap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    add_stanford_models(pycocoevalcap)
    program = (
        "import json\n"
        "if 'spice-1.0.jar' not in sys.argv: sys.exit('not now')\n"
        "entries = json.load(open(sys.argv[sys.argv.index('spice-1.0.jar') + 1]))\n"
        "assert {entry['test'] for entry in entries} >= {'kite', 'two women sit at a table'}\n"
        "assert sum(len(entry['refs']) for entry in entries) == 10\n"
        f"f = json.loads('{value}')\n"
        "results = [{'image_id': e['image_id'], 'scores': {'All': {'f': f}}} for e in entries]\n"
        "json.dump(results, open(sys.argv[sys.argv.index('-out') + 1], 'w'))\n"
        "print('Parsing captions')\n"
    )
    fake_java(tmp_path / "bin", monkeypatch, program)
    scores, left_out = java_metrics(REFERENCES, PREDICTIONS)
    if json.loads(value) is None:
        assert scores == {} and "SPICE is left out" in left_out[1]
    else:
        assert scores == {"SPICE": pytest.approx(25)} and len(left_out) == 1


@pytest.mark.slow
@pytest.mark.shared("scoring")
def test_meteor_equals_the_published_score(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")
    references, predictions, published = read_scoring()
    scores, left_out = java_metrics(references, predictions)
    assert published["METEOR"] == pytest.approx(29.5797)
    assert scores["METEOR"] == pytest.approx(published["METEOR"], abs=1e-4)
    assert not any("METEOR" in reason for reason in left_out)
    assert capfd.readouterr() == ("", "")
