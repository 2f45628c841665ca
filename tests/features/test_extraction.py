"""Stage 1: the encoder, extraction with its kills and broken images, and the command."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, cast
from urllib.error import URLError

import numpy
import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from conftest import REPOSITORY, SHARED, StubEncoder, draw
from torch import Tensor, nn

import extract_features
from pipeline.datasets.image_sources import ImageFolder
from pipeline.datasets.images import IMAGE_SIZE, find_images, read_square
from pipeline.features.cache import PENDING, FeatureCache, partial_path
from pipeline.features.encode_images import encode_batches
from pipeline.features.extraction import Extraction, ExtractionResult, extract
from pipeline.models.encoder import Encoder, load_encoder, load_trunk, weights_sha256
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.models.openvino import choose_engine
from pipeline.utils.errors import InputError, UserError

STANDIN = SHARED / "weights" / "inception_v3_standin.pth"
FLICKR8K = SHARED / "flickr8k" / "Images"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(data: Path, output: Path, encoder: StubEncoder, **options: Any) -> ExtractionResult:
    """Extract with a stub encoder, four images a batch, one batch after the other."""
    options = {"batch_size": 4, "workers": 1, **options}
    return extract(
        Extraction(ImageFolder(data), find_images(data), output, cast(Encoder, encoder), **options)
    )


def spoil(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(b"")


# Extraction


def test_every_image_becomes_a_row(images: Path, tmp_path: Path) -> None:
    draw(images / "sub folder" / "é.jpg", 10)
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder)
    names = [*(f"{number}.png" for number in range(10)), "sub folder/é.jpg"]
    assert (result.encoded, result.kept) == (11, 0)
    assert result.cache.complete
    assert result.cache.path == tmp_path / "x.h5"
    assert result.cache.names() == names
    assert result.cache.identity == encoder.identity
    assert encoder.batches == [4, 4, 3]
    squares = [read_square(images / name) for name in names]
    expected = numpy.concatenate(
        [StubEncoder().for_inference().encode(squares[start : start + 4]) for start in (0, 4, 8)]
    )
    assert (result.cache.read(numpy.arange(11)) == expected.astype(numpy.float16)).all()
    assert len(result.cache.damaged_rows()) == 0


@pytest.mark.parametrize("batch_size, workers", [(1, 1), (3, 4), (100, 2)])
def test_any_batches_and_threads(
    images: Path, tmp_path: Path, batch_size: int, workers: int
) -> None:
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder, batch_size=batch_size, workers=workers)
    assert sum(encoder.batches) == 10
    assert max(encoder.batches) == min(batch_size, 10)
    alone = run(images, tmp_path / "y.h5", StubEncoder(), batch_size=batch_size, workers=1)
    assert sha256(result.cache.path) == sha256(alone.cache.path)


def test_broken_images_are_recorded(images: Path, tmp_path: Path) -> None:
    spoil(images / "1.png")
    (images / "5.png").write_text("no image")
    result = run(images, tmp_path / "x.h5", StubEncoder())
    assert result.cache.failures() == {
        "1.png": "empty file",
        "5.png": "not an image that Pillow reads",
    }
    assert (result.encoded, result.kept) == (8, 0)
    assert result.cache.complete
    encoder = StubEncoder()
    assert run(images, tmp_path / "x.h5", encoder).kept == 10  # left as it is
    assert encoder.batches == []
    draw(images / "1.png", 1)  # another image now
    result = run(images, tmp_path / "x.h5", encoder)
    assert list(result.cache.failures()) == ["5.png"]
    assert encoder.batches == [4]
    run(images, tmp_path / "x.h5", encoder, retry_failed=True)
    assert encoder.batches == [4, 3]


def test_a_batch_wholly_broken(images: Path, tmp_path: Path) -> None:
    spoil(*(images / f"{number}.png" for number in range(4, 8)))
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder)
    assert encoder.batches == [4, 2]
    assert list(result.cache.failures()) == ["4.png", "5.png", "6.png", "7.png"]
    assert result.cache.complete


def test_all_images_broken(images: Path, tmp_path: Path) -> None:
    spoil(*images.iterdir())
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder)
    assert encoder.batches == []
    assert len(result.cache.failures()) == 10
    assert result.encoded == 0
    assert result.cache.complete


def test_stop_at_a_broken_image(images: Path, tmp_path: Path) -> None:
    spoil(images / "5.png")
    with pytest.raises(InputError, match=r"5\.png: empty file \(--on-error skip") as caught:
        run(images, tmp_path / "x.h5", StubEncoder(), on_error="fail")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "x.h5").exists()
    partial = FeatureCache(partial_path(tmp_path / "x.h5"))
    assert {"0.png", "3.png", "4.png", "7.png"} <= set(partial.names()) - set(
        partial.names(PENDING)
    )
    assert "5.png" in partial.names(PENDING)
    draw(images / "5.png", 5)
    encoder = StubEncoder()
    run(images, tmp_path / "x.h5", encoder, on_error="fail")
    assert encoder.batches == [4, 2]
    undisturbed = run(images, tmp_path / "undisturbed.h5", StubEncoder()).cache.path
    assert sha256(tmp_path / "x.h5") == sha256(undisturbed)


def test_complete_is_not_done_again(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "x.h5", StubEncoder())
    before = sha256(tmp_path / "x.h5")
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder)
    assert (result.encoded, result.kept, encoder.batches) == (0, 10, [])
    assert sha256(tmp_path / "x.h5") == before
    assert run(images, tmp_path / "x.h5", encoder, force=True).encoded == 10


def test_images_added_later(images: Path, tmp_path: Path) -> None:
    first = run(images, tmp_path / "x.h5", StubEncoder()).cache
    kept = first.read(first.rows(["0.png", "9.png"]))
    draw(images / "z.png", 20)
    (images / "5.png").unlink()
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder)
    assert encoder.batches == [2]  # 9.png goes along with z.png
    assert len(result.cache) == 10
    assert result.kept == 9
    assert (result.cache.rows(["z.png", "5.png"]) == [9, -1]).all()
    now = result.cache.read(result.cache.rows(["0.png", "9.png"]))
    assert (now[0] == kept[0]).all()
    assert numpy.allclose(now[1], kept[1], atol=0.02)


def test_another_encoder_is_refused(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "x.h5", StubEncoder())
    other = StubEncoder(weights="1" * 64)
    with pytest.raises(UserError, match=r"another encoder.*--force.*--output FILE"):
        run(images, tmp_path / "x.h5", other)
    assert other.batches == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stop_after", [0, 1, 2])
@pytest.mark.parametrize("commit_interval", [0.0, 60.0])
def test_interrupted_and_resumed(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    stop_after: int,
    commit_interval: float,
) -> None:
    monkeypatch.setattr("pipeline.features.cache_writer.COMMIT_INTERVAL", commit_interval)
    spoil(images / "4.png")
    run(images, tmp_path / "undisturbed.h5", StubEncoder())
    with pytest.raises(error):
        run(images, tmp_path / "x.h5", StubEncoder(stop_after=stop_after, error=error))
    assert not (tmp_path / "x.h5").exists()
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder)
    assert encoder.batches == [4, 3, 2][stop_after:]
    assert result.encoded == sum(encoder.batches)
    assert sha256(tmp_path / "x.h5") == sha256(tmp_path / "undisturbed.h5")
    assert not partial_path(tmp_path / "x.h5").exists()


# The script as it is, and the same but committing after every batch, so that a kill at any
# moment finds some rows done and others not, however quick the machine.
SCRIPT = [str(REPOSITORY / "extract_features.py")]
EAGER_SCRIPT = [
    "-c",
    "import runpy, sys; from pipeline import feature_writer; feature_writer.COMMIT_INTERVAL = 0.0; "
    "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')",
    *SCRIPT,
]


def rows_finished(output: Path) -> int:
    try:
        return int((FeatureCache(partial_path(output)).status != PENDING).sum())
    except UserError:
        return 0


@pytest.mark.skipif(os.name == "nt", reason="Windows moves no file that this test has open")
def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    data, count = tmp_path / "images", 28
    for number in range(count):
        draw(data / f"{number:02d}.png", number)
    spoil(data / "13.png")

    def start(script: list[str], output: Path) -> subprocess.Popen[str]:
        options = f"--weights random --precision fp32 --device cpu --batch-size 4 --data {data}"
        return subprocess.Popen(
            [sys.executable, *script, *options.split(), "--output", str(output)],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )

    random, kills, finished, batch_seconds = Random(0), 0, 0, 0.0
    output = tmp_path / "x.h5"
    while kills < 3 and not output.exists():
        child = start(EAGER_SCRIPT, output)
        begun = time.monotonic()
        while child.poll() is None and rows_finished(output) <= finished:
            if not partial_path(output).exists():
                begun = time.monotonic()
            time.sleep(0.01)
        batch_seconds = batch_seconds or time.monotonic() - begun
        time.sleep(random.uniform(0, batch_seconds))
        if child.poll() is None and not output.exists():
            kills += 1
        child.kill()
        assert child.wait() == -9 or output.exists(), child.communicate()[1]
        if not output.exists():
            assert finished < rows_finished(output)
        finished = rows_finished(output)
    assert kills

    resumed = start(SCRIPT, output)
    errors = resumed.communicate()[1]
    assert resumed.returncode == 1, errors  # for 13.png
    assert "failed: 13.png: empty file" in errors
    undisturbed = start(SCRIPT, tmp_path / "undisturbed.h5")
    assert undisturbed.wait() == 1
    assert FeatureCache(output).complete
    assert sha256(output) == sha256(tmp_path / "undisturbed.h5")
    assert sorted(path.name for path in tmp_path.glob("*.h5*")) == ["undisturbed.h5", "x.h5"]


# The encoder


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Give InceptionV3 weights that are random everywhere, BatchNorm's statistics too."""
    state = load_encoder("random").trunk.state_dict()
    generator = torch.Generator().manual_seed(1)
    for key, value in state.items():
        if key.endswith(("bn.weight", "bn.running_var")):
            value.uniform_(0.8, 1.25, generator=generator)
        elif key.endswith(("bn.bias", "bn.running_mean")):
            value.normal_(0.0, 0.1, generator=generator)
    return state


