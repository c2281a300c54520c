"""How a report looks: on a terminal with colours and columns, elsewhere as the same plain text.

Knows rich and the facts of `circuits.report`; nothing of how they were found.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from circuits.report import Prediction, Report, Route, Step, Theme, place, quoted
from graphs.names import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from circuits.commands.models import Shipped
    from circuits.preflight import Preflight
    from circuits.prompts import Outcome

WIDTH = 100
"""Widest line, and the width where there is no terminal to ask."""
TOKEN, FEATURE, TARGET, ERROR, FAINT, TITLE = "green", "yellow", "bold magenta", "red", "dim", "bold"
PROMPT_TOKENS = 40
"""Of longer prompts only the end is shown."""
PROMPT_CELLS = 40
"""How much of a prompt a table shows."""


def emit(*parts: RenderableType) -> None:
    """Print to standard output, at most WIDTH wide; without a terminal as plain text."""
    probe = Console(highlight=False)
    if probe.is_terminal:
        Console(highlight=False, width=min(probe.width, WIDTH)).print(*parts, sep="\n")
        return
    plain = Console(highlight=False, width=WIDTH, file=io.StringIO(), color_system=None)
    with plain.capture() as captured:
        plain.print(*parts, sep="\n")
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def show(
    facts: Report, *, files: Mapping[Path, str] | None = None, notes: Iterable[str] = (), took: str | None = None
) -> None:
    """Print a report; `files` are what was written (path -> what for), `notes` further lines, `took` the time."""
    arrow = _arrow()
    parts: list[RenderableType] = [_headline(facts, arrow), _origin(facts)]
    parts += [_section("Strongest routes from the prompt to the answer", _routes(facts.routes, arrow))]
    if facts.themes:
        parts.append(_section("Features that matter most", _themes(facts.themes)))
    parts.append(_section("The graph", _sizes(facts)))
    if files:
        parts.append(_files(files))
    spaced = (Padding(part, (0, 0, 1, 0), expand=False) for part in parts[:-1])
    closing = [Text(line, FAINT) for line in (*notes, took) if line]
    emit(Group(*spaced, parts[-1], *closing))


def show_files(files: Mapping[Path, str]) -> None:
    """Print which files were written, and what for."""
    emit(_files(files))


def show_prompts(outcomes: Sequence[Outcome], *, folder: Path, seconds: float) -> None:
    """Print what came of many prompts, a line each."""
    table = _grid(6, justify=("right", "left", "left", "right", "right", "right"))
    heads = ("", "prompt", "next token", "replacement", "completeness", "seconds")
    table.add_row(*(Text(head, FAINT) for head in heads))
    for one in outcomes:
        prompt = Text(printable(one.prompt) if one.error is None else "failed: " + printable(one.prompt))
        prompt.truncate(PROMPT_CELLS, overflow="ellipsis")
        if one.found is None:
            table.add_row(str(one.number), prompt, style=ERROR)
            continue
        said = Text(printable(one.found["prediction"]).strip(), TARGET)
        said.append(f" {_percent(one.found['probability'])}", FAINT)
        scores = (f"{one.found[name]:.3f}" for name in ("replacement_score", "completeness_score"))
        took = Text("done before", FAINT) if one.skipped else Text(f"{one.seconds:.1f}")
        table.add_row(str(one.number), prompt, said, *scores, took)
    skipped, failed = sum(one.skipped for one in outcomes), sum(one.found is None for one in outcomes)
    counts = [f"{len(outcomes) - skipped - failed} traced"]
    counts += [f"{skipped} done before"] * bool(skipped) + [f"{failed} failed"] * bool(failed)
    emit(
        table,
        Text(f"\n{', '.join(counts)}, in {seconds:.1f} s; one folder each, and prompts.jsonl, in {folder}", FAINT),
    )


def show_expected(expected: Preflight) -> None:
    """Print what to expect of a trace."""
    layers = "  ".join(f"L{layer} {count:,}" for layer, count in enumerate(expected.features_by_layer))
    parts = f"tracing {expected.tracing_seconds:.1f}, pruning and writing {expected.finishing_seconds:.1f}"
    model, rows = (f"{size / 1e9:.2f} GB" for size in (expected.loaded_bytes, expected.rows_bytes))
    grid = _grid(3)
    for name, value, meaning in (
        ("tokens", f"{expected.tokens:,}", ""),
        ("active features", f"{expected.active_features:,}", layers),
        ("rows to compute", f"{expected.rows:,}", f"with about {expected.edges:,} edges"),
        ("time", f"{expected.seconds:.1f} s", f"after loading: {parts}"),
        ("memory", f"{expected.peak_bytes / 1e9:.2f} GB", f"at most: {model} once loaded, {rows} for the rows kept"),
    ):
        grid.add_row(Text(name, FAINT), Text(value, TITLE), Text(meaning, FAINT))
    emit(grid, Text("\ncounts are exact; time and memory come from a few rows that were traced", FAINT))


def show_models(models: Sequence[Shipped]) -> None:
    """Print the shipped models and their dictionaries, a line each."""
    grid = _grid(3)
    for model in models:
        shape = f"{model.architecture}, {model.n_layers} layers, d_model {model.d_model}, {model.vocabulary:,} tokens"
        grid.add_row(Text(model.name, TITLE), Text(shape), Text(f"{model.megabytes:.1f} MB in all", FAINT))
        for one in model.dictionaries:
            size = f"{one.n_features:,} features, {one.megabytes:.1f} MB"
            name = Text(f"  {one.name}").append("  (default)" if one.default else "", FAINT)
            grid.add_row(name, Text(one.kind.replace("_", " ")), Text(size, FAINT))
        grid.add_row(Text("  neurons"), Text("the model's own MLP neurons"), Text("needs no training", FAINT))
    emit(grid, Text("\nuse one with: circuits trace PROMPT --model NAME --dictionaries SET", FAINT))


def _headline(facts: Report, arrow: str) -> Text:
    line = Text()
    tokens = [token for token in facts.tokens[-PROMPT_TOKENS:]]
    if len(facts.tokens) > PROMPT_TOKENS:
        line.append("... ", FAINT)
    prompt = facts.prompt if len(facts.tokens) <= PROMPT_TOKENS else "".join(tokens)
    line.append(prompt, TITLE).append(f" {arrow} ", FAINT)
    if facts.predictions:
        line.append(facts.predictions[0].token.strip(), TARGET)
    return line


def _origin(facts: Report) -> Table:
    grid = _grid(2)
    if facts.predictions:
        grid.add_row(Text("next token", FAINT), _listed(facts.predictions))
    grid.add_row(Text("traced", FAINT), _traced(facts))
    if facts.sources:
        shown = [Prediction(source.token, source.share) for source in facts.sources[:5]]
        grid.add_row(Text("comes from", FAINT), _listed(shown, style=TOKEN))
    grid.add_row(Text("model", FAINT), Text(facts.model or "not said"))
    grid.add_row(Text("dictionaries", FAINT), Text(facts.dictionaries or "not said"))
    if facts.linearised:
        grid.add_row(Text("linearised", FAINT), Text(facts.linearised))
    return grid


def _traced(facts: Report) -> Text:
    """What is explained: in words where it is simply the likeliest tokens."""
    targets, predictions = [one.token for one in facts.targets], [one.token for one in facts.predictions]
    both = min(len(targets), len(predictions))
    if not both or targets[:both] != predictions[:both]:
        return _listed(facts.targets)
    if len(targets) == 1:
        return Text(targets[0].strip(), TARGET)
    together = _percent(sum(one.probability for one in facts.targets))
    return Text(f"the {len(targets)} most probable, {together} together")


def _listed(predictions: Sequence[Prediction], *, style: str = TARGET) -> Text:
    line = Text()
    for number, (token, probability) in enumerate(predictions):
        line.append("   " if number else "").append(token.strip() or repr(token), style if number == 0 else "")
        line.append(f" {_percent(probability)}", FAINT)
    return line


def _routes(routes: Sequence[Route], arrow: str) -> RenderableType:
    if not routes:
        return Text("none: the pruned graph has no way from a token to a target", FAINT)
    grid = _grid(3, justify=("right", "left", "left"))
    for route in routes:
        sign = Text("+", "blue") if route.sign > 0 else Text("-", ERROR)
        line = Text()
        for number, step in enumerate(route.steps):
            line.append(f" {arrow} " if number else "", FAINT)
            line.append_text(_step(step, route.steps[number - 1] if number else None))
        grid.add_row(_percent(route.share), sign, line)
    key = Text("share of the answer's input in the pruned graph; + pushes the answer up, - down; L layer", FAINT)
    return Group(grid, key)


def _step(step: Step, before: Step | None) -> Text:
    if step.kind == "token":
        return Text(step.words, TOKEN)
    if step.kind == "target":
        return Text(step.words, TARGET)
    where = place(step, before)
    text = Text(quoted(step), FEATURE if step.kind == "feature" else ERROR)
    return text.append(f" ({where})", FAINT) if where else text


def _themes(themes: Sequence[Theme]) -> Table:
    grid = _grid(3, justify=("right", "left", "left"))
    for theme in themes:
        first, last = theme.layers
        over = ", ".join(theme.tokens[:4]) + (", ..." if len(theme.tokens) > 4 else "")
        layers = f"L{first}" if first == last else f"L{first}-{last}"
        many = f", {theme.features} features" if theme.features > 1 else ""
        where = Text(f"{layers} at {over}{many}", FAINT)
        grid.add_row(_percent(theme.share), Text(theme.words, FEATURE), where)
    return grid


def _sizes(facts: Report) -> RenderableType:
    columns = [facts.pruned] if facts.whole is None else [facts.whole, facts.pruned]
    grid = _grid(len(columns) + 2, justify=("left", *["right"] * len(columns), "left"))
    heads = ["as stored" if facts.thresholds is None else "pruned"] if facts.whole is None else ["whole", "pruned"]
    grid.add_row("", *(Text(head, FAINT) for head in heads), "")

    def row(title: str, field: str, meaning: str, *, share: bool = False) -> None:
        values = [getattr(column, field) for column in columns]
        grid.add_row(title, *(f"{value:.3f}" if share else f"{value:,}" for value in values), Text(meaning, FAINT))

    thresholds = (
        ""
        if facts.thresholds is None
        else "pruned to {:g} of nodes' and {:g} of edges' influence".format(*facts.thresholds)
    )
    row("nodes", "nodes", thresholds)
    row(
        "  features", "features", f"of {facts.active_features:,} active on this prompt" if facts.active_features else ""
    )
    row("  errors", "errors", "what the dictionaries missed, one a layer and position")
    dropped = f"the smallest left out, at most {_percent(facts.dropped_share)} of a node's inputs"
    row("edges", "edges", dropped if facts.dropped_share else "")
    row("replacement", "replacement_score", "1: all comes from the prompt's tokens, none from errors", share=True)
    row("completeness", "completeness_score", "1: no node has an error among its inputs", share=True)
    row("error share", "error_share", "share of all influence that errors hold", share=True)
    if facts.residual is None:
        return grid
    proof = f"edges into a node add up to the node's value; largest relative error {facts.residual:.0e}"
    lines: list[RenderableType] = [grid, Text("proof         ").append(proof, FAINT)]
    if facts.products_error:
        moved = (
            f"attention's were rounded to bfloat16: rows moved by up to {_percent(facts.products_error)} of their size"
        )
        lines.append(Text("products      ").append(moved, FAINT))
    return Group(*lines)


def _files(files: Mapping[Path, str]) -> Group:
    sections = []
    for folder in dict.fromkeys(path.parent for path in files):
        grid = _grid(2)
        for path, purpose in files.items():
            if path.parent == folder:
                grid.add_row(Text(path.name), Text(purpose, FAINT))
        sections.append(_section(f"Written to {folder}", grid))
    return Group(*sections)


def _section(title: str, body: RenderableType) -> Group:
    return Group(Text(title, TITLE), Padding(body, (0, 0, 0, 2), expand=False))


def _grid(columns: int, *, justify: Sequence[str] | None = None) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for number in range(columns):
        grid.add_column(justify=justify[number] if justify else "left", no_wrap=False)  # type: ignore[arg-type]
    return grid


def _percent(share: float) -> str:
    value = 100 * share
    return f"{value:.0f}%" if value >= 99.95 else f"{value:.1f}%" if value >= 0.1 or value == 0 else "< 0.1%"


def _arrow() -> str:
    try:
        "─▶".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "->"
    return "─▶"


class Stages:
    """One line on standard error that says what is going on, with a bar where the end is known; only on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)
        self.about = ""  # what all that follows is a part of

    def begin(self, what: str) -> None:
        """Say what begins now."""
        self._progress.reset(self._task, total=None, description=self.about + what)

    def advance(self, done: int, total: int) -> None:
        """Say how much of it is done."""
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def stages() -> Iterator[Stages]:
    """Yield a line of progress that vanishes at the end."""
    bar = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*bar, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        yield Stages(progress)
