"""Requests to caption images: forms read within limits of size and time."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

MEGABYTE = 1_000_000
MAX_IMAGES = 16
MAX_IMAGE_BYTES = 20 * MEGABYTE
MAX_FIELD_BYTES = 1000
# Seconds allowed for a request body, plus one second per BYTES_PER_SECOND received.
BODY_SECONDS = 20.0
BYTES_PER_SECOND = 20_000
# Type, minimum and maximum of each field.
FIELDS: dict[str, tuple[type[int] | type[float], float, float]] = {
    "beam_size": (int, 1, 50),
    "num_captions": (int, 1, 50),
    "temperature": (float, 0.05, 5),
    "top_p": (float, 0.01, 1),
    "seed": (int, 0, 2**32 - 1),
    "explain": (int, 0, 1),
}


@contextlib.asynccontextmanager
async def read_form(request: Request) -> AsyncIterator[FormData]:
    """Read a form; its files are in memory or temporary files, and close with the context.

    Raises:
        HTTPException: 408 for a slow body, 413 for one that is too large, 415 for another content
            type, 400 for a form that is malformed or has too many parts.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise HTTPException(415, "send the image as multipart/form-data, in the field image")
    limit = (MAX_IMAGES + 1) * MAX_IMAGE_BYTES
    too_large = HTTPException(413, f"the request is larger than {limit / MEGABYTE:g} MB")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        size = len(message.get("body", b""))
        received += size
        if received > limit:
            raise too_large
        timeout.deadline += size / BYTES_PER_SECOND
        return message

    try:
        with anyio.fail_after(BODY_SECONDS) as timeout:
            form = await Request(request.scope, receive).form(
                max_files=MAX_IMAGES, max_fields=len(FIELDS), max_part_size=MAX_FIELD_BYTES
            )
    except TimeoutError as error:
        raise HTTPException(408, "the request arrives too slowly") from error
    try:
        yield form
    finally:
        await form.close()


def parse_form(form: FormData) -> tuple[list[UploadFile], dict[str, Any]]:
    """Return the images of a form in their order, and the values of its other fields.

    Raises:
        HTTPException: 413 for an image that is too large, 400 for anything else.
    """
    images: list[UploadFile] = []
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "image":
                raise HTTPException(400, f"{name[:40]}: images go into the field image")
            if (value.size or 0) > MAX_IMAGE_BYTES:
                most = f"{MAX_IMAGE_BYTES / MEGABYTE:g} MB"
                raise HTTPException(413, f"image: {value.filename!r} is larger than {most}")
            images.append(value)
        elif name in fields:
            raise HTTPException(400, f"{name}: given twice")
        else:
            fields[name] = _parse_field(name, value)
    if not images:
        raise HTTPException(400, "image: no image; with curl, write -F image=@photo.jpg")
    count, beam_size = fields.get("num_captions", 1), fields.get("beam_size")
    if beam_size is not None and count > beam_size:
        raise HTTPException(400, f"num_captions: at most beam_size ({beam_size}), not {count}")
    return images, fields


def _parse_field(name: str, text: str) -> Any:
    if name == "image":
        raise HTTPException(400, "image: not a file; with curl, write -F image=@photo.jpg")
    if name not in FIELDS:
        known = ", ".join(["image", *FIELDS])
        raise HTTPException(400, f"{name[:40]!r}: no such field; there are {known}")
    kind, lowest, highest = FIELDS[name]
    with contextlib.suppress(ValueError):
        value = kind(text)
        if lowest <= value <= highest:
            return value
    number = "a whole number" if kind is int else "a number"
    raise HTTPException(400, f"{name}: {number} from {lowest} to {highest}, not {text[:40]!r}")
