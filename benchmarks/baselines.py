"""The baselines: plain PyTorch loops as in tutorials, and one that encodes in every step.

Nothing here is slowed down on purpose. Each loop does what programs of its kind do, on the
PyTorch of this environment with its default threads: a DataLoader with two workers around
PIL and torchvision's transforms, fp32, images in NCHW, shuffled batches padded to their
longest caption, PyTorch's default AdamW or Adam, beam search image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pipeline.datasets.vocabulary import END_ID, PAD_ID, START_ID, UNKNOWN_ID

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORKERS = 2


def plain_inception(weights: dict[str, Tensor]) -> nn.Module:
    """Build torchvision's network without its classifier."""
    network = torchvision.models.inception_v3(
        weights=None, init_weights=False, transform_input=True, aux_logits=False
    )
    network.fc = nn.Identity()
    network.load_state_dict(weights, strict=False)
    return network.eval()


# Extraction


class Images(Dataset[Tensor]):
    """Files to normalised tensors (3, 299, 299)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize((299, 299)),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, DEVIATION),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def extract(network: nn.Module, paths: Sequence[Path], output: Path) -> numpy.ndarray:
    """Encode files through a DataLoader and write their features to HDF5."""
    features = []
    with torch.no_grad():
        for images in DataLoader(Images(paths), batch_size=32, num_workers=WORKERS):
            features.append(network(images).numpy())
    result = numpy.concatenate(features)
    with h5py.File(output, "w") as file:
        file.create_dataset("features", data=result)
    return result


# Decoder training


class CaptionedFeatures(Dataset[tuple[Tensor, Tensor]]):
    """One feature vector and one caption at a time, from a list of pairs."""

    def __init__(self, features: Tensor, captions: Sequence[tuple[int, list[int]]]) -> None:
        self.features = features
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, tokens = self.captions[index]
        return self.features[image], torch.tensor(tokens)


def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pad a batch to its longest caption."""
    features, captions = zip(*items, strict=True)
    padded = pad_sequence(list(captions), batch_first=True, padding_value=PAD_ID)
    return torch.stack(features), padded


class PlainDecoder(nn.Module):
    """The same network as ``pipeline.models.decoder``, names included, as a tutorial writes it."""

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, vocabulary: int, embed: int, hidden: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(2048))
        self.register_buffer("feature_scale", torch.ones(2048))
        self.image_embedding = nn.Linear(2048, embed)
        self.word_embedding = nn.Embedding(vocabulary, embed, padding_idx=PAD_ID)
        self.lstm = nn.LSTM(embed, hidden, batch_first=True)
        self.projection = nn.Linear(hidden, vocabulary)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, captions: Tensor) -> Tensor:
        """Return logits (B, T, V) of the next word after each of captions (B, T)."""
        image = self.image_embedding((features - self.feature_mean) * self.feature_scale)
        words = self.word_embedding(captions)
        inputs = self.dropout(torch.cat([image.unsqueeze(1), words], dim=1))
        outputs, _ = self.lstm(inputs)
        return self.projection(self.dropout(outputs[:, 1:]))


