"""Show and Tell (Vinyals et al., arXiv 1411.4555) on precomputed InceptionV3 features.

>>> from pipeline import Captioner
>>> Captioner.load().caption("a.jpg")
'a dog runs through the grass'

Importing this package is cheap: torch loads when the first name that needs it is used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pipeline.utils.cores import available_cores

if TYPE_CHECKING:
    from pipeline.captioner import Captioner
    from pipeline.decoding.options import SearchOptions

# OpenMP reads this once, as torch loads. Waiting threads that spin take the cores from other
# programs: beside two of these a training step took six to ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# By itself it heeds the cores that a process is bound to, but no container's quota.
if available_cores() < (os.cpu_count() or 1):
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))

__version__ = "0.1.0"
__all__ = ["Captioner", "SearchOptions", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the public classes at first use (PEP 562); ``Captioner`` loads torch."""
    if name == "Captioner":
        from pipeline.captioner import Captioner

        return Captioner
    if name == "SearchOptions":
        from pipeline.decoding.options import SearchOptions

        return SearchOptions
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
