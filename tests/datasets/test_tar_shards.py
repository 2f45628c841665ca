"""Images in tar shards: listed, read in place, extracted, trained on; damaged ones."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy
import pytest
from commands import invoke
from conftest import StubEncoder, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_extraction import stub_extract

import evaluate
import extract_features
import finetune_joint
import train_decoder
from pipeline.datasets.caption_table import read_captions
from pipeline.datasets.image_sources import ImageFolder, open_source
from pipeline.datasets.images import ImageError, load_image, read_square
from pipeline.datasets.tar_shards import TarMember, TarShards, expand, is_tar_shards
from pipeline.features.cache import FAILED, FeatureCache, default_cache_path
from pipeline.utils.errors import UserError

fsspec = pytest.importorskip("fsspec")


def add(archive: tarfile.TarFile, name: str, content: bytes, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> str:
    """Put the ten images and captions for them into three shards; gives the pattern."""
    (tmp_path / "shards").mkdir()
    for number in range(3):
        with tarfile.open(tmp_path / "shards" / f"{number:04d}.tar", "w") as archive:
            for image in sorted(images.iterdir())[number::3]:
                add(archive, image.name, image.read_bytes())
                colour = ("red", "blue", "green")[number]
                text = f"a {colour} thing\n\nit is {colour}\n"
                add(archive, f"{image.stem}.txt", text.encode())
                add(archive, f"{image.stem}.json", b"{}")
    return str(tmp_path / "shards" / "{0000..0002}.tar")


def test_patterns_stand_for_files(tmp_path: Path) -> None:
    assert expand("a/{0009..0011}.tar") == ["a/0009.tar", "a/0010.tar", "a/0011.tar"]
    assert expand("{9..10}-{x,y}.tar") == ["9-x.tar", "9-y.tar", "10-x.tar", "10-y.tar"]
    assert expand("s3://b/{0..1}.tar") == ["s3://b/0.tar", "s3://b/1.tar"]
    for name in ("b.tar", "a.tar", "a.txt"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    (tmp_path / "photos.tar").mkdir()
    assert isinstance(open_source(tmp_path / "photos.tar"), ImageFolder)
    assert is_tar_shards("photos.TAR") and not is_tar_shards("photos")
    for pattern in ("none/*.tar", "x.tar.gz", "{3..2}.tar"):
        with pytest.raises(UserError, match=r"^--data .*(no such|compressed)"):
            expand(pattern)
    with pytest.raises(UserError, match=r"^--data nosuch://b/0\.tar: .*nosuch"):  # fsspec lacks it
        _ = TarShards("nosuch://b/0.tar").names


def test_features_are_those_of_a_folder(shards: str, tmp_path: Path) -> None:
    """The same images in the same order give the same rows, to the bit."""
    folder = tmp_path / "unpacked"
    for shard in sorted((tmp_path / "shards").iterdir()):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".png"):
                    archive.extract(member, folder / shard.name, filter="data")
    of_shards = stub_extract(shards, tmp_path / "a.h5").cache
    of_folder = stub_extract(folder, tmp_path / "b.h5").cache
    assert of_shards.names() == of_folder.names()
    assert numpy.array_equal(of_shards.column("features"), of_folder.column("features"))
    with pytest.raises(UserError, match="no such image"):
        TarShards(shards).image("0000.tar/none.png")


def test_extraction_goes_on_and_takes_further_shards(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.features.cache_writer.COMMIT_INTERVAL", -1.0)
    first = shards.replace("0002", "0001")
    with pytest.raises(KeyboardInterrupt):
        stub_extract(first, tmp_path / "a.h5", encoder=StubEncoder(stop_after=1))
    encoder = StubEncoder()
    stub_extract(first, tmp_path / "a.h5", encoder=encoder)
    assert sum(encoder.batches) == 3  # of 7, in batches of 4
    cache = stub_extract(shards, tmp_path / "a.h5").cache
    whole = stub_extract(shards, tmp_path / "b.h5").cache
    assert cache.names() == whole.names()
    assert len(cache) == 10


def test_an_image_that_changed_in_its_shard_is_encoded_again(
    shards: str, images: Path, tmp_path: Path
) -> None:
    """A shard that was copied, whose file is of now, has the same images still."""
    stub_extract(shards, tmp_path / "a.h5", encoder=StubEncoder())
    encoder = StubEncoder()

    def write_shard(**fields: Any) -> int:
        with tarfile.open(tmp_path / "shards" / "0000.tar", "w") as archive:
            for number in (0, 3, 6, 9):
                content = (images / f"{number}.png").read_bytes()
                add(archive, f"{number}.png", content, **(fields if number == 3 else {}))
        encoder.batches.clear()
        stub_extract(shards, tmp_path / "a.h5", encoder=encoder)
        return sum(encoder.batches)

    assert write_shard() == 0
    assert write_shard(mtime=1_700_000_000.25) == 4  # its batch
    assert write_shard(mtime=1_700_000_000.25) == 0
    draw(images / "3.png", 77, size=(70, 50))
    assert write_shard(mtime=1_700_000_000.25) == 4
    assert write_shard(mtime=-1) == 4
    assert write_shard(mtime=1 << 40) == 0  # a time of no use, as the one before


def test_captions_are_read_from_texts(shards: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shards" / "0000.tar", "a") as archive:
        add(archive, "alone.txt", b"no image")
        add(archive, "x.seg.png", b"")  # a name belongs to the text of what precedes its first dot
        add(archive, "x.txt", "\ufeffa dog\r\na cat".encode())
    table = read_captions(TarShards(shards))
    assert len(table.images) == 11
    assert table.images[4].name == "0000.tar/x.seg.png"
    assert table.images[4].captions == ("a dog", "a cat")
    assert table.images[0].name == "0000.tar/0.png"
    assert table.images[0].captions == ("a red thing", "it is red")
    assert table.notes[
        "text files without one image of their name ignored (first: 0000.tar/alone.txt)"
    ]


@pytest.mark.usefixtures("tiny_inception")
def test_the_commands_take_shards(shards: str, tmp_path: Path) -> None:
    names = ("x.h5", "run", "joint", "page.html")
    features, run, joint, page = (tmp_path / name for name in names)
    invoke(extract_features.main, "--data", shards, "--output", features, "--weights", "random")
    assert len(FeatureCache(features)) == 10
    sizes = "--epochs 1 --embed-size 8 --hidden-size 8 --min-count 1".split()
    options = ["--data", shards, "--features", features, "--run", run, *sizes]
    checked = invoke(train_decoder.main, *options, "--check").output
    assert f"images: 10 in {shards}, 10 of them with captions" in checked
    invoke(train_decoder.main, *options)
    assert "data:image/webp;base64," in (run / "report.html").read_text(encoding="utf-8")
    options = ["--start", run, "--run", joint, "--epochs", 1, "--unfreeze-from", "Mixed_7c"]
    invoke(finetune_joint.main, *options)
    # Encodes the images of the shards.
    invoke(evaluate.main, joint, "--no-java", "--html", page, "--device", "cpu")
    assert "0000.tar/" in page.read_text(encoding="utf-8")


def test_the_default_cache_is_named_for_the_folder(tmp_path: Path) -> None:
    assert default_cache_path("x/shards/{0..9}.tar") == Path("data/features/shards.h5")
    assert default_cache_path("s3://b/words/*.tar") == Path("data/features/words.h5")
    assert default_cache_path(tmp_path / "photos") == Path("data/features/photos.h5")


def test_only_plain_files_count(images: Path, tmp_path: Path) -> None:
    """Links, devices, hidden files and copies of macOS are passed over; of two the last stands.

    Shards of one name are told apart by their folders.
    """
    content = (images / "0.png").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "./sub/é.png", b"old")
        add(archive, "./sub/é.png", content)
        add(archive, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "hard.png", b"", type=tarfile.LNKTYPE, linkname="sub/é.png")
        add(archive, "pipe.png", b"", type=tarfile.FIFOTYPE)
        add(archive, "._x.png", content)
        add(archive, "__MACOSX/x.png", content)
        add(archive, "a" * 300 + ".png", content)
    source = TarShards(str(tmp_path / "x.tar"))
    assert list(source.names) == [f"x.tar/{'a' * 300}.png", "x.tar/sub/é.png"]
    assert all(read_square(source.image(name)).any() for name in source.names)
    (tmp_path / "sub").mkdir()
    with tarfile.open(tmp_path / "sub" / "x.tar", "w") as archive:
        add(archive, "1.png", (images / "1.png").read_bytes())
    source = TarShards(f"{tmp_path}{{/,/sub/}}x.tar")
    assert source.names[0] == "sub/x.tar/1.png"
    assert source.names[-1] == f"{tmp_path.name}/x.tar/sub/é.png"
    assert source.image("sub/x.tar/1.png").read() == (images / "1.png").read_bytes()


@pytest.mark.parametrize("left", [0.3, 0.9])
def test_a_shard_cut_off_is_named(shards: str, tmp_path: Path, left: float) -> None:
    path = tmp_path / "shards" / "0001.tar"
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[: int(left * len(content))])
    with pytest.raises(UserError, match=r"0001\.tar: damaged, cut off or no tar file"):
        _ = TarShards(shards).names
    path.unlink()
    with pytest.raises(UserError, match=r"0001\.tar: no such shard"):
        _ = TarShards(shards).names


def test_a_shard_damaged_in_the_middle_loses_nothing_unsaid(shards: str, tmp_path: Path) -> None:
    """Python's tarfile takes a broken header for the end."""
    path = tmp_path / "shards" / "0001.tar"
    with tarfile.open(path) as archive:
        third = archive.getmembers()[3]
    content = bytearray(path.read_bytes())
    content[third.offset + 10] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"0001\.tar: .*no header at byte"):
        _ = TarShards(shards).names


