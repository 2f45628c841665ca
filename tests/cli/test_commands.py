"""The commands as one program: their help, their headings, completion."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys

import click
import pytest
import torch
from commands import invoke
from conftest import REPOSITORY

from pipeline.cli import COMMANDS, main
from pipeline.cli.options import SCRIPTS, GroupedCommand, command
from pipeline.utils.errors import UserError


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
    text = invoke(command, "--help").stdout
    text = text[text.index("\nOptions:\n") :]
    for heading in command.groups:
        assert f"\n{heading}:\n" in text
    for parameter in command.params:
        if parameter.opts[0].startswith("--"):
            found = re.findall(rf"^  (?:-., )?{parameter.opts[0]}(?: |$)", text, re.MULTILINE)
            assert len(found) == 1, parameter.opts


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_in_the_words_that_were_used(name: str) -> None:
    direct = invoke(command_of(name), "--help").stdout
    own = f"python {SCRIPTS[name]}" if name in SCRIPTS else f"captioner {name}"
    assert f"    {own}" in direct and "Example" in direct
    installed = invoke(main, name, "--help", prog_name="captioner").stdout
    assert f"    captioner {name}" in installed
    assert not re.search(r"python (-m pipeline|(?!captioner-onnx)\w+\.py)", installed)


def test_help_and_wrong_options_load_nothing_heavy() -> None:
    code = f"""
import sys
from pipeline.cli import main
def run(*words):
    try: main([*words], prog_name="captioner")
    except SystemExit: pass
run("--help")
loaded = [m for m in sys.modules if m.startswith("pipeline.cli.")]
for name in {[*COMMANDS]}:
    run(name, "--help")
    run(name, "--no-such-option")
run("train", "--device", "gpu")
run("caption", "setup.cfg", "--model", "pretrianed")
heavy = "torch torchvision numpy h5py nltk PIL jinja2 matplotlib".split()
print(loaded + [m for m in heavy if m in sys.modules])
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "[]"
    assert all(re.search(rf"^  {name} ", ended.stdout, re.MULTILINE) for name in COMMANDS)
    assert ended.stderr.count("No such option") == len(COMMANDS)
    assert "--device gpu: unknown; use auto, cpu," in ended.stderr
    assert "pretrianed: no such checkpoint; train one" in ended.stderr


def test_an_unknown_command_is_named() -> None:
    assert "paint" in invoke(main, "paint", code=2).stderr


def test_the_scripts_are_the_commands() -> None:
    for name, script in SCRIPTS.items():
        assert importlib.import_module(script.removesuffix(".py")).main is command_of(name)


@pytest.mark.parametrize(
    ("words", "place", "expected"),
    [
        ("captioner ca", 1, "plain,caption"),
        ("captioner caption --be", 2, "plain,--beam-size"),
        ("captioner caption --format ", 3, "plain,jsonl"),
    ],
)
def test_the_shell_completes_commands_and_options(words: str, place: int, expected: str) -> None:
    variables = {
        "_CAPTIONER_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(place),
    }
    assert expected in invoke(main, prog_name="captioner", env=variables).stdout


@pytest.mark.parametrize(
    "words, message",
    [
        ("compress a b", "2 models: add --ensemble"),
        ("compress a --ensemble", "--ensemble: is for several models"),
        ("export a --model b", "2 models: add --ensemble"),
        ("export --ensemble", "--ensemble: is for several models"),
        ("evaluate a --ensemble", "--ensemble: is for several models"),
        ("train --self-critical-lr 1", "--self-critical-lr: is for --self-critical-epochs"),
        ("train --cross-entropy-weight 0", "--cross-entropy-weight: is for --self-critical-epochs"),
        ("extract --force --retry-failed", "--retry-failed: has no effect with --force"),
        ("extract --download --data a{0..1}.tar", "--download: needs a folder as --data"),
    ],
)
def test_options_without_effect_are_refused(words: str, message: str) -> None:
    assert message in invoke(main, *words.split(), code=2).stderr


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
    result = invoke(command, code=2)
    said = "out of memory: try a smaller --batch-size; run the same command to resume"
    assert result.stderr == f"Error: {said}\n"


@pytest.mark.parametrize("moment", ["before", "during", "amid an import", "after"])
def test_ctrl_c_is_one_line_at_any_moment(moment: str) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    @command(resumable=True)
    @click.option("--x", callback=interrupt if moment == "before" else None)
    @click.pass_context
    def run(context: click.Context, x: str | None) -> None:
        if moment == "during":
            interrupt()
        if moment == "amid an import":  # what pybind11 and a message about it make of Ctrl-C
            try:
                raise ImportError("initialization failed") from KeyboardInterrupt()
            except ImportError:
                raise UserError("a package is missing") from None
        context.call_on_close(interrupt)  # as locks are released

    result = invoke(run, code=130)
    assert result.stderr == "interrupted; run the same command to resume\n"


def test_the_lines_of_another_librarys_error_become_one() -> None:
    def run() -> None:
        cause = RuntimeError("Error(s) in loading:\n\tMissing key")
        raise UserError(f"a\nb.pt: damaged ({cause})") from cause

    result = invoke(GroupedCommand("x", callback=run, groups={}), code=2)
    assert result.stderr == "Error: a\\nb.pt: damaged (Error(s) in loading: Missing key)\n"


def test_other_errors_of_the_program_are_not_hidden() -> None:
    def run() -> None:
        raise RuntimeError("a bug")

    result = invoke(GroupedCommand("x", callback=run, groups={}), code=1)
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_what_most_trainings_need_comes_first_and_the_rest_is_advanced(name: str) -> None:
    text = invoke(command_of(name), "--help").stdout
    first, *others = re.findall(r"^(\S.*):$", text[text.index("\nOptions:") :], re.MULTILINE)
    assert first == "Options" and all(heading.startswith("Advanced: ") for heading in others)
    basics = text[text.index("\nOptions:") : text.index("\nAdvanced")]
    wanted = {"--data", "--captions", "--run", "--epochs", "--device", "--force", "--help"}
    assert wanted <= set(re.findall(r"--[a-z-]+", basics)) and basics.count("\n") < 40


def test_no_error_has_several_lines() -> None:
    """A line end in an error would show as a backslash and an n; file names alone have those."""
    for path in (REPOSITORY / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            if getattr(called, "id", getattr(called, "attr", "")) in ("UserError", "InputError"):
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                assert not any(isinstance(text, str) and "\n" in text for text in texts), path
