"""Caption images with an exported captioner.

    python run_captioner.py photo.jpg more/*.jpg
    python run_captioner.py photo.jpg --beam-size 5

It needs nothing but numpy, Pillow (10.1 or newer) and onnxruntime, and the files that lie beside
it: captioner.json and three .onnx files. Captions go to standard output (path, tab, caption),
complaints to standard error. Exit codes: 0 all images captioned, 1 some could not be read (each
is named), 2 the command was wrong. From Python:

    captioner = Captioner("captioner-onnx")
    print(captioner.caption("photo.jpg").text)

The captions are those of the program that exported it, by beam search, without the second opinions
that it may have: no similar training images, no matcher.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
from PIL import Image, ImageOps, UnidentifiedImageError

FORMAT, VERSION = "show-and-tell-captioner-onnx", 1
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Pillow's names of what is opened. It knows thirty more, and gives EPS to Ghostscript.
PICTURE_FORMATS = "JPEG PNG WEBP GIF AVIF TIFF BMP JPEG2000 PPM TGA".split()


class ExportError(Exception):
    """The exported files are missing, damaged or of another version."""


class ImageError(Exception):
    """An image that cannot be read; the text is the reason, without the file's name."""


@dataclass(frozen=True)
class Caption:
    """One caption of an image.

    Attributes:
        text: words, lower case, without a period.
        log_probability: under the model, in nats; nearer to 0 is surer.
        score: what captions are ranked by: the log-probability, normalised by length.
    """

    text: str
    log_probability: float
    score: float


class Captioner:
    """An exported captioner: three networks, and what captioner.json says of them.

    Attributes:
        settings: the content of captioner.json.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """Load the files of ``folder``, to run on the first of ONNX Runtime's ``providers``.

        Raises:
            ExportError: they are not all there, or not of this version.
        """
        folder = Path(folder)
        self.settings = read_settings(folder)
        self._words: list[str] = self.settings["vocabulary"]
        self._special: dict[str, int] = self.settings["special"]
        self._sessions = {
            name: _session(folder / file, providers)
            for name, file in self.settings["files"].items()
        }

    def caption(self, path: str | os.PathLike[str], beam_size: int | None = None) -> Caption:
        """Caption one image: the best of ``captions``."""
        return self.captions(path, beam_size)[0]

    def captions(self, path: str | os.PathLike[str], beam_size: int | None = None) -> list[Caption]:
        """Caption one image: ``beam_size`` captions, best first.

        Args:
            path: the image.
            beam_size: openings kept; 1 is greedy search, None what captioner.json says.

        Raises:
            ImageError: the image cannot be read.
        """
        return self.search(self.encode([read_square(path, self.settings["image_size"])]), beam_size)

    def encode(self, squares: Sequence[numpy.ndarray]) -> numpy.ndarray:
        """Bring uint8 squares (299, 299, 3), RGB, to float32 features (B, 2048)."""
        return self._run("encoder", pixels=numpy.stack(squares))[0]

    def search(self, features: numpy.ndarray, beam_size: int | None = None) -> list[Caption]:
        """Caption features (1, 2048): keep the ``beam_size`` likeliest openings; best first.

        An opening that ends among the best ``beam_size`` continuations is a caption; its place
        is taken by the next best that goes on. ``beam_size`` captions are enough.
        """
        config = self.settings["search"]
        beams = config["beam_size"] if beam_size is None else beam_size
        if beams < 1:
            raise ValueError(f"beam_size {beams}: at least 1")
        hidden, cell = self._run("decoder_start", features=features)
        openings: list[list[int]] = [[]]
        live = numpy.zeros(1, numpy.float32)
        tokens = numpy.array([self._special["start"]], numpy.int64)
        found: list[tuple[float, float, list[int]]] = []
        for length in range(config["max_length"] + 1):
            logits, hidden, cell = self._run(
                "decoder_step", tokens=tokens, hidden=hidden, cell=cell
            )
            best, following = self._best_tokens(logits, length, beams + 1)
            totals = (live[:, None] + best).ravel()
            going: list[tuple[int, int, numpy.float32]] = []
            for place, index in enumerate(numpy.argsort(-totals, kind="stable")[: 2 * beams]):
                total, token = totals[index], int(following.ravel()[index])
                parent = int(index) // best.shape[1]
                if total == -numpy.inf:
                    break
                if token != self._special["end"]:
                    going.append((parent, token, total))
                elif place < beams:
                    score = float(total) / (length + 1) ** config["length_penalty"]
                    found.append((score, float(total), openings[parent]))
            found = sorted(found, key=lambda caption: caption[0], reverse=True)[:beams]
            going = going[:beams]
            if len(found) == beams or not going:
                break
            openings = [[*openings[parent], token] for parent, token, _ in going]
            tokens = numpy.array([token for _, token, _ in going], numpy.int64)
            live = numpy.array([total for _, _, total in going], numpy.float32)
            parents = [parent for parent, _, _ in going]
            hidden, cell = hidden[parents], cell[parents]
        return [Caption(self.write(words), total, score) for score, total, words in found]

    def write(self, tokens: Sequence[int]) -> str:
        """Put word ids into a sentence: "man", "'s", "dog" are written "man's dog"."""
        rules = self.settings["writing"]
        written: list[list[str]] = []  # the tokens of each written word
        for token in tokens:
            word = self._words[token]
            if written and _belongs_to(written[-1], word, rules):
                written[-1].append(word)
            else:
                written.append([word])
        return " ".join("".join(parts) for parts in written)

    def _best_tokens(
        self, logits: numpy.ndarray, length: int, count: int
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Choose the likeliest tokens after ``length`` words: log-probabilities and ids.

        Both (R, min(count, V)), best first. What may not follow has -inf: padding, start and
        unknown always, the end before the shortest length, all else at the longest.
        """
        config, special = self.settings["search"], self._special
        highest = logits.max(axis=1, keepdims=True)
        normaliser = highest + numpy.log(numpy.exp(logits - highest).sum(axis=1, keepdims=True))
        allowed = numpy.ones(logits.shape[1], bool)
        if length >= config["max_length"]:
            allowed[:] = False
            allowed[special["end"]] = True
        else:
            allowed[[special["pad"], special["start"], special["unknown"]]] = False
            allowed[special["end"]] = length >= config["min_length"]
        logits = numpy.where(allowed, logits, -numpy.float32(numpy.inf))
        tokens = numpy.argsort(-logits, axis=1, kind="stable")[:, :count]
        return numpy.take_along_axis(logits, tokens, 1) - normaliser, tokens

    def _run(self, name: str, **inputs: numpy.ndarray) -> list[numpy.ndarray]:
        outputs: list[numpy.ndarray] = self._sessions[name].run(None, inputs)
        return outputs


