"""What each part of an image adds to each word of its caption."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from pipeline import Captioner
from pipeline.datasets.images import read_square
from pipeline.decoding.captions import token_log_probabilities
from pipeline.decoding.explain import word_maps
from pipeline.models.decoder import Decoder, DecoderConfig
from pipeline.models.ensemble import make_decoder

pytestmark = pytest.mark.usefixtures("tiny_inception")


@pytest.mark.parametrize("members", [1, 2])
def test_a_map_is_the_derivative_by_each_cell(members: int) -> None:
    """Against central differences: a cell is moved towards the average image and away from it."""
    torch.manual_seed(0)
    config = DecoderConfig(12, 8, 8, feature_size=6, init_state_from_image=True, members=members)
    decoder = make_decoder(config).double().eval()
    cells = torch.randn(64, 6, dtype=torch.float64)
    for part in [part for part in decoder.modules() if isinstance(part, Decoder)]:
        part.set_feature_statistics(torch.randn(6).double(), torch.rand(6).double() + 0.5)
    tokens = [5, 4, 7, 4]
    maps = word_maps(decoder, cells, tokens)
    assert maps.shape == (4, 64)

    def log_probabilities(moved: Tensor) -> Tensor:
        [[found]] = token_log_probabilities(decoder, moved.mean(0, keepdim=True), [[tokens]])
        return torch.tensor(found[:-1], dtype=torch.float64)

    for cell in (0, 9, 63):
        step = torch.zeros_like(cells)
        step[cell] = 0.5 * (cells[cell] - decoder.feature_mean)
        slope = log_probabilities(cells + step) - log_probabilities(cells - step)
        torch.testing.assert_close(maps[:, cell], slope, rtol=1e-2, atol=1e-6)


def test_the_cells_are_those_of_the_encoder_and_the_caption_is_the_same(
    captioner: Captioner, scenes: list[Path]
) -> None:
    path = scenes[0]
    square = read_square(path)
    cells = captioner.encoder.encode_cells([square])
    assert cells.shape == (1, 64, 2048)
    numpy.testing.assert_allclose(cells.mean(1), captioner.encoder.encode([square]), atol=1e-5)
    found = captioner.explain(path)
    assert found.text == captioner.caption(path)
    assert found.maps.shape == (len(found.words), 8, 8) and found.words == tuple(found.text.split())
    assert found.probabilities.shape == (len(found.words),) and (found.probabilities > 0).all()
    assert numpy.abs(found.maps).max(axis=(1, 2)).min() > 0