def test_an_image_that_cannot_be_read_is_one_failure(shards: str, tmp_path: Path) -> None:
    """A broken image in a shard is recorded; one that its shard lost since, or of absurd size,
    is an ImageError too.
    """
    with tarfile.open(tmp_path / "shards" / "0002.tar", "a") as archive:
        add(archive, "broken.png", b"")
    cache = stub_extract(shards, tmp_path / "a.h5").cache
    assert cache.names(FAILED) == ["0002.tar/broken.png"]
    assert cache.failures() == {"0002.tar/broken.png": "empty file"}
    path = tmp_path / "shards" / "0000.tar"
    image = TarShards(str(path)).image("0000.tar/0.png")
    path.write_bytes(path.read_bytes()[: image.offset + 5])
    with pytest.raises(ImageError, match="ends before it"):
        load_image(image)
    with pytest.raises(ImageError, match="claims 1,000,000,000,000 bytes"):
        load_image(TarMember(str(path), "x.png", 0, 10**12))
    path.unlink()
    with pytest.raises(ImageError, match="no such file"):
        load_image(image)


# From afar


@pytest.mark.parametrize("scheme", ["memory://", "simplecache::memory://"])
def test_shards_from_afar_read_as_local_ones(shards: str, tmp_path: Path, scheme: str) -> None:
    system = fsspec.filesystem("memory")
    for shard in (tmp_path / "shards").iterdir():
        system.pipe_file(f"/bucket/{shard.name}", shard.read_bytes())
    try:
        near = TarShards(shards)
        for pattern in ("{0000..0002}", "*"):
            far = TarShards(f"{scheme}bucket/{pattern}.tar")
            assert list(far.names) == list(near.names)
            assert far.read_captions() == near.read_captions()
            assert not far.is_local
            for name in far.names:
                assert far.image(name).read() == near.image(name).read()
        with pytest.raises(UserError, match=r"0003\.tar: no such shard"):
            _ = TarShards(f"{scheme}bucket/0003.tar").names
    finally:
        system.rm("/bucket", recursive=True)


