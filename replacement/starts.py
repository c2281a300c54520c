"""Which tokens are start tokens: they hold no text, and neither training nor evaluation looks at dictionaries there.

Rows of token ids are documents packed one after another, a start token before each of them, so that start tokens stand
inside of rows too. Knows tokenizers and ids; nothing of models.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor


def start_token(tokenizer: Any) -> int | None:
    """BOS, or what stands in its place where a tokenizer has none: padding, end of text; None where it has neither."""
    first = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in first if token is not None), None)


def start_tokens(ids: Int[Tensor, "documents pos"], start: int | None) -> Bool[Tensor, "documents pos"]:
    """Which tokens of rows are start tokens: the first of each row, and the id `start` (None: no other) anywhere."""
    found = ids == (-1 if start is None else start)
    found[:, 0] = True
    return found
