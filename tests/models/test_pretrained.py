"""The pretrained model: its compression, its file, and the commands that fall back on it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import invoke
from conftest import REPOSITORY, SHARED
from draw_scenes import draw_scenes
from drawn_run import DrawnRun

import caption
import evaluate
import extract_features
from pipeline import Captioner
from pipeline.cli import compress as command
from pipeline.datasets.images import read_square
from pipeline.features.cache import FeatureCache
from pipeline.models import encoder
from pipeline.models.checkpoint import load_checkpoint, save_checkpoint
from pipeline.models.checkpoint_file import read_tensors, write_tensors
from pipeline.models.encoder import load_encoder
from pipeline.models.pretrained import PRETRAINED, is_pretrained, pretrained_path
from pipeline.models.quantization import dequantize, quantize
from pipeline.utils.errors import UserError


def test_filters_lose_at_most_half_a_step_and_the_rest_nothing() -> None:
    torch.manual_seed(0)
    weights = {
        "conv.weight": torch.randn(5, 4, 3, 3) * torch.logspace(-4, 2, 5)[:, None, None, None],
        "bn.weight": torch.rand(5),
        "zeros.weight": torch.zeros(2, 1, 3, 3),
    }
    rounded, scales = quantize(weights)
    assert scales.keys() == {"conv.weight", "zeros.weight"}
    assert rounded["conv.weight"].dtype == torch.int8
    assert rounded["conv.weight"].abs().amax(dim=(1, 2, 3)).tolist() == [127] * 5
    back = dequantize(rounded, scales)
    for name in ("bn.weight", "zeros.weight"):
        assert torch.equal(back[name], weights[name])
    error = (back["conv.weight"] - weights["conv.weight"]).abs().amax(dim=(1, 2, 3))
    assert (error <= scales["conv.weight"] * 0.5001).all()
    assert (error > 0).all()


@pytest.fixture(scope="module")
def small_model(drawn_run: DrawnRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with its encoder inside, and its compressed form."""
    folder = tmp_path_factory.mktemp("compressed")
    (folder / "joint").mkdir()
    state = torch.load(drawn_run.weights, weights_only=True)
    kept = {name: value for name, value in state.items() if "num_batches" not in name}
    whole = replace(load_checkpoint(drawn_run.run), encoder_weights=kept)
    save_checkpoint(folder / "joint" / "best.safetensors", whole)
    small = folder / "small.safetensors"
    result = invoke(command.main, folder / "joint", "--output", small)
    assert f"{small.stat().st_size / 1e6:.1f} MB" in result.stderr
    return folder / "joint", small


def test_a_compressed_model_captions_as_the_whole_one(
    scenes: list[Path], small_model: tuple[Path, Path]
) -> None:
    joint, small = small_model
    assert small.stat().st_size < 0.3 * (joint / "best.safetensors").stat().st_size
    whole, compressed = (Captioner.load(model, device="cpu") for model in small_model)
    squares = [read_square(path) for path in scenes[:4]]
    exact, rounded = (torch.from_numpy(m.encoder.encode(squares)) for m in (whole, compressed))
    assert torch.cosine_similarity(exact, rounded).min() > 0.9
    # The encoder is untrained, whose features compression changes far more than a trained one's.
    compressed.encoder = whole.encoder
    pairs = zip(whole.caption(scenes[:8]), compressed.caption(scenes[:8]), strict=True)
    assert sum(a == b for a, b in pairs) >= 7


def test_a_compressed_model_is_its_own_encoder_and_tells_no_paths(
    drawn_run: DrawnRun, small_model: tuple[Path, Path]
) -> None:
    """Its encoder, taken out of the file, is the one that its decoder wants."""
    joint, small = small_model
    checkpoint = load_checkpoint(small)
    assert checkpoint.encoder.mismatch(load_encoder(str(small)).identity) is None
    assert checkpoint.encoder.mismatch(load_checkpoint(joint).encoder) is not None
    assert all(v.dtype == torch.float32 for v in checkpoint.decoder_weights.values())
    document = str(read_tensors(small)[1])
    assert str(drawn_run.data.parent) not in document and str(joint) not in document


def test_a_run_of_stage_2_takes_its_encoder_along(
    drawn_run: DrawnRun, scenes: list[Path], tmp_path: Path
) -> None:
    """Two decoders, together with the encoder whose features they were trained on."""
    small, none = tmp_path / "small.safetensors", tmp_path / "none.safetensors"
    runs = ["--ensemble", drawn_run.run, drawn_run.run]
    invoke(command.main, *runs, "--output", small)
    checkpoint = load_checkpoint(small)
    assert checkpoint.decoder_config.members == 2 and checkpoint.matcher is not None
    assert len(Captioner.load(small, device="cpu").caption(scenes[:1])[0]) > 5
    words = [*runs, "--weights", "imagenet.pth", "--output", none]
    assert "imagenet.pth" in invoke(command.main, *words, code=2).stderr
    assert not none.exists()


def test_compressing_again_makes_it_no_larger(
    small_model: tuple[Path, Path], tmp_path: Path
) -> None:
    """A matrix with two names, as of tied embeddings, is in the file once."""
    again, whole = tmp_path / "again.safetensors", tmp_path / "whole.safetensors"
    invoke(command.main, small_model[1], "--output", again)
    assert again.stat().st_size == pytest.approx(small_model[1].stat().st_size, rel=0.001)
    save_checkpoint(whole, load_checkpoint(small_model[1]))
    for path in (small_model[1], again, whole):
        weights = load_checkpoint(path).decoder_weights
        names = ("word_embedding.weight", "projection.weight")
        assert len({weights[name].data_ptr() for name in names}) == 1, path


