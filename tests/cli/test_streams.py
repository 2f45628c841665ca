"""Standard streams that are closed, full or cut off end no command in a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from commands import invoke

from pipeline.cli import main, options

SCRIPT = """
import click
from pipeline.cli import options
from pipeline.utils.terminal import echo

@options.command()
def command() -> None:
    echo("a message", err=True)
    click.echo("a caption" * {times})

command.main()
"""


def run(redirection: str, times: int = 1) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(times=times)
    line = f'"$0" -c "$1" {redirection}'
    return subprocess.run(
        ["sh", "-c", line, sys.executable, script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("times", [1, 100_000])
def test_a_full_standard_output_is_one_line(times: int) -> None:
    result = run("> /dev/full", times)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert lines[-1] == "Error: standard output: cannot be written (No space left on device)"
    assert set(lines[:-1]) <= {"a message"}


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    "redirection, stdout, stderr",
    [
        (">&-", "", "a message\n"),
        ("2>&-", "a caption\n", ""),
        ("<&-", "a caption\n", "a message\n"),
        pytest.param(
            "2> /dev/full",
            "a caption\n",
            "",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full"),
        ),
    ],
)
def test_closed_streams_and_a_full_standard_error_are_quiet(
    redirection: str, stdout: str, stderr: str
) -> None:
    result = run(redirection)
    assert (result.returncode, result.stdout, result.stderr) == (0, stdout, stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_a_pipe_that_is_cut_off_is_quiet() -> None:
    result = run("| head -c 5", times=100_000)
    assert (result.stdout, result.stderr.replace("a message\n", "")) == ("a cap", "")


def test_messages_name_the_command_that_was_typed(tmp_path: Path) -> None:
    data = ("--data", tmp_path, "--features", tmp_path / "x.h5")
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,a dog\n", encoding="utf-8")
    installed = invoke(main, "train", *data, code=2)
    assert "main extract" in installed.stderr
    assert "extract_features.py" not in installed.stderr
    group = click.Group("captioner", commands={"x": options.command()(lambda: None)})
    invoke(group, "x")
