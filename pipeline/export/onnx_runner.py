"""Caption images with an exported captioner.

    python run_captioner.py photo.jpg more/*.jpg
    python run_captioner.py photo.jpg --beam-size 5

It needs only numpy, Pillow (10.1 or newer), onnxruntime and the files beside it: captioner.json and
three .onnx files. Captions go to standard output (path, tab, caption), errors to standard error.
Exit codes: 0 all images captioned, 1 some could not be read (each is named), 2 the command was
wrong. From Python:

    captioner = Captioner("captioner-onnx")
    print(captioner.caption("photo.jpg").text)

The captions are those of plain beam search in the program that exported it, without reranking.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import onnxruntime
from PIL import Image, ImageOps, UnidentifiedImageError

FORMAT, VERSION = "show-and-tell-captioner-onnx", 1
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Pillow's names of accepted formats. It knows thirty more, and passes EPS to Ghostscript.
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM", "TGA"]


class ExportError(Exception):
    """The exported files are missing, damaged or of another version."""


class ImageError(Exception):
    """An image cannot be read; the message is the reason, without the file name."""


class Caption(NamedTuple):
    """A caption: its text, its log-probability in nats, and its length-normalised score."""

    text: str
    log_probability: float
    score: float


class Captioner:
    """An exported captioner: three networks, and ``settings``, the content of captioner.json."""

    def __init__(
        self, folder: str | os.PathLike[str], providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        """Load ``folder``'s files to run on the first of ONNX Runtime's ``providers``.

        Raises ExportError.
        """
        self.settings = read_settings(Path(folder))
        self._words: list[str] = self.settings["vocabulary"]
        self._special: dict[str, int] = self.settings["special"]
        self._sessions = {}
        for name, file in self.settings["files"].items():
            path = Path(folder) / file
            if not path.is_file():
                raise ExportError(f"{path}: no such file; export the captioner again")
            try:
                self._sessions[name] = onnxruntime.InferenceSession(path, providers=list(providers))
            except Exception as error:  # ONNX Runtime's errors have no common base class
                raise ExportError(f"{path}: ONNX Runtime cannot load it ({error})") from error

    def caption(self, path: str | os.PathLike[str], beam_size: int | None = None) -> Caption:
        """Return the best caption of one image."""
        return self.captions(path, beam_size)[0]

    def captions(self, path: str | os.PathLike[str], beam_size: int | None = None) -> list[Caption]:
        """Return ``beam_size`` captions of one image, best first; by default captioner.json's.

        Raises ImageError if the image cannot be read.
        """
        return self.search(self.encode([read_square(path, self.settings["image_size"])]), beam_size)

    def encode(self, squares: Sequence[numpy.ndarray]) -> numpy.ndarray:
        """Encode uint8 squares (299, 299, 3), RGB, to float32 features (B, 2048)."""
        return self._run("encoder", pixels=numpy.stack(squares))[0]

    def search(self, features: numpy.ndarray, beam_size: int | None = None) -> list[Caption]:
        """Return captions of features (1, 2048) by beam search, best first.

        A hypothesis that ends among the best ``beam_size`` continuations is a caption; the next
        best takes its place in the beam. The search stops at ``beam_size`` captions.
        """
        config = self.settings["search"]
        beams = config["beam_size"] if beam_size is None else beam_size
        if beams < 1:
            raise ValueError(f"beam_size {beams}: at least 1")
        hidden, cell = self._run("decoder_start", features=features)
        hypotheses: list[list[int]] = [[]]
        scores = numpy.zeros(1, numpy.float32)
        tokens = numpy.array([self._special["start"]], numpy.int64)
        found: list[tuple[float, float, list[int]]] = []
        for length in range(config["max_length"] + 1):
            logits, hidden, cell = self._run(
                "decoder_step", tokens=tokens, hidden=hidden, cell=cell
            )
            totals = (scores[:, None] + self._log_probabilities(logits, length)).ravel()
            alive: list[tuple[int, int, numpy.float32]] = []
            for place, index in enumerate(numpy.argsort(-totals, kind="stable")[: 2 * beams]):
                parent, token = divmod(int(index), logits.shape[1])
                total = totals[index]
                if total == -numpy.inf:
                    break
                if token != self._special["end"]:
                    alive.append((parent, token, total))
                elif place < beams:
                    score = float(total) / (length + 1) ** config["length_penalty"]
                    found.append((score, float(total), hypotheses[parent]))
            found = sorted(found, key=lambda caption: caption[0], reverse=True)[:beams]
            alive = alive[:beams]
            if len(found) == beams or not alive:
                break
            parents = [parent for parent, _, _ in alive]
            hypotheses = [[*hypotheses[parent], token] for parent, token, _ in alive]
            tokens = numpy.array([token for _, token, _ in alive], numpy.int64)
            scores = numpy.array([total for _, _, total in alive], numpy.float32)
            hidden, cell = hidden[parents], cell[parents]
        return [Caption(self.write(words), total, score) for score, total, words in found]

    def write(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids: "man", "'s", "dog" becomes "man's dog"."""
        rules = self.settings["writing"]
        written: list[list[str]] = []  # the tokens of each written word
        for token in tokens:
            word = self._words[token]
            if written and _belongs_to(written[-1], word, rules):
                written[-1].append(word)
            else:
                written.append([word])
        return " ".join("".join(parts) for parts in written)

    def _log_probabilities(self, logits: numpy.ndarray, length: int) -> numpy.ndarray:
        """Return log-probabilities (R, V) of the tokens after ``length`` words.

        Forbidden tokens are -inf: padding, start and unknown always, the end below the minimum
        length, all others at the maximum.
        """
        config, special = self.settings["search"], self._special
        highest = logits.max(axis=1, keepdims=True)
        normaliser = highest + numpy.log(numpy.exp(logits - highest).sum(axis=1, keepdims=True))
        allowed = numpy.full(logits.shape[1], length < config["max_length"])
        allowed[[special["pad"], special["start"], special["unknown"]]] = False
        allowed[special["end"]] = length >= min(config["min_length"], config["max_length"])
        return numpy.where(allowed, logits - normaliser, -numpy.float32(numpy.inf))

    def _run(self, name: str, **inputs: numpy.ndarray) -> list[numpy.ndarray]:
        outputs: list[numpy.ndarray] = self._sessions[name].run(None, inputs)
        return outputs


