"""What a trace may take is said in bytes or words, shared out, and never silently exceeded or cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from circuits import attribute, memory
from circuits.memory import COPIES, Budget, budget, free_bytes, in_words, parse
from circuits.tracer import _Fit, _sweep_batch, sweep_bytes
from replacement import InputError, columns
from tests.tiny import PROMPT

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("said", "size"),
    [
        (5, 5),
        (2.5e9, 2_500_000_000),
        ("8GB", 8_000_000_000),
        ("8 gb", 8_000_000_000),
        ("500M", 500_000_000),
        (".5kB", 500),
        ("1.5GiB", 1_610_612_736),
        ("2tib", 2 * 1024**4),
        ("700", 700),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(said, size):
    assert parse(said) == size


@pytest.mark.parametrize(
    "said", ["", "GB", "-1GB", "8 gigabytes", "1e9", "nan", 0, -5, True, float("nan"), float("inf")]
)
def test_what_is_no_size_is_refused(said, tiny_model):
    with pytest.raises(InputError, match=r"attribute\(memory=.*\): needs a number of bytes above 0; .* pass '8GB'"):
        attribute(tiny_model(), PROMPT, memory=said)


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (256 * 2**20, "268 MB"), (1.23456e12, "1,235 GB")]
)
def test_sizes_are_said_in_few_digits(size, words):
    assert in_words(size) == words


@pytest.mark.parametrize("total", [1, 10**6, 10**9, 10**12])
def test_what_is_shared_out_is_what_there_is(total):
    shared = budget(total, CPU)
    assert shared.sweep + shared.kept + COPIES * shared.rows <= shared.total == total
    assert shared.sweep <= memory.SWEEP_BYTES
    assert shared.sweep + shared.kept + COPIES * shared.rows >= total - COPIES


def test_the_default_is_a_share_of_what_is_free():
    assert 0 < budget(None, CPU).total < free_bytes()


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("5000", "2000", 3000), ("5000", "9000", 0), ("max", "2000", None)]
)
def test_a_control_group_bounds_what_is_free(limit, used, free, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    machine = free_bytes()
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    if free is None:
        assert free_bytes() == pytest.approx(machine, rel=0.2)
    else:
        assert free_bytes() == free


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
            "total_inactive_file",
        ),
    ],
)
@pytest.mark.parametrize("statistics", [True, False])
def test_files_that_were_read_before_are_free(names, line, statistics, tmp_path: Path, monkeypatch):
    """A control group counts them as used, and drops them when memory is asked for."""
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    texts = ("10000\n", "9900\n", f"anon 2000\nactive_file 900\n{line} 7000\n")
    for name, text in list(zip(names, texts, strict=True))[: 3 if statistics else 2]:
        (tmp_path / name).write_text(text)
    assert free_bytes() == (7100 if statistics else 100)


def test_little_memory_means_small_sweeps_and_the_same_rows(tiny_model):
    model = tiny_model()
    whole = attribute(model, PROMPT)
    room = 4 * 3 * sweep_bytes(model.local(PROMPT))  # for three targets at once
    part = attribute(model, PROMPT, memory=max(room, 10 * 12 * whole.n_edges))
    assert (part.adjacency.indices == whole.adjacency.indices).all()
    np.testing.assert_allclose(part.adjacency.data, whole.adjacency.data, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("room", range(1, 40))
def test_a_sweep_stays_within_its_share(tiny_model, room):
    """Also with the columns that its products have beside the targets'."""
    local = tiny_model().local(PROMPT)
    batch = _sweep_batch(local, Budget(10**9, room * sweep_bytes(local)))
    assert room / 2 <= columns.width(batch) <= room


@pytest.mark.parametrize("max_features", [None, 40])
def test_rows_that_do_not_fit_are_refused_in_one_line(max_features, tiny_model, monkeypatch: pytest.MonkeyPatch):
    """Said before they are all computed, and what was asked for is never changed."""
    model, rows = tiny_model(), []
    needs = attribute(model, PROMPT, max_features=max_features, batch_size=2).n_edges * 12
    monkeypatch.setattr("circuits.attribution.budget", lambda *_: Budget(needs, needs // 8))
    with pytest.raises(
        InputError, match=r"rows take at least .* \(--drop\), .* \(--max-features\) or more memory"
    ) as said:
        attribute(
            model,
            PROMPT,
            max_features=max_features,
            batch_size=2,
            progress=lambda done, all_: rows.append((done, all_)),
        )
    assert "\n" not in str(said.value)
    done, wanted = rows[-1] if rows else (0, 1)
    assert done < wanted
    monkeypatch.setattr("circuits.attribution.budget", lambda *_: Budget(8 * needs, needs // 8))
    graph = attribute(model, PROMPT, max_features=max_features, batch_size=2)
    assert graph.settings["drop"] == 0.0 and graph.n_edges * 12 == needs


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 1])
@pytest.mark.parametrize("drop", [0.0, 0.01])
def test_rows_that_just_fit_are_let_through(share, drop, tiny_model, monkeypatch: pytest.MonkeyPatch):
    """Though the first features stand late, and their rows are longer than those of the rest."""
    model, taken, done = tiny_model(), [], []
    n_features = int(attribute(model, PROMPT, max_features=None).nodes.is_feature.sum())
    asked = {"max_features": int(share * n_features), "drop": drop, "batch_size": 8, "update_interval": 1}
    with monkeypatch.context() as patch:
        check = _Fit.check
        patch.setattr(_Fit, "check", lambda self, block: check(self, block) or taken.append(self.taken))
        attribute(model, PROMPT, **asked)
    needs = taken[-1]
    for room in (needs, int(1.1 * needs), 2 * needs):
        monkeypatch.setattr("circuits.attribution.budget", lambda *_, room=room: Budget(COPIES * room + 10**6, 10**6))
        attribute(model, PROMPT, **asked)
    monkeypatch.setattr("circuits.attribution.budget", lambda *_: Budget(needs + 10**6, 10**6))
    with pytest.raises(InputError, match="rows take at least"):
        attribute(model, PROMPT, progress=lambda rows, _: done.append(rows), **asked)
    assert max(done, default=0) < asked["max_features"] * (0.5 if share == 1 else 1)


def test_no_room_for_one_sweep_is_refused(tiny_model):
    with pytest.raises(InputError, match=r"attribute\(memory='10 B'\): one row's sweep takes .*; pass more memory"):
        attribute(tiny_model(), PROMPT, memory=10)


def test_where_nothing_is_free_that_is_said(tiny_model, monkeypatch: pytest.MonkeyPatch):
    """Not a size that nobody passed."""
    monkeypatch.setattr(memory, "free_bytes", lambda: 0)
    with pytest.raises(
        InputError,
        match=r"attribute\(memory=None\): that is 50% of the memory that is free, 0 B; .* free some, or pass",
    ):
        attribute(tiny_model(), PROMPT)
