"""The pretrained model as ONNX files, InceptionV3 and all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from exporting import export, run_elsewhere

from pipeline import Captioner, SearchOptions

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")


@pytest.mark.slow
def test_the_exported_pretrained_model_captions_photographs_as_here(tmp_path: Path) -> None:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        pytest.skip("scikit-image, which has the photographs, is not installed")
    found = (Path(package.origin).parent / "data").iterdir()
    photographs = sorted(path for path in found if path.suffix in (".png", ".jpg"))
    assert len(photographs) > 3
    export("pretrained", "--output", tmp_path / "pretrained")
    pretrained = Captioner.load(device="cpu", precision="fp32")
    options = SearchOptions(3, consensus=0, matching=0)
    wanted = [f"{p.path}\t{p.captions[0].text}" for p in pretrained.stream(photographs, options)]
    assert run_elsewhere(tmp_path / "pretrained", *photographs).stdout.splitlines() == wanted
