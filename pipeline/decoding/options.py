"""Search options: what users choose, and the resulting configuration for one model.

Each field of ``SearchOptions`` is a command-line option and a keyword of the Python API;
``SearchOptions.resolve`` fills in what depends on the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pipeline.utils.errors import UserError
from pipeline.utils.options import option

if TYPE_CHECKING:  # --help must not import torch
    from pipeline.datasets.vocabulary import Vocabulary
    from pipeline.decoding.reranking import Reranker

# Defaults with reranking, tuned on Flickr8k val: beam sizes of one decoder and of an ensemble (its
# lower-ranked captions are better); weights, with another for the matcher with several passes.
RERANKED_BEAM, RERANKED_BEAM_OF_ENSEMBLE = 10, 20
CONSENSUS_WEIGHT, MATCHING_WEIGHT, PASSES_MATCHING = 3.0, 2.0, 4.0

SEARCH, CAPTIONS = "Search", "Captions"


@dataclass(frozen=True)
class SearchConfig:
    """How one model's captions are searched; see the help of ``SearchOptions``.

    Attributes:
        beam_size: hypotheses per image (1: greedy search); with ``sampling``, the number of draws.
        length_penalty: the exponent a in score = log p / (words + 1)^a.
        consensus, matching: weights of the rerankers; with both 0 the decoder alone chooses.
        prefix: token ids that every caption begins with.
        diversity: Hamming penalty, in nats, per token that an earlier caption of the image has at
            the same position, see ``reranking.diverse_captions``; 0: captions of one search.
        sampling: sample captions instead of searching for the likeliest.
        top_p: nucleus sampling (arXiv 1904.09751); 1: sample from all words.
    """

    beam_size: int = 3
    max_length: int = 20
    min_length: int = 1
    length_penalty: float = 0.9
    consensus: float = 0.0
    matching: float = 0.0
    search_passes: int = 1
    prefix: tuple[int, ...] = ()
    diversity: float = 0.0
    sampling: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    num_captions: int = 1


@dataclass(frozen=True)
class SearchOptions:
    """The user's search options; ``resolve`` fills in those that are None.

    ``diversity`` is the penalty of ``diverse``, in nats per shared word; it has no click option.

    Raises:
        UserError: options contradict each other, or one has no effect given the others.
    """

    beam_size: int | None = option(
        None,
        "Hypotheses per image. 1 is fastest and worst. With --consensus or --matching, 5 to 20 "
        "score alike; without, 3 to 5 are enough, and more make captions shorter and blander.",
        min=1,
        heading=SEARCH,
        default_help="10 with --consensus or --matching, 20 with them and an ensemble; else 3",
    )
    consensus: float | None = option(
        None,
        "Weight of a caption's agreement with the phrases (n-grams) predicted for the image; 0: "
        "none.",
        min=0,
        heading=SEARCH,
        default_help="3 if the model has an n-gram predictor",
    )
    matching: float | None = option(
        None,
        "Weight of the image-text matcher, which scores how well a caption fits the image; 0: "
        "none. Higher weights, up to 4, make captions more varied.",
        min=0,
        heading=SEARCH,
        default_help="2 if the model has a matcher, 4 with several --search-passes",
    )
    search_passes: int = option(
        1,
        "Number of diverse search passes whose candidates are pooled before reranking. 5 passes "
        "on Flickr8k: CIDEr-D +0.9, ROUGE-L -0.2, 3.5 times the search time.",
        min=1,
        heading=SEARCH,
    )
    length_penalty: float = option(
        SearchConfig.length_penalty,
        "Exponent of the length normalisation: 0 prefers short captions, 1 long ones.",
        min=0,
        heading=SEARCH,
    )
    num_captions: int | None = option(
        None,
        "Captions per image, with their log-probabilities; best first by score, in which length "
        "and reranking count, too.",
        min=1,
        heading=CAPTIONS,
        default_help="1, and 5 on a page",
    )
    diverse: bool = option(
        False,
        "Make the captions of an image differ; those of one beam differ in a word or two. The "
        "first stays the same, and the others follow by score.",
        heading=CAPTIONS,
    )
    prefix: str = option(
        "", "Words that every caption begins with, such as 'two dogs'.", heading=CAPTIONS
    )
    min_length: int = option(1, "Fewest words of a caption.", min=1, heading=CAPTIONS)
    max_length: int | None = option(
        None,
        "Most words of a caption. Captions longer than those in training ramble.",
        min=1,
        heading=CAPTIONS,
        default_help="20, more if characters are tokens, see train_decoder.py --tokenizer",
    )
    temperature: float | None = option(
        None,
        "Draw captions at random instead of searching for the likeliest: more lively, more often "
        "wrong. 1 is the model's own distribution; 0.5 to 0.7 is a good range.",
        min=0,
        open_min=True,
        heading=CAPTIONS,
    )
    top_p: float | None = option(
        None,
        "Draw captions from the likeliest words that together have this probability; 0.9 avoids "
        "odd words.",
        min=0,
        max=1,
        open_min=True,
        heading=CAPTIONS,
    )
    seed: int = option(
        0,
        "Seed of the draws: the same seed and file name give the same caption.",
        min=0,
        max=2**31 - 1,
        heading=CAPTIONS,
    )
    diversity: float = 1.0

    @property
    def sampling(self) -> bool:
        """True if captions are sampled."""
        return self.temperature is not None or self.top_p is not None

    def __post_init__(self) -> None:
        beams, count = self.beam_size, self.num_captions or 1
        if self.diverse and count < 2:
            raise UserError("--diverse: is for several captions; add --num-captions 3")
        if self.diverse and self.sampling:
            raise UserError("--diverse: drawn captions differ anyway; leave out --temperature")
        if beams is not None and count > beams and not self.diverse:
            raise UserError(f"--num-captions {count}: needs a --beam-size of at least {count}")
        if self.search_passes > 1 and (self.sampling or beams == 1):
            raise UserError(
                f"--search-passes {self.search_passes}: is for beam search, not for greedy search "
                "or drawn captions"
            )
        if beams == 1 and (self.consensus or self.matching):
            name = "--consensus" if self.consensus else "--matching"
            raise UserError(f"{name}: has nothing to choose from with --beam-size 1")
        if beams == 1 and self.length_penalty != SearchConfig.length_penalty:
            raise UserError("--length-penalty: has no effect with --beam-size 1")
        if self.max_length is not None:
            self._check_min_length(self.max_length)

    def _check_min_length(self, max_length: int) -> None:
        if self.min_length > max_length:
            raise UserError(
                f"--min-length {self.min_length}: must not be above --max-length {max_length}"
            )

    def resolve(
        self, vocabulary: Vocabulary, reranker: Reranker, decoders: int = 1
    ) -> SearchConfig:
        """Return the configuration for a model of ``decoders``; by default with all its rerankers.

        Raises:
            UserError: the model lacks a requested reranker, or the prefix is too long or has a word
                that is not in the vocabulary.
        """
        max_length = self.max_length or vocabulary.tokenizer.longest
        self._check_min_length(max_length)
        several = self.search_passes > 1
        usual_matching = PASSES_MATCHING if several else MATCHING_WEIGHT
        consensus = self._weight("consensus", reranker.predictor is not None, CONSENSUS_WEIGHT)
        matching = self._weight("matching", reranker.matcher is not None, usual_matching)
        if several and not (consensus or matching):
            raise UserError(
                f"--search-passes {self.search_passes}: pools candidates for reranking, but "
                "--consensus and --matching are 0 or the model has neither"
            )
        count = self.num_captions or 1
        usual = SearchConfig.beam_size
        if self.sampling:
            usual = count
        elif consensus or matching:
            usual = RERANKED_BEAM if decoders == 1 or several else RERANKED_BEAM_OF_ENSEMBLE
        return SearchConfig(
            beam_size=self.beam_size or max(usual, count),
            max_length=max_length,
            min_length=self.min_length,
            length_penalty=self.length_penalty,
            consensus=consensus,
            matching=matching,
            search_passes=self.search_passes,
            prefix=self._prefix_ids(vocabulary, max_length),
            diversity=self.diversity if self.diverse else 0.0,
            sampling=self.sampling,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            num_captions=count,
        )

    def _weight(self, name: str, available: bool, usual: float) -> float:
        """Return the weight of a reranker; 0 if there is nothing to choose from."""
        weight: float | None = getattr(self, name)
        if weight and not available:
            needed = "matcher" if name == "matching" else "n-gram predictor"
            raise UserError(
                f"--{name} {weight:g}: this model has no {needed}; retrain it, or pass --{name} 0"
            )
        if weight is None:
            greedy_or_drawn = self.beam_size == 1 or self.sampling
            return usual if available and not greedy_or_drawn else 0.0
        return weight

    def _prefix_ids(self, vocabulary: Vocabulary, max_length: int) -> tuple[int, ...]:
        words = vocabulary.tokenize(self.prefix)
        unknown = [word for word in words if word not in vocabulary]
        if unknown:
            raise UserError(
                f"--prefix: the model does not know {unknown[0]!r}; it has "
                f"{len(vocabulary):,} words"
            )
        if len(words) > max_length:
            raise UserError(
                f"--prefix: has {len(words)} words, more than --max-length {max_length}"
            )
        return tuple(vocabulary.encode(words))


def option_words(options: SearchOptions) -> list[str]:
    """Return the options that differ from the default, for a file name: "beam-size-5"."""
    return [
        f"{field.name.replace('_', '-')}-{value}"
        for field in fields(SearchOptions)
        if (value := getattr(options, field.name)) != field.default
    ]


def describe_search(search: Mapping[str, Any]) -> str:
    """Describe a search in a few words, from the fields of its ``SearchConfig``."""
    beam = search["beam_size"]
    if search.get("sampling"):
        words = [f"sampling, temperature {search['temperature']:g}, top-p {search['top_p']:g}"]
    else:
        words = ["greedy" if beam == 1 else f"beam {beam}"]
    if search.get("search_passes", 1) > 1:
        words.append(f"{search['search_passes']} passes")
    return ", ".join(
        [*words, *(f"{n} {search[n]:g}" for n in ("consensus", "matching") if search[n])]
    )
