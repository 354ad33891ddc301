"""The two matrix products of attention, with a place to round each of their inputs."""

from torch import Tensor, nn


class AttentionInput(nn.Identity):
    """Marks an input of a matrix product of two activations; a quantized copy rounds there."""


class Probabilities(AttentionInput):
    """Marks an input that is the output of a softmax."""


class AttentionMatmuls(nn.Module):
    """softmax(q k^T + bias) v; each of the four inputs passes a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = AttentionInput(), AttentionInput()
        self.attention, self.value = Probabilities(), AttentionInput()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """The attended values, [windows, heads, tokens, d].

        Args:
            q: queries [windows, heads, tokens, d], already scaled.
            k: keys of the same shape.
            v: values of the same shape.
            bias: [n, heads, tokens, tokens] for each n windows after one another.
        """
        scores = self.query(q) @ self.key(k).transpose(-2, -1)
        scores = (scores.unflatten(0, (-1, len(bias))) + bias).flatten(0, 1)
        return self.attention(scores.softmax(-1)) @ self.value(v)
