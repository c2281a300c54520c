"""Random Llama models with random dictionaries, for benchmarks: folders that this tool and circuit-tracer both load.

Knows no tool: a model is a Hugging Face folder, dictionaries are in circuit-tracer's format.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed
from transformers.utils.logging import disable_progress_bar

KINDS = {"transcoder": "transcoder_set", "clt": "cross_layer_transcoder"}
"""Kind of dictionaries, and its name in `config.yaml`."""
VOCABULARY, CONTEXT, D_HEAD = 1000, 2048, 64
BOS = 1


def prompt_ids(tokens: int) -> list[int]:
    """A prompt of so many token ids, BOS first; the others are words, and few of them are alike."""
    return [BOS, *((37 * i * i) % (VOCABULARY - 3) + 3 for i in range(tokens - 1))]


def prompt_text(tokens: int) -> str:
    """`prompt_ids` in words; tokenizing adds the BOS."""
    return " ".join(f"w{token}" for token in prompt_ids(tokens)[1:])


def make_model(folder: Path, *, layers: int, width: int) -> None:
    """Save a random model whose weights keep activations near 1, with a tokenizer of the words `w3`, `w4`, ..."""
    set_seed(0)
    disable_progress_bar()
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // D_HEAD, "num_key_value_heads": width // D_HEAD}
    limits = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **heads, **limits, initializer_range=width**-0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {"<unk>": 0, "<bos>": BOS, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    saved = folder / "tokenizer_config.json"
    said = json.loads(saved.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # a name that 4.x knows too
    saved.write_text(json.dumps(said))


def make_dictionaries(folder: Path, *, kind: str, layers: int, width: int, features: int, active: float) -> None:
    """Save ReLU dictionaries that have about `active` active features a token and layer.

    They read what a norm wrote, of root mean square 1: with encoder rows of about unit length pre-activations are
    normal, and the encoder's bias is the quantile that leaves so many of them above 0.
    """
    folder.mkdir(parents=True)
    config = {"model_kind": KINDS[kind], "model_name": "random", "scan": f"random-{kind}"}
    config |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    (folder / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in config.items()))
    generator = torch.Generator().manual_seed(0)
    bias = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(active / features)))

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    for layer in range(layers):
        encoder = {"W_enc": normal(features, width, scale=width**-0.5), "b_enc": torch.full((features,), bias)}
        encoder["b_dec"] = normal(width, scale=0.1)
        scale = active**-0.5
        if kind == "transcoder":
            decoder = normal(features, width, scale=scale)
            save_file(encoder | {"W_dec": decoder}, folder / f"layer_{layer}.safetensors")
            continue
        decoder = normal(features, layers - layer, width, scale=scale)
        decoder /= torch.arange(layer + 1, layers + 1)[:, None] ** 0.5  # as many layers write there
        save_file({f"{name}_{layer}": value for name, value in encoder.items()}, folder / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": decoder}, folder / f"W_dec_{layer}.safetensors")
