"""Shared by the commands: help under headings, click options from dataclasses, common options."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline.datasets.images import IMAGE_EXTENSIONS
from pipeline.datasets.tar_shards import is_tar_shards
from pipeline.models.pretrained import BEST, LICENCE, PRETRAINED
from pipeline.utils.errors import UserError
from pipeline.utils.files import check_replaceable, check_writable
from pipeline.utils.options import check_device_name
from pipeline.utils.terminal import echo, escape_control

Decorator = Callable[[Callable[..., Any]], Any]

# The run folders of stages 3 and 2, the better one first.
DEFAULT_MODELS = (f"runs/joint/{BEST}", f"runs/decoder/{BEST}")
# Sub-command of the installed program -> script of this repository.
SCRIPTS = {
    "extract": "extract_features.py",
    "train": "train_decoder.py",
    "finetune": "finetune_joint.py",
    "caption": "caption.py",
    "evaluate": "evaluate.py",
}


class HeadedOption(click.Option):
    """A click option with a heading in the help."""

    def __init__(self, *args: Any, heading: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading or "Options"


class GroupedCommand(click.Command):
    """A command whose help lists its options under headings.

    Attributes:
        groups: heading -> parameter names of its options; options without a heading come first.
        resumable: the same command resumes after an interruption.
    """

    def __init__(
        self,
        *args: Any,
        groups: Mapping[str, Sequence[str]],
        resumable: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.groups = groups
        self.resumable = resumable

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse the command line; Ctrl-C ends it with one line and exit code 130."""
        with self._interruptible():
            return super().make_context(*args, **extra)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """End the program with one line and exit code 130 after Ctrl-C."""
        try:
            yield
        except (KeyboardInterrupt, Exception) as error:
            if not _follows_ctrl_c(error):
                raise
            echo(f"interrupted{self._resuming}", err=True)
            sys.exit(130)

    @property
    def _resuming(self) -> str:
        return "; run the same command to resume" if self.resumable else ""

    def invoke(self, context: click.Context) -> Any:
        """Run the command; report Ctrl-C, failed standard output and lack of memory in one line.

        Raises:
            UserError: out of memory, on the CPU or a GPU; standard output cannot be written.
        """
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed, as in services
                setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        # Pillow's warnings (above 89 million pixels, odd metadata) would break the progress bar.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            with self._interruptible():
                result = super().invoke(context)
                context.close()  # here, because click exits with code 1 on Ctrl-C
                sys.stdout.flush()
                return result
        except UserError as error:
            vars(error)["message"] = self._as_typed(error.message, context)
            raise
        except OSError as error:
            # A named file's error, or a closed pipe, on which click exits quietly.
            if error.filename is not None or error.errno == errno.EPIPE:
                raise
            # Buffered output would fail again at exit.
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
            raise UserError(f"standard output: cannot be written ({error.strerror})") from error
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            names = {parameter.opts[0] for parameter in self.params}
            smaller = [n for n in ("--batch-size", "--workers", "--beam-size") if n in names]
            less = f"try a smaller {' or '.join(smaller)}" if smaller else "close other programs"
            raise UserError(f"out of memory: {less}{self._resuming}") from error

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; only one of several processes prints a usage error."""
        try:
            return super().parse_args(context, args)
        except click.UsageError as error:
            # The message quotes the unknown argument.
            vars(error)["message"] = escape_control(error.message)
            from pipeline.utils.distributed import joined_world

            with joined_world():
                raise

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        listed = {name: heading for heading, names in self.groups.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {"Options": []}
        rows |= {heading: [] for heading in self.groups}
        rows |= {o.heading: [] for o in self.params if isinstance(o, HeadedOption)}
        for option in self.get_params(context):
            record = option.get_help_record(context)
            if record is not None and isinstance(option, click.Option):
                # Click calls them INTEGER RANGE and FLOAT RANGE.
                record = record[0].replace(" RANGE", "").replace(" FLOAT", " NUMBER"), record[1]
                own = listed.get(option.name or "", "Options")
                rows[getattr(option, "heading", own)].append(record)
        for heading, records in rows.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def get_help(self, context: click.Context) -> str:
        """Return the help; under ``captioner``, with its sub-commands in the examples."""
        return self._as_typed(super().get_help(context), context)

    def _as_typed(self, text: str, context: click.Context) -> str:
        """Return ``text`` with the installed program's commands, if that is what is running."""
        if context.parent is not None:
            for name, script in SCRIPTS.items():
                command = f"{context.parent.command_path} {name}"
                text = text.replace(f"python {script}", command).replace(script, command)
        return text


def _follows_ctrl_c(error: BaseException | None) -> bool:
    # During an import it becomes pybind11's ImportError or __set_name__'s RuntimeError.
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _lacks_memory(error: Exception) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's; torch is not imported for this
        or "can't allocate memory" in str(error)
    )


class DataPath(click.Path):
    """The type of ``--data``: a folder, or a pattern of tar shards, which may be a URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Normalise a folder's path, so that settings of runs compare equal."""
        text = str(super().convert(value, param, ctx))
        return text if is_tar_shards(text) else str(Path(text))


def command(
    groups: Mapping[str, Sequence[str]] | None = None, resumable: bool = False
) -> Decorator:
    """Return a decorator that makes a function a ``GroupedCommand``."""
    return click.command(
        cls=GroupedCommand,
        groups=groups or {},
        resumable=resumable,
        context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    )


def path(name: str, help: str, **more: Any) -> Decorator:
    """Return a click option whose value is a ``Path``."""
    return click.option(name, type=click.Path(path_type=Path), help=help, **more)


