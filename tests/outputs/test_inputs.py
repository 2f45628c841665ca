"""What a command line or a list on standard input names."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import draw

from pipeline.outputs.inputs import collect
from pipeline.utils.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with images that no list below names."""
    for name in ("a.jpg", "é b.jpg", "private/c.jpg"):
        draw(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def collect_list(content: bytes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    return collect(("-",)).paths


@pytest.mark.parametrize(
    "content",
    [
        "a.jpg\né b.jpg\n".encode(),
        "a.jpg\r\n\r\né b.jpg\r\na.jpg".encode(),
        "\ufeffa.jpg\né b.jpg\n".encode(),
        "a.jpg\r\né b.jpg\r\n".encode("utf-16"),
        "\ufeffa.jpg\né b.jpg\n".encode("utf-16-be"),
        "a.jpg\0é b.jpg\0".encode(),
    ],
)
def test_a_list_is_read_in_every_usual_encoding(
    folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    assert collect_list(content, monkeypatch) == ["a.jpg", "é b.jpg"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_a_list_of_another_encoding_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    with pytest.raises(UserError, match="standard input: not a list of paths"):
        collect_list("./a.jpg\n/x/b.jpg\n".encode(encoding), monkeypatch)


def test_a_list_walks_only_folders_that_it_names_in_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert collect_list(b"/\n.\nprivate\n", monkeypatch) == ["/", ".", "private/c.jpg"]


def test_a_closed_standard_input_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        collect(("-",))