def read_settings(folder: Path) -> dict[str, Any]:
    """Read captioner.json; raises ExportError if it is missing, damaged or of another version."""
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
            f"{path}: version {settings.get('format_version')}, but this program reads version "
            f"{VERSION}; use the run_captioner.py that was exported with it"
        )
    return settings


def _belongs_to(parts: list[str], word: str, rules: dict[str, Any]) -> bool:
    """True if a word is written without a space after the word that ``parts`` make up."""
    if [parts[-1], word] in rules["pairs"] or {parts[-1], word} & set(rules["unspaced"]):
        return True
    alone = len(parts) == 1 and parts[0] in rules["apart"]
    return word in rules["attached"] and not alone


def read_square(path: str | os.PathLike[str], size: int = 299) -> numpy.ndarray:
    """Decode an image and squeeze it to a square: uint8 (size, size, 3), RGB.

    As in training: rotated upright by EXIF, transparency over white, 16 bits scaled to 8, the first
    frame of an animation; a large JPEG is decoded at its smallest built-in scale above twice
    ``size``. Raises ImageError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of large panoramas
            Image.init()
            formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]
            with Image.open(path, formats=formats) as image:
                if image.format == "JPEG":
                    image.draft(None, (2 * size, 2 * size))
                photo = _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ImageError("not a supported image") from error
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds of errors on damaged files
        raise ImageError(getattr(error, "strerror", None) or f"{error}") from error
    if photo.size != (size, size):
        photo = photo.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return numpy.asarray(photo)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits
        values = numpy.asarray(image, numpy.float64).clip(0, 65535) / 257
        image = Image.fromarray(numpy.round(values).astype(numpy.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Caption the images that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description="Caption images with an exported captioner.")
    parser.add_argument("images", nargs="+", help="images")
    parser.add_argument(
        "--beam-size",
        type=int,
        help="hypotheses per image; 1 is fastest and worst (default: that in captioner.json)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(__file__).resolve().parent,
        help="folder of the exported files (default: that of this program)",
    )
    options = parser.parse_args(arguments)
    if options.beam_size is not None and options.beam_size < 1:
        parser.error("--beam-size: at least 1")
    try:
        captioner = Captioner(options.model)
    except ExportError as error:
        print(f"Error: {_escape(str(error))}", file=sys.stderr)
        return 2
    failed = 0
    for path in options.images:
        name = _escape(os.fsencode(path).decode("utf-8", "replace"))
        try:
            text = captioner.caption(path, options.beam_size).text
        except ImageError as error:
            print(f"failed: {name}: {_escape(str(error))}", file=sys.stderr)
            failed += 1
        else:
            try:
                sys.stdout.buffer.write(f"{name}\t{_escape(text)}\n".encode())
                sys.stdout.buffer.flush()
            except BrokenPipeError:  # the reader, such as head, stopped reading
                # Buffered output would fail again at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
    if failed:
        print(f"{failed} of {len(options.images)} images could not be read", file=sys.stderr)
    return 1 if failed else 0


def _escape(text: str) -> str:
    """Escape control characters, which a terminal would obey."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


if __name__ == "__main__":
    sys.exit(main())
