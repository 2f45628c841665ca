"""The commands as one program: their help, their headings, completion."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from pipeline.cli import COMMANDS, main
from pipeline.cli.options import SCRIPTS, GroupedCommand

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "from pipeline.cli import main; main(prog_name='captioner')"


def command_of(name: str) -> GroupedCommand:
    command = importlib.import_module(f"pipeline.cli.{name}").main
    assert isinstance(command, GroupedCommand)
    return command


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_heading_is_there_and_stands_in_the_help_once(name: str) -> None:
    command = command_of(name)
    grouped = [option for options in command.groups.values() for option in options]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) <= {parameter.name for parameter in command.params}
    text = CliRunner().invoke(command, ["--help"]).stdout
    text = text[text.index("\nOptions:\n") :]
    for heading in command.groups:
        assert f"\n{heading}:\n" in text
    for parameter in command.params:
        if parameter.opts[0].startswith("--"):
            found = re.findall(rf"^  (?:-., )?{parameter.opts[0]}(?: |$)", text, re.MULTILINE)
            assert len(found) == 1, parameter.opts


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_in_the_words_that_were_used(name: str) -> None:
    direct = CliRunner().invoke(command_of(name), ["--help"]).stdout
    own = f"python {SCRIPTS[name]}" if name in SCRIPTS else f"captioner {name}"
    assert f"    {own}" in direct and "Example" in direct
    installed = CliRunner().invoke(main, [name, "--help"], prog_name="captioner").stdout
    assert f"    captioner {name}" in installed
    assert not re.search(r"python (-m pipeline|(?!captioner-onnx)\w+\.py)", installed)


def test_the_program_lists_its_commands_and_loads_none() -> None:
    code = (
        "import sys\n"
        "from pipeline.cli import main\n"
        "try: main(['--help'], prog_name='captioner')\n"
        "except SystemExit: pass\n"
        "print([m for m in sys.modules if m.startswith(('torch', 'pipeline.cli.'))])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "[]"
    assert all(re.search(rf"^  {name} ", ended.stdout, re.MULTILINE) for name in COMMANDS)


def test_an_unknown_command_is_named() -> None:
    result = CliRunner().invoke(main, ["paint"])
    assert result.exit_code == 2 and "paint" in result.stderr


def test_the_scripts_are_the_commands() -> None:
    for name, script in SCRIPTS.items():
        if script.endswith(".py"):
            assert importlib.import_module(script.removesuffix(".py")).main is command_of(name)


def test_the_shell_completes_commands_and_options() -> None:
    def completed(words: str, place: int) -> str:
        ended = subprocess.run(
            [
                sys.executable,
                "-c",
                "from pipeline.cli import main; main(prog_name='captioner')",
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "_CAPTIONER_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(place),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return ended.stdout

    assert "plain,caption" in completed("captioner ca", 1)
    assert "plain,--beam-size" in completed("captioner caption --be", 2)
    assert "plain,jsonl" in completed("captioner caption --format ", 3)


@pytest.mark.parametrize("kind", ["python", "torch", "gpu"])
def test_a_lack_of_memory_is_one_line(kind: str) -> None:
    def run(batch_size: int) -> None:
        if kind == "python":
            raise MemoryError
        if kind == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        torch.empty(1 << 60, dtype=torch.uint8)  # more than there are addresses

    option = click.Option(["--batch-size"], type=int, default=1)
    command = GroupedCommand("x", callback=run, params=[option], groups={}, resumable=True)
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 2
    said = "out of memory: try a smaller --batch-size; run the same command to resume"
    assert result.stderr == f"Error: {said}\n"


def test_other_errors_of_the_program_are_not_hidden() -> None:
    def run() -> None:
        raise RuntimeError("a bug")

    result = CliRunner().invoke(GroupedCommand("x", callback=run, groups={}), [])
    assert isinstance(result.exception, RuntimeError)
