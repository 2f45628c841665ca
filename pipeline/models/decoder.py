"""The Show-and-Tell decoder: an LSTM that sees the image once, as its first input.

Equations (10) to (12) of Vinyals et al. (arXiv 1411.4555):

    x_-1 = W_image CNN(I)            the image is the first input, and only that
    x_t  = W_embed S_t               then every word of the caption, from <start>
    p_t+1 = softmax(W_project LSTM(x_t))

Dropout is on the LSTM's inputs and outputs, not on its state (Zaremba et al., arXiv 1409.2329).

Options beyond the paper: the image also sets the LSTM's initial state (Tanti et al., arXiv
1703.09137, "init-inject"); input and output word embeddings are tied (Press and Wolf, arXiv
1608.05859), after a linear layer on the LSTM's output; dropout on the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.datasets.vocabulary import PAD_ID
from pipeline.models.encoder_identity import FEATURE_SIZE

# The projection's number of tokens is padded to a multiple of this: oneDNN caches kernels for every
# row count, which would otherwise take 7 MB more per step.
TOKENS_ROUNDED_TO = 64

# Hidden and cell state of the LSTM, each (B, H).
State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.

    Attributes:
        vocabulary_size: number of tokens V, including the special ones.
        embed_size: width E of the image and word embeddings.
        hidden_size: width H of the LSTM.
        dropout: probability, on the LSTM's inputs and outputs.
        feature_size: width of the encoder's features.
        feature_dropout: probability, on the standardized features.
        init_state_from_image, tie_embeddings: see above.
        members: number of decoders of these sizes in an ensemble.
    """

    vocabulary_size: int
    embed_size: int = 512
    hidden_size: int = 512
    dropout: float = 0.5
    feature_size: int = FEATURE_SIZE
    feature_dropout: float = 0.0
    init_state_from_image: bool = False
    tie_embeddings: bool = False
    members: int = 1