def test_a_network_that_stumbles_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Stumbling:
        def cat_file(self, path: str, start: int, end: int) -> bytes:
            calls.append(path)
            if len(calls) < 3:
                raise TimeoutError("timed out")
            return b"x" * (end - start)

    monkeypatch.setattr("pipeline.datasets.tar_shards._file_system", lambda url: (Stumbling(), url))
    monkeypatch.setattr("pipeline.datasets.tar_shards.PAUSE", 0.0)
    assert TarMember("s3://b/0.tar", "x.png", 0, 5).read() == b"xxxxx"
    assert len(calls) == 3
    monkeypatch.setattr("pipeline.datasets.tar_shards.TRIES", 2)
    calls.clear()
    with pytest.raises(ImageError, match="timed out"):
        load_image(TarMember("s3://b/0.tar", "x.png", 0, 5))


def tar_of(names: list[str]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            add(archive, name, b"data")
    return content.getvalue()


def test_names_in_shards_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    names = ["../secret.jpg", "a/../../secret.jpg", str(tmp_path / "secret.jpg"), "a.jpg"]
    (tmp_path / "0.tar").write_bytes(tar_of(names))
    shards = TarShards(str(tmp_path / "0.tar"))
    assert not any(".." in name.split("/") for name in shards.names)
    assert len(shards.names) == 2
    for name in shards.names:
        assert shards.image(name).read() == b"data"


@given(at=st.integers(0, 2000), new=st.binary(min_size=1, max_size=12), left=st.floats(0.5, 1))
@settings(max_examples=120)
def test_any_shard_is_read_or_refused(
    at: int, new: bytes, left: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(tar_of(["a.jpg", "b.jpg", "b.txt"]))
    content[at : at + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "spoiled.tar"
    path.write_bytes(content[: int(left * len(content))])
    try:
        shards = TarShards(str(path))
        shards.read_captions()
        for name in shards.names:
            shards.image(name).read()
    except UserError as error:
        assert "\n" not in error.format_message()
    except ImageError as error:
        assert str(error)
