"""What the fuzzers share: their command, their seeds and atheris' loop."""

from __future__ import annotations

import argparse
import hashlib
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris

# No input may take longer (seconds) or make the process larger (MB).
LONGEST, LARGEST = 60, 2048
# And none may take more at once (MB).
MOST_GROWTH = 200


def run(
    read: Callable[[bytes], object],
    seeds: Iterable[bytes],
    words: Iterable[bytes],
    largest: int,
    mutate: Callable[[bytes, int, int], bytes] | None = None,
) -> None:
    """Give a reader one made-up input after the other, until it fails or time is up.

    Args:
        read: raises nothing for any input.
        seeds: valid inputs to start from.
        words: bytes that mean something to the reader.
        largest: bytes of an input.
        mutate: makes another input of one, of at most so many bytes, by a seed; by default
            libFuzzer's own ways.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="where interesting inputs are kept")
    parser.add_argument("--seconds", type=int, default=660)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    def measured(content: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        read(content)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > MOST_GROWTH * 1024:
            raise MemoryError(f"the process has grown by {grown // 1024} MB")

    for seed in seeds:
        read(seed)  # what is imported late would count as a slow input
        (arguments.folder / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    with tempfile.NamedTemporaryFile("w", suffix=".dict") as dictionary:
        for word in words:
            dictionary.write('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n')
        dictionary.flush()
        options = {
            "dict": dictionary.name,
            "max_total_time": arguments.seconds,
            "timeout": LONGEST,
            "rss_limit_mb": LARGEST,
            "max_len": largest,
            "artifact_prefix": f"{arguments.folder}/failed-",
            "print_final_stats": 1,
        }
        others = {} if mutate is None else {"custom_mutator": mutate}
        settings = [f"-{name}={value}" for name, value in options.items()]
        atheris.Setup([sys.argv[0], *settings, str(arguments.folder)], measured, **others)
        atheris.Fuzz()
