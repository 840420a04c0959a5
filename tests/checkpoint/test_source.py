"""Opening a checkpoint finds all its errors at once and names them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moespan.checkpoint.placement import Piece, checkpoint_tensors, place
from moespan.checkpoint.random import RandomSource
from moespan.checkpoint.source import INDEX_FILE, SINGLE_FILE, SafetensorsSource
from moespan.config import Layout, ModelConfig
from moespan.errors import CheckpointError
from tests.support import ORACLES, Oracle, geometry

CONFIG = ModelConfig.from_dict(geometry())
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SHARDS = ("first.safetensors", "second.safetensors", "third.safetensors")
Tensors = dict[str, Tensor]


def tensors() -> Tensors:
    source = RandomSource(CONFIG, torch.float32, seed=1)
    return {name: source.draw(name) for name in source.shapes}


def write_single(folder: Path, values: Tensors) -> None:
    save_file(values, str(folder / SINGLE_FILE))


def write_sharded(folder: Path, values: Tensors) -> dict[str, str]:
    """Write every third tensor to the same shard; return the index."""
    weight_map = {name: SHARDS[at % 3] for at, name in enumerate(values)}
    for shard in SHARDS:
        mine = {name: values[name] for name, file in weight_map.items() if file == shard}
        save_file(mine, str(folder / shard))
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def problems_of(folder: Path, config: ModelConfig = CONFIG) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsSource(folder, config)
    assert str(folder) in str(caught.value)
    return caught.value.problems


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_every_slice_is_that_of_the_plain_file(
    tmp_path: Path, write: Callable[[Path, Tensors], object]
):
    values = tensors()
    write(tmp_path, values)
    source = SafetensorsSource(tmp_path, CONFIG)
    for rank in range(4):
        pieces = place(CONFIG, Layout(tp=4), rank).pieces
        read = [
            (piece, part.clone())
            for batch in source.batches(pieces)
            for piece, part in source.read(batch)
        ]
        assert sorted(piece.tensor for piece, _ in read) == sorted(p.tensor for p in pieces)
        for piece, part in read:
            assert torch.equal(part, values[piece.tensor][piece.tensor_index])


def test_the_system_is_asked_for_the_rows_of_the_pieces_ahead_and_for_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = tensors()
    weight_map = write_sharded(tmp_path, values)
    asked: list[bytes] = []

    def note(file: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append(os.pread(file, length, start))

    monkeypatch.setattr("moespan.checkpoint.source.os.posix_fadvise", note)
    source = SafetensorsSource(tmp_path, CONFIG)
    for batch in source.batches(place(CONFIG, Layout(tp=2), 1).pieces):
        asked.clear()
        next(iter(source.read(batch)))
        assert len({weight_map[piece.tensor] for piece in batch}) == 1
        # Whole rows, even if columns are cut: they lie in the same pages.
        rows = [values[piece.tensor][piece.tensor_index[0]] for piece in batch]
        assert asked == [part.numpy().tobytes() for part in rows]


def test_batches_cover_every_piece_in_file_order_and_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = tensors()
    weight_map = write_sharded(tmp_path, values)
    monkeypatch.setattr("moespan.checkpoint.source._BATCH_BYTES", 1000)
    source = SafetensorsSource(tmp_path, CONFIG)
    pieces = place(CONFIG, Layout(tp=2), 1).pieces
    batches = source.batches(reversed(pieces))
    rows: dict[tuple[str, str], list[int]] = {}
    for batch in batches:
        assert len({weight_map[piece.tensor] for piece in batch}) == 1
        # The last piece may exceed the limit, and a row is never cut.
        whole_rows = [piece.num_rows * values[piece.tensor][0].numel() * 4 for piece in batch]
        assert sum(whole_rows[:-1]) < 1000
        assert whole_rows[-1] <= max(1000, values[batch[-1].tensor][0].numel() * 4)
        for piece in batch:
            assert [i.stop - i.start for i in piece.tensor_index] == [
                i.stop - i.start for i in piece.index if isinstance(i, slice)
            ]
            part = piece.tensor_index[0]
            rows.setdefault((piece.tensor, piece.parameter), []).extend(
                range(part.start, part.stop)
            )
    assert rows == {
        (piece.tensor, piece.parameter): list(
            range(piece.tensor_index[0].start, piece.tensor_index[0].stop)
        )
        for piece in pieces
    }


def test_missing_unexpected_and_ill_shaped_tensors_are_all_reported_at_once(tmp_path: Path):
    values = tensors()
    del values[NORM], values["model.layers.2.mlp.experts.5.up_proj.weight"]
    values["model.layers.9.stray"] = torch.zeros(2)
    values[HEAD] = torch.zeros(61, 31)
    values[EMBED] = values[EMBED].to(torch.float64)
    values["model.layers.0.mlp.up_proj.weight"] = torch.zeros(26, 32, dtype=torch.int8)
    write_single(tmp_path, values)
    assert sorted(problems_of(tmp_path)) == sorted(
        [
            f"missing tensor {NORM}",
            "missing tensor model.layers.2.mlp.experts.5.up_proj.weight",
            f"{SINGLE_FILE}: unexpected tensor model.layers.9.stray",
            f"{SINGLE_FILE}: {HEAD} has shape [61, 31], not [61, 32]",
            f"{SINGLE_FILE}: {EMBED} has dtype F64, not one of F32, BF16, F16",
            f"{SINGLE_FILE}: model.layers.0.mlp.up_proj.weight has dtype I8, "
            "not one of F32, BF16, F16",
        ]
    )


def test_bad_shards_are_reported_beside_all_other_problems(tmp_path: Path):
    values = tensors()
    del values[NORM]
    values["stray"] = torch.zeros(1)
    write_sharded(tmp_path, values)
    cut_short = tmp_path / SHARDS[0]
    cut_short.write_bytes(cut_short.read_bytes()[:-100])
    (tmp_path / SHARDS[1]).unlink()
    problems = problems_of(tmp_path)
    stray_is_readable = any("unexpected tensor stray" in problem for problem in problems)
    assert stray_is_readable
    assert f"missing tensor {NORM}" in problems
    unreadable = [problem for problem in problems if "cannot be read" in problem]
    assert {problem.split(":")[0] for problem in unreadable} == {SHARDS[0], SHARDS[1]}
    # The tensors of the lost shards are not reported one by one.
    assert len(problems) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: data[:8] + b"\xff\xfe" + data[10:],
        lambda data: data[:8] + data[8:].replace(b'"F32"', b'"F99"'),
        lambda data: data[:8] + data[8:].replace(b'"data_offsets":[0,', b'"data_offsets":[4,'),
        lambda data: data + b"trailing",
    ],
)
def test_a_truncated_or_corrupt_file_is_one_problem(
    tmp_path: Path, damage: Callable[[bytes], bytes]
):
    write_single(tmp_path, tensors())
    file = tmp_path / SINGLE_FILE
    damaged = damage(file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{SINGLE_FILE}: cannot be read (")
    assert problem.endswith("it is missing, cut short or corrupt")


def test_a_folder_in_place_of_a_file_is_a_problem(tmp_path: Path):
    (tmp_path / SINGLE_FILE).mkdir()
    (problem,) = problems_of(tmp_path)
    assert "cannot be read" in problem


def test_a_tensor_of_the_index_that_its_shard_lacks_is_reported(tmp_path: Path):
    weight_map = write_sharded(tmp_path, tensors())
    moved = next(name for name, file in weight_map.items() if file == SHARDS[0])
    write_index(tmp_path, {**weight_map, moved: SHARDS[1]})
    assert problems_of(tmp_path) == [
        f"{SHARDS[1]}: {moved} is not in it, though {INDEX_FILE} says so"
    ]


def write_twice(folder: Path, values: Tensors) -> tuple[str, dict[str, str]]:
    """Write shards of which the second also holds zeros for a tensor of the first: name, index."""
    weight_map = write_sharded(folder, values)
    mine = {name: values[name] for name, file in weight_map.items() if file == SHARDS[1]}
    twice = next(name for name, file in weight_map.items() if file == SHARDS[0])
    save_file({**mine, twice: torch.zeros_like(values[twice])}, str(folder / SHARDS[1]))
    return twice, weight_map


def read_all(source: SafetensorsSource) -> Tensors:
    pieces = place(CONFIG, Layout(), 0).pieces
    return {
        piece.tensor: part.clone()
        for batch in source.batches(pieces)
        for piece, part in source.read(batch)
    }


def test_the_index_decides_which_of_two_shards_has_a_tensor(tmp_path: Path):
    values = tensors()
    twice, weight_map = write_twice(tmp_path, values)
    read = read_all(SafetensorsSource(tmp_path, CONFIG))
    assert all(torch.equal(read[name], values[name]) for name in values)
    write_index(tmp_path, {**weight_map, twice: SHARDS[1]})
    assert not read_all(SafetensorsSource(tmp_path, CONFIG))[twice].any()


def test_a_tensor_in_two_shards_that_the_index_does_not_name_is_reported(tmp_path: Path):
    twice, weight_map = write_twice(tmp_path, tensors())
    del weight_map[twice]
    write_index(tmp_path, weight_map)
    assert problems_of(tmp_path) == [
        f"{SHARDS[0]}: {twice} is also in {SHARDS[1]}, and {INDEX_FILE} does not say which counts"
    ]


# ---- Hostile and changing files ----


@pytest.mark.parametrize("name", [SHARDS[1], INDEX_FILE])
@pytest.mark.parametrize("kind", ["FIFO", "/dev/zero", "/proc/kmsg"])
def test_a_file_that_is_none_is_refused_at_once(tmp_path: Path, name: str, kind: str):
    write_sharded(tmp_path, tensors())
    (tmp_path / name).unlink()
    if kind == "FIFO":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to(kind)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}:? cannot be read"):
        SafetensorsSource(tmp_path, CONFIG)


def test_an_index_of_very_many_files_is_refused_at_once(tmp_path: Path):
    write_index(tmp_path, {str(i): f"{i}.safetensors" for i in range(5000)})
    with pytest.raises(CheckpointError, match="names 5000 files; at most 4096 are read"):
        SafetensorsSource(tmp_path, CONFIG)


@pytest.mark.parametrize("file", ["a\0b", "\ud800", "x" * 5000, "\x1b[2J"])
def test_a_file_name_that_no_file_can_have_is_one_problem(tmp_path: Path, file: str):
    weight_map = write_sharded(tmp_path, tensors())
    write_index(tmp_path, dict.fromkeys(weight_map, file))
    (problem,) = problems_of(tmp_path)
    assert "cannot be read" in problem and len(problem) < 400 and problem.isprintable()


def test_a_header_larger_than_any_is_refused_unread(tmp_path: Path):
    with (tmp_path / SINGLE_FILE).open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(1 << 40)
    (problem,) = problems_of(tmp_path)
    assert "its header has 1073741824 bytes" in problem


def test_names_of_strangers_are_cut_and_escaped(tmp_path: Path):
    name = "\x1b[2J" + "x" * 100_000
    write_single(tmp_path, {**tensors(), name: torch.zeros(1)})
    (problem,) = problems_of(tmp_path)
    assert r"unexpected tensor \x1b[2Jxxx" in problem and len(problem) < 200


def test_tensors_of_dtypes_that_nothing_reads_do_not_shift_the_others(tmp_path: Path):
    values = tensors()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_single(tmp_path, {**values, name: torch.ones(3, dtype=torch.float64)})
    read = read_all(SafetensorsSource(tmp_path, CONFIG))
    assert all(torch.equal(read[name], values[name]) for name in values)


@pytest.mark.parametrize("when", ["before a batch", "within a batch"])
def test_a_shard_that_shrinks_is_an_error_with_its_name(tmp_path: Path, when: str):
    write_single(tmp_path, tensors())
    source = SafetensorsSource(tmp_path, CONFIG)
    (batch,) = source.batches(place(CONFIG, Layout(), 0).pieces)
    reading = source.read(batch)
    if when == "within a batch":
        next(reading)
    os.truncate(tmp_path / SINGLE_FILE, (tmp_path / SINGLE_FILE).stat().st_size // 2)
    with pytest.raises(CheckpointError) as caught:
        list(reading)
    assert str(tmp_path / SINGLE_FILE) in str(caught.value)
    said = "has changed since" if when == "before a batch" else "it has become shorter since"
    assert said in str(caught.value)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_shard_that_is_replaced_or_removed_is_an_error_with_its_name(
    tmp_path: Path, replaced: bool
):
    write_single(tmp_path, tensors())
    source = SafetensorsSource(tmp_path, CONFIG)
    (batch,) = source.batches(place(CONFIG, Layout(), 0).pieces)
    (tmp_path / SINGLE_FILE).rename(tmp_path / "moved")
    if replaced:
        shutil.copy(tmp_path / "moved", tmp_path / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="has changed" if replaced else "cannot be read"):
        list(source.read(batch))


@pytest.mark.parametrize("file", ["../out.safetensors", "/out.safetensors", "a/b", 7, None, ".."])
def test_an_index_never_leads_out_of_the_folder(tmp_path: Path, file: object):
    values = tensors()
    folder = tmp_path / "inside"
    folder.mkdir()
    weight_map: dict[str, Any] = write_sharded(folder, values)
    shutil.copy(folder / SHARDS[0], tmp_path / "out.safetensors")
    outside = {name: file for name, shard in weight_map.items() if shard == SHARDS[0]}
    write_index(folder, {**weight_map, **outside})
    problems = problems_of(folder)
    if file == "..":
        assert problems[0].startswith("..: cannot be read")
    else:
        for name in outside:
            assert f"{INDEX_FILE}: {name} is in {file!r}, not a plain file name" in problems


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": 3}']
)
def test_a_broken_index_is_refused_though_the_shards_are_there(tmp_path: Path, content: bytes):
    write_sharded(tmp_path, tensors())
    (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=INDEX_FILE.replace(".", r"\.")):
        SafetensorsSource(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_a_fix(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError) as caught:
        SafetensorsSource(tmp_path, CONFIG)
    message = str(caught.value)
    assert name in message
    assert "never opened" in message
    assert "safetensors.torch.save_file" in message


def test_pickles_beside_safetensors_do_no_harm(tmp_path: Path):
    write_single(tmp_path, tensors())
    (tmp_path / "pytorch_model.bin").write_bytes(b"junk")
    SafetensorsSource(tmp_path, CONFIG)


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=f"has neither {INDEX_FILE} nor {SINGLE_FILE}"):
        SafetensorsSource(tmp_path, CONFIG)


def test_buffers_that_old_checkpoints_hold_are_tolerated(tmp_path: Path):
    values = tensors()
    for layer in range(CONFIG.num_hidden_layers):
        values[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    write_single(tmp_path, values)
    SafetensorsSource(tmp_path, CONFIG)


def test_a_head_beside_tied_embeddings_is_tolerated(tmp_path: Path):
    tied = ModelConfig.from_dict(geometry(tie_word_embeddings=True))
    write_single(tmp_path, tensors())
    SafetensorsSource(tmp_path, tied)
    untied = tensors()
    del untied[HEAD]
    write_single(tmp_path, untied)
    SafetensorsSource(tmp_path, tied)
    assert problems_of(tmp_path) == [f"missing tensor {HEAD}"]


def test_a_long_list_of_problems_is_cut_but_counted(tmp_path: Path):
    write_single(tmp_path, {NORM: tensors()[NORM]})
    missing = len(checkpoint_tensors(CONFIG)) - 1
    with pytest.raises(CheckpointError, match=rf"\({missing} problems\)") as caught:
        SafetensorsSource(tmp_path, CONFIG)
    assert len(caught.value.problems) == 51
    assert caught.value.problems[-1] == f"and {missing - 50} more"


@pytest.mark.parametrize("name", ORACLES)
def test_sharded_checkpoints_of_the_hugging_face_model_are_read(name: str):
    oracle = Oracle(name)
    values: Tensors = {}
    for file in oracle.folder.glob("*.safetensors"):
        values.update(load_file(file))
    source = oracle.source()
    pieces: list[Piece] = place(oracle.config, Layout(), 0).pieces
    for batch in source.batches(pieces):
        for piece, part in source.read(batch):
            assert torch.equal(part, values[piece.tensor])
