"""Export a captioner as ONNX files, with a small program that runs them; see docs/export.md."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pipeline
from pipeline.datasets.images import IMAGE_SIZE
from pipeline.datasets.tokenizers import ATTACHED, CONTRACTED, ENGLISH
from pipeline.datasets.vocabulary import END_ID, PAD_ID, SPECIALS, START_ID, UNKNOWN_ID, Vocabulary
from pipeline.decoding.options import SearchOptions
from pipeline.decoding.reranking import Reranker
from pipeline.export import onnx_graphs
from pipeline.models.checkpoint import Checkpoint, encoder_of, load_ensemble
from pipeline.models.encoder import NAMED_WEIGHTS
from pipeline.models.pretrained import PRETRAINED
from pipeline.utils.errors import UserError
from pipeline.utils.files import atomic_write, cannot_be_written

# The runner has its own copies, because it imports nothing from this package.
FORMAT, VERSION = "show-and-tell-captioner-onnx", 1
SETTINGS, RUNNER = "captioner.json", "run_captioner.py"
TEMPORARY = ".export.tmp"
GRAPHS = {name: f"{name}.onnx" for name in ("encoder", "decoder_start", "decoder_step")}

SEARCH_REMARK = (
    "Plain beam search. The rerankers of the program that exported this (predicted n-grams, an "
    "image-text matcher) are not among the files."
)
PRETRAINED_REMARK = (
    "For research and education only: the pretrained model was trained on Flickr8k, whose terms "
    "allow nothing else. Its encoder, decoders and vocabulary are in these files."
)
OWN_REMARK = (
    "The program that exported this is under the MIT licence; the model is under the terms of the "
    "images, captions and encoder weights that it was trained with."
)


def export_captioner(
    models: Sequence[Path],
    output: Path,
    weights: str | None = None,
    beam_size: int | None = None,
    force: bool = False,
) -> list[Path]:
    """Write a captioner as three ONNX files, captioner.json and a program that runs them.

    The files are written and compared with PyTorch in a temporary folder, then replace earlier
    ones. captioner.json is removed first and written last, so a folder that has one is complete.

    Args:
        models: run folders or checkpoints, see ``checkpoint.load_ensemble``.
        output: the folder to write.
        weights: the encoder's weights, if they moved since a run of stage 2.
        beam_size: default of the runner's ``--beam-size``; None for that of ``SearchConfig``.
        force: also write into a folder with other files, which stay.

    Returns:
        The files.

    Raises:
        UserError: the extra ``onnx`` is missing; ``output`` is a file, or a folder with other
            files; models or weights are not found; the disk is full.
    """
    output = output.resolve()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    names = [*GRAPHS.values(), RUNNER, SETTINGS]
    # Importing the runner leaves a __pycache__, a killed export its temporary folder.
    ours = {*names, TEMPORARY, "__pycache__"}
    if not force and output.is_dir() and any(path.name not in ours for path in output.iterdir()):
        raise UserError(
            f"--output {output}: has other files in it; choose another folder, or add --force to "
            "write beside them"
        )
    onnx_graphs.check_installed()
    checkpoint = load_ensemble(models)
    encoder = encoder_of(checkpoint, weights, "fp32").for_inference()
    decoder = checkpoint.build_decoder()
    temporary = output / TEMPORARY
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed export
    try:
        for name, graph in onnx_graphs.captioner_graphs(encoder, decoder).items():
            content = onnx_graphs.to_onnx(graph)
            onnx_graphs.check(name, graph, content)
            with atomic_write(temporary / GRAPHS[name], "wb") as handle:
                handle.write(content)
        with atomic_write(temporary / RUNNER, "wb") as handle:
            handle.write(Path(__file__).with_name("onnx_runner.py").read_bytes())
        with atomic_write(temporary / SETTINGS) as handle:
            json.dump(captioner_settings(checkpoint, models, beam_size), handle, indent=1)
            handle.write("\n")
        _move(temporary, output, names)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # the folder has files
            output.rmdir()
    return [output / name for name in names]


def _move(source: Path, target: Path, names: Sequence[str]) -> None:
    """Replace the files of an earlier export; its settings go first, the new ones come last."""
    try:
        (target / SETTINGS).unlink(missing_ok=True)
        for name in names:
            (source / name).replace(target / name)
    except OSError as error:
        raise cannot_be_written(target, error) from error


def captioner_settings(
    checkpoint: Checkpoint, models: Sequence[Path], beam_size: int | None = None
) -> dict[str, Any]:
    """Return the content of captioner.json: what a runner needs besides the networks."""
    config, encoder = checkpoint.decoder_config, checkpoint.encoder
    options = SearchOptions(beam_size, consensus=0, matching=0)
    search = options.resolve(checkpoint.vocabulary, Reranker())
    searched = ("beam_size", "max_length", "min_length", "length_penalty")
    source = encoder.weights_source
    origins = [source, *(checkpoint.settings.get("start") or ()), *map(str, models)]
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "program": f"show-and-tell-captioner {pipeline.__version__}",
        "licence": PRETRAINED_REMARK if PRETRAINED in origins else OWN_REMARK,
        # Only the ends of paths: the rest is private.
        "models": ["/".join(model.parts[-2:]).lstrip("/") for model in models],
        "decoders": config.members,
        "encoder": {
            "network": encoder.encoder,
            "weights_sha256": encoder.weights_sha256,
            "weights_source": source if source in NAMED_WEIGHTS else Path(source).name,
            "transform": encoder.transform,
        },
        "files": GRAPHS,
        "opset": onnx_graphs.OPSET,
        "image_size": IMAGE_SIZE,
        "feature_size": config.feature_size,
        "state_size": config.hidden_size * config.members,
        "vocabulary_size": config.vocabulary_size,
        "search": {
            **{name: getattr(search, name) for name in searched},
            "remark": SEARCH_REMARK,
        },
        "special": {"pad": PAD_ID, "start": START_ID, "end": END_ID, "unknown": UNKNOWN_ID},
        "writing": writing_rules(checkpoint.vocabulary),
        "vocabulary": list(checkpoint.vocabulary.words),
    }


def writing_rules(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return rules that join tokens as ``detokenize`` does.

    They cover one vocabulary fully, except for a lone symbol before three or more contractions:

    * ``attached``: tokens that are joined to the previous one;
    * ``apart``: tokens to which nothing is joined if they stand alone ("'s" at the beginning);
    * ``pairs``: other tokens that are joined ("can", "not"; "#", "5");
    * ``unspaced``: tokens of scripts without spaces, with no space on either side.
    """
    words = vocabulary.words[len(SPECIALS) :]

    def together(first: str, second: str) -> bool:
        return " " not in vocabulary.detokenize([first, second])

    if vocabulary.tokenizer.name != ENGLISH:
        unspaced = [word for word in words if together(word, word)]
        return {"attached": [], "apart": [], "pairs": [], "unspaced": unspaced}

    numbers = [word for word in words if word[:1].isdecimal()]
    pairs = [*CONTRACTED, *((symbol, number) for symbol in "#$" for number in numbers)]
    return {
        "attached": sorted(ATTACHED.intersection(words)),
        "apart": [word for word in words if not together(word, "'s")],
        "pairs": sorted(
            [a, b] for a, b in pairs if a in vocabulary and b in vocabulary and together(a, b)
        ),
        "unspaced": [],
    }
