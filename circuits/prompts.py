"""Many prompts, one folder each: reading the list, sharing it over processes, and leaving out what is done already.

A folder is done when its `prompt.json` names the same prompt and settings and every file asked for is there; that
record is written last. Knows files and processes; nothing of models, or of how one prompt is traced.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from circuits.outputs import slug
from graphs.errors import InputError as GraphInputError
from graphs.files import whole_file
from replacement.errors import InputError

RECORD = "prompt.json"
PATIENCE = timedelta(days=30)  #: how long a process that is done waits for the others


class Prompt(NamedTuple):
    """One entry of a list of prompts."""

    number: int
    """Its place in the list, from 1."""
    text: str
    targets: tuple[str, ...] = ()
    """What to explain; () for what the command says."""
    fault: str = ""
    """Why the entry is no prompt; "" where it is one."""


@dataclass(frozen=True)
class Outcome:
    """What came of one prompt; a line of `prompts.jsonl`."""

    number: int
    prompt: str
    targets: tuple[str, ...] = ()
    folder: str | None = None
    """Where its files are; None where it failed."""
    error: str | None = None
    """Why it failed, in one line."""
    skipped: bool = False
    """Whether it was done before."""
    seconds: float = 0.0
    found: Mapping[str, Any] | None = None
    """The graph's figures, as the caller's `trace` gave them."""

    def line(self) -> str:
        """The outcome as one line of JSON, without what is empty."""
        flat = {name: value for name, value in asdict(self).items() if value not in (None, ()) and name != "found"}
        return json.dumps(flat | dict(self.found or {}), default=str) + "\n"


class Share(NamedTuple):
    """Which part of the list is this process's: under torchrun every WORLD_SIZE-th prompt."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """The share that RANK and WORLD_SIZE name, all of the list where they are not set."""
        rank, processes = (os.environ.get(name, value) for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if not (rank.isdecimal() and processes.isdecimal() and int(rank) < int(processes)):
            raise InputError(f"RANK={rank!r}, WORLD_SIZE={processes!r}: needs whole numbers, 0 <= RANK < WORLD_SIZE")
        return cls(int(rank), int(processes))

    def has(self, prompt: Prompt) -> bool:
        """Whether a prompt is this process's."""
        return (prompt.number - 1) % self.processes == self.rank

    def listing(self, root: Path) -> Path:
        """Where this process lists what it did."""
        return root / ("prompts.jsonl" if self.processes == 1 else f"prompts.rank{self.rank}.jsonl")

    def join(self) -> bool:
        """Wait until every process of torchrun is here; False where there is nobody to wait for.

        torchrun ends all processes as soon as one of them fails, so none may say that a prompt failed before all are
        done.
        """
        if self.processes == 1 or "MASTER_ADDR" not in os.environ:
            return False
        from torch import distributed

        distributed.init_process_group("gloo", timeout=PATIENCE)
        distributed.barrier()
        distributed.destroy_process_group()
        return True


def read_prompts(source: str) -> Iterator[Prompt]:
    """The prompts of a file, one after another as they are read.

    source: a text file with one prompt a line, blank lines skipped; "-" for the same from standard input; or a `.jsonl`
    file of objects with `prompt` and perhaps `target`, a text or a list of them. An entry that is none of those has a
    `fault`. Raises InputError where the file cannot be read.
    """
    try:
        is_json = Path(source).suffix.lower() == ".jsonl"
        number = 0
        with nullcontext(sys.stdin) if source == "-" else open(source, encoding="utf-8-sig") as lines:
            for line in lines:
                if line.strip():
                    number += 1
                    yield _parse(number, line) if is_json else Prompt(number, line.rstrip("\r\n"))
    except OSError as problem:
        raise InputError(f"--prompts {source!r}: can't be read ({problem.strerror}); pass a text file") from problem
    except UnicodeDecodeError as problem:
        raise InputError(f"--prompts {source!r}: is not UTF-8 text ({problem.reason}); pass a text file") from problem


def _parse(number: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return Prompt(number, line, fault="is not JSON; needs an object with 'prompt'")
    if not isinstance(entry, dict) or not isinstance(text := entry.get("prompt"), str):
        return Prompt(number, line, fault="needs an object with 'prompt', a text")
    if unknown := entry.keys() - {"prompt", "target"}:
        return Prompt(number, text, fault=f"has {min(unknown)!r}; needs 'prompt' and perhaps 'target', nothing else")
    target = entry.get("target")
    targets = [] if target is None else [target] if isinstance(target, str) else target
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        return Prompt(number, text, fault="needs a text, or a list of texts, as 'target'")
    return Prompt(number, text, tuple(targets))


def trace_all(
    prompts: Iterable[Prompt],
    *,
    root: Path,
    trace: Callable[[Prompt, Path], Mapping[str, Any]],
    settings: Mapping[str, Any],
    files: Sequence[str],
    share: Share,
) -> Iterator[Outcome]:
    """Trace this process's share of the prompts, each into `root/NUMBER-WORDS`; yields what came of each.

    trace: traces one prompt into a folder, and returns the figures that its line of `prompts.jsonl` holds; the
        number of seconds, `seconds`, is among them. What it raises makes the prompt fail, and the next one's turn.
    settings: what the prompts have in common; a folder made with others is made anew.
    files: names of the files that each folder has to have.
    The listing grows by a line a prompt, and is written whole at the end.
    """
    root.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with open(share.listing(root), "a", encoding="utf-8") as listing:
        for prompt in prompts:
            if not share.has(prompt):
                continue
            folder = root / f"{prompt.number:04}-{slug(prompt.text)}"
            made_with = {"settings": json.loads(json.dumps(dict(settings), default=str)), "targets": [*prompt.targets]}
            outcome = _done(prompt, folder, made_with, files) or _attempt(prompt, folder, made_with, trace)
            if not outcome.skipped:
                listing.write(outcome.line())
                listing.flush()
            outcomes.append(outcome)
            yield outcome
    write_listing(share.listing(root), [outcome.line() for outcome in outcomes])


def _attempt(
    prompt: Prompt, folder: Path, made_with: Mapping[str, Any], trace: Callable[[Prompt, Path], Mapping[str, Any]]
) -> Outcome:
    outcome = Outcome(prompt.number, prompt.text, prompt.targets)
    try:
        if prompt.fault:
            raise InputError(f"entry {prompt.number}: {prompt.fault}")
        (folder / RECORD).unlink(missing_ok=True)  # from now on until all files are there, the folder is not done
        found = dict(trace(prompt, folder))
        record = {"prompt": prompt.text, **made_with, "found": found}
        with whole_file(folder / RECORD, call="trace") as draft:
            draft.write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
    except (InputError, GraphInputError) as mistake:
        return replace(outcome, error=" ".join(str(mistake).split()))
    except Exception as problem:  # one prompt too long for the memory must not cost the others
        return replace(outcome, error=" ".join(f"{type(problem).__name__}: {problem}".split()))
    return replace(outcome, folder=folder.name, seconds=found.pop("seconds"), found=found)


def _done(prompt: Prompt, folder: Path, made_with: Mapping[str, Any], files: Sequence[str]) -> Outcome | None:
    """What an earlier run found, where it left the folder whole."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = {"prompt": prompt.text, **made_with}
    if not isinstance(record, dict) or {name: record.get(name) for name in wanted} != wanted:
        return None
    if not all((folder / name).is_file() for name in files):
        return None
    found = record["found"]
    seconds = found.pop("seconds")
    return Outcome(prompt.number, prompt.text, prompt.targets, folder.name, None, True, seconds, found)


def write_listing(path: Path, lines: Iterable[str]) -> None:
    """Write a listing whole."""
    with whole_file(path, call="trace") as draft:
        draft.write_text("".join(lines), encoding="utf-8")


def gather(root: Path, share: Share) -> list[Outcome]:
    """What all processes listed, in the prompts' order, written as one `prompts.jsonl` too."""
    listed = [Share(rank, share.processes).listing(root) for rank in range(share.processes)]
    lines = [line for path in listed if path.is_file() for line in path.read_text(encoding="utf-8").splitlines(True)]
    outcomes = sorted((_outcome(json.loads(line)) for line in lines), key=lambda outcome: outcome.number)
    write_listing(root / "prompts.jsonl", [outcome.line() for outcome in outcomes])
    return outcomes


def _outcome(entry: dict[str, Any]) -> Outcome:
    own = {
        name: entry.pop(name) for name in ("number", "prompt", "folder", "error", "skipped", "seconds") if name in entry
    }
    return Outcome(**own, targets=tuple(entry.pop("targets", ())), found=entry or None)
