"""Each stage on two hosts, of which one is cut off and comes back; see ``two_hosts``.

docs/scale.md says what happens then and what the user types; this is where it is from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

import pytest
from conftest import draw
from drawn_run import DrawnRun, run
from small_data import make_small_data
from test_extraction import rows_finished
from test_feature_shards import assert_same
from test_torchrun import SMALL, assert_same_scores, assert_same_training, log_of, wait_for_epochs
from two_hosts import Cable, Host, two_hosts

import extract_features
import train_decoder
from pipeline.features.cache import FeatureCache
from pipeline.features.sharded_cache import shard_path

pytestmark = pytest.mark.slow
PATIENCE = 240  # s, for all that is waited for here


class Hosts(NamedTuple):
    first: Host
    second: Host
    cable: Cable

    def start(self, script: str, *arguments: str | Path) -> list[Popen[str]]:
        return [host.torchrun(script, *arguments) for host in (self.first, self.second)]

    def said(self) -> str:
        return "\n".join(f"-- {host.number}\n{host.said()}" for host in (self.first, self.second))


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with two_hosts(tmp_path) as made:
        yield Hosts(*made)


def wait_until(true: Callable[[], bool], hosts: Hosts) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, hosts.said()
        time.sleep(0.02)


def end_well(processes: list[Popen[str]], hosts: Hosts) -> None:
    wait_until(lambda: all(process.poll() is not None for process in processes), hosts)
    assert [process.returncode for process in processes] == [0, 0], hosts.said()


def test_extraction_outlives_a_host_without_current(hosts: Hosts, tmp_path: Path) -> None:
    """The cable goes first, so that nothing tells the other host; then the machine starts anew."""
    data, output, alone = (tmp_path / name for name in ("images", "x.h5", "alone.h5"))
    for number in range(64):
        draw(data / f"{number:02d}.png", number)
    options = f"--data {data} --weights random"
    command: list[str | Path] = [
        *options.split(),
        "--output",
        output,
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    processes = hosts.start("extract_features.py", *command)
    shard = shard_path(output, 1, 2)
    wait_until(lambda: rows_finished(shard) > 0, hosts)
    hosts.cable.pull_out()
    hosts.second.kill()
    assert not shard.is_file()
    # The first host does all of its own share, and then waits.
    wait_until(shard_path(output, 0, 2).is_file, hosts)
    assert processes[0].poll() is None
    hosts.cable.plug_in()
    processes[1] = hosts.second.torchrun("extract_features.py", *command)
    end_well(processes, hosts)
    assert "64 images (" in hosts.first.said() and " 0 before" not in hosts.first.said()
    run(extract_features.main, f"{options} --output {alone}")
    assert_same(FeatureCache(output), FeatureCache(alone))


def test_training_outlives_a_loose_cable_and_a_killed_host(hosts: Hosts, tmp_path: Path) -> None:
    data, features = make_small_data(tmp_path)
    alone, whole, disturbed = (tmp_path / name for name in ("alone", "whole", "disturbed"))
    command: list[str | Path] = ["--data", data, "--features", features, *SMALL, "--epochs", "60"]
    end_well(hosts.start("train_decoder.py", *command, "--run", whole), hosts)
    run(train_decoder.main, " ".join(map(str, [*command, "--run", alone])))
    assert_same_training(whole, alone, 1e-5)
    assert_same_scores(whole, alone)

    processes = hosts.start("train_decoder.py", *command, "--run", disturbed)
    wait_for_epochs(disturbed, 5, processes[0])
    hosts.cable.pull_out()
    time.sleep(0.5)  # for what had arrived already
    epochs = len(log_of(disturbed))
    time.sleep(2)
    assert len(log_of(disturbed)) == epochs, "neither host goes on alone"
    hosts.cable.plug_in()
    wait_for_epochs(disturbed, epochs + 3, processes[0])
    assert "going on after" not in hosts.said(), "nor is either started again"
    hosts.second.kill()
    processes[1] = hosts.second.torchrun("train_decoder.py", *command, "--run", disturbed)
    end_well(processes, hosts)
    assert hosts.first.said().count("going on after") == 1
    assert_same_training(whole, disturbed, 0.0)
    assert (whole / "predictions.json").read_bytes() == (
        disturbed / "predictions.json"
    ).read_bytes()


def test_fine_tuning_outlives_the_host_where_all_meet(
    hosts: Hosts, drawn_run: DrawnRun, tmp_path: Path
) -> None:
    """Without it the other host's torchrun ends; the same command on both goes on."""
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    command: list[str | Path] = [
        *("--start", drawn_run.run, "--data", drawn_run.data, "--weights", drawn_run.weights),
        *("--epochs", "3", "--unfreeze-from", "Mixed_7c", "--device", "cpu"),
        *("--precision", "fp32"),
    ]
    end_well(hosts.start("finetune_joint.py", *command, "--run", whole), hosts)
    processes = hosts.start("finetune_joint.py", *command, "--run", disturbed)
    wait_until(lambda: hosts.first.said().count("epoch 1/3 ") == 2, hosts)  # said when saved
    hosts.first.kill()
    wait_until(lambda: processes[1].poll() is not None, hosts)
    assert processes[1].returncode
    end_well(hosts.start("finetune_joint.py", *command, "--run", disturbed), hosts)
    assert "going on after epoch" in hosts.first.said()
    assert_same_training(whole, disturbed, 0.0)
    assert_same_scores(whole, disturbed)
