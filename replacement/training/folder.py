"""The folder of a training run: whose it is, that one run at a time writes there, and the settings that it keeps.

Knows nothing of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from replacement.errors import InputError
from replacement.formats import RUN
from replacement.formats.drafts import write_whole
from replacement.training.sharded_checkpoint import has_checkpoint

SETTINGS, LOCK = RUN, ".lock"
STAGES = "reconstruction", "end_to_end"
LAST_STAGE = STAGES[-1]
ADJUSTABLE = ("learning_rate",)
"""Settings of a stage that a stopped run may go on with at another value: what it has trained fits them all."""


def checkpoint_of(out: Path, stage: str) -> Path:
    """Where a stage keeps what it goes on from."""
    return out / "checkpoints" / f"{stage}.safetensors"


def has_kept(out: Path, stages: Sequence[str] = STAGES) -> bool:
    """Whether any of these stages can go on from a step that it kept."""
    return any(has_checkpoint(checkpoint_of(out, stage)) for stage in stages)


@contextmanager
def held(out: Path, *, by_this: bool) -> Iterator[None]:
    """Keep a folder for one run while the context lasts; by_this: by this process, not by another of the same run.

    Raises `InputError` where another run has it, or it cannot be made.
    """
    if not by_this:
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{out}: another process trains here; wait for its end, or pass another folder") from error
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); pass another folder") from error
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)  # while it is held, so that nobody's is removed
        lock.release()


def to_write(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `write_settings` is to put into a folder before a run begins or goes on there; None where it is there.

    A run that was stopped before it kept anything has not begun, whatever its settings were, and nor has a last stage.
    One that goes on with an adjusted setting keeps the earlier value under `earlier`. Raises `InputError` where the
    folder is another's.
    """
    path, wanted = out / SETTINGS, json.loads(json.dumps(settings))
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; pass a folder")
    if not path.exists():
        if out.exists() and any(not one.name.startswith(".") for one in out.iterdir()):
            raise InputError(f"{out}: is not empty and holds no {SETTINGS}; pass a new folder")
        return wanted
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        earlier = stored.pop("earlier", [])
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: not readable JSON ({error}); put it back, or delete all of the folder to start over"
        ) from error
    differ = differences(stored, wanted)
    if "source" not in differ and stored.get("source"):
        differ.pop("data", None)  # another name of the same text
    if not differ:
        return None
    finished = (out / "config.json").exists()
    if not (finished or has_kept(out)):
        return wanted
    if not (finished or has_kept(out, [LAST_STAGE])):
        differ = {name: words for name, words in differ.items() if name.partition(".")[0] != LAST_STAGE}
    wrong = {name: words for name, words in differ.items() if finished or name.rpartition(".")[2] not in ADJUSTABLE}
    if wrong:
        if len(wrong) > 1:
            wrong.pop("source", None)  # other settings may well be why
        raise InputError(
            f"{out}: holds a run with other settings ({'; '.join([*wrong.values()][:3])}); pass another folder"
        )
    return {**wanted, **({"earlier": [*earlier, *differ.values()]} if earlier or differ else {})}


def write_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder this run's; raises `InputError` where the disk does not take it."""
    try:
        write_whole(out / SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(
            f"{out / SETTINGS}: cannot be written ({error.strerror or error}); make room there and run it again"
        ) from error


def read_settings(out: Path) -> dict[str, Any]:
    """What `write_settings` put there, with earlier values of what was adjusted."""
    return json.loads((out / SETTINGS).read_text(encoding="utf-8"))


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], *, within: str = "") -> dict[str, str]:
    """What differs, by the setting's name: `stage.name` where it is a stage's."""
    found: dict[str, str] = {}
    for name in [*wanted, *(name for name in stored if name not in wanted)]:
        old, new = stored.get(name), wanted.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, within=f"{name}.")
        elif name == "source":
            found[name] = "the model's weights or the data have changed since"
        else:
            found[within + name] = f"{within}{name} {_short(old)} there, {_short(new)} here"
    return found


def _short(value: object) -> str:
    words = "none" if value is None else str(value)
    return words if len(words) <= 40 else words[:37] + "..."
