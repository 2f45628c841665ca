"""Photographs for ``distil_encoder``: listed by a manifest, packed into one file, and cropped."""

from __future__ import annotations

import io
import json
import math
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy
import torch
from PIL import Image, ImageOps
from torch import Tensor

# The captioner squeezes whole pictures to a square of this size. Crops of 128 to 224 pixels cost a
# half to a fifth, but training on their small grids, which are mostly border, made it worse.
SIZE = 299
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = {"train", "val", "validation", "test", "training_set", "test_set", "dataset", "data"}

# How captioning resizes, and how the teacher's training did.
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


class Pool:
    """Photographs in two files: ``NAME.bin``, encoded pictures end to end, and ``NAME.npz``.

    Encoded, 80,000 pictures of 256 pixels take 1.5 GB rather than 16, and 20,000 small ones are
    quickly copied to a GPU machine; decoding one takes 1 ms, a training step on a CPU 300.

    Attributes:
        aspects: float32 (N,), width / height before the picture was squeezed to a square.
        chances: float64 (N,), the probability that each is sampled; sums to 1.
    """

    def __init__(self, path: Path) -> None:
        index = numpy.load(path.with_suffix(".npz"))
        self.bytes = numpy.memmap(path.with_suffix(".bin"), dtype=numpy.uint8, mode="r")
        self.offsets, self.aspects = index["offsets"], index["aspects"]
        self.chances = index["weights"].astype(numpy.float64) / index["weights"].sum(dtype=float)

    def __len__(self) -> int:
        return len(self.aspects)

    def picture(self, number: int) -> Image.Image:
        """Decode one photograph, squeezed to a square."""
        data = self.bytes[self.offsets[number] : self.offsets[number + 1]].tobytes()
        return Image.open(io.BytesIO(data)).convert("RGB")

    def batch(self, seed: int, count: int, teacher_size: int) -> tuple[Tensor, Tensor]:
        """Sample ``count`` photographs and a crop of each.

        Returns:
            The crops for the student, uint8 (count, SIZE, SIZE, 3), and the same for the teacher.
        """
        draw = random.Random(seed)
        chosen = numpy.random.default_rng(seed).choice(len(self), count, p=self.chances)
        student = numpy.empty((count, SIZE, SIZE, 3), numpy.uint8)
        teacher = numpy.empty((count, teacher_size, teacher_size, 3), numpy.uint8)
        for i, number in enumerate(chosen):
            picture = self.picture(number)
            box = crop_box(draw, float(self.aspects[number]))
            if draw.random() < 0.5:
                picture = ImageOps.mirror(picture)
            left, top, right, bottom = (edge * picture.width for edge in box)
            for out, side, how in ((student, SIZE, BILINEAR), (teacher, teacher_size, BICUBIC)):
                crop = picture.resize((side, side), how, box=(left, top, right, bottom))
                out[i] = numpy.asarray(crop)
        return torch.from_numpy(student), torch.from_numpy(teacher)


def crop_box(draw: random.Random, aspect: float) -> tuple[float, float, float, float]:
    """Sample a crop as shares of width and height: left, top, right, bottom.

    One in ten is the whole picture, squeezed. The others have a true aspect ratio of 3:4 to 4:3 and
    at least three quarters of the area, so that objects are about as large as in captioning.
    """
    if draw.random() < 0.1:
        return 0.0, 0.0, 1.0, 1.0
    area = min(1.0, draw.uniform(0.75, 2.25))
    shape = math.exp(draw.uniform(-1, 1) * math.log(4 / 3))
    width = min(1.0, math.sqrt(area * shape / aspect))
    height = min(1.0, math.sqrt(area / shape * aspect))
    left, top = draw.uniform(0, 1 - width), draw.uniform(0, 1 - height)
    return left, top, left + width, top + height


def encoded_square(data: bytes, size: int, quality: int, form: str) -> tuple[bytes, float] | None:
    """Squeeze an encoded picture to a square of at most ``size``: its bytes and aspect ratio.

    A JPEG square that is small enough stays as it is. Returns None for what cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            kept = opened.format == "JPEG" == form and opened.width == opened.height <= size
            turned = opened.getexif().get(0x0112, 1) != 1
            opened.draft("RGB", (2 * size, 2 * size))
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    aspect = picture.width / picture.height
    if kept and not turned:
        return data, aspect
    side = min(size, max(picture.size))
    square = picture.resize((side, side), BICUBIC)
    square.save(out := io.BytesIO(), form, quality=quality)
    return out.getvalue(), aspect


def listed(source: dict[str, Any], root: Path, git_dirs: str) -> list[tuple[str, str]]:
    """List a source's photographs: their paths, and their blobs or files."""
    if "folder" in source:
        names = (root / source["list"]).read_text().split()
        found = [(name, str(root / source["folder"] / name)) for name in names]
    else:
        tree = git(source, git_dirs, "ls-tree", "-r", "-z", source["commit"])
        rows = [row.split("\t") for row in tree.communicate()[0].decode().split("\0") if row]
        found = [(path, about.split()[2]) for about, path in rows]
    wanted = {
        blob: path  # no blob twice
        for path, blob in found
        if path.lower().endswith(SUFFIXES)
        and any(path.startswith(folder) for folder in source.get("paths", [""]))
        and not any(part in f"/{path}" for part in source.get("leave_out", []))
    }
    found = [(path, blob) for blob, path in wanted.items()]
    random.Random(0).shuffle(found)
    return found[: source.get("most", len(found))]


