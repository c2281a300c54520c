"""Laws of token data: every text becomes the same rows however it is read, killed or shared; bad data gets one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replacement.errors import InputError
from replacement.loading import load_bridge
from replacement.training.data import open_tokens, packing, texts
from replacement.training.data.packing import SPLITS, Encoder, TokenStore, pack, split_of
from replacement.training.data.texts import SEPARATOR, JSONLines, TextFile, open_documents

CONTEXT = 8
BOS = 1


@pytest.fixture(scope="module")
def bridge(tiny_folder):
    return load_bridge(tiny_folder("llama"), torch.float32, "cpu")[0]


def words(n: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(3, 60, n))


def some_documents(count: int = 80) -> list[str]:
    return [words(3 + 5 * seed % 37, seed) for seed in range(count)]


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text(f"\n{SEPARATOR}\n".join(some_documents()))
    return path


def small_blocks(monkeypatch: pytest.MonkeyPatch, size: int = 300) -> None:
    monkeypatch.setattr(packing, "_BLOCK_CHARACTERS", size)


# ---- texts


@pytest.mark.parametrize("block", [1, 2, 7, 100, 1 << 20])
@pytest.mark.parametrize("text", ["é\r\n" * 40, f"one{SEPARATOR}twö\n\n{SEPARATOR}", "\ufeffbyte order mark"])
def test_documents_do_not_depend_on_the_blocks_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, text: str
):
    """A letter of several bytes, a separator or a line end may lie across two blocks. (Whether a file has separators is
    seen in its first block, which is a megabyte.)"""
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr(texts, "_BLOCK_BYTES", block)
    expected = text.removeprefix("\ufeff").replace("\r\n", "\n")
    found = list(TextFile(path).read(0))
    assert "".join(found) == expected.replace(SEPARATOR, "")
    assert list(TextFile(path).read(1)) == found[1:]


@given(text=st.text("a \n", max_size=400), block=st.integers(1, 50))
def test_a_text_without_separators_is_cut_into_bounded_documents_that_are_the_whole(text: str, block: int):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_LEAST_CHARACTERS": 5, "_MOST_CHARACTERS": 12, "_MARGIN": 30}.items():
            patch.setattr(texts, name, value)
        whole = texts._cut(text, margin=0)
        assert "".join(whole) == text and max(map(len, whole)) <= 30
        pieces, rest = [], ""
        for start in range(0, len(text), block):
            *new, rest = texts._cut(rest + text[start : start + block], margin=30)
            pieces += new
        assert [*pieces, *texts._cut(rest, margin=0)] == whole


def test_documents_of_a_long_text_end_at_blank_lines(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("\n".join("line\n" * 60 for _ in range(200)))
    found = list(TextFile(path).read(0))
    assert all(document.startswith("\n\nline") for document in found[1:])
    assert min(map(len, found[:-1])) >= 4096 and max(map(len, found[:-1])) < 5000


@pytest.mark.parametrize("offset", [0, 3, 4, 9])
def test_a_wrong_encoding_is_told_with_its_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int):
    monkeypatch.setattr(texts, "_BLOCK_BYTES", 4)
    path = tmp_path / "latin.txt"
    path.write_bytes(b"a" * offset + b"\xe9 caf\xe9")
    with pytest.raises(InputError, match=f"latin.txt: is not UTF-8 text at byte {offset}; convert it"):
        list(TextFile(path).read(0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 2: is not JSON .*; each line needs one JSON object with a field 'text'"),
        (b'["a"]', "line 2: needs a JSON object with a field 'text', got a list"),
        (b'{"story": "a"}', r"no field 'text'; its fields: story; pass one of them as text_field \(--text-field\)"),
        (b'{"text": 3}', "line 2: field 'text' needs a string, got a int"),
        (b'{"text": "\xff"}', "line 2: is not UTF-8 text at byte 27; convert it"),
    ],
)
def test_a_bad_line_of_jsonl_is_told_with_its_number(tmp_path: Path, line: bytes, message: str):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}' + line.join([b"\n", b"\n"]))
    with pytest.raises(InputError, match=message):
        list(JSONLines(path, "text").read(0))


def test_jsonl_is_read_by_field_from_any_line_on(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"story": "{text}"}}\n\n' for text in "abc"))
    assert list(JSONLines(path, "story").read(0)) == ["a", "b", "c"]
    assert list(JSONLines(path, "story").read(2)) == ["c"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no/such.txt", "no such file; pass a text file, a .jsonl file, hf:owner"),
        ("atals", "'atals'.*no such file.* or atlas"),
        (".", "is a folder"),
        ("hf:", "needs hf:owner/name"),
        ("hf:a/b:c:d:e", "needs hf:owner/name"),
    ],
)
def test_data_that_is_not_there_gets_one_line(data: str, message: str):
    with pytest.raises(InputError, match=message) as caught:
        open_documents(data, text_field="text")
    assert "\n" not in str(caught.value)


def test_half_a_character_of_json_becomes_the_sign_for_one(tmp_path: Path):
    """JSON can say lone surrogates, and scraped texts have them; no tokenizer takes them."""
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a \\ud800 b \\ud83d\\ude00 c"}\n')
    assert list(open_documents(str(path), text_field="text").read(0)) == ["a \ufffd b \U0001f600 c"]


@pytest.mark.parametrize("name", ["data.parquet", "text.txt.gz", "tokens.NPY"])
def test_files_that_are_no_text_are_told_by_their_name(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"text, for once")
    with pytest.raises(InputError, match="is no text file; unpack it, or pass its folder as hf:FOLDER"):
        open_documents(str(tmp_path / name), text_field="text")


def test_json_is_read_by_lines_and_an_array_is_refused(tmp_path: Path):
    """Not trained on as it is written."""
    path = tmp_path / "data.json"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(open_documents(str(path), text_field="text").read(0)) == ["one", "two"]
    path.write_text('[{"text": "one"},\n {"text": "two"}]\n')
    with pytest.raises(InputError, match="line 1: is not JSON"):
        list(open_documents(str(path), text_field="text").read(0))


def test_a_hub_out_of_reach_gets_one_line(monkeypatch: pytest.MonkeyPatch):
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.dataset_info", offline)
    with pytest.raises(InputError, match=r"hub cannot be reached \(ConnectionError\); try again, or pass a text"):
        open_documents("hf:owner/name", text_field="text")


# ---- packing


@given(stream=st.lists(st.integers(1, 4), max_size=60), context=st.integers(2, 7), start=st.sampled_from([1, None]))
def test_rows_are_the_stream_with_a_start_token_before_each(stream: list[int], context: int, start: int | None):
    """Taking away start tokens that were put in gives the stream back, up to a rest too short for a row."""
    rows, rest = pack(np.array(stream, dtype=np.int64), context=context, start=start)
    back: list[int] = []
    for row in rows.tolist():
        assert len(row) == context and (start is None or row[0] == start)
        back += row[1:] if start is not None and stream[len(back)] != start else row
    assert [*back, *rest.tolist()] == stream
    assert len(rest) < context


def test_every_document_is_in_one_split_by_its_text(bridge, stories: Path, tmp_path: Path):
    """Rows hold all documents of a split in their order, so nothing of the held-out texts is in training."""
    for split in SPLITS:
        tokens = open_tokens(str(stories), model=bridge, context=CONTEXT, split=split, cache=tmp_path / "cache")
        chosen = [text for text in some_documents() if split_of(text) == split]
        stream = np.concatenate(Encoder.of(bridge).encode(chosen))
        expected = pack(stream, context=CONTEXT, start=BOS).rows
        stored = np.load(tokens.store.folder / f"{split}.npy", mmap_mode="r")  # a plain file of numpy's
        assert stored.dtype == np.uint16 and np.array_equal(stored, expected)
        assert tokens.n_documents == len(expected) > 0
    shares = [split_of(words(5, seed)) for seed in range(4000)]
    assert 0.03 < shares.count("held_out") / 4000 < 0.07


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(bridge, stories: Path, tmp_path: Path):
    tokens = open_tokens(str(stories), model=bridge, context=CONTEXT, cache=tmp_path)
    n = tokens.n_documents
    assert n
    flat = torch.cat([tokens.batch(index, 7) for index in range(-(-3 * n // 7))])[: 3 * n]
    epochs = flat.view(3, n, CONTEXT).tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert torch.equal(tokens.batch(0, 3 * n), flat)  # a batch longer than an epoch, asked for later, is the same
    again = open_tokens(str(stories), model=bridge, context=CONTEXT, cache=tmp_path)
    assert torch.equal(again.batch(5, 7), flat[35:42])
    other = open_tokens(str(stories), model=bridge, context=CONTEXT, cache=tmp_path, seed=1)
    assert not torch.equal(other.batch(0, n), flat[:n])
    assert sorted(other.batch(0, n).tolist()) == sorted(epochs[0])


class Breaking:
    """Documents that break off, as by a kill or a lost connection, the first time they come to number `at`."""

    name = identity = "breaking"

    def __init__(self, at: int) -> None:
        self.at, self.given = at, 0

    def read(self, start: int) -> Iterator[str]:
        for number, text in enumerate(some_documents()[start:], start):
            if number == self.at:
                self.at = -1
                raise InputError("breaking: connection lost")
            self.given += 1
            yield text


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


@pytest.mark.parametrize("at", [0, 11, 40, 79])
def test_a_build_that_is_stopped_goes_on_to_the_same_bytes(
    bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    """Also in the same process, where a stream that broke must not pass for one that ended."""
    small_blocks(monkeypatch)
    encoder = Encoder.of(bridge)
    whole = TokenStore(tmp_path / "whole", Breaking(-1), encoder, context=CONTEXT)
    whole.grow("train")
    documents = Breaking(at)
    store = TokenStore(tmp_path / "broken", documents, encoder, context=CONTEXT)
    with pytest.raises(InputError, match="connection lost"):
        store.grow("train")
    assert not store.finished
    if (tmp_path / "broken" / "train.npy").exists():  # a kill between the rows and the state that counts them
        with open(tmp_path / "broken" / "train.npy", "ab") as file:
            file.write(b"half a row")
    if at == 40:
        store = TokenStore(tmp_path / "broken", documents, encoder, context=CONTEXT)
    store.grow("held_out")
    assert store.finished
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_two_openers_of_one_folder_share_the_work(bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch)
    documents = Breaking(-1), Breaking(-1)
    first, second = (TokenStore(tmp_path, one, Encoder.of(bridge), context=CONTEXT) for one in documents)
    first.grow("train", 10)
    second.grow("train", 60)
    first.grow("train")
    second.grow("train")
    assert documents[0].given + documents[1].given == len(some_documents())
    assert first.n_rows("train") == second.n_rows("train")


def test_a_full_disk_keeps_what_was_tokenized(bridge, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small_blocks(monkeypatch)
    calls, fsync = [0], packing.os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 7:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(packing.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\).*so far is kept"):
        open_tokens(str(stories), model=bridge, context=CONTEXT, cache=tmp_path / "full")
    resumed = open_tokens(str(stories), model=bridge, context=CONTEXT, cache=tmp_path / "full")
    fresh = open_tokens(str(stories), model=bridge, context=CONTEXT, cache=tmp_path / "fresh")
    assert files(resumed.store.folder) == files(fresh.store.folder)


def test_a_changed_file_is_tokenized_anew(bridge, stories: Path, tmp_path: Path):
    before = open_tokens(str(stories), model=bridge, context=CONTEXT, cache=tmp_path / "cache")
    stories.write_text(stories.read_text() + " w3 w3 w3 w3 w3 w3 w3 w3 w3 w3")
    after = open_tokens(str(stories), model=bridge, context=CONTEXT, cache=tmp_path / "cache")
    assert before.fingerprint != after.fingerprint and after.n_documents == before.n_documents + 1
    assert open_tokens(str(stories), model=bridge, context=5, cache=tmp_path / "cache").batch(0, 2).shape == (2, 5)


def test_damaged_tokens_are_told(bridge, stories: Path, tmp_path: Path):
    tokens = open_tokens(str(stories), model=bridge, context=CONTEXT, cache=tmp_path / "cache")
    (tokens.store.folder / "train.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"these cached tokens are damaged .*; delete the folder"):
        open_tokens(str(stories), model=bridge, context=CONTEXT, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", {}, "is empty; needs at least one document"),
        (" \n\n ", {}, "is empty; needs at least one document"),
        ("w3 w4", {}, "its train documents do not fill a row of 8 tokens .*more text or a smaller context"),
        (words(100, 0), {"split": "held_out"}, "its held out documents do not fill a row"),
        (
            "the quick brown fox " * 9,
            {},
            "% of its tokens are words that the model's vocabulary lacks; pass other text",
        ),
        ("<|endoftext|>".join(["quick"] * 200), {}, "100% of its tokens are words that the model's vocabulary lacks"),
        (words(100, 0), {"text_field": "body"}, "a text file has no fields; leave text_field out"),
        (words(100, 0), {"data": "atlas", "text_field": "body"}, "a generator has no fields; leave it out"),
        (words(100, 0), {"context": 99}, r"open_tokens\(context=99\): the model takes 2 to 32 tokens"),
        (words(100, 0), {"split": "test"}, "needs one of train, held_out"),
    ],
)
def test_unusable_text_gets_one_line(bridge, tmp_path: Path, text: str, arguments: dict, message: str):
    path = tmp_path / "text.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        settings = {"data": str(path), "model": bridge, "context": CONTEXT, "cache": tmp_path / "cache"}
        open_tokens(**{**settings, **arguments})


# ---- streams and atlas


def test_a_dataset_is_tokenized_only_as_far_as_it_is_read(bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows are those of the same documents in a file, in their order; they stay on the disk; after the end comes the
    beginning."""
    small_blocks(monkeypatch)
    folder = tmp_path / "dataset"
    folder.mkdir()
    lines = [json.dumps({"story": text}) + "\n" for text in some_documents()]
    (folder / "train.jsonl").write_text("".join(lines))
    (tmp_path / "file.jsonl").write_text("".join(lines))
    settings = {"model": bridge, "context": CONTEXT, "cache": tmp_path / "cache", "text_field": "story"}
    everything = open_tokens(str(tmp_path / "file.jsonl"), **settings)
    rows = torch.from_numpy(np.load(everything.store.folder / "train.npy").astype(np.int64))
    stream = open_tokens(f"hf:{folder}", **settings)
    assert stream.n_documents is None
    assert torch.equal(stream.batch(2, 6), rows[12:18])
    assert not stream.store.finished and stream.store.n_rows("train") < len(rows) // 2
    stream = open_tokens(f"hf:{folder}", **settings)  # goes on behind what is there
    assert torch.equal(stream.batch(0, 6), rows[:6])
    assert torch.equal(stream.batch(1, len(rows) - 3), torch.cat([rows, rows])[len(rows) - 3 : 2 * len(rows) - 6])
    with pytest.raises(InputError, match=r"hf:.*cannot be read after 0 records .*check the name, config and split"):
        open_tokens(f"hf:{folder}::nosuch", **settings)


def test_atlas_writes_documents_by_number(tmp_path: Path, bridge):
    atlas, _ = load_bridge("atlas", torch.float32, "cpu")
    tokens, held_out = (open_tokens("atlas", model=atlas, context=20, split=split) for split in SPLITS)
    assert tokens.n_documents is None and tokens.batch(0, 3).shape == (3, 20)
    assert (tokens.batch(0, 3)[:, 0] == atlas.tokenizer.bos_token_id).all()
    assert torch.equal(tokens.batch(4, 3), tokens.batch(4, 3))
    assert not torch.equal(tokens.batch(4, 3), tokens.batch(5, 3))
    assert not torch.equal(tokens.batch(4, 3), held_out.batch(4, 3))
    with pytest.raises(InputError, match="in the vocabulary of the model atlas only"):
        open_tokens("atlas", model=bridge, context=20)