def encoder_with(state: dict[str, Tensor], precision: str = "fp32") -> Encoder:
    encoder = Encoder(precision=precision)
    load_trunk(encoder, state, "test")
    return encoder


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> list[numpy.ndarray]:
    folder = tmp_path_factory.mktemp("squares")
    return [read_square(draw(folder / f"{number}.png", number)) for number in range(3)]


def cosines(first: numpy.ndarray, second: numpy.ndarray) -> numpy.ndarray:
    norms = numpy.linalg.norm(first, axis=1) * numpy.linalg.norm(second, axis=1)
    return (first * second).sum(axis=1) / norms


def test_encoder_equals_torchvision(state: dict[str, Tensor], squares: list[numpy.ndarray]) -> None:
    network = torchvision.models.inception_v3(
        weights=None, init_weights=False, transform_input=True, aux_logits=False
    ).eval()
    network.load_state_dict(state, strict=False)
    network.fc = nn.Identity()
    pixels = torch.from_numpy(numpy.stack(squares)).permute(0, 3, 1, 2) / 255
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    with torch.inference_mode():
        expected = network(torchvision.transforms.functional.normalize(pixels, mean, deviation))
    features = encoder_with(state).encode(squares)
    assert features.shape == (3, FEATURE_SIZE)
    assert features.dtype == numpy.float32
    assert numpy.abs(features - expected.numpy()).max() < 1e-4 * expected.abs().max()
    assert numpy.abs(features[0] - features[1]).max() > 0.01  # it looks at the image


