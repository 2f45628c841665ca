"""What a checkpoint from a stranger has to be, before anything is built of it.

``torch_files`` sees to it that loading a file allocates no more than the file is large; here its
content is held against what a decoder of its sizes consists of. What passes fits together, and
its numbers are so small that no caption overflows float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.datasets.vocabulary import SPECIALS
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder_identity import EncoderIdentity
from pipeline.models.matcher import Matcher, MatcherConfig
from pipeline.models.weight_checks import (
    FLOATS,
    check_names,
    check_state,
    check_values,
    shapes_of,
    short,
)
from pipeline.utils.terminal import BEYOND_C0

INTEGERS = frozenset((torch.int16, torch.int32, torch.int64))
# A word's weight in a caption is the exponential of a parameter.
LARGEST_EXPONENT = 50.0
LARGEST_SIZE = 1 << 20
LONGEST_TEXT = 4096  # of an encoder's identity, which may be a path
# Settings are options of a command, and what goes on in training an optimizer's groups.
DEEPEST, MOST_VALUES = 8, 1_000_000
# What a terminal would obey, and the line ends that it does not know.
UNPRINTABLE = re.compile(f"[\x00-\x1f\u2028\u2029{BEYOND_C0}]")
PATHS = ("data", "captions", "features", "weights")

Sizes = TypeVar("Sizes", DecoderConfig, MatcherConfig)


def check_sizes(kind: type[Sizes], given: Any) -> Sizes:
    """Make a decoder's or matcher's sizes of what a file holds of them.

    Raises:
        ValueError: names, types or sizes are wrong.
    """
    types = {field.name: str(field.type) for field in fields(kind)}
    check_names(given, types, f"of {kind.__name__}", all_of_them=False)
    for name, value in given.items():
        whole = type(value) is int and 1 <= value <= LARGEST_SIZE
        share = type(value) in (int, float) and 0 <= value < 1
        flag = type(value) is bool
        if not {"int": whole, "float": share, "bool": flag}[types[name]]:
            raise ValueError(f"{name} is {short(value)}")
    if "vocabulary_size" not in given:
        raise ValueError("vocabulary_size is missing")
    return kind(**given)


def check_vocabulary(words: Any, config: DecoderConfig) -> None:
    """Raise ValueError unless ``words`` can be printed and are as many as the decoder has."""
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("the vocabulary is no list of words")
    if len(words) != config.vocabulary_size:
        raise ValueError("vocabulary and decoder differ in size")
    if len(words) <= len(SPECIALS):
        raise ValueError("the vocabulary holds no word")
    found = UNPRINTABLE.search("".join(words))
    if found:
        raise ValueError(f"a word holds {found[0]!r}")


def check_encoder(given: Any) -> EncoderIdentity:
    """Make an encoder's identity of what a file holds of it.

    Raises:
        ValueError: names are missing or unknown, or not short and printable.
    """
    names = {field.name for field in fields(EncoderIdentity)}
    check_names(given, names | {"engine"}, "of the encoder", all_of_them=False)
    for name, value in given.items():
        if type(value) is not str or len(value) > LONGEST_TEXT or UNPRINTABLE.search(value):
            raise ValueError(f"the encoder's {name} is {short(value)}")
    return EncoderIdentity(**given)


def check_decoder_weights(given: Any, config: DecoderConfig) -> None:
    """Raise ValueError unless names, shapes and types are those of a decoder of these sizes."""
    with torch.device("meta"):  # without memory
        shapes = shapes_of(Decoder(config))
    if config.members > 1:
        # Before they are listed, so that a number alone cannot ask for a million decoders.
        if not isinstance(given, dict) or len(given) != config.members * len(shapes):
            raise ValueError("there are not as many weights as the decoders have")
        shapes = {
            f"members.{number}.{name}": shape
            for number in range(config.members)
            for name, shape in shapes.items()
        }
    check_state(given, shapes, "decoder")


def check_matcher(given: Any, config: DecoderConfig) -> MatcherConfig:
    """Check a matcher's sizes and weights against each other and the decoder.

    Raises:
        ValueError: they do not fit, or its numbers are too large.
    """
    check_names(given, {"config", "weights"}, "of the matcher")
    sizes = check_sizes(MatcherConfig, given["config"])
    if (sizes.vocabulary_size, sizes.feature_size) != (config.vocabulary_size, config.feature_size):
        raise ValueError("matcher and decoder differ in size")
    with torch.device("meta"):
        shapes = shapes_of(Matcher(sizes))
    check_state(given["weights"], shapes, "matcher")
    check_values(given["weights"], "matcher")
    if not bool((given["weights"]["word_weight"].abs() <= LARGEST_EXPONENT).all()):
        raise ValueError("a word weighs too much in the matcher")
    return sizes


def check_neighbours(given: Any, config: DecoderConfig) -> None:
    """Raise ValueError unless these are tensors of neighbours of the decoder's kind.

    Whether they fit together is seen by ``Neighbours.from_tensors``.
    """
    of_floats, of_integers = ("mean", "directions"), ("pictures", "tokens", "offsets")
    check_names(given, {*of_floats, *of_integers}, "of the neighbours")
    for names, dtypes in ((of_floats, FLOATS), (of_integers, INTEGERS)):
        for name in names:
            if not isinstance(given[name], Tensor) or given[name].dtype not in dtypes:
                raise ValueError(f"the neighbours' {name} are of another type")
    check_values({name: given[name] for name in of_floats}, "neighbours")
    if not bool((given["directions"].abs() < 1.1).all()):
        raise ValueError("the neighbours' directions are not of length 1")
    tokens = given["tokens"]
    if tokens.dim() != 1 or not bool(((tokens >= 0) & (tokens < config.vocabulary_size)).all()):
        raise ValueError("the neighbours have words that the vocabulary does not have")
    if given["mean"].shape != (config.embed_size * config.members,):
        raise ValueError("neighbours and decoder differ in size")


def check_record(content: Mapping[str, Any]) -> None:
    """Raise ValueError unless epoch, scores, settings and bookkeeping are plain values."""
    if type(content["epoch"]) is not int or not 0 <= content["epoch"] <= LARGEST_SIZE:
        raise ValueError(f"the epoch is {short(content['epoch'])}")
    scores, settings, training = (content[name] for name in ("scores", "settings", "training"))
    if not isinstance(scores, dict) or not all(type(v) in (int, float) for v in scores.values()):
        raise ValueError("the scores are no numbers")
    if not isinstance(settings, dict) or not isinstance(training, dict | None):
        raise ValueError("the settings are none")
    for name in PATHS:
        if not isinstance(settings.get(name), str | None):
            raise ValueError(f"the setting {name} is {short(settings[name])}")
    budget = _Budget()
    budget.spend_plain(scores)
    budget.spend_plain(settings)
    budget.spend_plain(training, tensors=True)


def check_training(
    given: dict[str, Any],
    progress: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    averaged: Sequence[Tensor],
) -> None:
    """Check what ``last.pt`` holds to go on from; torch would find out in the middle of a step.

    Args:
        given: that: ``optimizer``, ``progress``, ``weights`` and ``steps``.
        progress: what ``progress`` is at the start of a run.
        optimizer: as it is at the start: AdamW, of the parameters that learn.
        averaged: what ``weights`` have to be like; where there are none they may be left out.

    Raises:
        ValueError: it does not fit.
    """
    check_names(given["progress"], progress, "of the progress")
    _check_like(given["progress"], progress, "of the progress")
    if type(given.get("steps", 0)) is not int:
        raise ValueError("the steps are no number")
    _check_tensors(given.get("weights", []), averaged, "averaged weights")
    saved, own = given["optimizer"], optimizer.state_dict()
    check_names(saved, ("state", "param_groups"), "of the optimizer")
    groups, wanted = saved["param_groups"], own["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(wanted):
        raise ValueError("the optimizer has other groups")
    for group, like in zip(groups, wanted, strict=True):
        if not isinstance(group, dict) or not {"params", "lr", "initial_lr"} <= group.keys():
            raise ValueError("an optimizer's group lacks its learning rate")
        _check_like(group, like, "of an optimizer's group")
        if not all(type(n) is int for n in group["params"]) or group["params"] != like["params"]:
            raise ValueError("the optimizer has other parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in saved["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise ValueError("the optimizer has other parameters")
        check_names(state, ("step", "exp_avg", "exp_avg_sq"), "of the optimizer")
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        _check_tensors(moments, [parameters[number]] * 2, "moments")
        _check_tensors([state["step"]], [torch.tensor(0.0)], "steps of the optimizer")


def _check_like(given: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raise ValueError unless values are of the types of others of their names."""
    for name in given.keys() & wanted.keys():
        value, like = given[name], wanted[name]
        numbers = type(value) in (int, float) and type(like) in (int, float)
        if isinstance(value, tuple) and isinstance(like, tuple):
            same = len(value) == len(like) and all(type(v) in (int, float) for v in value)
        else:
            same = type(value) is type(like)
        if not (numbers or same):
            raise ValueError(f"{name} {what} is {short(value)}")


def _check_tensors(given: Any, wanted: Sequence[Tensor], what: str) -> None:
    if not isinstance(given, list) or len(given) != len(wanted):
        raise ValueError(f"there are not as many {what} as parameters")
    named = {str(number): tensor for number, tensor in enumerate(given)}
    check_state(named, {str(n): tensor.shape for n, tensor in enumerate(wanted)}, what)
    check_values(named, what)


class _Budget:
    """Counts values, which may hold each other and themselves, until there are too many."""

    def __init__(self) -> None:
        self.left = MOST_VALUES

    def spend_plain(self, value: Any, depth: int = 0, tensors: bool = False) -> None:
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            raise ValueError("the settings are nested without end")
        if isinstance(value, dict):
            for name, inner in value.items():
                if not isinstance(name, str) and not tensors:
                    raise ValueError(f"a setting has the name {short(name)}")
                self.spend_plain(inner, depth + 1, tensors)
        elif isinstance(value, list | tuple):
            for inner in value:
                self.spend_plain(inner, depth + 1, tensors)
        elif not isinstance(value, str | int | float | None) and not (
            tensors and isinstance(value, Tensor)
        ):
            raise ValueError(f"a setting is of the type {type(value).__name__}")
