"""`circuits diff-models`: a model and a fine-tuned one, compared feature by feature by a crosscoder over both."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from time import perf_counter

from circuits.commands.options import add, print_json

LOAD, DIFF = "replacement.model:ReplacementModel.load", "circuits.model_diff:diff_models"


def configure(parser: argparse.ArgumentParser) -> None:
    """Name the command's arguments."""
    parser.add_argument("base", metavar="BASE", help="a shipped model, a Hugging Face directory, or a hub id")
    parser.add_argument("tuned", metavar="TUNED", help="the same model after fine-tuning")
    add(parser, LOAD, "--dtype", "float32, float64, bfloat16 or float16")
    add(parser, LOAD, "--device", "a torch device such as cpu or cuda")
    what = parser.add_argument_group("crosscoder")
    what.add_argument("--crosscoder", type=Path, metavar="DIR", help="take this one, train none")
    text = "text that shows the difference: 'atlas', 'atlas-changed', a text or .jsonl file, or hf:owner/name"
    add(what, DIFF, "--data", text)
    add(what, DIFF, "--text-field", "of JSON objects", metavar="NAME")
    what.add_argument("--layer", type=int, metavar="N", help="layer to read (default: where a few tokens differ most)")
    add(what, DIFF, "--site", "hook to read there, in both models")
    add(what, DIFF, "--features", "features of the crosscoder", type=int, metavar="N")
    add(what, DIFF, "--k", "features a token, on average", type=int, metavar="N")
    add(what, DIFF, "--tokens", "tokens to train on", type=int, metavar="N")
    add(what, DIFF, "--context", "tokens of a row, at most the models'", type=int, metavar="N")
    add(what, DIFF, "--seed", "of training and text", type=int, metavar="N")
    report = parser.add_argument_group("report")
    add(report, DIFF, "--held-out", "held-out tokens to measure on", type=int, metavar="N")
    add(report, DIFF, "--top", "features listed of each model", type=int, metavar="N")
    report.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for diff.json and the crosscoder; a stopped run goes on (default: circuits-out/BASE-to-TUNED)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Load both models, train and measure, report."""
    started = perf_counter()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `trace`
    from circuits.commands.eval import finite
    from circuits.display_diff import show_comparison
    from circuits.model_diff import BASE, TUNED, diff_models
    from circuits.report import as_json
    from replacement.errors import InputError
    from replacement.formats.drafts import write_whole
    from replacement.loading import load_bridge
    from replacement.model import DTYPES

    if arguments.dtype not in DTYPES:
        raise InputError(f"--dtype {arguments.dtype!r}: needs one of {', '.join(DTYPES)}")
    names = {BASE: arguments.base, TUNED: arguments.tuned}
    bridges = {which: load_bridge(name, DTYPES[arguments.dtype], arguments.device)[0] for which, name in names.items()}
    out = arguments.output or Path("circuits-out", "-to-".join(_short(name) for name in names.values()))
    training = ("data", "text_field", "layer", "site", "features", "k", "tokens", "context", "seed", "crosscoder")
    compared = diff_models(
        bridges,
        names=(arguments.base, arguments.tuned),
        out=out,
        show_progress=not arguments.json,
        **{name: getattr(arguments, name) for name in (*training, "held_out", "top")},
    )
    found = finite(as_json(compared))
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "diff.json", (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    seconds = perf_counter() - started
    if arguments.json:
        print_json({**found, "file": str(out / "diff.json"), "seconds": round(seconds, 3)})
    else:
        show_comparison(compared, written=out / "diff.json", took=f"{seconds:.0f} s")


def _short(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(name).name).strip("-.") or "model"