class OutputPath(click.Path):
    """The type of an option that names a file to write.

    It refuses folders, names with an image extension, and existing files of another kind than the
    one written, such as the user's images, captions or pages, even with ``--force``.
    """

    def __init__(self, kind: re.Pattern[bytes]) -> None:
        super().__init__(path_type=Path)
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check the path."""
        path = Path(str(super().convert(value, param, ctx)))
        if path.suffix.lower() in IMAGE_EXTENSIONS:
            raise UserError(f"{path}: has the ending of an image; name another file to write")
        check_writable(path)
        check_replaceable(path, self.kind)
        return path


def output(name: str, help: str, kind: re.Pattern[bytes], **more: Any) -> Decorator:
    """Return a click option for an output file of this kind; see ``OutputPath``."""
    return click.option(name, type=OutputPath(kind), help=help, **more)


def from_dataclass(options_class: type, leave_out: Sequence[str] = ()) -> Decorator:
    """Return a decorator that adds a click option for every ``utils.options.option`` field.

    A class's own options come before those that it inherits. The command receives each as a
    keyword argument named after the field.
    """
    hints = typing.get_type_hints(options_class)
    own = [*vars(options_class)["__annotations__"]]
    fields = sorted(
        (f for f in dataclasses.fields(options_class) if f.metadata and f.name not in leave_out),
        key=lambda field: own.index(field.name) if field.name in own else len(own),
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for field in reversed(fields):
            command = _click_option(field, hints[field.name])(command)
        return command

    return decorate


def _click_option(field: dataclasses.Field[Any], hint: Any) -> Decorator:
    metadata, name = field.metadata, field.name.replace("_", "-")
    kinds = {kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)}
    declaration, help_text = f"--{name}", metadata["help"]
    kind: click.ParamType | type = str
    flag = kinds == {bool}
    if flag:
        kind = bool
        declaration += f"/--no-{name}" if field.default else ""
    elif metadata["choices"]:
        kind = click.Choice(metadata["choices"])
    elif kinds in ({int}, {float}):
        limits = metadata["limits"]
        kind = click.IntRange(**limits) if kinds == {int} else click.FloatRange(**limits)
    if metadata["default_help"]:
        help_text += f"  [default: {metadata['default_help']}]"
    return click.option(
        declaration,
        cls=HeadedOption,
        heading=metadata["heading"],
        type=kind,
        is_flag=flag,
        default=field.default,
        help=help_text,
    )


def _check_device(_context: click.Context, _option: click.Parameter, name: str) -> str:
    """Check ``--device`` before torch is imported, which takes seconds."""
    check_device_name(name)
    return name


device = click.option(
    "--device",
    callback=_check_device,
    default="auto",
    help="Device: auto, cpu, cuda, cuda:N or mps.",
)

captions = path(
    "--captions",
    "Captions file, if --data holds several; it may be given several times. docs/file-formats.md "
    "lists the formats.",
    multiple=True,
)

encoding = click.option(
    "--encoding",
    help="Encoding of the captions files, such as gb18030 or cp1251.  [default: UTF-8 or UTF-16, "
    "else Windows-1252 where that is plausible]",
)

weights = click.option(
    "--weights",
    help="The encoder's weights, if they were moved since training; they must be the same. A model "
    "of finetune_joint.py contains them.",
)

ensemble = click.option(
    "--ensemble",
    is_flag=True,
    help="Use several models as one, which averages their predictions of every word. They must "
    "have the same encoder and recipe, and other seeds.",
)

force = click.option("--force", is_flag=True, help="Start the run over, discarding what is there.")

tensorboard = click.option(
    "--tensorboard",
    is_flag=True,
    help="Write the curves, and some captions of every epoch, for TensorBoard too, which must be "
    "installed (pip install -e '.[tensorboard]'): tensorboard --logdir runs",
)


def check_ensemble(models: Sequence[Path], ensemble: bool) -> None:
    """Raise UserError for several models without ``--ensemble``, or the reverse."""
    if len(models) > 1 and not ensemble:
        raise UserError(f"{len(models)} models: add --ensemble to use them as one")
    if ensemble and len(models) < 2:
        raise UserError("--ensemble: is for several models")


def refuse_given(names: Sequence[str], reason: str) -> None:
    """Raise UserError if the user gave one of these options, by parameter name."""
    for parameter in _given(click.get_current_context()):
        if parameter.name in names:
            raise UserError(f"{parameter.opts[0]}: {reason}")


def _given(context: click.Context) -> Iterator[click.Parameter]:
    """Yield the options and arguments that the user wrote on the command line."""
    for parameter in context.command.params:
        if context.get_parameter_source(parameter.name or "") == ParameterSource.COMMANDLINE:
            yield parameter


def default_model() -> Path:
    """Return the model to use when none is named: the user's own, else the pretrained one."""
    for candidate in DEFAULT_MODELS:
        if Path(candidate).is_file():
            echo(f"model: {candidate}", err=True)
            return Path(candidate)
    echo(f"model: the pretrained model, {LICENCE}; captioner info pretrained shows more", err=True)
    return Path(PRETRAINED)


def render_command(command: str, options: Mapping[str, str]) -> list[str]:
    """Return the words of a command, with the options that the user gave to the current one.

    Args:
        command: a key of ``SCRIPTS``.
        options: parameter of the current command -> name of the option in ``command``.
    """
    context = click.get_current_context()
    words = ["python", SCRIPTS[command]]
    if context.parent is not None:
        words = [*context.parent.command_path.split(), command]
    for parameter in _given(context):
        name = parameter.name or ""
        if name not in options:
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append(options[name] if value else parameter.secondary_opts[0])
        else:
            for item in value if isinstance(value, tuple) else [value]:
                words += [options[name], str(item)]
    return words