def dropout(values: Tensor, probability: float, training: bool = True) -> Tensor:
    """In training, zero values at random and scale up the others, as ``F.dropout`` does.

    On a CPU, ``F.dropout`` draws one random number per value: a tenth of a training step. Here 64
    random bits serve eight values, and the probability is rounded to a multiple of 1/256.
    """
    if not probability or not training:
        return values
    if values.device.type != "cpu":
        return F.dropout(values, probability)
    dropped = min(255, round(probability * 256))
    words = torch.empty(-(-values.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.uint8)[: values.numel()].view(values.shape) >= dropped
    return values * (kept.to(values.dtype) * (256 / (256 - dropped)))


class Decoder(nn.Module):
    """The image embedding, the word embedding, the LSTM, and the projection onto words."""

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("feature_mean", torch.zeros(config.feature_size))
        self.register_buffer("feature_scale", torch.ones(config.feature_size))
        self.image_embedding = nn.Linear(config.feature_size, config.embed_size)
        self.word_embedding = nn.Embedding(
            config.vocabulary_size, config.embed_size, padding_idx=PAD_ID
        )
        self.lstm = nn.LSTM(config.embed_size, config.hidden_size, batch_first=True)
        if config.tie_embeddings:
            self.to_embedding = nn.Linear(config.hidden_size, config.embed_size)
            self.projection = nn.Linear(config.embed_size, config.vocabulary_size)
            self.projection.weight = self.word_embedding.weight
        else:
            self.projection = nn.Linear(config.hidden_size, config.vocabulary_size)
        if config.init_state_from_image:
            self.init_state_from_image = nn.Linear(config.embed_size, 2 * config.hidden_size)
        self._gates: tuple[object, Tensor] | None = None
        # Word and image embeddings of similar norm, so that neither dominates; with tied
        # embeddings, logits of about the size of the LSTM's output.
        deviation = config.embed_size**-0.5 if config.tie_embeddings else 0.1
        nn.init.normal_(self.word_embedding.weight, std=deviation)
        nn.init.normal_(self.image_embedding.weight, std=deviation / config.feature_size**0.5)
        nn.init.zeros_(self.image_embedding.bias)
        nn.init.zeros_(self.projection.bias)
        with torch.no_grad():
            self.word_embedding.weight[PAD_ID].zero_()
            # The forget gate starts open (Jozefowicz et al., 2015); gate order i, f, g, o.
            forget = slice(config.hidden_size, 2 * config.hidden_size)
            self.lstm.get_parameter("bias_ih_l0")[forget] = 1.0

    def set_feature_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Store the training features' mean and standard deviation (2048,), for standardization.

        The deviation has a floor, so that nearly constant dimensions are not amplified.
        """
        floor = 0.1 * deviation.mean().clamp_min(1e-6)
        self.feature_mean.copy_(mean)
        self.feature_scale.copy_(1.0 / torch.maximum(deviation, floor))

    def embed_image(self, features: Tensor) -> tuple[Tensor, State]:
        """Map features (B, 2048) to the LSTM's first input (B, 1, E) and its initial state."""
        standard = (features - self.feature_mean) * self.feature_scale
        standard = dropout(standard, self.config.feature_dropout, self.training)
        image = self.image_embedding(standard)
        if self.config.init_state_from_image:
            shown = dropout(image, self.config.dropout, self.training)
            hidden, cell = self.init_state_from_image(shown).chunk(2, dim=1)
            state = hidden.tanh(), cell.contiguous()
        else:
            state = image.new_zeros(2, len(image), self.config.hidden_size).unbind(0)
        return image.unsqueeze(1), state

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Run captions through the LSTM, teacher-forced.

        Args:
            features: float (B, 2048).
            tokens: int64 (B, T), each row beginning with <start>.

        Returns:
            Outputs of the LSTM after every token, dropout applied: (B, T, H).
        """
        image, (hidden, cell) = self.embed_image(features)
        inputs = torch.cat([image, self.word_embedding(tokens)], dim=1)
        inputs = dropout(inputs, self.config.dropout, self.training)
        outputs, _ = self.lstm(inputs, (hidden.unsqueeze(0), cell.unsqueeze(0)))  # (B, 1 + T, H)
        return dropout(outputs[:, 1:], self.config.dropout, self.training)

    def project(self, outputs: Tensor) -> Tensor:
        """Map outputs of the LSTM (..., H) to logits (..., V)."""
        return self.projection(
            self.to_embedding(outputs) if self.config.tie_embeddings else outputs
        )

    def next_logits(self, features: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """Return the logits (B, V) of the token after position ``places`` (B,) of each row.

        ``features`` and ``tokens`` are those of ``forward``.
        """
        outputs = self(features, tokens)
        return self.project(outputs[torch.arange(len(outputs), device=outputs.device), places])

    def loss(
        self,
        features: Tensor,
        captions: Tensor,
        label_smoothing: float = 0.0,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Sum the cross-entropy over all tokens except padding.

        Args:
            features: float (B, 2048).
            captions: int64 (B, T), <start> words <end> and then padding.
            label_smoothing: share of the target spread evenly over the vocabulary.
            weights: float (B,), the weight of each caption's loss; by default 1.

        Returns:
            The summed loss in nats, and the number of tokens that it runs over.
        """
        outputs = self(features, captions[:, :-1]).flatten(0, 1)
        targets = captions[:, 1:].flatten()
        chosen = (targets != PAD_ID).nonzero().squeeze(1)
        tokens = len(chosen)
        spare = -tokens % TOKENS_ROUNDED_TO
        targets = F.pad(targets[chosen], (0, spare), value=PAD_ID)  # ignored in the loss
        # index_select: the gradient of plain indexing takes three times as long.
        outputs = outputs.index_select(0, F.pad(chosen, (0, spare)))
        logits = self.project(outputs)  # (tokens + spare, V)
        loss = F.cross_entropy(
            logits.float(),
            targets,
            reduction="sum" if weights is None else "none",
            ignore_index=PAD_ID,
            label_smoothing=label_smoothing,
        )
        if weights is not None:
            loss = loss[:tokens] @ weights[chosen // (captions.shape[1] - 1)]
        return loss, tokens

    @torch.inference_mode()
    def start(self, features: Tensor) -> State:
        """Feed the images (B, 2048) to the LSTM; return its state."""
        image, (hidden, cell) = self.embed_image(features)
        _, (hidden, cell) = self.lstm(image, (hidden.unsqueeze(0), cell.unsqueeze(0)))
        return hidden[0], cell[0]

    @torch.inference_mode()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token per sequence, int64 (B,).

        The LSTM's equations, (4) to (9), are written out: for a single step ``nn.LSTM`` spends more
        time rearranging its weights than multiplying.

        Returns:
            Logits of the next token, float32 (B, V), and the new state.
        """
        hidden, cell = state
        gates = torch.addmm(
            self._word_gates()[tokens], hidden, self.lstm.get_parameter("weight_hh_l0").t()
        )
        enter, keep, new, out = gates.chunk(4, dim=1)  # each (B, H)
        cell = keep.sigmoid_().mul_(cell).addcmul_(enter.sigmoid_(), new.tanh_())
        hidden = out.sigmoid_() * cell.tanh()
        return self.project(hidden).float(), (hidden, cell)

    def train(self, mode: bool = True) -> Decoder:
        """Switch dropout on or off."""
        # A fused optimizer changes weights without changing their versions.
        self._gates = None
        return super().train(mode)

    def _word_gates(self) -> Tensor:
        """Return every word's contribution to the four gates, (V, 4H).

        Cached until the weights are loaded, moved or trained.
        """
        sources = [
            self.word_embedding.weight,
            *map(self.lstm.get_parameter, ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0")),
        ]
        version = [(source.data_ptr(), source._version) for source in sources]
        if self._gates is None or self._gates[0] != version:
            words, weight, bias, more_bias = sources
            self._gates = version, F.linear(words, weight, bias + more_bias)
        return self._gates[1]
