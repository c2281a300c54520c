"""`circuits trace`: a prompt's attribution graph, reported in words and written to files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from circuits.commands import tracing
from circuits.commands.options import add, add_thresholds, print_json

ATTRIBUTE = "circuits.attribution:attribute"
LOAD = "replacement.model:ReplacementModel.load"


def configure(parser: argparse.ArgumentParser) -> None:
    """Name the command's arguments."""
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("prompt", metavar="PROMPT", nargs="?", help="text whose next token is explained")
    given.add_argument(
        "--prompts",
        metavar="FILE",
        help="trace many: one prompt a line, '-' for standard input, or .jsonl with 'prompt' and perhaps 'target'; "
        "each gets a folder in -o DIR, and those that are done are skipped when the command is given again",
    )
    model = parser.add_argument_group("model")
    add(model, LOAD, "--model", "a shipped model, a Hugging Face directory, or a hub id")
    add(
        model,
        LOAD,
        "--dictionaries",
        "a set that comes with the model, a folder, a hub id, or 'neurons'; repeat it for several that share the model "
        "(default: the model's first set)",
        action="append",
        metavar="SET",
    )
    add(model, LOAD, "--dtype", "float32, float64, bfloat16 or float16")
    add(model, LOAD, "--device", "a torch device such as cpu or cuda")
    _configure_tracing(parser)
    add_thresholds(parser)
    _configure_output(parser)


def _configure_tracing(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to trace")
    what.add_argument(
        "--target",
        action="append",
        metavar="T",
        help="a token (' Austin'), a difference ('Austin - Sacramento') or a feature ('L3#1204@7'); repeat it for "
        "several (default: the most probable next tokens)",
    )
    add(
        what, ATTRIBUTE, "--position", "explain the prediction at this token instead of the last", type=int, metavar="P"
    )
    add(what, ATTRIBUTE, "--max-logits", "without --target: trace at most N tokens", type=int, metavar="N")
    add(
        what,
        ATTRIBUTE,
        "--logit-probability",
        "without --target: trace tokens with this much probability",
        type=float,
        metavar="SHARE",
    )
    add(what, ATTRIBUTE, "--max-features", "trace the N most influential features only", type=int, metavar="N")
    add(
        what,
        ATTRIBUTE,
        "--drop",
        "leave out each node's smallest inputs, up to this share of them all (default: 0, or 0.001 for large graphs)",
        type=float,
        metavar="SHARE",
    )
    add(what, ATTRIBUTE, "--trace-bos", "trace the first position like any other", action="store_true")
    add(what, ATTRIBUTE, "--engine", "linear (fast) or autograd (the reference)")
    add(what, ATTRIBUTE, "--products", "exact, or bfloat16: faster; the error is measured and kept", metavar="HOW")
    add(
        what,
        ATTRIBUTE,
        "--memory",
        "what the trace may take beside the model, such as 8GB (default: half of what is free)",
        metavar="BYTES",
    )
    rest = parser.add_argument_group("what no dictionary replaces")
    add(rest, ATTRIBUTE, "--mlp", "linearise MLPs by relp, jacobian, ig or stop", metavar="RULE")
    add(rest, ATTRIBUTE, "--attention", "frozen (values move by the pattern) or gradient (queries and keys too)")
    add(rest, ATTRIBUTE, "--ig-steps", "points of integrated gradients", type=int, metavar="N")


def _configure_output(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("output")
    out.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="folder (default: circuits-out/ and the prompt's words)"
    )
    out.add_argument(
        "--format",
        metavar="LIST",
        help="svg, png, json, dot, graphml, native; several with commas (default: svg,json,dot,native)",
    )
    out.add_argument(
        "--resume",
        action="store_true",
        help=f"go on from the rows that a stopped trace has left in the output folder, in {tracing.ROWS}/",
    )
    out.add_argument(
        "--dry-run", action="store_true", help="print what to expect, and trace nothing: features, rows, time, memory"
    )


def run(arguments: argparse.Namespace) -> int:
    """Trace, prune, write, report; returns the exit code, 1 where some of many prompts failed."""
    # before torch is loaded: its threads sleep while they wait. Spinning, as they do by default, makes a small model's
    # trace take 20 times as long on a machine whose cores are busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from circuits import outputs
    from replacement.errors import InputError

    formats = outputs.parse_formats(arguments.format)
    name = outputs.slug(arguments.prompt if arguments.prompts is None else Path(arguments.prompts).stem)
    folder = arguments.output or outputs.ROOT / name
    outputs.check_folder(folder)
    tracing.check_thresholds(arguments)
    if arguments.prompts is not None:
        from circuits.commands import trace_prompts

        return trace_prompts.run(arguments, folder, formats)
    if arguments.dry_run:
        if arguments.resume:
            raise InputError("--dry-run: traces nothing, so there is nothing to go on with; leave --resume out")
        _expect(arguments)
    else:
        _trace(arguments, folder, formats)
    return 0


def _trace(arguments: argparse.Namespace, folder: Path, formats: Sequence[str]) -> None:
    started = perf_counter()
    from circuits import outputs
    from circuits.display import show, stages
    from circuits.report import as_json
    from circuits.saved_rows import SavedRows

    if arguments.resume and SavedRows(folder / tracing.ROWS).empty:
        print(f"circuits: --resume: no stopped trace has left rows in {folder}; tracing anew", file=sys.stderr)
    clock = tracing.Clock()
    with stages() as progress:
        progress.begin(f"loading {arguments.model}")
        with clock.time("loading"):
            model = tracing.load(arguments)
        facts, settings, files = tracing.trace(
            model,
            arguments,
            prompt=arguments.prompt,
            targets=arguments.target,
            folder=folder,
            formats=formats,
            clock=clock,
            progress=progress,
        )
    seconds = perf_counter() - started
    if arguments.json:
        written = {name: str(path) for path, name in files.items()}
        print_json({**as_json(facts), "settings": settings, "files": written, "seconds": round(seconds, 3)})
        return
    notes = [] if arguments.format or outputs.has_graphviz() else [outputs.NO_GRAPHVIZ]
    purposes = {path: outputs.FORMATS[name].purpose for path, name in files.items()}
    show(facts, files=purposes, notes=notes, took=f"{seconds:.1f} s: {clock}")


def _expect(arguments: argparse.Namespace) -> None:
    """Say what a trace would take."""
    from circuits.display import show_expected, stages
    from circuits.preflight import preflight

    with stages() as progress:
        progress.begin(f"loading {arguments.model}")
        model = tracing.load(arguments)
        progress.begin("sampling rows")
        expected = preflight(model, arguments.prompt, targets=arguments.target, **tracing.settings(arguments))
    if arguments.json:
        print_json(expected.as_json())
        return
    show_expected(expected)
