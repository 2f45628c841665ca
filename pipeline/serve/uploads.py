"""What comes in a request: images, to files in a private folder, and fields with their ranges.

python-multipart takes the request apart as it arrives; what is too much is refused in the middle
of it. The names that a client gives are kept as text alone: files get names of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

MEGABYTE = 1_000_000
MAX_FILES = 16
MAX_FILE_BYTES = 20 * MEGABYTE
MAX_FIELD_BYTES = 1000
MAX_PARTS = MAX_FILES + 16
# Seconds that the body of a request may take, beside one for so many bytes.
BODY_SECONDS = 20.0
BYTES_A_SECOND = 20_000


class RefusedError(Exception):
    """A request that is not served; the text says why.

    Attributes:
        status: the HTTP status that says so.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Range:
    """What a field of a request may be.

    Attributes:
        kind: int or float.
        lowest, highest: both allowed.
    """

    kind: type[int] | type[float]
    lowest: float
    highest: float

    def parse(self, name: str, text: str) -> Any:
        """Read a value.

        Raises:
            RefusedError: it is none of these.
        """
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if value is None or not self.lowest <= value <= self.highest:
            number = "a whole number" if self.kind is int else "a number"
            raise RefusedError(
                400, f"{name}: {number} from {self.lowest} to {self.highest}, not {text[:40]!r}"
            )
        return value


RANGES = {
    "beam_size": Range(int, 1, 50),
    "num_captions": Range(int, 1, 50),
    "temperature": Range(float, 0.05, 5),
    "top_p": Range(float, 0.01, 1),
    "seed": Range(int, 0, 2**32 - 1),
}


@dataclass(frozen=True)
class Wishes:
    """How the images of a request are captioned; None where the captioner chooses.

    Attributes:
        beam_size, num_captions: as of ``caption.py``.
        temperature, top_p: where one is given, captions are drawn at random.
        seed: of the draws, which depend on it and on the image's bytes.
    """

    beam_size: int | None = None
    num_captions: int = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    @classmethod
    def parse(cls, fields: dict[str, str]) -> Wishes:
        """Read the fields of a request.

        Raises:
            RefusedError: 400, naming the field and what it may be.
        """
        values: dict[str, Any] = {}
        for name, text in fields.items():
            if name not in RANGES:
                known = ", ".join(["image", *RANGES])
                raise RefusedError(400, f"{name[:40]!r}: no such field; there are {known}")
            values[name] = RANGES[name].parse(name, text)
        wishes = cls(**values)
        if wishes.beam_size is not None and wishes.num_captions > wishes.beam_size:
            raise RefusedError(
                400,
                f"num_captions: at most beam_size ({wishes.beam_size}), not {wishes.num_captions}",
            )
        return wishes


@dataclass(frozen=True)
class Upload:
    """One image.

    Attributes:
        name: what the client calls it; text for people, never a path.
        path: where it lies. The file's name is the hash of its bytes, and so the same for the
            same image, wherever it comes in a request.
    """

    name: str
    path: Path


@dataclass
class Form:
    """What a request holds: its images in their order, and its other fields."""

    uploads: list[Upload] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)