def read_settings(folder: Path) -> dict[str, Any]:
    """Read captioner.json.

    Raises:
        ExportError: it is missing or damaged, or a newer program wrote it.
    """
    path = folder / "captioner.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path}: {error.strerror}; export the captioner again") from error
    except ValueError as error:
        raise ExportError(f"{path}: damaged; export the captioner again") from error
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise ExportError(f"{path}: not that of an exported captioner")
    if settings.get("format_version") != VERSION:
        raise ExportError(
            f"{path}: of version {settings.get('format_version')}, and this program reads "
            f"{VERSION}; use the run_captioner.py that was exported with it"
        )
    return settings


def _session(path: Path, providers: Sequence[str]) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise ExportError(f"{path}: no such file; export the captioner again")
    try:
        return onnxruntime.InferenceSession(path, providers=list(providers))
    except Exception as error:  # ONNX Runtime's errors have no common class of their own
        raise ExportError(f"{path}: ONNX Runtime cannot load it ({error})") from error


def _belongs_to(parts: list[str], word: str, rules: dict[str, Any]) -> bool:
    """Tell whether a word is written on to those that ``parts`` make up."""
    if [parts[-1], word] in rules["pairs"] or {parts[-1], word} & set(rules["unspaced"]):
        return True
    alone = len(parts) == 1 and parts[0] in rules["apart"]
    return word in rules["attached"] and not alone


def read_square(path: str | os.PathLike[str], size: int = 299) -> numpy.ndarray:
    """Decode an image and squeeze it to a square: uint8 (size, size, 3), RGB.

    As the decoder's training saw images: upright by EXIF, transparency over white, CMYK and
    palettes converted, 16 bits scaled to 8, of an animation the first frame; a large JPEG is
    decoded at the smallest of its own scales above twice ``size``.

    Raises:
        ImageError: it cannot be read; the text says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of large panoramas
            Image.init()
            formats = [name for name in PICTURE_FORMATS if name in Image.OPEN]
            with Image.open(path, formats=formats) as image:
                if image.format == "JPEG":
                    image.draft(None, (2 * size, 2 * size))
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                photo = _to_rgb(image)
    except UnidentifiedImageError as error:
        raise ImageError("not an image that Pillow reads") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too many pixels (decompression bomb?)") from error
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds on damaged files
        raise ImageError(getattr(error, "strerror", None) or f"{error}") from error
    if photo.size != (size, size):
        photo = photo.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return numpy.asarray(photo)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB without losing what is seen."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scale_to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Map 0..65535, of floats 0..1, or else the image's own range, to 0..255."""
    values = numpy.asarray(image, dtype=numpy.float64)
    finite = values[numpy.isfinite(values)]
    low, high = 0.0, 1.0 if image.mode == "F" else 65535.0
    if finite.size and (finite.min() < low or finite.max() > high):
        low, high = finite.min(), finite.max()
    values = numpy.nan_to_num(values.clip(low, high), nan=low)
    values = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(numpy.round(values).astype(numpy.uint8)).convert("RGB")


def _at_least_one(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Caption the images that the command line names; gives the exit code."""
    parser = argparse.ArgumentParser(description="Caption images with an exported captioner.")
    parser.add_argument("images", nargs="+", help="images")
    parser.add_argument(
        "--beam-size",
        type=_at_least_one,
        help="openings kept an image; 1 is quickest, and poorest (default: what captioner.json "
        "says)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder of the exported files (default: that of this program)",
    )
    options = parser.parse_args(arguments)
    try:
        captioner = Captioner(options.model)
    except ExportError as error:
        print(f"Error: {_visible(str(error))}", file=sys.stderr)
        return 2
    failed = 0
    for path in options.images:
        try:
            text = captioner.caption(path, options.beam_size).text
        except ImageError as error:
            print(f"failed: {_printable(path)}: {_visible(str(error))}", file=sys.stderr)
            failed += 1
        else:
            sys.stdout.buffer.write(f"{_printable(path)}\t{_visible(text)}\n".encode())
            sys.stdout.buffer.flush()
    if failed:
        print(f"{failed} of {len(options.images)} images could not be read", file=sys.stderr)
    return 1 if failed else 0


def _printable(path: str) -> str:
    """Give a path as text that can be written: bytes that are no UTF-8 become marks."""
    return _visible(os.fsencode(path).decode("utf-8", "replace"))


def _visible(text: str) -> str:
    """Write control characters, which a terminal would obey, as Python does."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


if __name__ == "__main__":
    sys.exit(main())
