"""A file written atomically is whole or not there; one process at a time holds a lock."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from thread_job import in_threads

from pipeline.utils.distributed import World
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write, lock_path, locked, temporary_path

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions and signals")


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


def test_of_two_writers_of_one_file_the_later_one_leaves_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    with (
        pytest.raises(UserError, match=r"x\.txt: .* \(another process is writing it, too\)"),
        atomic_write(path) as first,
    ):
        first.write("first")
        with atomic_write(path) as second:
            second.write("second")
            second.flush()
            first.write("half")
    assert path.read_text() == "second"
    with pytest.raises(UserError, match="another process"), atomic_write(path) as first:
        # The other is still writing when the first has ended; its temporary file stays.
        temporary_path(path).unlink()
        temporary_path(path).write_text("other")
    assert temporary_path(path).read_text() == "other" and path.read_text() == "second"


@posix
def test_a_symbolic_link_and_the_permissions_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "disk" / "x.txt", tmp_path / "x.txt"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o664)
    link.symlink_to(target)
    with atomic_write(link) as handle:
        handle.write("new")
    assert link.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o664
    assert [p.name for p in target.parent.iterdir()] == ["x.txt"]


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    temporary_path(tmp_path / "x.txt").write_text("what was left is longer than what comes")
    with atomic_write(tmp_path / "x.txt") as handle:
        handle.write("new")
    assert (tmp_path / "x.txt").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


# Locks


HOLDER = """
import sys, time
from pathlib import Path
from pipeline.utils.files import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_went(
    tmp_path: Path,
) -> None:
    target = tmp_path / "new" / "x.h5"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(target)], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    with pytest.raises(UserError) as refused, locked(target):
        raise AssertionError("two have the lock")
    message = refused.value.message
    assert message.startswith(f"{target}: another process is at work on it (process {holder.pid} ")
    assert "\n" not in message
    with locked(tmp_path / "new" / "y.h5"):
        pass  # a lock is for one file
    holder.kill()
    holder.wait()
    assert lock_path(target).exists()  # the lock file that a killed process leaves is harmless
    with locked(target):
        assert lock_path(target).exists()
    if os.name == "posix":
        assert list(target.parent.iterdir()) == []


def test_a_folder_has_its_lock_beside_it_whatever_its_name_is(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "decoder"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    for name in (run, tmp_path / "link", run / ".." / "decoder"):
        assert lock_path(name) == tmp_path / "runs" / ".decoder.lock"
    with locked(run), pytest.raises(UserError, match="another process"), locked(tmp_path / "link"):
        pass


def test_the_processes_of_one_job_have_one_lock(tmp_path: Path) -> None:
    target = tmp_path / "x.h5"

    def work(world: World) -> Any:
        with locked(target, world):
            world.barrier()
            if world.rank == 0:
                with pytest.raises(UserError, match="another process"), locked(target):
                    pass
            world.barrier()
            return world.rank

    assert in_threads(3, work) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []
    with locked(target):
        refused = in_threads(2, work)
    assert all(isinstance(error, UserError) for error in refused)


def test_where_the_lock_cannot_lie_work_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "x.h5"), locked(tmp_path / "file" / "x.h5"):
        pass
    lock_path(tmp_path / "x.h5").mkdir()
    with locked(tmp_path / "x.h5"):
        pass
