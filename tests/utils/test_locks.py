"""One process at a time on a file or folder; a lock ends with its process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from test_feature_shards import in_threads

from pipeline.utils import locks
from pipeline.utils.distributed import World
from pipeline.utils.errors import UserError
from pipeline.utils.locks import lock_path, locked

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no flock")

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.utils.locks import locked
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
    holder.send_signal(signal.SIGKILL) if os.name == "posix" else holder.kill()
    holder.wait()
    assert lock_path(target).exists()  # what a killed process leaves holds nobody up
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


@posix
def test_processes_of_one_job_share_a_lock_and_keep_others_off(tmp_path: Path) -> None:
    target = tmp_path / "x.h5"
    together = threading.Barrier(3)

    def work(world: World) -> Any:
        with locked(target, world):
            together.wait(20)
            if world.rank == 0:
                with pytest.raises(UserError, match="another process"), locked(target):
                    pass
            together.wait(20)
            return world.rank

    assert in_threads(3, work) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []
    with locked(target):
        refused = in_threads(2, work)
    assert all(isinstance(error, UserError) for error in refused)


@posix
def test_a_job_whose_first_process_is_gone_still_has_its_lock(tmp_path: Path) -> None:
    """``torchrun`` may be a moment late to end the others, which write on for that long."""
    target = tmp_path / "x.h5"
    left, checked = threading.Event(), threading.Event()

    def work(world: World) -> Any:
        with locked(target, world):
            if world.rank == 1:
                left.wait(20)
                with pytest.raises(UserError, match="another process"), locked(target):
                    pass
                checked.set()
        if world.rank == 0:
            left.set()
            assert checked.wait(20)
        return world.rank

    assert in_threads(2, work) == [0, 1]
    with locked(target):
        pass


def test_of_several_processes_without_a_job_the_first_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path / "run"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError), locked(tmp_path / "run"):
            pass


@posix
@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_where_there_are_no_locks_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def none(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(locks, "_lock", none)
    with locked(tmp_path / "x"), locked(tmp_path / "x"):
        pass


def test_where_the_lock_cannot_lie_work_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "x.h5"), locked(tmp_path / "file" / "x.h5"):
        pass
    lock_path(tmp_path / "x.h5").mkdir()
    with locked(tmp_path / "x.h5"):
        pass
