"""Training images that consensus reranking compares with, kept in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.datasets.encoded_captions import EncodedCaptions
from pipeline.models.ensemble import CaptionDecoder

# Of more training images, an evenly spaced sample is kept.
MOST_IMAGES = 10_000


@dataclass
class Neighbours:
    """Training images to compare with.

    Attributes:
        mean: float32 (E,), the mean image embedding.
        directions: float16 (N, E): the images' differences from it, of length 1.
        captions: of these images, by their number.
    """

    mean: Tensor
    directions: Tensor
    captions: EncodedCaptions

    def to_tensors(self) -> dict[str, Tensor]:
        """Return all as tensors, for ``from_tensors``."""
        return {
            "mean": self.mean,
            "directions": self.directions,
            "images": self.captions.images.int(),
            "tokens": self.captions.tokens,
            "offsets": self.captions.offsets.int(),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Neighbours:
        """Rebuild neighbours; raise KeyError or ValueError for tensors of nothing such."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        images, offsets = tensors["images"], tensors["offsets"]
        count, width = shapes["directions"]
        whole = (
            shapes["mean"] == (width,)
            and shapes["offsets"] == (len(images) + 1,)
            and images.dim() == 1
            and len(images) >= count > 0
            and bool((images.diff() >= 0).all())
            and images.unique().tolist() == list(range(count))
            and bool((offsets.diff() >= 2).all())
            and (int(offsets[0]), int(offsets[-1])) == (0, len(tensors["tokens"]))
        )
        if not whole:
            raise ValueError("the neighbours do not fit together")
        captions = EncodedCaptions(
            tensors["images"].long(), tensors["tokens"].int(), tensors["offsets"].long()
        )
        return cls(tensors["mean"].float(), tensors["directions"].half(), captions)


def sampled_images(count: int) -> Tensor:
    """Return which of ``count`` training images are kept: int64 (up to MOST_IMAGES,)."""
    return torch.arange(0, count, max(1, -(-count // MOST_IMAGES)))


@torch.inference_mode()
def choose_neighbours(
    decoder: CaptionDecoder, images: Tensor, features: Iterable[Tensor], captions: EncodedCaptions
) -> Neighbours:
    """Embed training images to compare with.

    Args:
        decoder: in eval mode.
        images: int64 (N,): their numbers, ascending.
        features: of these images, in batches (B, 2048).
        captions: of all training images.
    """
    device = decoder.feature_mean.device
    embeddings = torch.cat(
        [decoder.embed_image(batch.to(device))[0][:, 0].float().cpu() for batch in features]
    )
    mean = embeddings.mean(0)
    everyone = len(images) == int(captions.images[-1]) + 1
    return Neighbours(
        mean.clone(),
        F.normalize(embeddings - mean, dim=1).half().clone(),
        captions if everyone else captions.of_images(images),
    )


def merge_neighbours(members: Sequence[Neighbours | None]) -> Neighbours | None:
    """Combine the neighbours of an ensemble's members: near means near to all of them.

    Returns:
        None if a member has none, or if members keep different training images or captions.
    """
    neighbours = [member for member in members if member is not None]
    captions = [member.captions for member in neighbours]
    alike = len(neighbours) == len(members) and all(
        torch.equal(other.images, captions[0].images)
        and torch.equal(other.tokens, captions[0].tokens)
        for other in captions
    )
    if not alike:
        return None
    directions = torch.cat([member.directions.float() for member in neighbours], dim=1)
    return Neighbours(
        torch.cat([member.mean for member in neighbours]),
        F.normalize(directions, dim=1).half(),
        captions[0],
    )
