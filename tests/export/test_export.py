"""A captioner as ONNX files: the same captions elsewhere, and nothing half-written here."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from drawn_run import DrawnRun
from exporting import export, run_elsewhere
from PIL import Image

from pipeline import Captioner
from pipeline.datasets.images import read_square
from pipeline.datasets.tokenizers import ENGLISH, detokenize_english
from pipeline.datasets.vocabulary import SPECIALS, Vocabulary
from pipeline.decoding.options import SearchConfig, SearchOptions
from pipeline.decoding.search import search
from pipeline.export import onnx as module
from pipeline.export import onnx_graphs
from pipeline.export.onnx import RUNNER, SETTINGS, writing_rules
from pipeline.export.onnx_graphs import Graph, check, to_onnx
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.models.encoder import Encoder
from pipeline.utils.errors import UserError

try:
    onnx_graphs.check_installed()
except UserError as missing:
    pytest.skip(missing.message, allow_module_level=True)
from pipeline.export import onnx_runner

# InceptionV3 itself is exported in test_export_pretrained.py.
pytestmark = pytest.mark.usefixtures("tiny_inception")

FILES = {"encoder.onnx", "decoder_start.onnx", "decoder_step.onnx", SETTINGS, RUNNER}


@pytest.fixture(scope="module")
def exported(drawn_run: DrawnRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn run's captioner, exported by the command."""
    folder = tmp_path_factory.mktemp("export") / "captioner"
    result = export(drawn_run.run, "--output", folder)
    assert result.stdout == "", "the exporter's chatter"
    assert [line.rpartition(": ")[0] for line in result.stderr.splitlines()] == [
        str(folder / name)
        for name in ("encoder.onnx", "decoder_start.onnx", "decoder_step.onnx", RUNNER, SETTINGS)
    ]
    return folder


