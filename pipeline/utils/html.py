"""HTML pages filled in from ``pipeline/templates``."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2

from pipeline.utils.progress import duration

TEMPLATES = Path(__file__).parents[1] / "templates"


@functools.cache
def environment() -> jinja2.Environment:
    """Return the environment of the templates; what is filled in is escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["duration"] = duration
    return made
