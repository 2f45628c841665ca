"""METEOR and SPICE: Java programs shipped with pycocoevalcap, run if it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.metrics.coco import Predictions, References, check_predictions, check_references

JAVA_TIMEOUT = 1800.0  # seconds; METEOR takes about 20 for 1,000 images, SPICE some minutes


def java_metrics(
    references: References, predictions: Predictions
) -> tuple[dict[str, float], list[str]]:
    """Return METEOR and SPICE in percent, and a sentence for each that cannot be computed here.

    METEOR 1.5 (Denkowski and Lavie 2014) and SPICE 1.0 (Anderson et al. 2016) are run with
    pycocoevalcap's options. Nothing is downloaded. Raises what ``Scorer.score`` raises.
    """
    check_references(references)
    check_predictions(predictions, references)
    captions = {
        name: (_line(predictions[name]), [_line(tokens) for tokens in references[name]])
        for name in references
    }
    scores: dict[str, float] = {}
    left_out: list[str] = []
    for metric, compute in (("METEOR", _meteor), ("SPICE", _spice)):
        try:
            scores[metric] = compute(captions)
        except _LeftOutError as reason:
            left_out.append(f"{metric} is left out: {reason}.")
    return scores, left_out


class _LeftOutError(Exception):
    """A score that cannot be computed here; the message is the reason."""


_Captions = Mapping[str, tuple[str, list[str]]]  # image name -> prediction, references


def _line(tokens: Sequence[str]) -> str:
    """Return tokens as one line; "|||" separates fields in METEOR's input."""
    return " ".join(" ".join(tokens).replace("|||", " ").split())


def _meteor(captions: _Captions) -> float:
    """Return METEOR of the corpus in percent."""
    folder = _pycocoevalcap("meteor")
    command = ["-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    # Two runs: an exchange with a single process could deadlock on a pipe.
    questions = [
        " ||| ".join(("SCORE", *references, prediction))
        for prediction, references in captions.values()
    ]
    statistics = _run_java(command, folder, questions, answers=len(questions))
    question = " ||| ".join(("EVAL", *statistics))
    # One score per image, then that of the corpus.
    scores = _run_java(command, folder, [question], answers=len(questions) + 1)
    try:
        return 100 * float(scores[-1])
    except ValueError:
        raise _LeftOutError(f"its answer {scores[-1][:80]!r} is no number") from None


def _spice(captions: _Captions) -> float:
    """Return the mean SPICE of the images in percent."""
    folder = _pycocoevalcap("spice")
    for jar in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        if not (folder / "lib" / jar).is_file():
            raise _LeftOutError(
                f"{jar} is missing; python -m pycocoevalcap.spice.get_stanford_models downloads it"
            )
    entries = [
        {"image_id": name, "test": prediction, "refs": references}
        for name, (prediction, references) in captions.items()
    ]
    with tempfile.TemporaryDirectory() as temporary:
        # Not in the package's folder, where pycocoevalcap writes: it may be read-only.
        questions, answers = Path(temporary, "captions.json"), Path(temporary, "scores.json")
        questions.write_text(json.dumps(entries), encoding="utf-8")
        command = ["-Xmx8G", "-jar", "spice-1.0.jar", str(questions), "-out", str(answers)]
        _run_java([*command, "-subset", "-silent"], folder, [], answers=0)
        try:
            results = json.loads(answers.read_text(encoding="utf-8"))
            scores = [float(result["scores"]["All"]["f"]) for result in results]
            return 100 * math.fsum(scores) / len(captions)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise _LeftOutError(f"its results cannot be read ({error})") from None


def _pycocoevalcap(part: str) -> Path:
    """Return the folder of a part of pycocoevalcap, or raise _LeftOutError."""
    package = importlib.util.find_spec("pycocoevalcap")
    # Only the Java programs are wanted, so the package need not be imported.
    for location in (package.submodule_search_locations or ()) if package else ():
        if Path(location, part).is_dir():
            return Path(location, part)
    raise _LeftOutError("it needs pycocoevalcap (pip install pycocoevalcap) and Java")


def _run_java(
    arguments: Sequence[str], folder: Path, lines: Sequence[str], answers: int
) -> list[str]:
    """Run Java in ``folder`` on lines of input; return its output of at least ``answers`` lines."""
    java = shutil.which("java")
    if java is None:
        raise _LeftOutError("it needs Java, and there is no java command")
    try:
        process = subprocess.run(
            [java, "-Dfile.encoding=UTF-8", *arguments],
            cwd=folder,
            input="".join(f"{line}\n" for line in lines).encode(errors="replace"),
            capture_output=True,
            timeout=JAVA_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _LeftOutError(f"Java took more than {JAVA_TIMEOUT:.0f} seconds") from None
    except OSError as error:
        raise _LeftOutError(f"Java could not be started ({error})") from None
    output = process.stdout.decode(errors="replace").splitlines()
    if process.returncode != 0 or len(output) < answers:
        complaint = process.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise _LeftOutError(
            f"Java ended early with exit code {process.returncode} ({complaint[0][:200]})"
        )
    return output
