"""Command line of the recipe: `train` makes a model folder, `finetune` one that believes other facts, `tasks` prints a
model's accuracies, `dictionaries` makes its sets.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from replacement.errors import InputError
from replacement.pretrained import directory
from replacement.pretrained.recipe import dictionaries, finetune, tasks
from replacement.pretrained.recipe.card import card
from replacement.pretrained.recipe.export import export, load, write_json
from replacement.pretrained.recipe.training import Progress, Run, Schedule

HEADLINES = (
    "city_state",
    "two_hop_seen_states",
    "two_hop_h1_states",
    "two_hop_h2_states",
    "two_hop_h2_countries",
    "antonym_across_held_out",
    "indirect_object",
    "induction",
    "sum_held_out",
    "greater_than",
)
"""Tasks that are printed while training."""
PRINT_EVERY = 100
"""Steps between lines while training."""


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    top = argparse.ArgumentParser(prog="python -m replacement.pretrained.recipe", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the model and write its folder")
    train.add_argument("--out", type=Path, required=True, help="folder of the model; training.pt in it is resumed")
    train.add_argument(
        "--steps", type=int, default=Schedule().steps, help="updates of the main part (default: %(default)s)"
    )
    train.add_argument(
        "--finish-steps", type=int, default=Schedule().finish_steps, help="updates after it (default: %(default)s)"
    )
    train.add_argument("--minutes", type=float, help="stop after so many CPU minutes; run again to go on")
    train.add_argument("--seed", type=int, default=Schedule().seed)
    train.add_argument("--every", type=int, default=1000, help="steps between checkpoints (default: %(default)s)")
    train.add_argument("--no-compile", action="store_true", help="do not use torch.compile (no C++ compiler)")
    train.set_defaults(run=run_train)
    tune = commands.add_parser("finetune", help="fine-tune the model on changed facts and write its folder")
    tune.add_argument("--out", type=Path, required=True, help="folder of the fine-tuned model")
    tune.add_argument("--model", type=Path, help="model folder to start from (default: the one that ships)")
    tune.add_argument("--steps", type=int, default=finetune.SCHEDULE.steps, help="updates (default: %(default)s)")
    tune.add_argument("--seed", type=int, default=finetune.SCHEDULE.seed)
    tune.set_defaults(run=run_finetune)
    table = commands.add_parser("tasks", help="print the accuracy of a model folder by task")
    table.add_argument("--model", type=Path, help="model folder (default: the one that ships)")
    table.set_defaults(run=run_tasks)
    dictionaries.add_commands(commands)
    return top


def train(out: Path, schedule: Schedule, *, every: int, minutes: float | None = None) -> dict[str, float]:
    """Train, or go on from `training.pt` in `out`; write the model folder; return its accuracies by task."""
    out.mkdir(parents=True, exist_ok=True)
    run, checkpoint = Run(schedule), out / "training.pt"
    if checkpoint.exists():
        run.resume(checkpoint)
    for now in run.train(minutes=minutes):
        if now.step % PRINT_EVERY == 0:
            losses = f"loss on answers {now.answer_loss:.3f}, on other tokens {now.other_loss:.3f}"
            print(f"step {now.step}/{schedule.updates}  {now.seconds:.0f} s  {losses}", file=sys.stderr, flush=True)
        if now.step % every == 0 and now.step < schedule.updates:
            run.save(checkpoint)
            export(run.trained, out)
            scores = tasks.evaluate(load(out))
            shown = "  ".join(f"{name} {100 * scores[name]:.1f}" for name in HEADLINES)
            print(f"  {shown}", file=sys.stderr, flush=True)
    run.save(checkpoint)
    export(run.trained, out)
    scores = tasks.evaluate(load(out))
    write_json(out / "tasks.json", {name: round(value, 4) for name, value in scores.items()})
    (out / "README.md").write_text(card(schedule, run.model.shape, scores), encoding="utf-8")
    return scores


def run_train(given: argparse.Namespace) -> int:
    """Carry out the `train` command."""
    schedule = Schedule(
        steps=given.steps, finish_steps=given.finish_steps, seed=given.seed, compiled=not given.no_compile
    )
    _print(train(given.out, schedule, every=given.every, minutes=given.minutes))
    return 0


def run_finetune(given: argparse.Namespace) -> int:
    """Carry out the `finetune` command."""

    def report(now: Progress) -> None:
        if now.step % PRINT_EVERY == 0:
            losses = f"loss on answers {now.answer_loss:.3f}, on other tokens {now.other_loss:.3f}"
            print(f"step {now.step}/{given.steps}  {now.seconds:.0f} s  {losses}", file=sys.stderr, flush=True)

    schedule = replace(finetune.SCHEDULE, steps=given.steps, seed=given.seed)
    scores = finetune.finetune(given.model or directory("atlas"), given.out, schedule, report=report)
    for name, value in scores.changed.items():
        print(f"changed, {name:27s} {100 * value:6.1f} %   old answer {100 * scores.old[name]:6.1f} %")
    _print(scores.tasks)
    return 0


def run_tasks(given: argparse.Namespace) -> int:
    """Carry out the `tasks` command."""
    folder = given.model or directory("atlas")
    if not (folder / "config.json").exists():
        raise InputError(f"tasks(model={str(folder)!r}): no config.json there; give a model folder")
    model = load(folder)
    _print(tasks.evaluate(model))
    _print(tasks.evaluate(model, {"every held-out comparison": tasks.every_comparison()}))
    return 0


def _print(scores: dict[str, float]) -> None:
    for name, value in scores.items():
        print(f"{name:36s} {100 * value:6.1f} %")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        given = parser().parse_args(arguments)
        torch.set_num_threads(1)
        return given.run(given)
    except InputError as mistake:
        print(mistake, file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
