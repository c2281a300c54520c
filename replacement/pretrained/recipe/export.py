"""The model folder: weights, config, tokenizer, task table and model card in the Hugging Face layout.

Weights are stored in half precision and read back in single precision, so the folder's own file is what is evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from replacement.pretrained.recipe import tokenizer
from replacement.pretrained.recipe.decoder import Decoder, llama_config, llama_weights
from replacement.pretrained.recipe.vocabulary import BOS, PAD, word_ids


def write_json(path: Path, content: object) -> None:
    """Write a JSON file with an end of line."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(decoder: Decoder, folder: Path) -> None:
    """Write weights (float16), configuration and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {"bos": word_ids()[BOS], "pad": word_ids()[PAD]}
    write_json(folder / "config.json", llama_config(decoder.shape, **ids))
    generation = {"bos_token_id": ids["bos"], "pad_token_id": ids["pad"], "do_sample": False, "max_new_tokens": 8}
    write_json(folder / "generation_config.json", generation)
    weights = {name: value.half() for name, value in llama_weights(decoder).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library writes it for its owner only
    tokenizer.save(folder)


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    """The model of a folder as a function from token ids to logits, read by transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.no_grad()
    def next_token_logits(ids: Tensor) -> Tensor:
        return model(ids).logits

    return next_token_logits