def git(source: dict[str, Any], git_dirs: str, *command: str) -> subprocess.Popen[bytes]:
    """Start a git command on the repository of ``source``."""
    owner, name = source["repository"].split("/")
    place = Path(git_dirs.format(owner=owner, name=name))
    place = place / ".git" if (place / ".git").exists() else place
    arguments = ["git", f"--git-dir={place}", *command]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def contents(source: dict[str, Any], blobs: list[str], git_dirs: str) -> Iterator[bytes]:
    """Read what ``listed`` found, in its order."""
    if "folder" in source:
        yield from (Path(blob).read_bytes() for blob in blobs)
        return
    with git(source, git_dirs, "cat-file", "--batch") as process:
        assert process.stdin is not None and process.stdout is not None
        for blob in blobs:
            process.stdin.write(f"{blob}\n".encode())
            process.stdin.flush()
            length = int(process.stdout.readline().split()[2])
            yield process.stdout.read(length + 1)[:-1]
        process.stdin.close()


def group_of(path: str) -> str:
    """Return the class folder of a picture, without the folder of its split."""
    return "/".join(part for part in Path(path).parts[:-1] if part not in SPLITS)


def pack_pool(
    manifest: Path,
    pool: Path,
    root: Path,
    git_dirs: str,
    size: int,
    quality: int,
    form: str,
    limit: int | None = None,
) -> Counter[str]:
    """Write the pool that ``manifest`` lists; with ``limit``, a sample of that size by weight.

    The pictures of a class folder with more than ``cap`` are sampled less often, so that the
    folder as a whole counts like ``cap`` pictures.
    """
    plan = json.loads(manifest.read_text())
    rows: list[tuple[dict[str, Any], str, float]] = []
    for source in plan["sources"]:
        found = listed(source, root, git_dirs)
        sizes = Counter(group_of(path) for path, _ in found)
        for path, blob in found:
            group = group_of(path)
            cap = source.get("caps", {}).get(group.split("/")[-1], source.get("cap", plan["cap"]))
            share = min(1.0, cap / sizes[group])
            rows.append((source, blob, source.get("weight", 1) * share))
    if limit is not None:  # Efraimidis and Spirakis: weighted sampling without replacement
        draw = random.Random(0)
        keys = [draw.random() ** (1 / weight) for _, _, weight in rows]
        best = sorted(range(len(rows)), key=keys.__getitem__)[-limit:]
        rows = [(*rows[i][:2], 1.0) for i in sorted(best)]
    offsets, aspects, weights, counts = [0], list[float](), list[float](), Counter[str]()
    partial = pool.with_suffix(".bin.partial")
    with partial.open("wb") as out, ThreadPoolExecutor(2) as threads:
        for source in plan["sources"]:
            name = source.get("repository", source.get("folder"))
            mine = [(blob, weight) for given, blob, weight in rows if given is source]
            data = contents(source, [blob for blob, _ in mine], git_dirs)
            for some in iter(lambda: list(islice(zip(data, mine, strict=False), 256)), []):  # noqa: B023
                done = threads.map(lambda row: encoded_square(row[0], size, quality, form), some)
                for result, (_, (_, weight)) in zip(done, some, strict=True):
                    if result is None:
                        counts["undecodable"] += 1
                        continue
                    out.write(result[0])
                    offsets.append(offsets[-1] + len(result[0]))
                    aspects.append(result[1])
                    weights.append(weight)
                    counts[name] += 1
            click.echo(f"{name}: {counts[name]}", err=True)
    partial.replace(pool.with_suffix(".bin"))
    numpy.savez(
        pool.with_suffix(".npz"),
        offsets=numpy.array(offsets, numpy.int64),
        aspects=numpy.array(aspects, numpy.float32),
        weights=numpy.array(weights, numpy.float32),
    )
    return counts
