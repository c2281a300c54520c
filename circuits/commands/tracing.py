"""What every form of `circuits trace` does: load the model, trace one prompt, write its files.

Knows the command's options; nothing of how results are shown, and not whether there is one prompt or many.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from circuits.commands.options import thresholds

if TYPE_CHECKING:
    from circuits.display import Stages
    from circuits.report import Prediction, Report
    from circuits.saved_rows import SavedRows
    from replacement import ReplacementModel

N_PREDICTIONS = 5
ROWS = "circuits-rows"  #: folder in the output folder where rows are kept while a long trace goes on
LOADING = ("dictionaries", "dtype", "device")
TRACING = (
    *("position", "max_logits", "logit_probability", "max_features", "trace_bos"),
    *("engine", "products", "mlp", "attention", "ig_steps", "drop", "memory"),
)


class Traced(NamedTuple):
    """One prompt's graph, told and written."""

    facts: Report
    settings: dict[str, Any]
    """What the graph's header says of how it was made."""
    files: dict[Path, str]
    """What was written: path -> format."""


class Clock:
    """How long each stage took."""

    def __init__(self) -> None:
        self._stages: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add what happens inside to a stage."""
        started = perf_counter()
        yield
        self._stages[stage] = self._stages.get(stage, 0.0) + perf_counter() - started

    def __str__(self) -> str:
        return ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self._stages.items())


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that `attribute` takes."""
    return {name: getattr(arguments, name) for name in TRACING}


def load(arguments: argparse.Namespace) -> ReplacementModel:
    """Load the model, unless a setting is wrong whatever the prompt; raises InputError.

    Under torchrun every process takes a GPU of its own where `--device cuda` names none.
    """
    from circuits.attribution import check_settings
    from replacement import ReplacementModel

    check_settings(**settings(arguments))
    loading = {name: getattr(arguments, name) for name in LOADING}
    if arguments.device == "cuda" and "LOCAL_RANK" in os.environ:
        import torch

        loading["device"] = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
    return ReplacementModel.load(arguments.model, **loading)


def trace(
    model: ReplacementModel,
    arguments: argparse.Namespace,
    *,
    prompt: str,
    targets: Sequence[str] | None,
    folder: Path,
    formats: Sequence[str],
    clock: Clock,
    progress: Stages,
) -> Traced:
    """Trace a prompt and write its files into a folder, all of them or none; raises InputError as `attribute` does."""
    from circuits import attribute, outputs
    from circuits.report import report
    from circuits.saved_rows import SavedRows
    from graphs import prune

    saved = SavedRows(folder / ROWS, resume=arguments.resume)
    progress.begin("tracing")
    with clock.time("tracing"):
        predictions = _predictions(model, prompt, arguments.position)
        advance: Callable[[int, int], None] = progress.advance
        graph = attribute(model, prompt, targets=targets, saved=saved, progress=advance, **settings(arguments))
    progress.begin("pruning")
    with clock.time("pruning and writing"), _told(saved):
        pruned = prune(graph, **thresholds(arguments))
        facts = report(graph, pruned, predictions=predictions)
        files = outputs.names(folder, formats)
        outputs.write(graph, pruned, files)
        saved.remove()
    return Traced(facts, dict(graph.settings), files)


@contextmanager
def _told(saved: SavedRows) -> Iterator[None]:
    """Where Ctrl-C comes after the rows, say that they are still there."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or saved.left()) from None


def check_thresholds(arguments: argparse.Namespace) -> None:
    """Refuse a wrong threshold before the long work, not after it."""
    from graphs.pruning import check_threshold

    for name, value in thresholds(arguments).items():
        check_threshold(name, value)


def _predictions(model: ReplacementModel, prompt: str, position: int | None) -> tuple[Prediction, ...]:
    from circuits.report import Prediction
    from replacement.errors import InputError

    logits = model.logits(prompt)
    at = -1 if position is None else position
    if not -len(logits) <= at < len(logits):
        raise InputError(f"position {at}: the prompt has positions 0 to {len(logits) - 1} (0 is BOS)")
    top = logits[at].double().softmax(-1).topk(min(N_PREDICTIONS, logits.shape[-1]))
    words = model.token_strings(top.indices)
    return tuple(Prediction(token, float(p)) for token, p in zip(words, top.values, strict=True))
