"""captioner info: what a model, a run or a cache says about itself, quickly and safely."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from click.testing import Result
from commands import invoke
from conftest import REPOSITORY, StubEncoder
from safetensors.torch import save_file
from small_checkpoint import small_checkpoint
from stub_extraction import stub_extract

from pipeline.cli import main
from pipeline.models.checkpoint import save_checkpoint
from pipeline.models.pretrained import DOCUMENT


def info(*words: object, code: int = 0) -> Result:
    return invoke(main, "info", *words, code=code, prog_name="captioner")


def facts(path: Path) -> dict[str, str]:
    lines = info(path).stdout.splitlines()
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in lines)}


def test_a_checkpoint_is_described(tmp_path: Path) -> None:
    checkpoint = small_checkpoint()
    checkpoint.settings["captions"] = []  # as a run without --captions has it
    save_checkpoint(tmp_path / "x.safetensors", checkpoint)
    found = facts(tmp_path / "x.safetensors")
    assert found["kind"] == "a checkpoint"
    assert found["encoder"].startswith("inception_v3, weights random ")
    assert found["encoder"].endswith("; not in the file")
    count = sum(weight.numel() for weight in checkpoint.build_decoder().parameters())
    assert found["decoder"] == f"an ensemble of 2 LSTMs of 3 units, {count:,} weights"
    assert found["vocabulary"] == "6 words (english)"
    assert found["reranking"] == "image-text matcher, predictor of 3 n-grams"
    assert found["trained"] == "3 epochs" and found["scores"].startswith("CIDEr-D 40.5 (val, ")
    assert found["settings"] == "data data/flickr8k, lr 0.001, start ['a', 'b']"


def test_a_run_is_described_with_its_scores(tmp_path: Path) -> None:
    assert "not a run" in info(tmp_path, code=2).stderr
    save_checkpoint(tmp_path / "best.safetensors", small_checkpoint(1))
    scores = {"scores": {"CIDEr-D": 46.04, "BLEU-4": 17.9}, "split": "test"}
    (tmp_path / "scores-test.json").write_text(json.dumps(scores))
    (tmp_path / "scores.json").write_text('["damaged"]')
    found = facts(tmp_path)
    assert found["kind"] == "a run; best.safetensors of it"
    assert found["scores-test.json"] == "CIDEr-D 46.0, BLEU-4 17.9 (test)"
    assert "scores.json" not in found


def test_a_cache_is_described_finished_or_not(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "x.h5"
    with pytest.raises(KeyboardInterrupt):
        stub_extract(images, cache, StubEncoder(stop_after=1))
    found = facts(cache)
    assert found["kind"] == "unfinished feature cache"
    (images / "0.png").write_bytes(b"broken")
    stub_extract(images, cache, StubEncoder(), force=True)
    found = facts(cache)
    assert found["images"] == f"9 of 10 encoded, 1 could not be read; from {images}"
    assert found["encoder"].startswith("stub, weights random (SHA-256 000000000000), squeeze-299")


def test_the_pretrained_model_comes_with_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no run is
    result = info()
    assert "licence     trained on Flickr8k, for research and education only\n" in result.stdout
    card = (REPOSITORY / "data/pretrained/MODEL_CARD.md").read_text(encoding="utf-8")
    assert result.stdout.endswith(f"\n\n{card}")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89HDF\r\n\x1a\nshort",
        b"\x05\0\0\0\0\0\0\0{[]}x",
        b"\xff\xff\0\0\0\0\0\0{}",
        b"not a model at all",
        {},
        {"decoder_config": [], "scores": {}},
        {"decoder_config": {"hidden_size": "x"}, "scores": {}, "settings": []},
        [],
    ],
)
def test_other_files_are_refused_in_a_line(tmp_path: Path, content: object) -> None:
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({}, path, {DOCUMENT: json.dumps(content)})
    result = info(path, code=2)
    assert result.stderr.startswith(f"Error: {path}: ")
    assert result.stderr.count("\n") == 1


def test_a_strangers_words_are_one_line_each_and_open_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    settings = {"data": "ftp://example.org/{0..1}.tar", "captions": "a\nlicence  yours\x1b[2J"}
    model = small_checkpoint()
    source = str(tmp_path / "weights")
    encoder = replace(model.encoder, weights_source=source)
    save_checkpoint(path, replace(model, settings=settings, encoder=encoder))
    code = f"""
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append((event, str(args[:1]))))
from pipeline.cli import main
try: main(["info", {str(path)!r}])
except SystemExit: pass
print([e for e in seen if e[0].startswith("socket.") or {source!r} in e[1]], "torch" in sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    lines = ended.stdout.splitlines()
    assert lines[-1] == "[] False"
    assert sum(line.startswith("licence") for line in lines) == 1
    assert "\x1b" not in ended.stdout and source in ended.stdout


def test_nothing_there_is_said(tmp_path: Path) -> None:
    assert "no such model, run or feature cache" in info(tmp_path / "x", code=2).stderr
    with h5py.File(tmp_path / "other.h5", "w"):
        pass
    assert "not a feature cache" in info(tmp_path / "other.h5", code=2).stderr
