"""Checkpoints and weights from strangers: nothing in them runs, and they are used or refused."""

from __future__ import annotations

import copy
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkpoint import PICKLE, STORAGES, saved_members, small_content, use, write_members
from torch import Tensor

from pipeline.captioner import Captioner
from pipeline.features.encode_images import encode_batches
from pipeline.models.checkpoint import load_checkpoint
from pipeline.models.checkpoint_checks import check_training
from pipeline.models.encoder import Encoder, load_encoder
from pipeline.models.torch_files import read_torch_file
from pipeline.training.loop import Progress
from pipeline.utils.errors import UserError

CONTENT = small_content()
MEMBERS = saved_members(CONTENT)


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.target, "gone off")


def as_zip(path: Path, bomb: Bomb) -> None:
    """As torch.save writes files now."""
    torch.save({"schema_version": 1, "decoder_weights": bomb}, path)


def as_pickle(path: Path, bomb: Bomb) -> None:
    """As torch.save wrote them long ago, or as anything pickles."""
    path.write_bytes(pickle.dumps({"state_dict": bomb}))


def as_legacy(path: Path, bomb: Bomb) -> None:
    torch.save({"state_dict": bomb}, path, _use_new_zipfile_serialization=False)


def as_script(path: Path, bomb: Bomb) -> None:
    """Looks like TorchScript, which older versions of torch ran."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(bomb))
        archive.writestr("x/constants.pkl", pickle.dumps(bomb))
        archive.writestr("x/version", "3\n")


@pytest.mark.filterwarnings("ignore")  # torch's own, of old files and TorchScript
@pytest.mark.parametrize("pack", [as_zip, as_pickle, as_legacy, as_script])
@pytest.mark.parametrize("load", [load_checkpoint, lambda path: load_encoder(str(path))])
def test_a_pickle_bomb_does_not_go_off(
    tmp_path: Path, pack: Callable[[Path, Bomb], None], load: Callable[[Path], Any]
) -> None:
    target, path = tmp_path / "mark", tmp_path / "x.pt"
    pack(path, Bomb(target))
    with pytest.raises(UserError, match="that torch can read") as refused:
        load(path)
    assert "\n" not in refused.value.message
    assert not target.exists()


def test_the_bomb_is_one(tmp_path: Path) -> None:
    """Else the test above could not fail."""
    as_zip(tmp_path / "x.pt", Bomb(tmp_path / "mark"))
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "mark").read_text() == "gone off"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    use(path)  # looks at the line
    return caught.value.message


# Content that torch loads


def places(value: Any) -> list[tuple[Any, ...]]:
    """List where something is in a tree of dictionaries and lists."""
    if not isinstance(value, dict | list):
        return [()]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [(), *((key, *place) for key, part in inner for place in places(part))]


def changed(value: Any, place: tuple[Any, ...], new: Callable[[Any], Any]) -> Any:
    """Copy a tree with something else in one place; None there takes it out."""
    if not place:
        return new(value)
    value = copy.copy(value)
    part = changed(value[place[0]], place[1:], new)
    if part is None:
        del value[place[0]]
    else:
        value[place[0]] = part
    return value


def always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


PLACES = places(CONTENT)[1:]
TENSORS = [place for place in PLACES if isinstance(reduce(getitem, place, CONTENT), Tensor)]

tensors = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(0, 6), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.int8, torch.bool]),
)
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-9, 9),
    st.sampled_from([2**31, 2**63, 10**400, -(10**20), 1e308, float("nan"), float("inf")]),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "a\nb", "\x1b[2J", "x" * 10_000, "members.0.feature_mean", "words"]),
)
anything = st.recursive(
    st.one_of(plain, tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 3)), inner, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=4,
)


@given(st.lists(st.tuples(st.sampled_from(PLACES), anything), min_size=1, max_size=3))
@settings(max_examples=150)
def test_other_values_are_refused_or_used(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[tuple[Any, ...], Any]]
) -> None:
    content = CONTENT
    for place, value in changes:
        try:
            content = changed(content, place, always(value))
        except (LookupError, TypeError):  # no longer there
            continue
    path = tmp_path_factory.mktemp("checkpoint") / "x.pt"
    torch.save(content, path)
    use(path)


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t.float(), value).to(t.dtype)


TENSOR_CHANGES: list[Callable[[Tensor], Any]] = [
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.bfloat16(),
    lambda t: t.long(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to_sparse(),
    lambda t: t.to("meta"),
    lambda t: t.requires_grad_() if t.is_floating_point() else -t,
    lambda t: torch.nn.Parameter(t.float()),
    lambda t: t.flatten(),
    lambda t: t.unsqueeze(0),
    lambda t: t[:-1] if t.dim() else t,
    lambda t: t[:0] if t.dim() else t,
    lambda t: t.t() if t.dim() == 2 else t,
    lambda t: t.new_ones(()).expand(t.shape),
    lambda t: t + 1,
    lambda t: t.flip(0) if t.dim() else t,
    *map(filled, (0.0, -1.0, 1e7, -1e7, 1e30, 40.0, float("nan"), float("inf"))),
]


@given(
    st.lists(
        st.tuples(st.sampled_from(TENSORS), st.sampled_from(TENSOR_CHANGES)),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=150)
@pytest.mark.filterwarnings("ignore")
def test_other_tensors_are_refused_or_used(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[tuple[Any, ...], Callable[[Tensor], Any]]],
) -> None:
    content = copy.deepcopy(CONTENT)
    for place, change in changes:
        content = changed(content, place, change)
    path = tmp_path_factory.mktemp("checkpoint") / "x.pt"
    try:
        torch.save(content, path)
    except NotImplementedError:  # not every change can follow every other
        return
    use(path)


@pytest.mark.parametrize("size", [1e7, -1e7])
def test_the_largest_numbers_that_are_allowed_give_captions(tmp_path: Path, size: float) -> None:
    content = {
        **CONTENT,
        "decoder_weights": {n: t * 0 + size for n, t in CONTENT["decoder_weights"].items()},
    }
    torch.save(content, tmp_path / "x.pt")
    load_checkpoint(tmp_path / "x.pt")
    use(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("vocabulary", [*CONTENT["vocabulary"][:-1], "a\nb"], r"a word holds '\\n'"),
        ("vocabulary", CONTENT["vocabulary"][:4], "differ in size"),
        ("decoder_config", {**CONTENT["decoder_config"], "members": 10**5}, "as many weights"),
        ("decoder_config", {**CONTENT["decoder_config"], "hidden_size": 10**12}, "hidden_size is"),
        ("decoder_config", {**CONTENT["decoder_config"], "dropout": 1.5}, "dropout is 1.5"),
        (
            "encoder",
            {**CONTENT["encoder"], "weights_source": "x\n" * 9},
            "encoder's weights_source",
        ),
        ("epoch", -1, "the epoch is -1"),
        ("scores", {"CIDEr-D": "high"}, "the scores are no numbers"),
        ("settings", {"data": 5}, "the setting data is 5"),
        ("settings", {"a": [[[[[[[[[[1]]]]]]]]]]}, "nested without end"),
        ("tokenizer", ["english"], "made with the tokenizer a list"),
        ("matcher", "text", "of the matcher is no dictionary"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, value: Any, words: str) -> None:
    torch.save({**CONTENT, name: value}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / "x.pt")
    refusal(tmp_path / "x.pt")


# The file


@given(data=st.data())
@settings(max_examples=200)
def test_other_pickles_are_refused_or_used(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Instructions of the pickle are taken out, doubled, moved and given other operands."""
    whole = MEMBERS[PICKLE]
    starts = [place for _, _, place in pickletools.genops(whole) if place is not None]
    parts = [whole[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    for _ in range(data.draw(st.integers(1, 4))):
        number = data.draw(st.integers(1, len(parts) - 2))
        other = data.draw(st.integers(1, len(parts) - 2))
        change = data.draw(st.sampled_from(["double", "take out", "swap", "operand", "bytes"]))
        if change == "double":
            parts.insert(other, parts[number])
        elif change == "take out":
            del parts[number]
        elif change == "swap":
            parts[number], parts[other] = parts[other], parts[number]
        elif change == "operand":
            operand = data.draw(st.binary(min_size=4, max_size=4))
            parts[number] = parts[number][:1] + operand[: len(parts[number]) - 1]
        else:
            parts[number] = data.draw(st.binary(max_size=4))
    path = tmp_path_factory.mktemp("checkpoint") / "x.pt"
    write_members(path, {**MEMBERS, PICKLE: b"".join(parts)})
    use(path)


@given(data=st.data())
@settings(max_examples=100)
def test_other_bytes_are_refused_or_used(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("checkpoint") / "x.pt"
    torch.save(CONTENT, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    use(path)


def test_files_of_before_2020_are_read(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert load_checkpoint(tmp_path / "x.pt").vocabulary.to_list() == CONTENT["vocabulary"]


def test_what_state_dicts_consist_of_is_read(tmp_path: Path) -> None:
    layers = torch.nn.LSTM(3, 4)
    content = {
        "state_dict": layers.state_dict(),
        "parameters": dict(layers.named_parameters()),
        "optimizer": torch.optim.AdamW(layers.parameters()).state_dict(),
        "numbers": [1, 2**40, 0.5, True, None, (1, (2, 3))],
        "kinds": [torch.ones(2, dtype=d) for d in (torch.int8, torch.bool, torch.bfloat16)],
        "channels": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    torch.save(content, tmp_path / "x.pt")
    read = read_torch_file(tmp_path / "x.pt", "x.pt", "a file")
    assert list(read) == list(content) and read["numbers"] == content["numbers"]


class Call:
    """Pickled, it is a call of a function; loaded, what that gives."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def tensor_call(storage: Any, offset: int, size: Any, stride: Any) -> Call:
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage, offset, size, stride, False, OrderedDict())


LARGE = 400_000_000


def make_bombs(folder: Path) -> None:
    """Write files of which loading would take hundreds of megabytes, or years."""
    storage = torch.arange(8.0).storage()
    ones = torch.ones(250_000)
    looped: list[Any] = []
    looped += [looped, looped]
    wide: Any = list(range(1000))
    for _ in range(5):
        wide = [wide] * 1000
    contents = {
        "bytearray": Call(bytearray, LARGE),
        "tensor of a size": Call(torch.Tensor, LARGE),
        "larger than its storage": tensor_call(storage, 0, (LARGE,), (1,)),
        "repeats its storage": tensor_call(storage, 0, (LARGE,), (0,)),
        "behind its storage": tensor_call(storage, 8, (1,), (1,)),
        "one storage for all": [ones[n:] for n in range(400)],
        "settings that hold themselves": {**CONTENT, "settings": {"a": looped}},
        "settings without end": {**CONTENT, "settings": {"a": wide}},
        "members without end": {
            **CONTENT,
            "decoder_config": {**CONTENT["decoder_config"], "members": 10**9},
        },
        "ordered": Call(OrderedDict, [(1, 2)] * 9),
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
        torch.save(content, folder / f"{name}, old.pt", _use_new_zipfile_serialization=False)
    large = saved_members({"a": torch.zeros(LARGE // 4, dtype=torch.uint8)})
    # Each tuple holds the one before twice, and the last is a key.
    nested = b"".join(b"q%ch%c\x86" % (n, n) for n in range(100))
    members = {
        "hashed for years": ({PICKLE: b"\x80\x02})" + nested + b"K\x01s."}, zipfile.ZIP_STORED),
        "compressed": (large, zipfile.ZIP_DEFLATED),
        "small parts": ({**MEMBERS, PICKLE: b"\x80\x02" + b"}" * 10_000_000}, zipfile.ZIP_STORED),
        "sets": ({**MEMBERS, PICKLE: b"\x80\x02" + b"\x8f" * 100_000 + b"."}, zipfile.ZIP_STORED),
        "another size": ({**MEMBERS, f"{STORAGES}0": b"\0" * 1000}, zipfile.ZIP_STORED),
    }
    for name, (files, compression) in members.items():
        write_members(folder / f"{name}.pt", files, compression)


def set_off(folder: Path) -> None:
    """Try all bombs; run in a process of its own, whose memory is looked at."""
    import resource

    use(folder / "whole.pt")
    paths = sorted(folder.glob("*.pt"))
    paths.remove(folder / "whole.pt")
    unit = 1 if sys.platform == "darwin" else 1024
    for path in paths:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        refusal(path)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
        assert grown < 100e6, (path.name, grown)
    print(len(paths), "did not go off")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_memory_bombs_do_not_go_off(tmp_path: Path) -> None:
    make_bombs(tmp_path)
    torch.save(CONTENT, tmp_path / "whole.pt")
    code = "import sys, test_hostile_checkpoint as t; t.set_off(t.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        cwd=REPOSITORY / "tests",
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "data"))),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "did not go off" in done.stdout, done.stderr[-2000:]


# The encoder's weights


@pytest.fixture(scope="module")
def trunk() -> dict[str, Tensor]:
    return Encoder().trunk.state_dict()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t * torch.nan, "holds infinite or very large numbers"),
        (lambda t: t.clone().fill_(1e30), "holds infinite or very large numbers"),
        (lambda t: t.to(torch.int8), "is of the type torch.int8"),
        (lambda t: t.to(torch.complex64), "of the encoder has not the shape|safely|can read"),
        (lambda t: t[:-1], r"has not the shape \(32, 3, 3, 3\)"),
        (lambda t: t.new_ones(()).expand(t.shape), "safely"),
        (lambda t: "text", "holds no InceptionV3 weights|has not the shape"),
    ],
)
def test_other_weights_of_an_encoder_are_refused(
    tmp_path: Path, trunk: dict[str, Tensor], change: Callable[[Tensor], Any], words: str
) -> None:
    name = "Conv2d_1a_3x3.conv.weight"
    weights = {**trunk, name: change(trunk[name])}
    for content, load in (
        (weights, lambda path: load_encoder(str(path))),
        ({"state_dict": weights}, lambda path: load_encoder(str(path))),
        ({**CONTENT, "encoder_weights": weights}, load_checkpoint),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=words) as caught:
            load(tmp_path / "x.pt")
        assert str(tmp_path / "x.pt") in caught.value.message
        assert len(caught.value.message.splitlines()) == 1


def test_names_of_weights_stay_on_one_line(tmp_path: Path, trunk: dict[str, Tensor]) -> None:
    torch.save({**trunk, "a\nb" * 1000: torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="is unknown") as caught:
        load_encoder(str(tmp_path / "x.pt"))
    assert len(caught.value.message.splitlines()) == 1 and len(caught.value.message) < 400


def test_weights_that_give_no_features_are_named(tmp_path: Path, trunk: dict[str, Tensor]) -> None:
    """Each number is allowed; what they give together is not a number."""
    path = tmp_path / "x.pt"
    torch.save({n: t * 0 - 1 if "running_var" in n else t for n, t in trunk.items()}, path)
    encoder = load_encoder(str(path)).for_inference()
    batches = [[(0, draw(tmp_path / "0.png"))]]
    with pytest.raises(UserError, match=r"x\.pt\) gives numbers that are no features"):
        list(encode_batches(encoder, batches, 1))


def test_a_decoder_of_other_features_is_refused(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "x.pt")
    with pytest.raises(UserError, match="reads 5 numbers an image, the encoder gives 2,048"):
        Captioner.load(tmp_path / "x.pt", device="cpu")


# What a run goes on from


def resumable() -> tuple[dict[str, Any], torch.optim.Optimizer, list[Tensor]]:
    layer = torch.nn.Linear(3, 2)
    groups = [{"params": [*layer.parameters()], "lr": 0.1, "initial_lr": 0.1}]
    optimizer = torch.optim.AdamW(groups)
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    averaged = [parameter.detach().clone() for parameter in layer.parameters()]
    training = {
        "optimizer": optimizer.state_dict(),
        "progress": asdict(Progress(3, 2, 40.5, 2.5)),
        "weights": averaged,
        "steps": 7,
    }
    return training, torch.optim.AdamW(groups), averaged


def test_what_a_run_goes_on_from_is_checked() -> None:
    training, optimizer, averaged = resumable()
    check_training(training, asdict(Progress()), optimizer, averaged)
    check_training(
        {**training, "progress": asdict(Progress(3, 2, 40, 2))},
        *(asdict(Progress()), optimizer, averaged),
    )
    places_of = [place for place in places(training) if place and place[-1] != "best_epoch"]
    needed = ("state", "lr", "initial_lr", "betas", "params", "progress", "weights", "steps")
    for place in places_of:
        if any(part in needed for part in place):
            for bad in ("text", [torch.zeros(9)], {"a": 1}, torch.full((2, 3), torch.nan)):
                spoiled = changed(copy.deepcopy(training), place, always(bad))
                with pytest.raises((ValueError, LookupError, TypeError, AttributeError)):
                    check_training(spoiled, asdict(Progress()), optimizer, averaged)
