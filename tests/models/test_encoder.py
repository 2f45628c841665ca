"""The encoder: equal to torchvision's, its precisions and engines, and its weights' identity."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
import torchvision
from conftest import SHARED, draw
from tiny_inception import TinyInception
from torch import Tensor, nn

from pipeline.datasets.images import IMAGE_SIZE, read_square
from pipeline.features.encode_images import encode_batches
from pipeline.models.encoder import Encoder, load_encoder, load_trunk, weights_sha256
from pipeline.models.encoder_identity import FEATURE_SIZE
from pipeline.models.openvino import choose_engine
from pipeline.utils.errors import UserError

STANDIN = SHARED / "weights" / "inception_v3_standin.pth"
FLICKR8K = SHARED / "flickr8k" / "Images"


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


def cosines(first: numpy.ndarray, second: numpy.ndarray) -> Tensor:
    return torch.cosine_similarity(torch.from_numpy(first), torch.from_numpy(second))


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


def test_int8_is_close_and_the_same_each_time(
    squares: list[numpy.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr("pipeline.models.encoder.Inception3", TinyInception)
    exact = load_encoder("random").for_inference("openvino").encode(squares)
    encoder = load_encoder("random", "int8").for_inference("openvino")
    assert (encoder.identity.precision, encoder.identity.engine) == ("int8", "openvino")
    features = encoder.encode(squares)
    assert cosines(exact, features).min() > 0.99
    assert not numpy.allclose(exact, features, rtol=1e-3, atol=1e-3)  # it is quantized
    again = load_encoder("random", "int8").for_inference("openvino")
    assert (again.encode(squares) == features).all()


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
    assert choose_engine("auto", cpu, 1, "int8") == "openvino"
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
@pytest.mark.parametrize(
    ("precision", "engine", "least"),
    [
        ("bf16", "torch", 0.999),
        pytest.param("int8", "openvino", 0.995, marks=pytest.mark.slow),
    ],
)
def test_rounding_is_close_on_photographs(precision: str, engine: str, least: float) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    paths = sorted(FLICKR8K.glob("*.jpg"))[:8]
    photographs = [read_square(path) for path in paths]
    exact = load_encoder(str(STANDIN)).for_inference().encode(photographs)
    rounded = load_encoder(str(STANDIN), precision).for_inference(engine).encode(photographs)
    assert exact.shape == (8, FEATURE_SIZE)
    assert cosines(exact, rounded).min() > least


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
    weights = encoder_with(state).trunk_weights()
    assert weights_sha256(dict(reversed(weights.items()))) == sha
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
