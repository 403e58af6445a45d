"""Floating-point operations of a decoder-only model; a multiplication with an addition counts as two.

Sources: Kaplan et al. 2020 (2N a token, and attention beside it) and Hoffmann et al. 2022, appendix F; the backward
pass of frozen weights has no weight gradients and costs as much as the forward pass, not twice as much.
"""

from hiplora.models.shapes import ModelShape


def body(shape: ModelShape) -> float:
    """Return the operations of all layers on one token, attention scores and output head left out: 2 N_body."""
    return 2.0 * (shape.parameters - shape.embedding_parameters)


def attention(shape: ModelShape, context: float) -> float:
    """Return the operations of one token's attention to `context` tokens: 4 · layers · heads · head size · context."""
    return 4.0 * shape.layers * shape.heads * shape.head_size * context


def head(shape: ModelShape) -> float:
    """Return the operations of the logits at one position: 2 · hidden · vocabulary."""
    return 2.0 * shape.hidden * shape.vocabulary


def forward(shape: ModelShape, tokens: float, positions: float, length: float) -> float:
    """Return the operations of reading tokens in texts of some length, with logits at `positions` of them."""
    return tokens * (body(shape) + attention(shape, length / 2)) + positions * head(shape)


def training(
    shape: ModelShape,
    tokens: float,
    positions: float,
    length: float,
    trainable: int,
    checkpointing: bool = False,
) -> float:
    """Return the operations of training an adapter on frozen weights.

    Forward and the gradient of the inputs: 2 × forward, of attention 3 × (its backward pass has two gradients to
    make); the adapter 6 P a token; with `checkpointing` one more forward pass through the layers.
    """
    layers = tokens * body(shape)
    attended = tokens * attention(shape, length / 2)
    again = layers + attended if checkpointing else 0.0
    return 2 * layers + 3 * attended + 2 * positions * head(shape) + 6.0 * trainable * tokens + again


def cache_bytes(shape: ModelShape, tokens: float, element_bytes: int) -> float:
    """Return the memory of the keys and values of some tokens: 2 · layers · kv heads · head size a token."""
    return 2.0 * shape.layers * shape.kv_heads * shape.head_size * element_bytes * tokens
