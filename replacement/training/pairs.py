"""Which language models can be compared feature by feature: those that read the same tokens in the same way.

Knows bridges' configurations and tokenizers; nothing of crosscoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from replacement.errors import InputError


def require_comparable(bridges: Mapping[str, Any]) -> None:
    """Raise `InputError` unless all models have one width, one vocabulary and one tokenizer.

    bridges: TransformerBridges by name. Their numbers of layers may differ.
    """
    (first, one), *others = bridges.items()
    for name, other in others:
        for what, field in (("width", "d_model"), ("vocabulary", "d_vocab")):
            mine, its = getattr(one.cfg, field), getattr(other.cfg, field)
            if mine != its:
                raise InputError(
                    f"models {first} and {name}: have {what} {mine} and {its}, need the same; compare a model with a "
                    "fine-tuned version of itself"
                )
        if (one.tokenizer is None) != (other.tokenizer is None) or (
            one.tokenizer is not None and one.tokenizer.get_vocab() != other.tokenizer.get_vocab()
        ):
            raise InputError(
                f"models {first} and {name}: their tokenizers give one text different tokens, need the same; compare a "
                "model with a fine-tuned version of itself"
            )
