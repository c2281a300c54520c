"""The model folder: weights, config, tokenizer, task table and model card in the Hugging Face layout.

Weights are stored in half precision and read back in single precision, so the folder's own file is what is evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from replacement.errors import InputError
from replacement.pretrained.recipe import tokenizer
from replacement.pretrained.recipe.decoder import Decoder, Shape, from_llama, llama_config, llama_weights
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


def load_decoder(folder: Path) -> Decoder:
    """The model of a folder that `export` wrote, to train on; raises `InputError` where it is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        shape = Shape(
            n_vocabulary=config["vocab_size"],
            d_model=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_attention_heads"],
            d_mlp=config["intermediate_size"],
            context=config["max_position_embeddings"],
            rope_theta=config["rope_parameters"]["rope_theta"],
            norm_epsilon=config["rms_norm_eps"],
        )
        return from_llama(weights, shape)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"model {str(folder)!r}: is no folder of this recipe's making ({reason})") from error


def load(folder: Path) -> Callable[[Tensor], Tensor]:
    """The model of a folder as a function from token ids to logits, read by transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.no_grad()
    def next_token_logits(ids: Tensor) -> Tensor:
        return model(ids).logits

    return next_token_logits
