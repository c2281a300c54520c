"""What a trace may take of memory, and how that is shared between a sweep's working arrays and the rows that are kept.

Knows bytes and devices; nothing of models or rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from replacement.contributions import KEPT_BYTES
from replacement.errors import InputError

FREE_SHARE = 0.5  #: of what is free, unless told otherwise: a trace is rarely alone on its machine
SWEEP_SHARE = 0.25  #: of what the trace may take, for a sweep's arrays; rows take the rest
KEPT_SHARE = 0.25  #: of what the trace may take, for what the engine keeps from sweep to sweep
SWEEP_BYTES = 512 * 2**20  #: the most a sweep takes: its products are large by then
COPIES = 2  #: rows and the graph that is made of them, at most
UNITS = {"": 1, "B": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
UNITS |= {f"{letter}i": 1024**power for power, letter in enumerate("KMGT", 1)}
LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)  #: of version 2 and 1: limit, use, and the part of it that is files read before, which makes way when asked
CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Budget:
    """Bytes that a trace may take beside model and dictionaries."""

    total: int
    """All of it, on the processor's side."""
    sweep: int
    """What the working arrays of one sweep may take, on the model's device."""
    kept: int = 0
    """What may be kept from sweep to sweep, there too."""
    given: bool = True
    """Whether the total was asked for, not found."""

    @property
    def rows(self) -> int:
        """What rows may take, so that the graph made of them has room too."""
        return max(0, self.total - self.sweep - self.kept) // COPIES

    @property
    def call(self) -> str:
        """How a message about it begins."""
        size = in_words(self.total)
        if self.given:
            return f"attribute(memory={size!r}): "
        return f"attribute(memory=None): that is {FREE_SHARE:.0%} of the memory that is free, {size}; "


def budget(memory: int | float | str | None, device: torch.device) -> Budget:
    """Share out `memory` (bytes, or text such as `"8GB"`), half of what is free where it is None.

    On a GPU the sweep's arrays are there, within the same share of what is free there. Raises InputError for what is
    no number of bytes.
    """
    total = int(FREE_SHARE * free_bytes()) if memory is None else parse(memory)
    room = total
    if device.type == "cuda":
        free = int(FREE_SHARE * torch.cuda.mem_get_info(device)[0])
        room = free if memory is None else min(free, total)
    sweep, kept = min(SWEEP_BYTES, int(SWEEP_SHARE * room)), min(KEPT_BYTES, int(KEPT_SHARE * room))
    return Budget(total, sweep, kept, given=memory is not None)


def parse(memory: int | float | str) -> int:
    """Bytes of a number or of text such as `"8GB"`, `"500 MB"`, `"1.5GiB"`; raises InputError where it is neither."""
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?i?)B?\s*", memory, re.IGNORECASE)
        unit = found and UNITS.get(found[2].upper().replace("I", "i"))
        size = float(found[1]) * unit if found and unit else 0.0
    else:
        size = memory if isinstance(memory, int | float) and not isinstance(memory, bool) else 0.0
    if not 1 <= size < 2**63:
        raise InputError(f"attribute(memory={memory!r}): needs a number of bytes above 0; for 8 gigabytes pass '8GB'")
    return int(size)


def free_bytes() -> int:
    """Memory that new work can take without swapping, within this process's control group where there is one."""
    free = int(psutil.virtual_memory().available)
    for limit, used, statistics, name in LIMITS:
        try:
            bound, taken = ((CONTROL_GROUP / file).read_text().strip() for file in (limit, used))
        except OSError:
            continue
        if bound.isdecimal() and taken.isdecimal():
            held = max(0, int(taken) - _statistic(CONTROL_GROUP / statistics, name))
            free = min(free, max(0, int(bound) - held))
    return free


def _statistic(path: Path, name: str) -> int:
    """A number of a file that has a name and a number a line; 0 where it has none of that name."""
    try:
        found = dict(line.split(maxsplit=1) for line in path.read_text().splitlines() if " " in line)
    except OSError:
        return 0
    number = found.get(name, "").strip()
    return int(number) if number.isdecimal() else 0


def in_words(size: float) -> str:
    """A number of bytes, as people write it."""
    for name in ("B", "KB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {name}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"
