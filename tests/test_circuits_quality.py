"""Laws of what is measured: which documents, which prompts, and what is refused before the long work."""

from __future__ import annotations

import torch

from circuits.quality import PROMPT_TOKENS, Documents


class Rows:
    """Rows that say which batch they were drawn for; a start token, 1, inside of some."""

    context, n_documents = 30, None

    def batch(self, index: int, documents: int) -> torch.Tensor:
        found = torch.arange(documents)[:, None] + 1000 * (index + 1) + torch.zeros(30, dtype=torch.long)
        found[:, 0] = 1
        found[1::3, 5] = found[2::3, 1] = 1
        return found


def test_prompts_hold_one_document() -> None:
    """The beginning of a row ends before the next start token; a row that begins with two of them gives none."""
    found = Documents(Rows(), tokens=900, vocabulary=10).beginnings(7, 1)
    assert [len(one) for one in found] == [PROMPT_TOKENS, 5] * 3 + [PROMPT_TOKENS]
    assert all((one[1:] != 1).all() and one[0] == 1 for one in found)
    assert [len(one) for one in Documents(Rows(), tokens=900, vocabulary=10).beginnings(3)] == [PROMPT_TOKENS] * 3


def test_documents_do_not_depend_on_the_memory_that_a_set_takes() -> None:
    """Not even where a source draws every batch from a seed of its own, as atlas's generator does."""
    made = [Documents(Rows(), tokens=30 * 150, vocabulary=10, features=many) for many in (0, 300_000, 10**9)]
    assert [one.batch for one in made] == [64, 4, 1]
    whole, *others = (torch.cat(list(one)) for one in made)
    assert len(whole) == 150 and all(torch.equal(whole, one) for one in others)
    assert all(max(len(part) for part in one) <= one.batch for one in made)