@pytest.fixture
def quick(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the exporter's work where it would make the same files again."""

    def known(graph: Graph) -> bytes:
        name = type(graph.module).__name__
        file = {"Encoder": "encoder", "StartGraph": "decoder_start"}.get(name, "decoder_step")
        return (exported / f"{file}.onnx").read_bytes()

    monkeypatch.setattr(onnx_graphs, "to_onnx", known)
    monkeypatch.setattr(onnx_graphs, "check", lambda *words: None)


@pytest.fixture(scope="module")
def runner(exported: Path) -> onnx_runner.Captioner:
    return onnx_runner.Captioner(exported)


# The same captions


def test_the_runner_captions_as_the_captioner_and_names_unreadable_images(
    scenes: list[Path],
    exported: Path,
    captioner: Captioner,
    runner: onnx_runner.Captioner,
    tmp_path: Path,
) -> None:
    paths = scenes[:8]
    by_beam, greedy = (
        [p.captions[0].text for p in captioner.stream(paths, options)]
        for options in (SearchOptions(n, consensus=0, matching=0) for n in (3, 1))
    )
    assert len(set(by_beam)) > 3, "the captioner should not be constant"
    assert [runner.caption(path).text for path in paths] == by_beam
    broken, text = tmp_path / "broken.jpg", tmp_path / "text.jpg"
    broken.write_bytes(paths[0].read_bytes()[:2000])
    text.write_text("no image")
    bad = (broken, tmp_path / "none.jpg", text)
    ended = run_elsewhere(exported, *bad, *paths, "--beam-size", 1)
    assert ended.returncode == 1, ended.stderr
    assert ended.stdout.splitlines() == [f"{p}\t{t}" for p, t in zip(paths, greedy, strict=True)]
    first, *lines = ended.stderr.splitlines()
    assert first.startswith(f"failed: {broken}: ") and "truncated" in first
    assert lines == [
        f"failed: {tmp_path / 'none.jpg'}: no such file",
        f"failed: {text}: not a supported image",
        "3 of 11 images could not be read",
    ]


def test_features_are_those_of_pytorch(
    scenes: list[Path], captioner: Captioner, runner: onnx_runner.Captioner
) -> None:
    squares = [read_square(path) for path in scenes[:3]]
    wanted, found = captioner.encoder.encode(squares), runner.encode(squares)
    assert found.dtype == numpy.float32 and found.shape == (3, 2048)
    assert len(runner.captions(scenes[0], 2)) == 2
    assert numpy.abs(wanted - found).max() < 1e-4 * numpy.abs(wanted).max()


def some_features(captioner: Captioner, count: int) -> torch.Tensor:
    """More various than those of images of one kind, and so the captions."""
    noise = torch.randn(count, 2048, generator=torch.Generator().manual_seed(5))
    return captioner.decoder.feature_mean + 3 * noise / captioner.decoder.feature_scale


@pytest.mark.parametrize(
    "config",
    [
        SearchConfig(1),
        SearchConfig(3),
        SearchConfig(10),
        SearchConfig(4, max_length=3),
        SearchConfig(4, min_length=12, length_penalty=0.0),
        SearchConfig(60, max_length=1),  # more than there are words
    ],
    ids=str,
)
def test_every_hypothesis_is_the_searchs(
    captioner: Captioner,
    runner: onnx_runner.Captioner,
    config: SearchConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of the beam, in its order, with its log-probabilities and scores."""
    settings = {
        name: getattr(config, name) for name in runner.settings["search"] if name != "remark"
    }
    monkeypatch.setitem(runner.settings, "search", settings)
    features = some_features(captioner, 20)
    for row, hypotheses in zip(features, search(captioner.decoder, features, config), strict=True):
        found = runner.search(row[None].numpy())
        wanted = [detokenize_english(captioner.vocabulary.decode(h.tokens)) for h in hypotheses]
        assert [caption.text for caption in found] == wanted
        for caption, hypothesis in zip(found, hypotheses, strict=True):
            assert caption.log_probability == pytest.approx(hypothesis.log_probability, abs=1e-4)
            assert caption.score == pytest.approx(hypothesis.score, abs=1e-4)


@pytest.mark.slow
def test_several_decoders_are_one_graph(
    drawn_run: DrawnRun, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(drawn_run.run)
    torch.manual_seed(1)
    for name, weights in checkpoint.decoder_weights.items():
        if name not in ("feature_mean", "feature_scale"):
            weights += 0.3 * weights.std() * torch.randn_like(weights)
    save_checkpoint(tmp_path / "other.safetensors", checkpoint)

    def encoder_known(graph: Graph) -> bytes:
        if isinstance(graph.module, Encoder):
            return (exported / "encoder.onnx").read_bytes()
        return to_onnx(graph)

    monkeypatch.setattr(onnx_graphs, "to_onnx", encoder_known)
    models = [drawn_run.run, tmp_path / "other.safetensors"]
    words = ("--output", tmp_path / "both", "--beam-size", 5)
    export(models[0], "--model", models[1], "--ensemble", *words)
    both = onnx_runner.Captioner(tmp_path / "both")
    assert both.settings["decoders"] == 2 and both.settings["state_size"] == 2 * 48
    assert both.settings["models"][1].endswith("/other.safetensors")
    together = Captioner.load(models, device="cpu", precision="fp32")
    features = some_features(together, 20)
    found = [[c.text for c in both.search(row[None].numpy())] for row in features]
    assert found == [
        [detokenize_english(together.vocabulary.decode(h.tokens)) for h in hypotheses]
        for hypotheses in search(together.decoder, features, SearchConfig(5))
    ]
    alone = onnx_runner.Captioner(exported)
    assert found != [[c.text for c in alone.search(row[None].numpy(), 5)] for row in features]


def odd_images(folder: Path) -> list[Path]:
    """Draw one image of every kind that is brought to RGB in a way of its own."""
    values = numpy.random.default_rng(0).integers(0, 256, (90, 70, 4), numpy.uint8)
    photo = Image.fromarray(values)
    turned = Image.Exif()
    turned[0x0112] = 6
    colours = photo.convert("RGB")
    grey_16 = Image.fromarray(values[..., 0].astype(numpy.uint16) * 257)
    palette = colours.quantize(16)
    large = colours.resize((1900, 1300))
    files: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "plain.png": (colours, {}),
        "clear.png": (photo, {}),
        "clear-grey.png": (photo.convert("LA"), {}),
        "one-clear.png": (palette, {"transparency": 3}),
        "palette.gif": (palette, {}),
        "grey.jpg": (colours.convert("L"), {}),
        "bits.png": (colours.convert("1"), {}),
        "grey-16.png": (grey_16, {}),
        "cmyk.jpg": (colours.convert("CMYK"), {}),
        "turned.jpg": (colours, {"exif": turned}),
        "large.jpg": (large, {"exif": turned}),
        "square.png": (colours.resize((299, 299)), {}),
    }
    for name, (image, how) in files.items():
        image.save(folder / name, **how)
    return [folder / name for name in files]


def test_the_runner_sees_images_as_the_pipeline(tmp_path: Path) -> None:
    for path in odd_images(tmp_path):
        assert numpy.array_equal(onnx_runner.read_square(path), read_square(path)), path.name


WORDS = {
    ENGLISH: "a dog can not gon na wan do n't 's 'm 'd 're 've 'll % # $ & 5 1,000 3rd '90s 'n "
    "st. u.s. t-shirt ca wo he",
    "words": "狗 在 t恤 london u-bahn 3 한 ไทย l'eau two 's",
    "characters": "狗 在 t恤 london u-bahn 3 한 ไทย l'eau two 's",
}


@pytest.mark.parametrize("tokenizer", WORDS)
def test_the_runner_writes_as_the_pipeline(
    monkeypatch: pytest.MonkeyPatch, runner: onnx_runner.Captioner, tokenizer: str
) -> None:
    words = [*SPECIALS, *WORDS[tokenizer].split()]
    vocabulary = Vocabulary(words, tokenizer)
    rules = writing_rules(vocabulary)
    if tokenizer == ENGLISH:
        assert rules["apart"] == ["'s", "'m", "'d", "'re", "'ve", "'ll", "'90s", "'n"]
        assert ["can", "not"] in rules["pairs"] and ["#", "5"] in rules["pairs"]
    monkeypatch.setattr(runner, "_words", words)
    monkeypatch.setitem(runner.settings, "writing", rules)
    chance = random.Random(0)
    # Of four English tokens, such as "#'ll've's", some differ, as documented.
    longest = 3 if tokenizer == ENGLISH else 5
    for _ in range(4000 if tokenizer == ENGLISH else 500):
        tokens = chance.choices(range(4, len(words)), k=chance.randint(0, longest))
        assert runner.write(tokens) == vocabulary.detokenize(vocabulary.decode(tokens))


# What the files are


def test_tensors_are_as_documented(exported: Path, runner: onnx_runner.Captioner) -> None:
    tensors = {
        name: [
            {t.name: (t.type, t.shape[0], *t.shape[1:]) for t in side}
            for side in (session.get_inputs(), session.get_outputs())
        ]
        for name, session in runner._sessions.items()
    }
    floats, size = "tensor(float)", len(runner.settings["vocabulary"])
    assert tensors == {
        "encoder": [
            {"pixels": ("tensor(uint8)", "batch", 299, 299, 3)},
            {"features": (floats, "batch", 2048)},
        ],
        "decoder_start": [
            {"features": (floats, "batch", 2048)},
            {"hidden": (floats, "batch", 48), "cell": (floats, "batch", 48)},
        ],
        "decoder_step": [
            {
                "tokens": ("tensor(int64)", "batch"),
                "hidden": (floats, "batch", 48),
                "cell": (floats, "batch", 48),
            },
            {
                "logits": (floats, "batch", size),
                "next_hidden": (floats, "batch", 48),
                "next_cell": (floats, "batch", 48),
            },
        ],
    }


def test_the_files_tell_no_paths(drawn_run: DrawnRun, exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    for path in exported.iterdir():
        content = path.read_bytes()
        for told in (str(drawn_run.run.parent), str(Path(torch.__file__).parents[1])):
            assert told.encode() not in content, f"{told} in {path.name}"
        assert b"site-packages" not in content and b"stack_trace" not in content


def test_the_settings_say_what_they_are(drawn_run: DrawnRun, exported: Path) -> None:
    settings = json.loads((exported / SETTINGS).read_text(encoding="utf-8"))
    checkpoint = load_checkpoint(drawn_run.run)
    assert settings["encoder"]["weights_sha256"] == checkpoint.encoder.weights_sha256
    assert settings["encoder"]["weights_source"] == "weights.pth"
    assert settings["vocabulary"] == list(checkpoint.vocabulary.words)
    remark = settings["search"].pop("remark")
    assert "reranker" in remark
    usual = {"beam_size": 3, "max_length": 20, "min_length": 1, "length_penalty": 0.9}
    assert settings["search"] == usual
    assert "Flickr8k" not in settings["licence"]
    for models, start in ([["pretrained"], ()], [["runs/joint"], ("pretrained",)]):
        checkpoint.settings["start"] = start
        settings = module.captioner_settings(checkpoint, list(map(Path, models)), beam_size=5)
        assert "research and education only" in settings["licence"]
        assert settings["search"] == {**usual, "beam_size": 5, "remark": remark}


def test_an_export_that_computes_something_else_is_refused(exported: Path) -> None:
    """Weights that were lost on the way, as a broken exporter would."""
    import onnx

    torch.manual_seed(0)
    graph = Graph(torch.nn.Linear(4, 3), {"features": torch.randn(2, 4)}, ("logits",))
    content = to_onnx(graph)
    check("linear", graph, content)
    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        if tensor.dims == [3]:
            tensor.raw_data = numpy.frombuffer(tensor.raw_data, numpy.float32)[::-1].tobytes()
    with pytest.raises(UserError, match=r"linear\.onnx differs from PyTorch"):
        check("linear", graph, model.SerializeToString())


# Nothing half-written


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.usefixtures("quick")
def test_a_killed_export_leaves_what_was_there_and_the_next_cleans_up(
    drawn_run: DrawnRun, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(exported, tmp_path / "captioner")
    words = [drawn_run.run, "--output", output]

    def killed(graph: Graph) -> bytes:
        if isinstance(graph.module, onnx_graphs.StepGraph):
            os.kill(os.getpid(), signal.SIGKILL)
        return b"half"

    process = os.fork()
    if not process:
        torch.set_num_threads(1)  # the others were left behind
        monkeypatch.setattr(onnx_graphs, "to_onnx", killed)
        try:
            export(*words)
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert (output / module.TEMPORARY).is_dir()
    kept = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert kept == contents(exported)
    export(*words)
    assert contents(output) == contents(exported)
    assert [path.name for path in tmp_path.iterdir()] == ["captioner"]


@pytest.mark.usefixtures("quick")
def test_files_of_two_exports_are_never_taken_for_one(
    drawn_run: DrawnRun,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped while the new files take the old ones' places: the runner says so."""
    output = shutil.copytree(exported, tmp_path / "captioner")
    replace = Path.replace

    def failing(source: Path, target: Path) -> Path:
        if target == output / "decoder_step.onnx":
            raise OSError(28, "No space left on device")
        return replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", failing)
        result = export(drawn_run.run, "--output", output, code=2)
    assert result.stderr.endswith("captioner: cannot be written (No space left on device)\n")
    assert onnx_runner.main(["a.jpg", "--model", str(output)]) == 2
    assert "captioner.json: No such file" in capsys.readouterr().err
    export(drawn_run.run, "--output", output)
    assert contents(output) == contents(exported)


# Errors


def test_a_missing_extra_is_one_line(
    drawn_run: DrawnRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "onnxscript" else find(name, package),
    )
    result = export(drawn_run.run, "--output", tmp_path / "out", code=2)
    assert result.stderr == (
        "Error: onnxscript is not installed: pip install onnx onnxscript onnxruntime\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
def test_other_things_are_not_written_among_unless_forced(
    drawn_run: DrawnRun, tmp_path: Path
) -> None:
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "mother.txt").write_text("dear")
    (letters / SETTINGS).write_text("[1]")
    for output, message in ((letters, "other files in it"), (letters / "mother.txt", "is a file")):
        assert message in export(drawn_run.run, "--output", output, code=2).stderr
    assert sorted(contents(letters)) == [SETTINGS, "mother.txt"]
    export(drawn_run.run, "--output", letters, "--force")
    assert set(contents(letters)) == {*FILES, "mother.txt"}


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    result = export(tmp_path / "nothing", "--output", tmp_path / "out", code=2)
    assert "no such checkpoint" in result.stderr
    assert list(tmp_path.iterdir()) == []


# The runner's errors


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (SETTINGS, None, "captioner.json: No such file or directory; export the captioner again"),
        (SETTINGS, "{", "captioner.json: damaged; export the captioner again"),
        (SETTINGS, "{}", "captioner.json: not that of an exported captioner"),
        (
            SETTINGS,
            json.dumps({"format": module.FORMAT, "format_version": 2}),
            "captioner.json: version 2, but this program reads version 1",
        ),
        ("decoder_step.onnx", None, "decoder_step.onnx: no such file"),
        ("encoder.onnx", "weights", "encoder.onnx: ONNX Runtime cannot load it"),
    ],
)
def test_files_that_are_not_those_of_an_export(
    exported: Path, tmp_path: Path, name: str, content: str | None, reason: str
) -> None:
    folder = shutil.copytree(exported, tmp_path / "captioner")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(onnx_runner.ExportError) as raised:
        onnx_runner.Captioner(folder)
    assert str(raised.value).startswith(f"{folder}{os.sep}{reason}")


def test_a_beam_of_none_is_a_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        onnx_runner.main(["a.jpg", "--beam-size", "0"])
    assert "--beam-size" in capsys.readouterr().err


def test_the_runner_ends_quietly_when_its_reader_has_enough(
    scenes: list[Path], exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as pipe:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", pipe)
        assert onnx_runner.main([*map(str, scenes[:3]), "--model", str(exported)]) == 1
