"""HTML pages filled in from ``pipeline/templates``."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import jinja2

from pipeline.utils.progress import duration

TEMPLATES = Path(__file__).parents[1] / "templates"


@functools.cache
def environment() -> jinja2.Environment:
    """Return the template environment; values are escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(duration=duration, tidy=tidy, counted=counted)
    return made


def read_asset(*names: str) -> str:
    """Return template files (style sheets or scripts), joined into one string."""
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "1,000 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def tidy(reference: str) -> str:
    """Return a reference without the space before punctuation: "a dog ." becomes "a dog."."""
    return re.sub(r"\s+(?=[.,!?;:](\s|$))", "", reference)
