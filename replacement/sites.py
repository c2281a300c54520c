"""Where a language model is read and written: the only file that knows hook names.

Everything a trace needs of the language model is gathered here from transformer-lens's TransformerBridge: the weights
of the linear path (norms, value and output maps) and, for one prompt, what one forward pass leaves behind (attention
patterns, norm scales, residual streams). Knows nothing of dictionaries, features or targets.

Sites are named as the bridge names them, without `blocks.{layer}.`, and lie at one of five places of a block:

| place | site | is |
| --- | --- | --- |
| PRE | `hook_resid_pre` | the residual stream as it enters the block |
| ATTENTION | `attn.hook_out` | attention's output, before a post-norm where the family has one |
| | `hook_attn_out` | what attention adds to the stream, after a post-norm |
| MID | `hook_resid_mid` | the residual stream after attention |
| MLP | `mlp.hook_in` | the MLP's input: the second norm's output, weight and bias applied |
| | `ln2.hook_normalized` | the same before the norm's weight and bias |
| | `mlp.hook_out` | the MLP's output, before a post-norm |
| | `hook_mlp_out` | what the MLP adds to the stream, after a post-norm |
| POST | `hook_resid_post` | the residual stream as it leaves the block |
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.errors import InputError

MLP_READS = ("mlp.hook_in", "ln2.hook_normalized", "hook_resid_mid")
"""Where a dictionary that replaces an MLP may read."""


class Place(enum.IntEnum):
    """Where in a block something is read and written; the order is that of computation."""

    PRE = 0
    ATTENTION = 1
    MID = 2
    MLP = 3
    POST = 4


class Slot(NamedTuple):
    """One place of one block; slots sort in the order of computation."""

    layer: int
    place: Place


WRITES = {
    "hook_resid_pre": Place.PRE,
    "attn.hook_out": Place.ATTENTION,
    "hook_attn_out": Place.ATTENTION,
    "hook_resid_mid": Place.MID,
    "mlp.hook_out": Place.MLP,
    "hook_mlp_out": Place.MLP,
    "hook_resid_post": Place.POST,
}
"""Where a dictionary may write; a dictionary that reads where it writes replaces what stands there."""
SITES = tuple(dict.fromkeys((*MLP_READS, *WRITES)))

Hook = tuple[str, Callable[..., Tensor | None]]


class Norm(NamedTuple):
    """`x -> (x - center * mean(x)) / scale * weight (+ bias)`; the scale belongs to a prompt and is kept apart."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"] | None
    center: bool


class BlockWeights(NamedTuple):
    """The linear path of one block."""

    ln1: Norm
    ln2: Norm
    ln1_post: Norm | None
    ln2_post: Norm | None
    W_V: Float[Tensor, "kv_heads d_model d_head"]
    b_V: Float[Tensor, "kv_heads d_head"] | None
    W_O: Float[Tensor, "heads d_head d_model"]
    b_O: Float[Tensor, " d_model"] | None


class ModelWeights(NamedTuple):
    """The linear path of the whole model."""

    blocks: tuple[BlockWeights, ...]
    ln_final: Norm
    W_U: Float[Tensor, "d_model vocab"]
    b_U: Float[Tensor, " vocab"]
    logit_soft_cap: float | None
    parallel: bool  # attention and MLP of a block read the same residual (GPT-NeoX)


class BlockPass(NamedTuple):
    """What one block left behind on one prompt."""

    pattern: Float[Tensor, "heads query key"]
    ln1_scale: Float[Tensor, "pos 1"]
    ln2_scale: Float[Tensor, "pos 1"]
    ln1_post_scale: Float[Tensor, "pos 1"] | None
    ln2_post_scale: Float[Tensor, "pos 1"] | None
    at: dict[str, Float[Tensor, "pos d_model"]]  # site -> activations


class ForwardPass(NamedTuple):
    """What one forward pass over one prompt left behind."""

    tokens: Int[Tensor, " pos"]
    embedding: Float[Tensor, "pos d_model"]  # token embeddings as they enter the first block
    position_embedding: Float[Tensor, "pos d_model"] | None
    blocks: tuple[BlockPass, ...]
    ln_final_scale: Float[Tensor, "pos 1"]
    final: Float[Tensor, "pos d_model"]  # output of the last norm
    logits: Float[Tensor, "pos vocab"]


def hook_name(layer: int, site: str) -> str:
    """The bridge's full name of a site: `hook_name(3, "mlp.hook_in") == "blocks.3.mlp.hook_in"`."""
    return f"blocks.{layer}.{site}"


def read_weights(bridge: Any, dtype: torch.dtype) -> ModelWeights:
    """The linear path's weights of a TransformerBridge, as tensors of `dtype` that share memory where they can."""

    def norm(component: Any) -> Norm:
        offset = 1.0 if component.uses_weight_offset else 0.0
        original = component.original_component
        bias = None if component.uses_rms_norm else getattr(original, "bias", None)
        return Norm(
            (component.weight.detach().to(dtype) + offset) if offset else component.weight.detach().to(dtype),
            None if bias is None else bias.detach().to(dtype),
            center=not component.uses_rms_norm,
        )

    def cast(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).contiguous()

    def optional(build: Callable[[Any], Any], value: Any) -> Any:
        return None if value is None else build(value)

    try:
        blocks = tuple(
            BlockWeights(
                norm(block.ln1),
                norm(block.ln2),
                optional(norm, getattr(block, "ln1_post", None)),
                optional(norm, getattr(block, "ln2_post", None)),
                cast(block.attn.W_V),
                optional(cast, block.attn.b_V),
                cast(block.attn.W_O),
                optional(cast, block.attn.b_O),
            )
            for block in bridge.blocks
        )
        soft_cap = getattr(bridge.cfg, "output_logits_soft_cap", None)
        return ModelWeights(
            blocks,
            norm(bridge.ln_final),
            cast(bridge.W_U),
            cast(bridge.b_U),
            soft_cap if soft_cap and soft_cap > 0 else None,
            bool(getattr(bridge.cfg, "parallel_attn_mlp", False)),
        )
    except AttributeError as error:
        raise InputError(
            f"{bridge.cfg.model_name}: the linear path does not know this architecture ({error})"
        ) from error


