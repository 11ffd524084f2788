"""Recurrent networks that predict the next character."""

from __future__ import annotations

from torch import Tensor, nn

from lamina.models.knobs import whole


class CharModel(nn.Module):
    """Embedding, recurrent layers, `fc`: int64 [B, T] -> logits [B, vocab], or [B, vocab, T] with `every_step`."""

    def __init__(
        self, cell: type[nn.LSTM] | type[nn.GRU], vocab: int, embed: int, hidden: int, layers: int, every_step: bool
    ) -> None:
        super().__init__()
        for knob, value in (("vocab", vocab), ("embed", embed), ("hidden", hidden), ("layers", layers)):
            whole(knob, value)
        self.every_step = every_step
        self.embed = nn.Embedding(vocab, embed)
        self.rnn = cell(embed, hidden, layers, batch_first=True)
        self.fc = nn.Linear(hidden, vocab)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(self.embed(x))  # [B, T, hidden]
        logits: Tensor = self.fc(states if self.every_step else states[:, -1])
        return logits.transpose(1, 2) if self.every_step else logits


def char_lstm(
    vocab: int = 80, embed: int = 8, hidden: int = 256, layers: int = 2, *, every_step: bool = False
) -> CharModel:
    """LEAF's Shakespeare model: 80 characters in, the next one out; 819,920 parameters with 80 symbols.

    Args:
        vocab: symbols, in and out.
        embed: width of the embedding.
        hidden: width of the recurrent layers.
        layers: how many of them.
        every_step: predict after every character, not only after the last: logits [B, vocab, T], as cross-entropy
            takes them with targets [B, T].
    """
    return CharModel(nn.LSTM, vocab, embed, hidden, layers, every_step)


def char_gru(
    vocab: int = 86, embed: int = 256, hidden: int = 1024, layers: int = 1, *, every_step: bool = True
) -> CharModel:
    """The GRU of TFF's text generation that FLARE uses: 4,048,470 parameters; arguments as in `char_lstm`."""
    return CharModel(nn.GRU, vocab, embed, hidden, layers, every_step)
