"""A captioner's networks as ONNX graphs, which other programs run without PyTorch.

Three graphs: pixels to features, features to the decoder's state, and a token and a state to logits
and the next state. An ensemble is one graph, like a single decoder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.datasets.images import IMAGE_SIZE
from pipeline.models.decoder import Decoder
from pipeline.models.encoder import Encoder
from pipeline.models.ensemble import CaptionDecoder, Ensemble, join_states
from pipeline.utils.errors import UserError

# The opset that the exporter writes without translation; ONNX Runtime reads it from 1.18 on (IR
# version 10).
OPSET = 18
# Allowed difference from PyTorch, relative to the largest value; rounding causes about 1e-6.
TOLERANCE = 1e-4


class DecoderGraph(nn.Module):
    """One decoder, or the members of an ensemble."""

    def __init__(self, decoder: CaptionDecoder) -> None:
        super().__init__()
        self.decoders = decoder.decoders if isinstance(decoder, Ensemble) else [decoder]
        self.members = nn.ModuleList(self.decoders)


class StartGraph(DecoderGraph):
    """``start`` of one decoder or several: features (B, 2048) to hidden and cell state."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Feed the images; the states (B, S) are those of the members, concatenated."""
        states = []
        for member in self.decoders:
            image, (hidden, cell) = member.embed_image(features)
            states.append(_lstm(member, image.squeeze(1), hidden, cell))
        return join_states(states)


class StepGraph(DecoderGraph):
    """``step`` of one decoder or several: a token and the state to logits and the next state.

    It omits ``Decoder.step``'s cache of word gates, which would add 21 MB for 2,500 words.
    """

    def forward(self, tokens: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """Feed int64 tokens (B,) and states (B, S); return logits (B, V) and states."""
        parts = (state.chunk(len(self.decoders), dim=1) for state in (hidden, cell))
        logits, states = [], []
        for member, *before in zip(self.decoders, *parts, strict=True):
            state = _lstm(member, member.word_embedding(tokens), *before)
            logits.append(member.project(state[0]))
            states.append(state)
        return (torch.stack(logits).mean(0), *join_states(states))


def _lstm(decoder: Decoder, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the LSTM (arXiv 1411.4555, equations 4 to 9) with inputs (B, E)."""

    def linear(values: Tensor, kind: str) -> Tensor:
        weight = decoder.lstm.get_parameter(f"weight_{kind}_l0")
        return F.linear(values, weight, decoder.lstm.get_parameter(f"bias_{kind}_l0"))

    gates = linear(inputs, "ih") + linear(hidden, "hh")
    enter, forget, new, output = gates.chunk(4, dim=1)  # each (B, H)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return output.sigmoid() * cell.tanh(), cell


@dataclass(frozen=True)
class Graph:
    """A network to export, and the names of its tensors.

    Attributes:
        module: the network, in eval mode on the CPU, in float32.
        inputs: each input by name, as a batch of two.
        outputs: names of the outputs.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]


def captioner_graphs(encoder: Encoder, decoder: CaptionDecoder) -> dict[str, Graph]:
    """Return a captioner's three graphs by name: ``encoder``, ``decoder_start``, ``decoder_step``.

    Args:
        encoder: float32, on the CPU; ``for_inference`` makes its graph smaller.
        decoder: on the CPU.
    """
    random = torch.Generator().manual_seed(0)
    config = decoder.config
    width = config.hidden_size * config.members
    pixels = torch.randint(0, 256, (2, IMAGE_SIZE, IMAGE_SIZE, 3), generator=random)
    features = decoder.feature_mean + torch.randn(2, config.feature_size, generator=random) / (
        decoder.feature_scale
    )
    tokens = torch.randint(0, config.vocabulary_size, (2,), generator=random)
    hidden, cell = (torch.randn(2, width, generator=random).tanh() for _ in range(2))
    return {
        "encoder": Graph(encoder, {"pixels": pixels.to(torch.uint8)}, ("features",)),
        "decoder_start": Graph(StartGraph(decoder), {"features": features}, ("hidden", "cell")),
        "decoder_step": Graph(
            StepGraph(decoder),
            {"tokens": tokens, "hidden": hidden, "cell": cell},
            ("logits", "next_hidden", "next_cell"),
        ),
    }


def check_installed() -> None:
    """Raise UserError if the extra ``onnx`` is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install onnx onnxscript onnxruntime")


def to_onnx(graph: Graph) -> bytes:
    """Return a graph as one ONNX file with its weights, for batches of any size."""
    batch = torch.export.Dim("batch")
    with _quiet():
        program: Any = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple({0: batch} for _ in graph.inputs),
            external_data=False,
        )
        model = program.model_proto
    # The exporter records each node's source file: paths on this machine.
    graph_proto = model.graph
    values = (graph_proto.value_info, graph_proto.input, graph_proto.output)
    for part in (model, graph_proto, *graph_proto.node, *graph_proto.initializer, *chain(*values)):
        part.ClearField("metadata_props")
    for node in graph_proto.node:
        node.ClearField("doc_string")
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def check(name: str, graph: Graph, content: bytes) -> None:
    """Compare an ONNX file with PyTorch, on inputs and batch sizes other than those of the export.

    Raises:
        UserError: the results differ.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    one = {name: value[1:] for name, value in graph.inputs.items()}
    three = {n: torch.cat([value.flip(-1), value[:1]]) for n, value in graph.inputs.items()}
    for inputs in (one, three):
        with torch.inference_mode():
            wanted = graph.module(*inputs.values())
        found = session.run(list(graph.outputs), {k: v.numpy() for k, v in inputs.items()})
        for a, b in zip(wanted if isinstance(wanted, tuple) else (wanted,), found, strict=True):
            off = numpy.abs(a.numpy() - b).max() / numpy.abs(a.numpy()).max()
            if not off <= TOLERANCE:  # also NaN
                raise UserError(
                    f"{name}.onnx differs from PyTorch (by {off:.1e}); "
                    "try other versions of torch, onnxscript and onnxruntime"
                )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress messages off the terminal; errors still appear."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
