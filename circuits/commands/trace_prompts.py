"""`circuits trace --prompts`: many prompts with one model, a folder each, and a table of what came of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from circuits import __version__
from circuits.commands import tracing
from circuits.commands.options import print_json, thresholds

if TYPE_CHECKING:
    from circuits.prompts import Outcome, Prompt


def run(arguments: argparse.Namespace, folder: Path, formats: Sequence[str]) -> int:
    """Trace them all; returns 1 where some failed."""
    started = perf_counter()
    from circuits.outputs import names
    from circuits.prompts import Share, gather, read_prompts, trace_all
    from replacement.errors import InputError

    if arguments.dry_run:
        raise InputError("--dry-run: needs one PROMPT, not --prompts; pass the longest of them")
    share, prompts, outcomes = Share.of_environment(), read_prompts(arguments.prompts), []
    if (first := next(prompts, None)) is None:
        raise InputError(f"--prompts {arguments.prompts!r}: holds no prompt; put one on a line")
    with _tracer(arguments, formats) as trace:
        try:
            for outcome in trace_all(
                chain([first], prompts),
                root=folder,
                trace=trace,
                settings=_settings(arguments),
                files=[path.name for path in names(folder, formats)],
                share=share,
            ):
                outcomes.append(outcome)
        except KeyboardInterrupt as stop:
            done = sum(outcome.error is None for outcome in outcomes)
            said = f"{done} prompts are done, in {folder}; the same command goes on from there"
            raise KeyboardInterrupt("; of the next one ".join(part for part in (said, str(stop)) if part)) from None
    if share.join():
        if share.rank:
            return 0
        outcomes = gather(folder, share)
    return _report(outcomes, arguments, folder, perf_counter() - started)


@contextmanager
def _tracer(
    arguments: argparse.Namespace, formats: Sequence[str]
) -> Iterator[Callable[[Prompt, Path], dict[str, Any]]]:
    """What traces one prompt with the one model, and says what its line in the listing holds."""
    from circuits.display import stages

    with stages() as progress:
        progress.begin(f"loading {arguments.model}")
        model = tracing.load(arguments)

        def trace(prompt: Prompt, folder: Path) -> dict[str, Any]:
            clock, started = tracing.Clock(), perf_counter()
            progress.about = f"prompt {prompt.number}: "
            facts, _, _ = tracing.trace(
                model,
                arguments,
                prompt=prompt.text,
                targets=prompt.targets or arguments.target,
                folder=folder,
                formats=formats,
                clock=clock,
                progress=progress,
            )
            sizes = facts.whole or facts.pruned
            return {
                "prediction": facts.predictions[0].token,
                "probability": facts.predictions[0].probability,
                "replacement_score": sizes.replacement_score,
                "completeness_score": sizes.completeness_score,
                "error_share": sizes.error_share,
                "residual": facts.residual,
                "tokens": len(facts.tokens),
                "active_features": facts.active_features,
                "nodes": sizes.nodes,
                "edges": sizes.edges,
                "seconds": round(perf_counter() - started, 3),
            }

        yield trace


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that decides what a folder holds, but for the prompt and its own targets."""
    names = ("model", "dictionaries", "dtype", "target")
    given = {name: getattr(arguments, name) for name in names}
    decides = {name: value for name, value in tracing.settings(arguments).items() if name != "memory"}
    return {"version": __version__, **given, **decides, **thresholds(arguments)}


def _report(outcomes: Sequence[Outcome], arguments: argparse.Namespace, folder: Path, seconds: float) -> int:
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if arguments.json:
        counts = {"skipped": sum(outcome.skipped for outcome in outcomes), "failed": len(failed)}
        listed = [json.loads(outcome.line()) for outcome in outcomes]
        print_json({"output": str(folder), "prompts": listed, **counts, "seconds": round(seconds, 3)})
    else:
        from circuits.display import show_prompts

        show_prompts(outcomes, folder=folder, seconds=seconds)
    for outcome in failed:
        line = f"circuits: prompt {outcome.number}: {outcome.error}"
        print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
    return 1 if failed else 0
