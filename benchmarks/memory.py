"""Peak memory of every stage, from the real commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from material import Material
from measure import ROOT, echo


def measure_memory(material: Material, folder: Path) -> dict[str, float]:
    """Peak memory of each stage in GB: the real commands on a small data set."""
    data = folder / "memory"
    data.mkdir()
    rows = ["image,caption,split"]
    for number, path in enumerate(sorted(material.images.iterdir())):
        (data / path.name).write_bytes(path.read_bytes())
        split = "val" if number % 4 == 3 else "train"
        for words in material.train[number]:
            rows.append(f"{path.name},{' '.join(words)},{split}")
    (data / "captions.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    cache, run = folder / "memory.h5", folder / "memory-run"
    commands = {
        "extract_features.py": ["--data", data, "--output", cache, "--weights", material.weights],
        "train_decoder.py": (
            ["--data", data, "--features", cache, "--run", run, "--epochs", 2, "--min-count", 1]
        ),
        "finetune_joint.py": ["--start", run, "--run", f"{run}-joint", "--epochs", 1],
        "caption.py": [data, "--model", run, "--weights", material.weights],
    }
    peaks = {}
    for script, arguments in commands.items():
        command = [sys.executable, "benchmarks/measure.py", script, *map(str, arguments)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(f"{script} ended with exit code {ended.returncode}: {ended.stderr}")
        peaks[script] = round(float(ended.stdout.splitlines()[-1]), 2)
        echo(f"  memory: {script}: {peaks[script]} GB")
    return peaks
