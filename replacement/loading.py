"""Booting a language model as a TransformerBridge, safely: safetensors only, and no foreign code is run.

Knows where models are found and what can be wrong with them; nothing of dictionaries.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from replacement import pretrained
from replacement.errors import InputError
from replacement.finite import all_finite
from replacement.hub import require_on_hub


def load_bridge(model: str | Path, dtype: torch.dtype, device: str) -> tuple[Any, Path | None]:
    """Boot a language model as a TransformerBridge; also its directory, None for a hub id.

    model: a shipped model's name, a Hugging Face directory, or a hub id.
    Raises InputError, one line, where it is missing, damaged, not finite, or the device is not there.
    """
    from transformer_lens.model_bridge import TransformerBridge

    source, local = _find(model)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device!r}: is not available here ({str(error).splitlines()[0]}); pass cpu"
        ) from error
    _quiet()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            language_model, tokenizer = _load(source, local, dtype)
            _check_finite(language_model, source)
            bridge = TransformerBridge.boot_transformers(
                source, hf_model=language_model.eval(), tokenizer=tokenizer, dtype=dtype, device=device
            )
    except InputError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError and its own kinds
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model {source!r}: cannot be loaded ({type(error).__name__}: {reason}); pass {_choices()}"
        ) from error
    return bridge, Path(source) if local else None


def _find(model: str | Path) -> tuple[str, bool]:
    """What to hand to the libraries, and whether it is a directory."""
    if str(model) in pretrained.names():
        return str(pretrained.directory(str(model))), True
    if Path(model).is_dir():
        return str(model), True
    if Path(model).is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1:
        raise InputError(f"model {str(model)!r}: no such directory; pass {_choices()}")
    require_on_hub(str(model), "config.json", what="model", choices=_choices())
    return str(model), False


def _choices() -> str:
    return ", ".join(["a directory", "a hub id", *pretrained.names()])


def _load(source: str, local: bool, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    language_model, info = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation="eager", use_safetensors=True, output_loading_info=True, **options
    )
    if info["missing_keys"]:
        raise InputError(f"model {source!r}: its file lacks weights, among them {sorted(info['missing_keys'])[0]}")
    return language_model, AutoTokenizer.from_pretrained(source, **options)


def _check_finite(language_model: nn.Module, source: str) -> None:
    for name, parameter in language_model.named_parameters():
        if not all_finite(parameter):
            raise InputError(
                f"model {source!r}: {name} has values that are not finite (NaN or inf); the file is damaged"
            )


def _quiet() -> None:
    """Leave standard error to this project's own words."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