@pytest.mark.parametrize("change", ["scale of another shape", "scale of no filter"])
def test_a_damaged_compressed_model_is_named(
    small_model: tuple[Path, Path], tmp_path: Path, change: str
) -> None:
    tensors, document = read_tensors(small_model[1])
    name = next(name for name in tensors if name.startswith("encoder_scales."))
    if change == "scale of another shape":
        tensors[name] = tensors[name][:-1]
    else:
        tensors["encoder_scales.nothing"] = tensors.pop(name)
    damaged = tmp_path / "damaged.safetensors"
    write_tensors(damaged, tensors, document)
    for load in (load_checkpoint, lambda path: load_encoder(str(path))):
        with pytest.raises(UserError, match=r"damaged\.safetensors: .*(damaged|holds no)"):
            load(damaged)


# The model itself


@pytest.fixture(scope="module")
def boxed() -> Captioner:
    return Captioner.load(device="cpu", precision="fp32")


def test_the_model_in_the_box_is_small_and_its_name_is_found() -> None:
    files = [path for path in (REPOSITORY / "data/pretrained").rglob("*") if path.is_file()]
    assert pretrained_path() in files
    assert sum(path.stat().st_size for path in files) <= 60e6
    checkpoint = load_checkpoint(Path(PRETRAINED))
    assert checkpoint.encoder.mismatch(load_encoder(PRETRAINED).identity) is None
    assert checkpoint.predictor is not None and len(checkpoint.vocabulary) > 2000


def test_a_folder_of_that_name_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_pretrained(Path(PRETRAINED))
    (tmp_path / PRETRAINED).mkdir()
    assert is_pretrained(Path(PRETRAINED))  # an empty folder is no model
    (tmp_path / PRETRAINED / "best.safetensors").touch()
    assert not is_pretrained(Path(PRETRAINED))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chelsea.png", "a brown dog is looking at the camera"),
        ("motorcycle_left.png", "a man on a motorcycle"),
    ],
)
def test_a_fixed_photograph_gives_a_fixed_caption(boxed: Captioner, name: str, text: str) -> None:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        pytest.skip("scikit-image, which has the photographs, is not installed")
    assert boxed.caption([Path(package.origin).parent / "data" / name]) == [text]


def test_a_fixed_drawing_gives_fixed_features(boxed: Captioner, tmp_path: Path) -> None:
    """On any machine, whatever is installed: the drawing is made by the project itself."""
    draw_scenes(tmp_path, images=1, seed=0)
    image = next((tmp_path / "Images").glob("*.jpg"))
    features = boxed.encoder.encode([read_square(image)])[0]
    assert features.mean() == pytest.approx(0.145048, rel=1e-3)


@pytest.mark.shared("weights/inception_v3_standin.pth", "flickr8k_fullres")
def test_8_bits_keep_the_features_of_a_trained_encoder(tmp_path: Path) -> None:
    weights = SHARED / "weights/inception_v3_standin.pth"
    state = torch.load(weights, weights_only=True)
    torch.save(dequantize(*quantize(state)), tmp_path / "rounded.pth")
    squares = [read_square(p) for p in sorted((SHARED / "flickr8k_fullres").rglob("*.jpg"))[:4]]
    exact, rounded = (
        torch.from_numpy(load_encoder(str(path)).for_inference().encode(squares))
        for path in (weights, tmp_path / "rounded.pth")
    )
    assert torch.cosine_similarity(exact, rounded).min() > 0.999


@pytest.mark.slow
@pytest.mark.shared("flickr8k")
def test_the_model_scores_what_its_card_says(tmp_path: Path) -> None:
    output = tmp_path / "predictions.json"
    words = ["pretrained", "--data", SHARED / "flickr8k", "--output", output, "--no-java"]
    invoke(evaluate.main, *words)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["split_sha256"] == "51c9cff8a4e3"
    card = (REPOSITORY / "data/pretrained/MODEL_CARD.md").read_text(encoding="utf-8")
    [row] = [line for line in card.splitlines() if line.startswith("| `captioner.safetensors`")]
    names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D")
    for name, cell in zip(names, row.split("|")[2:], strict=False):
        if name in scores["scores"]:  # bf16 and other processors differ a little
            assert scores["scores"][name] == pytest.approx(float(cell), abs=0.4), name


def test_caption_uses_it_and_says_so(
    scenes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(caption.main, scenes[0], "--device", "cpu")
    assert (
        "model: the pretrained model, trained on Flickr8k, for research and education only; "
        "captioner info pretrained shows more\n"
    ) in result.stderr
    assert result.stdout.startswith(f"{scenes[0]}\t") and len(result.stdout.split("\t")[1]) > 5


def test_extraction_falls_back_on_its_encoder_and_keeps_to_it(
    drawn_run: DrawnRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable() -> dict[str, torch.Tensor]:
        raise UserError("the ImageNet weights of InceptionV3 cannot be had (no network)")

    def never() -> dict[str, torch.Tensor]:
        raise AssertionError("the cache was begun with other weights")

    monkeypatch.setattr(encoder, "_imagenet_state", unreachable)
    output = tmp_path / "features.h5"
    words = ["--data", drawn_run.data, "--output", output, "--device", "cpu"]
    result = invoke(extract_features.main, *words)
    assert "cannot be had (no network)" in result.stderr
    assert "(--weights pretrained)" in result.stderr
    identity = FeatureCache(output).identity
    assert identity.weights_source == PRETRAINED
    assert identity.mismatch(load_checkpoint(Path(PRETRAINED)).encoder) is None
    monkeypatch.setattr(encoder, "_imagenet_state", never)
    assert "complete" in invoke(extract_features.main, *words).stderr
