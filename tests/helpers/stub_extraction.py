"""Extraction with a stub encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from conftest import StubEncoder

from pipeline.datasets.image_sources import open_source
from pipeline.features.extraction import Extraction, ExtractionResult, extract
from pipeline.models.encoder import Encoder
from pipeline.utils.distributed import SINGLE_PROCESS, World


def stub_extract(
    data: str | Path,
    output: Path,
    encoder: StubEncoder | None = None,
    world: World = SINGLE_PROCESS,
    **options: Any,
) -> ExtractionResult:
    """Extract, by default four images per batch and one batch after the other."""
    source, network = open_source(data), cast(Encoder, encoder or StubEncoder())
    options = {"batch_size": 4, "workers": 1, **options}
    return extract(Extraction(source, source.names, output, network, **options), world)
