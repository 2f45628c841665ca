"""What several test files share: drawn images, and an encoder that takes no time."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before anything imports torch

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import numpy
import pytest
from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
sys.path.insert(0, str(REPOSITORY))  # the scripts lie there

from drawn_run import DrawnRun, make_drawn_run  # noqa: E402
from tiny_inception import TinyInception  # noqa: E402

from pipeline import Captioner  # noqa: E402
from pipeline.models.encoder_identity import FEATURE_SIZE, EncoderIdentity  # noqa: E402

# The same examples every time, so that a failure is of the change and not of the day.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=5000,  # ms an example: an input must not keep a reader busy
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("suite")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose files in ../shared are missing."""
    for marker in item.iter_markers("shared"):
        for name in marker.args:
            if not (SHARED / name).exists():
                pytest.skip(f"../shared/{name} is missing")


class StubEncoder:
    """An encoder for ``extract``: quick, and a function of the pixels.

    As with a real network, a feature depends a little on the image's place in its batch.

    Attributes:
        batches: how many images each call of ``encode`` had.
        stop_after: calls of ``encode`` that succeed before one raises ``error``; None: all.
    """

    def __init__(
        self,
        weights: str = "0" * 64,
        precision: str = "fp32",
        stop_after: int | None = None,
        error: type[BaseException] = KeyboardInterrupt,
    ) -> None:
        self.weights = weights
        self.precision = precision
        self.engine = "torch"
        self.batches: list[int] = []
        self.stop_after = stop_after
        self.error = error
        self.folded = False

    @property
    def identity(self) -> EncoderIdentity:
        return EncoderIdentity(
            *("stub", self.weights, "squeeze-299-bilinear", self.precision, "random", "0"),
            engine=self.engine,
        )

    def for_inference(self, engine: str = "torch") -> StubEncoder:
        self.folded = True
        return self

    def encode(self, images: Sequence[numpy.ndarray]) -> numpy.ndarray:
        assert self.folded
        if len(self.batches) == self.stop_after:
            raise self.error
        self.batches.append(len(images))
        features = [
            numpy.resize(image[::37, ::37] / 255 + 0.01 * place, FEATURE_SIZE)
            for place, image in enumerate(images)
        ]
        return numpy.stack(features).astype(numpy.float32)


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (64, 48)) -> Path:
    """Draw a small image that no other seed gives; the suffix says in which format."""
    random = numpy.random.default_rng(seed)
    colours = [tuple(int(value) for value in random.integers(0, 256, 3)) for _ in range(4)]
    image = Image.new("RGB", size, colours[0])
    pen = ImageDraw.Draw(image)
    for colour in colours[1:]:
        left, top = (int(random.integers(0, side)) for side in size)
        pen.ellipse((left - 15, top - 10, left + 15, top + 10), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Make a folder of ten images: 0.png to 9.png."""
    for number in range(10):
        draw(tmp_path / "images" / f"{number}.png", number)
    return tmp_path / "images"


@pytest.fixture
def unlistable(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Return what makes listing folders of a name fail with an error number."""
    scandir = os.scandir

    def make(name: str, number: int) -> None:
        def refuse(path: str) -> object:
            if Path(path).name == name:
                raise OSError(number, os.strerror(number), path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return make


@pytest.fixture(scope="module")
def tiny_inception() -> Iterator[None]:
    """Have all tests of a module encode images with a tiny network, which takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.models.encoder.Inception3", TinyInception)
        yield


@pytest.fixture(scope="session")
def drawn_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], DrawnRun]:
    """Return what makes the run of ``drawn_run``, once for each network."""
    return functools.cache(lambda tiny: make_drawn_run(tmp_path_factory.mktemp("drawn")))


@pytest.fixture(scope="module")
def drawn_run(request: pytest.FixtureRequest, drawn_runs: Callable[[bool], DrawnRun]) -> DrawnRun:
    """Draw 30 scenes, extract their features and train a decoder on them, once for all tests.

    The network is InceptionV3, or the tiny one where a module uses ``tiny_inception``.
    """
    tiny = "tiny_inception" in request.fixturenames
    if tiny:
        request.getfixturevalue("tiny_inception")  # which pytest may set up later
    return drawn_runs(tiny)


@pytest.fixture
def scenes(drawn_run: DrawnRun) -> list[Path]:
    """Return the images of ``drawn_run``."""
    return sorted((drawn_run.data / "Images").glob("*.jpg"))


@pytest.fixture(scope="module")
def captioner(drawn_run: DrawnRun) -> Captioner:
    """Load the model of ``drawn_run``."""
    return Captioner.load(drawn_run.run, device="cpu", precision="fp32")
