"""One of this project's commands, with pixels instead of the network's features.

    python benchmarks/load_worker.py extract_features.py --data photos --output photos.h5

For the images of ``load.py`` InceptionV3 would take hours, and its speed is known; everything else
runs unchanged. Prints the peak memory in GB.
"""

from __future__ import annotations

import sys
from typing import Any

from growth import PixelEncoder
from measure import run_script_and_tell_memory

from pipeline import captioner
from pipeline.models import encoder


class PixelNetwork(PixelEncoder):
    """Adds what else the commands need from an encoder."""

    source = "pixels"

    def to(self, device: Any) -> PixelNetwork:
        """Do nothing."""
        return self


if __name__ == "__main__":
    encoder.load_encoder = lambda *arguments: PixelNetwork()  # type: ignore[assignment]
    captioner.encoder_of = lambda *arguments: PixelNetwork()  # type: ignore[assignment]
    run_script_and_tell_memory(*sys.argv[1:])