def train_epoch(
    decoder: PlainDecoder,
    data: CaptionedFeatures,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    batch_size: int,
) -> int:
    """Train one epoch; returns the number of captions."""
    decoder.train()
    criterion = nn.CrossEntropyLoss(ignore_index=PAD_ID, label_smoothing=0.1)
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, collate_fn=collate)
    for features, captions in loader:
        logits = decoder(features, captions[:, :-1])
        loss = criterion(logits.flatten(0, 1), captions[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 5.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return len(data)


# Captioning


@torch.no_grad()
def beam_search(
    decoder: PlainDecoder, feature: Tensor, beams: int, longest: int, length_penalty: float
) -> list[int]:
    """Find one image's caption, with hypotheses in a Python list; feature (1, 2048)."""
    image = decoder.image_embedding((feature - decoder.feature_mean) * decoder.feature_scale)
    _, state = decoder.lstm(image.unsqueeze(1))
    hypotheses = [([START_ID], 0.0, state)]
    finished: list[tuple[list[int], float]] = []
    for length in range(longest + 1):
        candidates = []
        for words, total, state in hypotheses:
            output, next_state = decoder.lstm(
                decoder.word_embedding(torch.tensor([[words[-1]]])), state
            )
            log_probabilities = decoder.projection(output[0, 0]).log_softmax(-1)
            log_probabilities[[PAD_ID, START_ID, UNKNOWN_ID]] = -torch.inf
            if length == 0:
                log_probabilities[END_ID] = -torch.inf
            if length == longest:
                best = [(float(log_probabilities[END_ID]), END_ID)]
            else:
                values, indices = log_probabilities.topk(2 * beams)
                best = list(zip(values.tolist(), indices.tolist(), strict=True))
            candidates += [([*words, token], total + p, next_state) for p, token in best]
        candidates.sort(key=lambda candidate: candidate[1], reverse=True)
        hypotheses = []
        for place, (words, total, state) in enumerate(candidates[: 2 * beams]):
            if words[-1] != END_ID:
                hypotheses.append((words, total, state))
            elif place < beams and len(finished) < beams:
                finished.append((words, total / (len(words) - 1) ** length_penalty))
        hypotheses = hypotheses[:beams]
        if len(finished) == beams:
            break
    return max(finished, key=lambda found: found[1])[0][1:-1]


# Stage 3


class CaptionedImages(Dataset[tuple[Tensor, list[Tensor]]]):
    """An image with all of its captions."""

    def __init__(self, paths: Sequence[Path], captions: Sequence[list[list[int]]]) -> None:
        self.images = Images(paths)
        self.captions = captions

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, list[Tensor]]:
        return self.images[index], [torch.tensor(words) for words in self.captions[index]]


def collate_images(
    items: list[tuple[Tensor, list[Tensor]]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Stack images, number the captions by image, and pad them."""
    images, groups = zip(*items, strict=True)
    numbers = [number for number, group in enumerate(groups) for _ in group]
    captions = [caption for group in groups for caption in group]
    padded = pad_sequence(captions, batch_first=True, padding_value=PAD_ID)
    return torch.stack(images), torch.tensor(numbers), padded


def joint_epoch(
    network: nn.Module,
    decoder: PlainDecoder,
    data: CaptionedImages,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
) -> int:
    """Fine-tune both networks for an epoch; what is frozen has ``requires_grad`` off."""
    decoder.train()
    criterion = nn.CrossEntropyLoss(ignore_index=PAD_ID, label_smoothing=0.1)
    loader = DataLoader(
        data, batch_size=batch_size, shuffle=True, collate_fn=collate_images, num_workers=WORKERS
    )
    for images, numbers, captions in loader:
        logits = decoder(network(images)[numbers], captions[:, :-1])
        loss = criterion(logits.flatten(0, 1), captions[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return len(data)


# A captioner that runs the encoder in every step of every epoch: one image and one caption per
# sample, the network in training mode with a new last layer.


class RawCaptions(Dataset[tuple[Tensor, Tensor]]):
    """A decoded image and one of its captions, tokenised on access.

    Such programs tokenise with spaCy; splitting at spaces is faster, which favours the baseline.
    """

    def __init__(
        self, samples: Sequence[tuple[Path, str]], numbers: Callable[[str], list[int]]
    ) -> None:
        self.samples = samples
        self.numbers = numbers
        self.transform = transforms.Compose(
            [
                transforms.Resize((356, 356)),
                transforms.RandomCrop((299, 299)),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, caption = self.samples[index]
        image = self.transform(Image.open(path).convert("RGB"))
        return image, torch.tensor(self.numbers(caption))


def collate_raw(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack images and pad captions to (T, B)."""
    images, captions = zip(*items, strict=True)
    return torch.stack(images), pad_sequence(list(captions), padding_value=PAD_ID)


class OneStepCaptioner(nn.Module):
    """InceptionV3 with a new last layer, and an LSTM, 256 wide, in one module."""

    def __init__(self, weights: dict[str, Tensor], vocabulary: int, size: int = 256) -> None:
        super().__init__()
        self.inception = plain_inception(weights)
        for parameter in self.inception.parameters():
            parameter.requires_grad = False
        self.inception.fc = nn.Linear(2048, size)
        self.word_embedding = nn.Embedding(vocabulary, size)
        self.lstm = nn.LSTM(size, size)
        self.projection = nn.Linear(size, vocabulary)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor, captions: Tensor) -> Tensor:
        """Return logits (T, B, V)."""
        image = self.dropout(self.inception(images).relu())
        words = self.dropout(self.word_embedding(captions))
        outputs, _ = self.lstm(torch.cat([image.unsqueeze(0), words]))
        return self.projection(outputs)


def one_step_batches(
    model: OneStepCaptioner, data: RawCaptions, optimizer: torch.optim.Optimizer
) -> Iterator[int]:
    """Train; yield the number of captions in each batch when it is done."""
    model.train()
    criterion = nn.CrossEntropyLoss(ignore_index=PAD_ID)
    loader = DataLoader(
        data,
        batch_size=32,
        shuffle=True,
        num_workers=WORKERS,
        collate_fn=collate_raw,
    )
    for images, captions in loader:
        outputs = model(images, captions[:-1])
        loss = criterion(outputs.reshape(-1, outputs.shape[2]), captions.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(images)
