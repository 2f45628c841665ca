"""Hypotheses put into words, with the probability of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.datasets.vocabulary import Vocabulary
from pipeline.decoding.search import Hypothesis, token_log_probabilities
from pipeline.models.ensemble import CaptionDecoder
from pipeline.utils.terminal import escape_control


@dataclass(frozen=True)
class Word:
    """One token of a caption, and its probability given the image and the tokens before."""

    text: str
    probability: float


@dataclass(frozen=True)
class Caption:
    """One caption of an image.

    Attributes:
        text: words, lower case, without a period.
        log_probability: under the model, in nats; nearer to 0 is surer.
        words: the tokens one by one, where details were asked for, else empty.
    """

    text: str
    log_probability: float
    words: tuple[Word, ...] = ()


def captions_of(hypotheses: Sequence[Hypothesis], vocabulary: Vocabulary) -> list[Caption]:
    """Put hypotheses into words; a stranger's model may have words of control characters."""
    return [
        Caption(
            escape_control(vocabulary.detokenize(vocabulary.decode(h.tokens))), h.log_probability
        )
        for h in hypotheses
    ]


def detailed_captions(
    decoder: CaptionDecoder,
    features: torch.Tensor,
    found: Sequence[Sequence[Hypothesis]],
    vocabulary: Vocabulary,
) -> list[list[Caption]]:
    """Put the hypotheses of features (B, 2048) into words, with the probability of each."""
    chances = token_log_probabilities(decoder, features, [[h.tokens for h in g] for g in found])
    return [
        [
            replace(
                caption,
                words=tuple(
                    Word(escape_control(word), math.exp(chance))
                    for word, chance in zip(vocabulary.decode(h.tokens), each, strict=False)
                ),
            )
            for caption, h, each in zip(
                captions_of(group, vocabulary), group, of_group, strict=True
            )
        ]
        for group, of_group in zip(found, chances, strict=True)
    ]