def use_exact_norms(bridge: Any) -> None:
    """Let every norm compute in the model's own precision: Hugging Face's RMSNorms compute in float32 even in a
    float64 model."""
    for module in bridge.modules():
        if hasattr(module, "use_native_layernorm_autograd"):
            module.use_native_layernorm_autograd = False


def forward(bridge: Any, tokens: Int[Tensor, " pos"], dtype: torch.dtype) -> ForwardPass:
    """One forward pass at batch 1, with everything a trace needs kept, as tensors of `dtype`."""
    wanted = {_EMBEDDED, "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_out"}
    suffixes = (*_BLOCK_HOOKS.values(), *SITES)
    wanted |= {hook_name(layer, suffix) for layer in range(len(bridge.blocks)) for suffix in suffixes}
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(
            tokens[None], names_filter=lambda name: name in wanted, return_cache_object=False
        )
    if odd := next((name for name, value in cache.items() if value.ndim < 3), None):
        raise InputError(f"{bridge.cfg.model_name}: the linear path does not know this architecture ({odd}: no batch)")
    kept = {name: value[0].detach().to(dtype) for name, value in cache.items()}

    def block(layer: int) -> BlockPass:
        values = {suffix: kept[hook_name(layer, suffix)] for suffix in suffixes if hook_name(layer, suffix) in kept}
        fields: dict[str, Any] = {field: values.get(suffix) for field, suffix in _BLOCK_HOOKS.items()}
        return BlockPass(**fields, at={site: values[site] for site in SITES if site in values})

    position_embedding = kept.get("hook_pos_embed")
    embedded = kept[_EMBEDDED]  # not hook_embed: Gemma scales its embeddings on the way in
    return ForwardPass(
        tokens,
        embedded if position_embedding is None else embedded - position_embedding,
        position_embedding,
        tuple(block(layer) for layer in range(len(bridge.blocks))),
        kept["ln_final.hook_scale"],
        kept["ln_final.hook_out"],
        logits[0].detach().to(dtype),
    )


_EMBEDDED = "blocks.0.hook_resid_pre"
_BLOCK_HOOKS = {
    "pattern": "attn.hook_pattern",
    "ln1_scale": "ln1.hook_scale",
    "ln2_scale": "ln2.hook_scale",
    "ln1_post_scale": "ln1_post.hook_scale",
    "ln2_post_scale": "ln2_post.hook_scale",
}
"""Field of BlockPass -> hook."""


def freeze_hooks(forward_pass: ForwardPass, *, norms: bool, patterns: bool = True) -> list[Hook]:
    """Hooks that hold attention patterns and norm scales, as asked, at their values on the prompt.

    Values are constants to autograd, so a backward pass through the hooked model sees a model that is linear in all but
    its MLPs.
    """

    def constant(value: Tensor) -> Callable[..., Tensor]:
        return lambda tensor, hook: value[None].to(tensor.dtype)

    hooks: list[Hook] = []
    for layer, block in enumerate(forward_pass.blocks):
        if patterns:
            hooks.append((hook_name(layer, "attn.hook_pattern"), constant(block.pattern)))
        if norms:
            scales = {name: getattr(block, field) for field, name in _BLOCK_HOOKS.items() if field.endswith("scale")}
            hooks += [(hook_name(layer, name), constant(value)) for name, value in scales.items() if value is not None]
    if norms:
        hooks.append(("ln_final.hook_scale", constant(forward_pass.ln_final_scale)))
    return hooks


def patterns_take_edits(bridge: Any) -> bool:
    """Whether editing `attn.hook_pattern` changes what every block's attention writes (not so for GPT-Neo's).

    Runs two tokens with each pattern doubled, which doubles what attention moves, and looks at attention's output.
    """
    tokens = torch.tensor([0, 1], device=next(bridge.parameters()).device)
    names = [hook_name(layer, "attn.hook_out") for layer in range(len(bridge.blocks))]
    outputs: list[dict[str, Tensor]] = [{}, {}]

    def keep(into: dict[str, Tensor], name: str) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: object) -> None:
            into[name] = tensor.detach().clone()

        return hook

    with torch.no_grad():
        hooked(bridge, tokens, [(name, keep(outputs[0], name)) for name in names])
        for layer, name in enumerate(names):  # one at a time: an edit below would change every output above
            double = (hook_name(layer, "attn.hook_pattern"), lambda tensor, hook: 2 * tensor)
            hooked(bridge, tokens, [double, (name, keep(outputs[1], name))])
    return all(not torch.equal(outputs[0][name], outputs[1][name]) for name in names)


def hooked(bridge: Any, tokens: Int[Tensor, " pos"], hooks: list[Hook]) -> Float[Tensor, "pos vocab"]:
    """The logits of one prompt with hooks in place."""
    with warnings.catch_warnings():  # the bridge warns that edited norms round differently; that is meant here
        warnings.simplefilter("ignore", UserWarning)
        return bridge.run_with_hooks(tokens[None], fwd_hooks=hooks)[0]
