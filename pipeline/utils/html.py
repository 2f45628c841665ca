"""Templates of the files that people look at, and how they are filled in."""

from __future__ import annotations

import functools

import jinja2

from pipeline.utils.progress import duration


@functools.cache
def environment() -> jinja2.Environment:
    """Give the templates of ``pipeline/templates``, which escape markup in what is filled in."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["duration"] = duration
    return made
