"""From a prompt to its attribution graph: what is asked for, checked, traced row by row, and put together.

`circuits.targets` says what is explained, `circuits.tracer` computes the rows, `circuits.assembly` makes the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from circuits.assembly import assemble
from circuits.identity import identity
from circuits.memory import budget, parse
from circuits.precision import rounding_error
from circuits.rows import check_drop
from circuits.saved_rows import SavedRows
from circuits.targets import Feature, Spec, as_specs, from_start, last_position, resolve
from circuits.tracer import Progress, Tracer
from graphs.graph import AttributionGraph
from replacement.crosscoder import Crosscoder
from replacement.errors import InputError
from replacement.linearised import Linearisation
from replacement.local import LocalModel
from replacement.model import ENGINES, ReplacementModel, check_engine

MAX_RESIDUAL = 0.01  #: relative residual beyond which rows are wrong, not rounded, in float32 and float64
ROUNDED_RESIDUAL = 0.1  #: the same where attention's products are rounded


def attribute(
    model: ReplacementModel,
    prompt: str | Int[Tensor, " pos"],
    *,
    targets: Spec | Sequence[Spec] | None = None,
    position: int | None = None,
    max_features: int | None = 7500,
    max_logits: int = 10,
    logit_probability: float = 0.95,
    engine: str = "linear",
    products: str = "exact",
    trace_bos: bool = False,
    mlp: str = "relp",
    attention: str = "frozen",
    ig_steps: int = 10,
    batch_size: int = 512,
    update_interval: int = 4,
    drop: float | None = None,
    memory: int | float | str | None = None,
    saved: SavedRows | None = None,
    progress: Progress | None = None,
) -> AttributionGraph:
    """The attribution graph of a prompt: `A[t, s] = w_t^T J(t <- s) v_s` (Ameisen et al. 2025, "Circuit Tracing").

    prompt: text, or a 1-D tensor of token ids.
    targets: what to explain: a token (`" Austin"` or an id), a difference (`"Austin - Sacramento"`), a feature
        (`"L3#1204@7"`), a `Direction` or a vector at the last norm's output, or a list of those; None: the smallest
        set of tokens that holds `logit_probability` of the distribution, at most `max_logits`.
    position: where tokens and directions are predicted; None: the last. What follows all targets is left out.
    max_features: trace the inputs of at most this many features, taken in order of influence; None: of all. Features
        left out are no nodes; what they contribute is kept as a sum (`graph.untraced`).
    engine: "linear" (matrix products) or "autograd" (the reference, slow).
    products: "exact", or "bfloat16": attention's are then rounded; the header's `products_error` is a row's error.
    trace_bos: trace position 0 like any other; by the field's convention it has no features and no errors.
    mlp, attention, ig_steps: what passes where no dictionary stands; see `Linearisation`.
    batch_size, update_interval: features are ranked anew after every `batch_size * update_interval` of them. A sweep
        takes at most `batch_size` targets, mostly fewer: as many as are fastest, and have room.
    drop: leave out the smallest edges of each row, of at most this share of its absolute sum together (`graph.dropped`
        keeps what they contribute); None: 0 up to `rows.WHOLE_ENTRIES` rows times sources, `rows.LARGE_DROP` beyond.
    memory: what the trace may take beside the model, bytes or text such as "8GB"; None: half of what is free. Rows that
        would not fit are refused, never cut.
    saved: keeps rows on disk meanwhile, and has those of a run that was stopped; the caller removes them when done.
    progress: called with (rows done, rows in all).
    Raises InputError for a prompt, target or setting that cannot be used, where the rows do not fit in memory, and
    where they do not add up because the architecture has paths that are not known here.
    """
    said: dict[str, Any] = {"engine": engine, "products": products, "trace_bos": trace_bos, "drop": drop}
    said |= {"max_features": max_features, "max_logits": max_logits, "logit_probability": logit_probability}
    check_settings(**said, batch_size=batch_size, update_interval=update_interval, memory=memory)
    with torch.no_grad():
        tracer = prepare(
            model, prompt, targets=targets, position=position, max_logits=max_logits, engine=engine, products=products,
            logit_probability=logit_probability, trace_bos=trace_bos, batch_size=batch_size, memory=memory,
            linearisation=Linearisation(mlp=mlp, attention=attention, steps=ig_steps), progress=progress,
        )  # fmt: skip
        return _traced(
            model, tracer, saved, said, update_every=batch_size * update_interval, text=_text(model, prompt),
            asked=_as_asked(model, targets),
        )  # fmt: skip


def _traced(
    model: ReplacementModel,
    tracer: Tracer,
    saved: SavedRows | None,
    said: dict[str, Any],
    *,
    update_every: int,
    text: str,
    asked: dict[str, Any],
) -> AttributionGraph:
    """All rows, and the graph that they make; rows are safe on disk, where that was asked for, whatever stops it."""
    if saved is not None:
        tracer.save_in(saved, identity(model, tracer, said | {"update_every": update_every}))
    with nullcontext() if saved is None else saved.insured(tracer.blocks):
        tracer.run(said["max_features"], update_every, said["drop"])
        found = _found(model, tracer, exact=said["products"] == "exact")
        if saved is not None:
            saved.settle(tracer.blocks)
        tracer.finish()
        graph = assemble(model, tracer, text, said | found | asked)
    _require_whole_rows(model, graph)
    return graph


def prepare(
    model: ReplacementModel,
    prompt: str | Int[Tensor, " pos"],
    *,
    targets: Spec | Sequence[Spec] | None,
    position: int | None,
    max_logits: int,
    logit_probability: float,
    engine: str,
    products: str,
    trace_bos: bool,
    linearisation: Linearisation,
    batch_size: int,
    memory: int | float | str | None,
    progress: Progress | None = None,
) -> Tracer:
    """All that comes before the first row, arguments as in `attribute`: one forward pass, features, targets."""
    tokens, specs = model.tokenize(prompt), as_specs(targets)
    last = last_position(specs, position, len(tokens))
    specs, at = from_start(specs, len(tokens)), (-1 if position is None else position) % len(tokens)
    local = model.local(tokens[: last + 1], trace_bos=trace_bos, linearisation=linearisation)
    resolved = resolve(
        model, local, specs, position=min(at, last), max_logits=max_logits, logit_probability=logit_probability
    )
    shares = budget(memory, model.device)
    rows = model.engine(local, engine, products=products, room=shares.kept)
    return Tracer(local, rows, resolved, batch_size, shares, progress)


def _text(model: ReplacementModel, prompt: str | Int[Tensor, " pos"]) -> str:
    return prompt if isinstance(prompt, str) else model.bridge.tokenizer.decode(model.tokenize(prompt).tolist())


def _found(model: ReplacementModel, tracer: Tracer, *, exact: bool) -> dict[str, Any]:
    """What the graph's header says of how its rows came to be; exact: whether products were."""
    said: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch."), "drop": tracer.drop}
    if not exact:
        said["products_error"] = rounding_error(tracer, model.engine(tracer.local, "linear", room=0))
    return said | {"dropped_share": tracer.dropped_share} | _how_linearised(tracer.local)


