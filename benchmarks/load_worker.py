"""One of this project's commands, with pixels in the place of the network's features.

    python benchmarks/load_worker.py extract_features.py --data photos --output photos.h5

What an image costs InceptionV3 is known, and is hours for what ``load.py`` asks for; all that lies
around it is as it is. Prints the peak memory in GB.
"""

from __future__ import annotations

import sys
from typing import Any

from growth import PixelEncoder
from measure import run_script_and_tell_memory

from pipeline import captioner
from pipeline.models import encoder


class PixelNetwork(PixelEncoder):
    """What the commands want of an encoder besides."""

    source = "pixels"

    def to(self, device: Any) -> PixelNetwork:
        """Do nothing."""
        return self


if __name__ == "__main__":
    encoder.load_encoder = lambda *arguments: PixelNetwork()  # type: ignore[assignment]
    captioner.encoder_of = lambda *arguments: PixelNetwork()  # type: ignore[assignment]
    run_script_and_tell_memory(*sys.argv[1:])
