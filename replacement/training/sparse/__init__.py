"""Sparse encoding and decoding of many tokens at once, with exact gradients, fast on a CPU.

Only the encoder's product is dense, and only to *choose* the active features: that product runs in bfloat16, a few
tokens at a time. Values of the chosen ones, the decoder and every gradient touch active entries alone, in the weights'
own precision. Knows nothing of losses, layers or training steps.
"""

from replacement.training.sparse.active import ActiveSet, active_at, in_order
from replacement.training.sparse.choice import select_above, select_top
from replacement.training.sparse.pairs import dense_pairs, encode_pairs, pairs_above, pairs_top
from replacement.training.sparse.products import decode_active, encode_active

__all__ = [
    "ActiveSet",
    "active_at",
    "decode_active",
    "dense_pairs",
    "encode_active",
    "encode_pairs",
    "in_order",
    "pairs_above",
    "pairs_top",
    "select_above",
    "select_top",
]
