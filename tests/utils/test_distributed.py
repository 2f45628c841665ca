"""What the processes of a job share: the work of a list, batches, validation; by threads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import StubEncoder, draw
from small_data import make_small_data
from thread_job import in_threads
from torch import Tensor, nn

from pipeline.datasets.encoded_captions import encode_captions
from pipeline.datasets.vocabulary import Vocabulary
from pipeline.features.encode_images import encode_distributed
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.encoder import load_encoder
from pipeline.training.decoder_stage import DecoderStage, FeatureBatch, prepare_stage
from pipeline.training.joint_stage import JointBatch, JointStage, TrainingImage
from pipeline.training.options import DecoderOptions, JointOptions
from pipeline.training.validation import Validator
from pipeline.utils.distributed import SINGLE_PROCESS, World
from pipeline.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("items", [0, 1, 2, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shared_work_comes_back_whole_and_in_order(items: int, size: int) -> None:
    done: list[int] = []

    def work(item: int) -> int:
        done.append(item)
        return 10 * item

    results = in_threads(size, lambda world: world.share_out(range(items), work))
    assert results == [[10 * item for item in range(items)]] * size
    assert sorted(done) == list(range(items)), "each once"


def test_processes_that_differ_are_refused_and_told_in_what() -> None:
    def check(world: World) -> None:
        world.refuse_differences({"seed": 0, "precision": ["fp32", "bf16"][world.rank]})

    errors = in_threads(2, check)
    assert all(isinstance(error, UserError) for error in errors)
    assert any("differ in precision: fp32 and bf16" in str(error) for error in errors)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> DecoderStage:
    """72 captions of 36 images, in batches of 7: the last has 2."""
    folder = tmp_path_factory.mktemp("small")
    data, features = make_small_data(folder)
    options = DecoderOptions(
        data=str(data),
        features=str(features),
        epochs=2,
        batch_size=7,
        embed_size=8,
        hidden_size=8,
        dropout=0.0,
        ema_decay=0.0,
        min_count=1,
        self_critical_epochs=1,
        precision="fp32",
    )
    return prepare_stage(options, folder / "run", CPU, 1e9, force=False)


@pytest.mark.parametrize("size", [2, 5])
def test_shares_of_captions_make_the_batches_of_one_process(stage: DecoderStage, size: int) -> None:
    def rows(batch: FeatureBatch | None) -> list[tuple[Any, ...]]:
        if batch is None:
            return []
        if batch.captions is None:
            return [(number,) for number in batch.images.tolist()]
        pairs = zip(batch.features[:, 0].tolist(), batch.captions.tolist(), strict=True)
        return [(first, *[token for token in tokens if token]) for first, tokens in pairs]

    for epoch in (1, 2):
        whole = list(stage.batches(epoch))
        assert len(whole) == stage.batches_per_epoch(epoch)
        shares = [
            list(replace(stage, world=World(rank, size)).batches(epoch)) for rank in range(size)
        ]
        for batch, *parts in zip(whole, *shares, strict=True):
            assert sorted(rows(batch)) == sorted(row for part in parts for row in rows(part))
            lengths = [len(rows(part)) for part in parts]
            assert max(lengths) - min(lengths) <= 1
    assert any(part is None for share in shares for part in share)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("images, batch_size", [(11, 4), (2, 4)])
def test_validation_in_shares_is_that_of_one_process(
    size: int, images: int, batch_size: int
) -> None:
    """Eleven images divide by neither number, and two are fewer than three."""
    words = "a red blue dog car house runs stands".split()
    torch.manual_seed(0)
    references = {
        f"{number}.jpg": [[words[n] for n in torch.randint(8, (4 + number % 3,)).tolist()]]
        for number in range(images)
    }
    vocabulary = Vocabulary.build((c for group in references.values() for c in group), 1)
    decoder = Decoder(DecoderConfig(len(vocabulary), 8, 8, feature_size=5)).eval()
    nn.init.normal_(decoder.projection.weight, std=2.0)
    features = 3 * torch.randn(images, 5)
    validator = Validator(references, vocabulary, batch_size)
    alone = validator.validate(decoder, features)
    assert alone.scores["distinct"] > 1
    seen: list[list[int]] = [[] for _ in range(size)]

    class Watched(Validator):
        """Remembers how many images each process searched."""

        def validate(self, decoder: Any, features: Any, world: World = SINGLE_PROCESS) -> Any:
            class Counted:
                def __getitem__(self, photos: Tensor) -> Tensor:
                    seen[world.rank].append(len(photos))
                    return features[photos]

            return super().validate(decoder, Counted(), world)  # type: ignore[arg-type]

    watched = Watched(references, vocabulary, batch_size)
    for found in in_threads(
        size, lambda world: watched.validate(copy.deepcopy(decoder), features, world)
    ):
        assert found == alone
    # Once each for the search, and once for the loss, as each image has one caption.
    assert sum(map(sum, seen)) == 2 * images


@pytest.fixture(scope="module")
def joint_stage(tiny_inception: None, tmp_path_factory: pytest.TempPathFactory) -> JointStage:
    """Twelve images, two of which cannot be read, in batches of 5 (and readable ones 5 and 5)."""
    folder = tmp_path_factory.mktemp("images")
    images = [TrainingImage(draw(folder / f"{n:02}.png", n), flip=True) for n in range(12)]
    for number in (3, 7):
        Path(str(images[number].image)).write_bytes(b"broken")
    vocabulary = Vocabulary.build([["a", "dog"]], 1)
    captions = encode_captions([[["a"] * (n + 1), ["dog"]] for n in range(12)], vocabulary)
    options = JointOptions(
        start=("none",),
        data=str(folder),
        features="none.h5",
        epochs=2,
        batch_size=5,
        grad_accum_steps=1,
        ema_decay=0.0,
        unfreeze_from="Mixed_7c",
        min_crop=0.8,
        precision="fp32",
    )
    decoder = Decoder(DecoderConfig(len(vocabulary), 8, 8, dropout=0.0))
    validator = Validator({"a.jpg": [["a"]], "b.jpg": [["dog"]]}, vocabulary)
    encoder = load_encoder("random")
    return JointStage(
        encoder, decoder, vocabulary, images, captions, [], validator, options, 2, CPU
    )


@pytest.mark.parametrize("size", [2, 4])
def test_shares_of_images_make_the_batches_of_one_process(
    joint_stage: JointStage, size: int
) -> None:
    """Each image is read by one process alone, and the broken ones are known to all."""

    def batches(world: World) -> tuple[list[JointBatch | None], dict[str, str]]:
        stage = copy.copy(joint_stage)
        stage.world, stage.unreadable = world, {}
        return list(stage.batches(1)), stage.unreadable

    def rows(batch: JointBatch | None) -> list[tuple[bytes, list[int]]]:
        if batch is None:
            return []
        pairs = zip(batch.image.tolist(), batch.captions, strict=True)
        return [(batch.pixels[n].numpy().tobytes(), c[c > 0].tolist()) for n, c in pairs]

    whole, unreadable = batches(SINGLE_PROCESS)
    assert [len(batch.pixels) for batch in whole if batch is not None] == [5, 5]
    assert len(unreadable) == 2
    shares = in_threads(size, batches)
    for batch, *parts in zip(whole, *(share for share, _ in shares), strict=True):
        assert sorted(rows(batch)) == sorted(row for part in parts for row in rows(part))
        images = [len(part.pixels) for part in parts if part is not None]
        assert sum(images) == 5 and max(images) < 5
    for _, found in shares:
        assert list(found.items()) == list(unreadable.items())


class CpuStub(StubEncoder):
    """Says where it is."""

    def parameters(self) -> Iterator[Tensor]:
        yield torch.zeros(1)


def test_images_encoded_in_shares_are_those_of_one_process(joint_stage: JointStage) -> None:
    """To the bit, though an image's features depend on its place in a batch of four."""
    paths = [image.image for image in joint_stage.images]
    alone: Any = CpuStub().for_inference()
    features, failures = encode_distributed(alone, paths, 1)
    assert list(failures) == [3, 7] and (features[[3, 7]] == 0).all()
    assert alone.batches == [3, 3, 4] and (features.std(0) > 0).any()
    encoders: list[Any] = [CpuStub().for_inference() for _ in range(2)]
    for shared, broken in in_threads(
        2, lambda world: encode_distributed(encoders[world.rank], paths, 1, world)
    ):
        assert torch.equal(shared, features) and broken == failures
    assert [encoder.batches for encoder in encoders] == [[3, 4], [3]]
