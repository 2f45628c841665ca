"""Options of stages 2 and 3: fields that are both command-line options and a run's settings.

A run folder's ``config.json`` stores them. Fields made with ``option`` have their help, limits and
defaults only here; the commands declare the paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.datasets.tokenizers import ENGLISH, TOKENIZERS
from pipeline.utils.options import option

# Headings of --help; options without one, which most runs need, come first.
TRAINING = "Advanced: training"
DECODER = "Advanced: decoder"
REGULARIZATION = "Advanced: regularization"
AUGMENTATION = "Advanced: image augmentation"
SELF_CRITICAL = "Advanced: self-critical training"
MACHINE = "Advanced: machine"


def _fraction(default: float, help: str) -> Any:
    """Return an option with values in [0, 1)."""
    return option(default, help, min=0, max=1, open_max=True, heading=REGULARIZATION)


def _ema_decay(default: float) -> Any:
    return _fraction(
        default,
        "Decay per step of the exponential moving average (EMA) of the weights, which is the model "
        "that is scored and saved; nearer to 1 averages over more steps. 0 turns it off.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options common to both stages.

    Attributes:
        data: folder or tar shards with the captions, and the images.
        captions: the captions files; none: those found in ``data``.
        encoding: of the captions files; None: see ``decode_text``.
        features: the feature cache of stage 2.
    """

    data: str
    captions: tuple[str, ...] = ()
    encoding: str | None = None
    features: str
    weight_decay: float = option(
        1e-2, "Weight decay of the AdamW optimizer.", min=0, heading=REGULARIZATION
    )
    label_smoothing: float = _fraction(
        0.1, "Share of the target probability that is spread over all words."
    )
    ema_decay: float = 0.0
    patience: int | None = option(
        None,
        "Stop after this many epochs without a better one on val, but never before "
        "self-critical ones; 0 never stops early.",
        min=0,
        default_help="15, or more if those have fewer than 2,000 batches",
        heading=TRAINING,
    )
    seed: int = option(
        0,
        "Random seed of initial weights, order, augmentation and dropout.",
        min=0,
        max=2**31 - 1,
        heading=TRAINING,
    )
    precision: str = option(
        "auto",
        "Arithmetic of the network. auto takes bf16 on CPUs with AMX, and in stage 3 on GPUs that "
        "support it.",
        choices=["auto", "fp32", "bf16"],
        heading=MACHINE,
    )


@dataclass(frozen=True, kw_only=True)
class DecoderOptions(TrainingOptions):
    """The options of ``train_decoder.py`` that affect the result."""

    epochs: int = option(
        50,
        "Passes over the captions. The learning rate falls to zero over all of them, so with more "
        "epochs it also falls more slowly.",
        min=1,
    )
    batch_size: int = option(128, "Captions per batch.", min=1, heading=TRAINING)
    lr: float = option(1e-3, "Peak learning rate.", min=0, open_min=True, heading=TRAINING)
    embed_size: int = option(256, "Width of the image and word embeddings.", min=1, heading=DECODER)
    hidden_size: int = option(512, "Width of the LSTM.", min=1, heading=DECODER)
    init_state_from_image: bool = option(
        True,
        "Compute the LSTM's initial state from the image, which is its first input as well.",
        heading=DECODER,
    )
    tie_embeddings: bool = option(
        True,
        "Share the word embedding with the output layer (weight tying): fewer parameters, faster "
        "steps.",
        heading=DECODER,
    )
    dropout: float = _fraction(
        0.5,
        "Dropout on the LSTM's inputs and outputs. Raise it when val loss starts to rise early.",
    )
    feature_dropout: float = _fraction(
        0.0,
        "Dropout on the image's 2048 features. 0.25 keeps val loss low for longer, but the best "
        "epoch's captions are better without.",
    )
    ema_decay: float = _ema_decay(0.998)
    min_count: int = option(
        5,
        "Words that occur less often in the training captions become <unk>.",
        min=1,
    )
    tokenizer: str = option(
        ENGLISH,
        "How captions are split: english; words, for other languages that put spaces between "
        "words; characters, for Chinese, Japanese and others that do not.",
        choices=[*TOKENIZERS],
    )
    self_critical_epochs: int = option(
        0,
        "This many of the last epochs are self-critical (arXiv 1612.00563): the decoder samples "
        "captions and learns from their CIDEr-D. Such an epoch takes about twice as long; on "
        "Flickr8k a single one brought no measurable gain.",
        min=0,
        heading=SELF_CRITICAL,
    )
    self_critical_lr: float = option(
        1e-4,
        "Peak learning rate of self-critical epochs.",
        min=0,
        open_min=True,
        heading=SELF_CRITICAL,
    )
    cross_entropy_weight: float = option(
        0.05,
        "Weight of the cross-entropy of training captions in self-critical epochs, which keeps "
        "the captions grammatical; 0: none.",
        min=0,
        heading=SELF_CRITICAL,
    )


@dataclass(frozen=True, kw_only=True)
class JointOptions(TrainingOptions):
    """The options of ``finetune_joint.py`` that affect the result.

    Attributes:
        start: the runs or checkpoints to start from.
        weights: a file with the encoder's weights, if ``start`` does not contain them.
    """

    start: tuple[str, ...]
    weights: str | None = None
    epochs: int = option(12, "Passes over the images.", min=1)
    batch_size: int = option(
        16, "Images per batch, each with all its captions.", min=1, heading=TRAINING
    )
    grad_accum_steps: int = option(
        4,
        "Batches per optimizer step. Fewer and larger batches give the same steps: on a GPU "
        "--batch-size 64 --grad-accum-steps 1 is faster.",
        min=1,
        heading=TRAINING,
    )
    encoder_lr: float = option(3e-4, "Peak learning rate of the encoder.", min=0, heading=TRAINING)
    decoder_lr: float = option(
        3e-4,
        "Peak learning rate of the decoder, which is trained already.",
        min=0,
        heading=TRAINING,
    )
    unfreeze_from: str = option(
        "Mixed_6a",
        "First InceptionV3 block that is trained. Later ones (Mixed_7a) gain less but save time "
        "and memory: on a CPU 30 % of the time.",
        heading=TRAINING,
    )
    ema_decay: float = _ema_decay(0.995)
    min_crop: float = option(
        0.7,
        "Smallest share of each side that a random crop keeps; 1 turns cropping off.",
        min=0,
        max=1,
        open_min=True,
        heading=AUGMENTATION,
    )
    flip: bool = option(
        True,
        "Mirror half of the images, except those whose captions mention left or right. Only for "
        "English captions (stage 2 with --tokenizer english).",
        heading=AUGMENTATION,
    )