async def read_form(content_type: str, chunks: AsyncIterator[bytes], folder: Path) -> Form:
    """Read a multipart request whose files are all in the field ``image``.

    Args:
        content_type: the request's header.
        chunks: its body.
        folder: an empty one, for the images; the caller removes it.

    Raises:
        RefusedError: 413 for too much of anything, before the rest is read; 415 for another kind of
            request; 400 for one that is cut off or malformed.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise RefusedError(415, "send the image as multipart/form-data, in the field image")
    parts = _Parts(folder)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.begin,
                "on_header_field": parts.header_name,
                "on_header_value": parts.header_value,
                "on_header_end": parts.header_end,
                "on_headers_finished": parts.headers_finished,
                "on_part_data": parts.data,
                "on_part_end": parts.end,
                "on_end": parts.finish,
            },
        )
        async for chunk in chunks:
            parts.count(len(chunk))
            parser.write(chunk)
    except FormParserError as error:
        raise RefusedError(400, f"not a multipart request: {error}") from error
    finally:
        parts.close()
    if not parts.complete:
        raise RefusedError(400, "the request ends in the middle")
    return parts.form


async def in_time(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Pass on what arrives, while it does: who sends too slowly keeps a place in the line.

    Raises:
        RefusedError: 408, it takes too long.
    """
    started, received = time.monotonic(), 0
    while True:
        allowed = BODY_SECONDS + received / BYTES_A_SECOND
        try:
            left = started + allowed - time.monotonic()
            chunk = await asyncio.wait_for(anext(chunks), max(0.0, left))
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError as error:
            raise RefusedError(408, "the request arrives too slowly") from error
        received += len(chunk)
        yield chunk


class _Parts:
    """Callbacks for the pieces of a request, in the order in which they stand in it."""

    def __init__(self, folder: Path) -> None:
        self.form = Form()
        self.complete = False
        self._folder = folder
        self._handle: IO[bytes] | None = None
        self._read = self._parts = 0

    def count(self, size: int) -> None:
        """Bound the whole, whatever it consists of."""
        self._read += size
        if self._read > (MAX_FILES + 1) * MAX_FILE_BYTES:
            raise RefusedError(413, "the request is too large")

    def begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise RefusedError(413, "the request has too many fields")
        self._headers: dict[bytes, bytes] = {}
        self._header_name = self._header_value = b""

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._bound_header()

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._bound_header()

    def _bound_header(self) -> None:
        if len(self._header_name) + len(self._header_value) > 8 * MAX_FIELD_BYTES:
            raise RefusedError(413, "a field's header is too long")

    def header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""
        if len(self._headers) > MAX_PARTS:
            raise RefusedError(413, "a field has too many headers")

    def headers_finished(self) -> None:
        disposition = self._headers.get(b"content-disposition", b"").decode("latin-1")
        _, options = parse_options_header(disposition)
        self._name, self._filename = (
            value if value is None else value.decode("utf-8", "replace")
            for value in (options.get(b"name"), options.get(b"filename"))
        )
        self._size = 0
        if self._name is None:
            raise RefusedError(400, "not a multipart request: a field has no name")
        if self._name == "image":
            self._open()
        elif self._filename is not None:
            raise RefusedError(400, f"{self._name[:40]}: images go into the field image")
        self._value = bytearray()

    def _open(self) -> None:
        if self._filename is None:
            raise RefusedError(400, "image: is no file; with curl, write -F image=@photo.jpg")
        if len(self.form.uploads) == MAX_FILES:
            raise RefusedError(413, f"image: at most {MAX_FILES} images a request")
        place = self._folder / str(len(self.form.uploads))
        place.mkdir()
        self._path = place / "arriving"
        self._handle = self._path.open("wb")
        self._digest = hashlib.sha256()

    def data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._handle is not None:
            if self._size > MAX_FILE_BYTES:
                most = f"{MAX_FILE_BYTES / MEGABYTE:g} MB"
                raise RefusedError(413, f"image: {self._filename!r} is larger than {most}")
            self._handle.write(data[start:end])
            self._digest.update(data[start:end])
        else:
            if self._size > MAX_FIELD_BYTES:
                raise RefusedError(413, f"{(self._name or '')[:40]}: is too long")
            self._value += data[start:end]

    def end(self) -> None:
        if self._handle is not None:
            self.close()
            path = self._path.replace(self._path.with_name(self._digest.hexdigest()))
            self.form.uploads.append(Upload(self._filename or "", path))
        elif self._name in self.form.fields:
            raise RefusedError(400, f"{self._name[:40]}: is given twice")
        else:
            self.form.fields[self._name or ""] = self._value.decode("utf-8", "replace")

    def finish(self) -> None:
        self.complete = True

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None
