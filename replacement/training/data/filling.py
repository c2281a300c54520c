"""A cache of activations for a training run: written as far as the run will read, read where it is there already.

Knows how a run reads its source, buffer by buffer; nothing of models and dictionaries.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from replacement.training.config import TrainingConfig
from replacement.training.data.cache import CachedActivations, CacheIndex, read_index, write_activations
from replacement.training.parallel import ALONE, Mesh
from replacement.training.progress import progress_bar
from replacement.training.source import ActivationSource, block_of


def fill_cache(
    source: ActivationSource,
    folder: Path,
    *,
    held: CacheIndex,
    config: TrainingConfig,
    show_progress: bool = True,
    mesh: Mesh = ALONE,
) -> CachedActivations:
    """A cache that holds all that a run of `config` reads of a source, so that no batch comes twice.

    held: what the folder holds already, as `open_cache` found it. mesh: processes that train together, all of which
    call this; the first of them writes while the others wait, buffer by buffer.
    Raises `InputError` as `write_activations` does.
    """
    dtype = torch.bfloat16 if held.dtype == "bfloat16" else torch.float32  # as exact as what is stored, and no wider
    first = CachedActivations(folder, dtype=dtype).batch(0) if held.batches else source.batch(0)
    block = block_of(config.buffer_bytes, {site: x.to(dtype) for site, x in first.items()}, tokens=config.tokens_read)
    write = partial(write_activations, source, folder, model=held.model, fingerprint=held.fingerprint, dtype=held.dtype)
    mesh.wait()  # all have looked at the folder
    each = block.batches * len(next(iter(first.values())))  # about, of a buffer's tokens
    expected = -(-(config.steps + 1) // max(1, each // config.batch_tokens)) * each
    with progress_bar(show=show_progress and mesh.is_first and held.tokens < config.tokens) as bar:
        task = bar.add_task("activations", total=expected, completed=held.tokens, figure="")

        def report(index: CacheIndex) -> None:
            bar.update(task, completed=index.tokens, total=max(expected, index.tokens))

        blocks = steps = 0
        while steps <= config.steps:  # one batch more than it learns from, to calibrate on
            blocks += 1
            if mesh.is_first:
                write(batches=blocks * block.batches, report=report)
            mesh.wait()
            sizes = [tokens for shard in read_index(folder).shards for tokens in shard]
            here = block.tokens(sizes[(blocks - 1) * block.batches : blocks * block.batches]) // config.batch_tokens
            if not here:
                break  # the run says what is wrong
            steps += here
        bar.update(task, completed=sum(sizes), total=sum(sizes))
    return CachedActivations(folder, dtype=dtype)
