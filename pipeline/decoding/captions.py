"""Features to captions as text, with the probability of each word."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pipeline.datasets.encoded_captions import pad_captions
from pipeline.datasets.vocabulary import END_ID, START_ID, Vocabulary
from pipeline.decoding.explain import word_maps
from pipeline.decoding.hypothesis import Hypothesis
from pipeline.decoding.options import SearchConfig
from pipeline.decoding.reranking import Reranker, best_captions, diverse_captions
from pipeline.models.ensemble import CaptionDecoder
from pipeline.utils.terminal import escape_control

# Full stops of scripts with their own, keyed by the first word of the script's Unicode character
# names; Thai and Lao have none.
FULL_STOPS = {
    **dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO"), "\u3002"),
    **dict.fromkeys(("DEVANAGARI", "BENGALI", "GURMUKHI", "ORIYA"), "\u0964"),
    "MYANMAR": "\u104b",
    "KHMER": "\u17d4",
    "ARMENIAN": "\u0589",
    "ETHIOPIC": "\u1362",
    "THAI": "",
    "LAO": "",
}


@dataclass(frozen=True)
class Word:
    """One token of a caption.

    Attributes:
        text: the token.
        probability: given the image and the preceding tokens.
        cells: contribution of each of the image's 8 x 8 cells to the log-probability, in nats, in
            row-major order; empty unless requested. See ``explain.word_maps``.
    """

    text: str
    probability: float
    cells: tuple[float, ...] = ()


@dataclass(frozen=True)
class Caption:
    """One caption of an image.

    Attributes:
        text: words, lower case, without a period; see ``as_sentence``.
        log_probability: under the model, in nats; nearer to 0 is more certain.
        words: the tokens with their probabilities, if details were requested, else empty.
        score_parts: the terms of the ranking score, if details were requested: ``likelihood``, and
            ``matching`` and ``consensus`` if used.
    """

    text: str
    log_probability: float
    words: tuple[Word, ...] = ()
    score_parts: Mapping[str, float] = field(default_factory=dict)


def caption_features(
    decoder: CaptionDecoder,
    features: Tensor,
    config: SearchConfig,
    reranker: Reranker,
    vocabulary: Vocabulary,
    *,
    most: int,
    details: bool = False,
    cells: Tensor | None = None,
    keys: Sequence[int] | None = None,
) -> list[list[Caption]]:
    """Return at most ``most`` captions, best first, for each row of features (B, 2048).

    ``details`` adds each word's probability. ``cells`` (B, 64, 2048), whose mean is the features,
    adds each cell's contribution to the words of the best caption. ``keys``: see ``search.search``.
    """
    if config.diversity:
        found = diverse_captions(decoder, features, config, reranker)
    else:
        found = best_captions(decoder, features, config, reranker, keys)
    best = [hypotheses[:most] for hypotheses in found]
    captions = [captions_of(hypotheses, vocabulary) for hypotheses in best]
    if not details:
        return captions
    tokens = [[h.tokens for h in group] for group in best]
    probabilities = token_log_probabilities(decoder, features, tokens)
    for group, hypotheses, values in zip(captions, best, probabilities, strict=True):
        for place, (h, nats) in enumerate(zip(hypotheses, values, strict=True)):
            words = map(escape_control, vocabulary.decode(h.tokens))
            # The last number belongs to <end>.
            chances = tuple(Word(w, math.exp(n)) for w, n in zip(words, nats[:-1], strict=True))
            parts = {"likelihood": h.score - sum(h.added.values()), **h.added}
            group[place] = replace(group[place], words=chances, score_parts=parts)
    if cells is not None:
        for group, hypotheses, grid in zip(captions, best, cells, strict=True):
            group[0] = explained(decoder, grid, group[0], hypotheses[0].tokens)
    return captions


def explained(
    decoder: CaptionDecoder, cells: Tensor, caption: Caption, tokens: Sequence[int]
) -> Caption:
    """Return a caption with the contribution of each image cell (64, 2048) to its words."""
    maps = word_maps(decoder, cells, tokens).tolist()
    each = zip(caption.words, maps, strict=True)
    return replace(caption, words=tuple(replace(w, cells=tuple(m)) for w, m in each))


def captions_of(hypotheses: Sequence[Hypothesis], vocabulary: Vocabulary) -> list[Caption]:
    """Return hypotheses as text; control characters in a model's vocabulary are escaped."""
    return [
        Caption(
            escape_control(vocabulary.detokenize(vocabulary.decode(h.tokens))), h.log_probability
        )
        for h in hypotheses
    ]


def as_sentence(caption: Caption) -> Caption:
    """Return a caption with a capital letter and the full stop of its script.

    >>> as_sentence(Caption("a dog runs", -1.0)).text
    'A dog runs.'
    """
    text, words = caption.text, caption.words
    # Unlike upper case, title case does not change scripts without capitals (Georgian).
    first = text[:1].title() if len(text[:1].title()) == 1 else text[:1]
    scripts = (unicodedata.name(letter, " ").split(" ")[0] for letter in reversed(text))
    stop = next((FULL_STOPS[script] for script in scripts if script in FULL_STOPS), ".")
    stop = "" if text.endswith((".", stop)) or not text else stop
    if words and text.startswith(words[0].text):
        words = (replace(words[0], text=first + words[0].text[1:]), *words[1:])
    return replace(caption, text=first + text[1:] + stop, words=words)


@torch.inference_mode()
def token_log_probabilities(
    decoder: CaptionDecoder, features: Tensor, captions: Sequence[Sequence[Sequence[int]]]
) -> list[list[list[float]]]:
    """Return the log-probability, in nats, of each caption token given the preceding ones.

    ``features`` are (B, 2048); ``captions`` are token ids, without <start> and <end>.

    Returns:
        For each caption, one number per token and a last one for <end>.
    """
    device = features.device
    rows = [[*caption, END_ID] for group in captions for caption in group]
    if not rows:
        return [[] for _ in captions]
    counts = torch.tensor([len(group) for group in captions], device=device)
    hidden, cell = (part.repeat_interleave(counts, 0) for part in decoder.start(features))
    token = torch.full((len(rows),), START_ID, device=device)
    found = []
    for following in pad_captions(rows).to(device).unbind(1):
        logits, (hidden, cell) = decoder.step(token, (hidden, cell))
        token = following
        found.append(logits.log_softmax(dim=-1).gather(1, token.unsqueeze(1)))
    each = iter(torch.cat(found, dim=1).tolist())
    return [[next(each)[: len(caption) + 1] for caption in group] for group in captions]