def test_folded_equals_unfolded(state: dict[str, Tensor], squares: list[numpy.ndarray]) -> None:
    encoder = encoder_with(state)
    identity, features = encoder.identity, encoder.encode(squares)
    folded = encoder.for_inference().encode(squares)
    assert encoder.identity == identity
    assert not [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert numpy.abs(folded - features).max() < 1e-3 * numpy.abs(features).max()


def test_bf16_is_close(state: dict[str, Tensor], squares: list[numpy.ndarray]) -> None:
    exact = encoder_with(state).encode(squares)
    encoder = encoder_with(state, "bf16").for_inference()
    features = encoder.encode(squares)
    assert next(encoder.parameters()).dtype == torch.bfloat16
    assert features.dtype == numpy.float32
    assert cosines(exact, features).min() > 0.999
    assert (exact != features).any()


def test_openvino_is_close(state: dict[str, Tensor], squares: list[numpy.ndarray]) -> None:
    pytest.importorskip("openvino")
    exact = encoder_with(state).encode(squares)
    encoder = encoder_with(state).for_inference("openvino")
    assert encoder.identity.engine == "openvino"
    features = encoder.encode(squares)
    assert features.dtype == numpy.float32
    assert cosines(exact, features).min() > 0.9999
    assert numpy.allclose(encoder.encode(squares[2:]), features[2:], rtol=1e-3, atol=1e-3)


def test_an_openvino_that_does_not_load_is_one_line(
    state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # importing it fails
    with pytest.raises(UserError, match=r"does not load .*pip uninstall openvino"):
        encoder_with(state).for_inference("openvino")


def test_the_engine_is_chosen_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_engine("auto", cpu, 199) == "torch"
    assert choose_engine("auto", cpu, 200) == "openvino"
    assert choose_engine("auto", cuda, 200) == "torch"
    assert choose_engine("torch", cpu, 200) == "torch"
    with pytest.raises(UserError, match="only for --device cpu"):
        choose_engine("openvino", cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_engine("auto", cpu, 200) == "torch"
    with pytest.raises(UserError, match="not installed"):
        choose_engine("openvino", cpu)


def test_threads_are_as_before_afterwards(
    state: dict[str, Tensor], squares: list[numpy.ndarray], tmp_path: Path
) -> None:
    """Workers take a share of torch's threads; the rest of the program keeps all of them."""
    before = torch.get_num_threads()
    draw(tmp_path / "a.png")
    batches = list(encode_batches(encoder_with(state), [[(0, tmp_path / "a.png")]], workers=2))
    assert batches[0].keys == [0]
    assert torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == before


@pytest.mark.shared("weights/inception_v3_standin.pth", "flickr8k/Images")
def test_bf16_is_close_on_photographs() -> None:
    paths = sorted(FLICKR8K.glob("*.jpg"))[:8]
    photographs = [read_square(path) for path in paths]
    exact, rounded = (
        load_encoder(str(STANDIN), precision).for_inference().encode(photographs)
        for precision in ("fp32", "bf16")
    )
    assert exact.shape == (8, FEATURE_SIZE)
    assert cosines(exact, rounded).min() > 0.999


def test_normalisation() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, IMAGE_SIZE, IMAGE_SIZE, 3)
    normal = Encoder().normalize(pixels)
    assert normal.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.allclose(normal[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))


def test_the_same_weights_have_the_same_identity(state: dict[str, Tensor]) -> None:
    sha = encoder_with(state).identity.weights_sha256
    heads = {"fc.weight": torch.ones(1000, 2048), "AuxLogits.fc.weight": torch.ones(1000, 768)}
    counts = [key for key in state if key.endswith("num_batches_tracked")]
    for same in (
        {**state, **heads},
        {f"module.{key}": value for key, value in state.items()},
        {f"trunk.{key}": value for key, value in reversed(state.items())},
        {key: value for key, value in state.items() if key not in counts},
        {**state, **{key: torch.tensor(7) for key in counts}},
    ):
        assert encoder_with(same).identity.weights_sha256 == sha
    assert weights_sha256(dict(reversed(state.items()))) == sha
    key = "Mixed_7c.branch_pool.bn.bias"
    changed = state[key].clone()
    changed[0] = torch.nextafter(changed[0], torch.tensor(9.0))
    encoder = encoder_with(state)
    assert encoder.identity.weights_sha256 == sha
    load_trunk(encoder, {**state, key: changed}, "test")
    assert encoder.identity.weights_sha256 != sha


def test_half_precision_weights_and_their_copy(state: dict[str, Tensor], tmp_path: Path) -> None:
    half = {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    }
    path = tmp_path / "half.pth"
    torch.save(half, path)
    copy = {key: value.float() for key, value in half.items()}
    encoder = load_encoder(str(path))
    assert encoder.identity.weights_sha256 == encoder_with(copy).identity.weights_sha256
    assert encoder.identity.weights_source == str(path)
    assert next(encoder.parameters()).dtype == torch.float32


def test_random_weights_are_the_same_each_time() -> None:
    first, second = load_encoder("random"), load_encoder("random", "bf16")
    assert first.identity.weights_sha256 == second.identity.weights_sha256
    assert first.identity.mismatch(second.identity) is None
    assert first.identity.encoder == "inception_v3"
    assert first.identity.transform == "squeeze-299-bilinear"


# The command


def invoke(*arguments: str | Path) -> Result:
    options = ("--device", "cpu", "--precision", "fp32")
    return CliRunner().invoke(extract_features.main, [*options, *map(str, arguments)])


def refusal(*arguments: str | Path) -> str:
    """Return the message of a command that must end with exit code 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    before, _, message = result.stderr.partition("Error: ")
    assert "Traceback" not in before
    return message.strip()


def test_no_data_names_both_ways(tmp_path: Path) -> None:
    message = refusal("--data", tmp_path / "missing")
    for words in (str(tmp_path / "missing"), "--download", "Kaggle", "--data FOLDER"):
        assert words in message


def test_a_folder_without_images_is_refused_before_any_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.models.encoder.load_encoder", None)
    (tmp_path / "notes.txt").touch()
    message = refusal("--data", tmp_path, "--output", tmp_path / "x.h5", "--weights", "random")
    assert message == f"--data {tmp_path}: no images there"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_help_loads_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *SCRIPT, "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pipeline.utils.errors" in imported
    assert not imported & {"torch", "numpy", "h5py", "PIL"}
    assert "--retry-failed" in done.stdout


def test_no_network(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str, timeout: float) -> None:
        assert timeout == 30.0  # a silent server is given up
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    asked = ("--weights", "imagenet", "--output", tmp_path / "x.h5")
    message = refusal("--data", images, *asked)
    assert len(message.splitlines()) == 1
    for words in ("no network", "--weights FILE", "https://download.pytorch.org/"):
        assert words in message
    assert not list(tmp_path.glob("*.h5*"))


@pytest.mark.parametrize("whole", [False, True])
def test_imagenet_weights_are_downloaded_once_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    torch.save(Encoder().trunk.state_dict(), tmp_path / "served")
    served = (tmp_path / "served").read_bytes()
    digest = hashlib.sha256(served).hexdigest()[:8] if whole else "0cc3c7bd"
    url = f"https://download.pytorch.org/models/inception_v3_google-{digest}.pth"
    weights = torchvision.models.Inception_V3_Weights.IMAGENET1K_V1
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights, "_value_", dataclasses.replace(weights.value, url=url))
    answers = iter([io.BytesIO(served)])
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: next(answers))
    kept = tmp_path / "hub" / "checkpoints" / Path(url).name
    if not whole:
        with pytest.raises(UserError, match="wrong checksum"):
            load_encoder("imagenet")
        assert not kept.exists()
        return
    assert load_encoder("imagenet").identity == load_encoder("imagenet").identity
    assert kept.read_bytes() == served


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_weights_that_are_none(images: Path, tmp_path: Path) -> None:
    shapes = {
        key: torch.zeros(value.shape, dtype=torch.float16)
        for key, value in Encoder().trunk.state_dict().items()
    }
    key = "Mixed_6c.branch_pool.conv.weight"
    contents: dict[str, tuple[object, str]] = {
        "missing tensor": (
            {k: v for k, v in shapes.items() if k != key},
            f"{key!r} of the InceptionV3 state dict is missing",
        ),
        "shape": (
            {**shapes, key: torch.zeros(2, 3)},
            f"{key} of the InceptionV3 state dict does not have the shape (192, 768,",
        ),
        "unknown": (
            {**shapes, "layer9.weight": torch.zeros(2)},
            "'layer9.weight' of the InceptionV3",
        ),
        "numbers": ({"epoch": 3}, "of the InceptionV3 state dict is missing"),
        "list": ([torch.zeros(2)], "holds no InceptionV3 weights"),
        "bomb": ({**shapes, key: Bomb(tmp_path / "exploded")}, "not a PyTorch file of tensors"),
    }
    for name, (content, words) in contents.items():
        path = tmp_path / name
        torch.save(content, path)
        message = refusal("--data", images, "--output", tmp_path / "x.h5", "--weights", path)
        assert words in message
        assert str(path) in message
        assert len(message.splitlines()) == 1
    (tmp_path / "text").write_text("no weights")
    assert "not a PyTorch file of tensors" in refusal(
        "--data", images, "--weights", tmp_path / "text"
    )
    message = refusal("--data", images, "--weights", tmp_path / "gone.pth")
    assert "gone.pth: no such file (use imagenet, pretrained" in message
    assert not (tmp_path / "exploded").exists()
    assert not list(tmp_path.glob("*.h5*"))


def test_broken_images_are_named_at_the_end(tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "x.h5"
    draw(data / "good.png")
    draw(data / "sub" / "bad.png")
    spoil(data / "sub" / "bad.png")
    options = ("--data", data, "--output", output, "--weights", "random")
    result = invoke(*options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "x.h5: complete, 1 images (1 encoded now, 0 before; fp32, torch)" in result.stderr
    assert "failed: sub/bad.png: empty file" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("1 could not be read; --retry-failed")

    again = invoke(*options)
    assert again.exit_code == 1
    assert "(0 encoded now" in again.stderr
    draw(data / "sub" / "bad.png", 1)
    mended = invoke(*options)
    assert mended.exit_code == 0
    assert "images that have changed, to be encoded again: 1\n" in mended.stderr
    assert "complete, 2 images (" in mended.stderr
    assert "failed" not in mended.stderr

    draw(data / "more.png", 2)
    message = refusal(*options, "--precision", "bf16")
    assert "begun with --precision fp32, not bf16" in message

    # Begun on a machine with bf16, it goes on so on one that would choose fp32.
    other = tmp_path / "other.h5"
    options = ("--data", data, "--output", other, "--weights", "random")
    assert invoke(*options, "--precision", "bf16").exit_code == 0
    draw(data / "still more.png", 3)
    assert "bf16, torch)" in invoke(*options, "--precision", "auto").stderr
    options = ("--data", data, "--output", output, "--weights", "random")

    spoil(data / "good.png")
    stopped = invoke(*options, "--force", "--on-error", "fail")
    assert stopped.exit_code == 1
    assert "good.png: empty file (--on-error skip" in stopped.stderr
    assert FeatureCache(output).complete  # the old one is still there


def test_a_image_that_changed_is_encoded_again(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(images, tmp_path / "x.h5", StubEncoder(), batch_size=1).cache
    before = first.read(numpy.arange(10))
    draw(images / "3.png", 30)
    information = (images / "7.png").stat()
    draw(images / "7.png", 70, size=(80, 60))
    os.utime(images / "7.png", ns=(0, information.st_mtime_ns))  # its size tells
    (images / "8.png").rename(images / "8b.png")
    encoder = StubEncoder()
    after = run(images, tmp_path / "x.h5", encoder, batch_size=1).cache
    assert sum(encoder.batches) == 3
    said = capsys.readouterr().err
    assert "dropped: 1\n" in said and "to be encoded again: 2\n" in said
    alike = (after.read(numpy.arange(10)) == before).all(1)
    assert alike.tolist() == [number not in (3, 7) for number in range(10)]
    alone = run(images, tmp_path / "alone.h5", StubEncoder(), batch_size=1).cache
    assert sha256(after.path) == sha256(alone.path)
    assert run(images, tmp_path / "x.h5", encoder, batch_size=1).kept == 10


def test_a_image_that_changed_while_an_extraction_was_stopped(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.features.cache_writer.COMMIT_INTERVAL", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "x.h5", StubEncoder(stop_after=4), batch_size=1)
    for number in (0, 3, 9):  # two that were done, and one that was not
        draw(images / f"{number}.png", 90 + number)
    encoder = StubEncoder()
    result = run(images, tmp_path / "x.h5", encoder, batch_size=1)
    assert (result.kept, sum(encoder.batches)) == (2, 8)
    run(images, tmp_path / "alone.h5", StubEncoder(), batch_size=1)
    assert sha256(tmp_path / "x.h5") == sha256(tmp_path / "alone.h5")


def test_images_that_are_gone_are_counted_aloud(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(images, tmp_path / "x.h5", StubEncoder())
    assert "dropped" not in capsys.readouterr().err
    (images / "3.png").unlink()
    assert len(run(images, tmp_path / "x.h5", StubEncoder()).cache) == 9
    assert "features dropped: 1" in capsys.readouterr().err
    run(images, tmp_path / "x.h5", StubEncoder())
    assert "dropped" not in capsys.readouterr().err