def _as_asked(model: ReplacementModel, targets: Spec | Sequence[Spec] | None) -> dict[str, Any]:
    """What the graph's header says of what was asked for, where that is text or numbers."""
    said: dict[str, Any] = {"sets": list(model.loaded_from)} if model.loaded_from else {}
    specs = as_specs(targets)
    if specs is not None and all(isinstance(spec, str | int | Feature) for spec in specs):
        said["targets"] = [str(spec) if isinstance(spec, Feature) else spec for spec in specs]
    return said


def _how_linearised(local: LocalModel) -> dict[str, Any]:
    """What the graph's header says of parts of the model that no dictionary replaces."""
    rule = local.linearisation
    said: dict[str, Any] = {"attention": rule.attention}
    if local.linearised:
        said |= {"mlp": rule.mlp, "linearised_mlps": local.linearised} | (
            {"ig_steps": rule.steps} if rule.mlp == "ig" else {}
        )
    if any(isinstance(dictionary, Crosscoder) for dictionary in local.coverage):
        said["acausal"] = "a crosscoder's feature stands at every layer it writes; reads of later layers are its bias"
    return said


def check_settings(**given: Any) -> None:
    """Raise InputError for a setting that `attribute` cannot use, whatever the prompt.

    given: any of its keyword arguments by name; those that take a prompt to check are let through.
    """
    check_drop(given.get("drop"))
    if given.get("memory") is not None:
        parse(given["memory"])
    rule = Linearisation()
    check_engine(
        given.get("engine", ENGINES[0]), given.get("products", "exact"), given.get("attention", rule.attention)
    )
    parts = (("mlp", "mlp"), ("attention", "attention"), ("steps", "ig_steps"))
    Linearisation(**{name: given[argument] for name, argument in parts if argument in given})
    for name in ("max_logits", "batch_size", "update_interval"):
        if name in given and (not _is_whole(given[name]) or given[name] < 1):
            raise InputError(f"attribute({name}={given[name]!r}): must be at least 1, a whole number")
    most = given.get("max_features")
    if most is not None and (not _is_whole(most) or most < 0):
        raise InputError(f"attribute(max_features={most!r}): must be 0 or more; pass None for all")
    share = given.get("logit_probability", 1)
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(f"attribute(logit_probability={share}): must be in (0, 1]; for 95 percent pass 0.95")


def _require_whole_rows(model: ReplacementModel, graph: AttributionGraph) -> None:
    """Raise InputError where rows do not add up; half precision rounds the model's own stream, and is let through."""
    if model.dtype != model.compute_dtype or graph.residual is None:
        return
    missed = f"attribute(engine={graph.settings['engine']!r}): rows miss their targets by up to {graph.residual:.0%}"
    if graph.settings["products"] == "exact" and graph.residual > MAX_RESIDUAL:
        raise InputError(
            f"{missed} of their size; the linear path does not know {model.name}'s architecture, "
            "and its graph would be wrong"
        )
    if graph.residual > ROUNDED_RESIDUAL:
        raise InputError(
            f"{missed} of their size; rounding to bfloat16 is too coarse for this prompt: use products='exact'"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
