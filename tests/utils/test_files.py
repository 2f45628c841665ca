"""A file written atomically is whole or not there."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import IO

import pytest
import torch

from pipeline.models.checkpoint import write_content
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write, temporary_path


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "x.txt"
    with atomic_write(path) as handle:
        handle.write("ä\n")
        assert not path.exists()
    assert path.read_bytes() == "ä\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path, "wb") as handle:
        handle.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_of_two_writers_of_one_file_each_leaves_a_whole_one(tmp_path: Path) -> None:
    """Both have the same temporary name; what stands under the final one is of one of them."""
    path = tmp_path / "x.txt"
    mixed: list[str] = []

    def write(letter: str) -> None:
        for _ in range(15):
            with atomic_write(path) as handle:
                for _ in range(20):
                    handle.write(letter * 500)
                    handle.flush()
                    time.sleep(0)
            content = path.read_text()
            if content not in ("a" * 10_000, "b" * 10_000):
                mixed.append(content)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert mixed == []
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")
def test_a_file_that_another_process_does_not_finish_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.utils.files.PATIENCE", 0.1)
    path = tmp_path / "x.txt"
    with atomic_write(path) as handle:
        busy = pytest.raises(UserError, match=r"x\.txt: .* \(another process is writing it\)")
        with busy, atomic_write(path):
            pass
        handle.write("whole")
    assert path.read_text() == "whole"


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    temporary_path(tmp_path / "x.txt").write_text("what was left is longer than what comes")
    with atomic_write(tmp_path / "x.txt") as handle:
        handle.write("new")
    assert (tmp_path / "x.txt").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_waits_for_a_checkpoint_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def interrupted(content: object, handle: IO[bytes]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(content, handle)

    monkeypatch.setattr(torch, "save", interrupted)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            write_content(tmp_path / "x.pt", {"epoch": 3})
        assert torch.load(tmp_path / "x.pt", weights_only=True) == {"epoch": 3}
        with pytest.raises(KeyboardInterrupt):  # as ever
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)
