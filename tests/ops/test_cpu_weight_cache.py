"""Packed weights are kept for the next start: the same bits, mapped once for all, within a bound.
Files that are damaged, foreign, or not ours are not used."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moespan import log
from moespan.checkpoint.building import Loaded
from moespan.checkpoint.loader import load_weights
from moespan.checkpoint.placement import place
from moespan.config import Layout
from moespan.ops.cpu.native import NativeCpuOps
from moespan.ops.cpu.packing import PackedWeight
from moespan.ops.cpu.weight_cache import WeightCache
from tests.support import CPU, Oracle

STRANGER = 54321
LARGE = torch.arange(3 << 20, dtype=torch.int32).view(torch.uint8).view(4, 1 << 20, 3)[..., :2]


@pytest.fixture(scope="module")
def ops() -> NativeCpuOps:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no compiler")
    return NativeCpuOps()


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_said", set())


@pytest.fixture
def cache(tmp_path: Path, ops: NativeCpuOps) -> WeightCache:
    return WeightCache(tmp_path / "weights", "a model", 5 << 20, 100 << 20, ops._checksum)


def weights_of_all_forms() -> Loaded:
    panels = torch.arange(3 << 20, dtype=torch.int32).view(torch.int8).view(2, 96, -1)
    scales, sums = torch.rand(2, 96), torch.arange(192, dtype=torch.int32).view(2, 96)
    return {
        "norm": torch.rand(64).to(torch.bfloat16),
        "router": torch.rand(1 << 20, 3).t(),
        "not dense": LARGE,
        "empty": torch.empty(0, 3),
        "int8": PackedWeight(panels, 2, 2, 90, 96, panels.shape[-1], scales, sums),
        "bfloat16": PackedWeight(torch.rand(1, 32, 8).to(torch.bfloat16), 0, 1, 32, 32, 8),
    }


def keep(cache: WeightCache, weights: Loaded) -> Loaded:
    with cache.keeping() as keep_one:
        return {name: keep_one(name, weight) for name, weight in weights.items()}


def parts(weight: Any) -> list[Any]:
    if isinstance(weight, Tensor):
        return [weight]
    return [type(weight), *(getattr(weight, field.name) for field in fields(weight))]


def assert_same(ours: Loaded | None, theirs: Loaded) -> None:
    assert ours is not None and ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        for one, other in zip(parts(ours[name]), parts(weight), strict=True):
            if isinstance(other, Tensor):
                assert one.dtype == other.dtype and torch.equal(one, other), name
            else:
                assert one == other, name


def mapped_file(tensor: Tensor) -> str:
    """The file in which the memory of `tensor` lies; empty for memory of this process alone."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= tensor.data_ptr() < int(end, 16):
            return Path(line.split()[5]).name if len(line.split()) > 5 else ""
    return ""


def test_what_is_kept_is_found_with_the_same_bits_and_strides(cache: WeightCache):
    weights = weights_of_all_forms()
    assert cache.find() is None
    kept = keep(cache, weights)
    found = cache.find()
    assert_same(kept, weights)
    assert_same(found, weights)
    assert found is not None and found["router"].stride() == weights["router"].stride()


def test_large_tensors_are_mapped_from_the_file_at_once_and_later(cache: WeightCache):
    kept, found = keep(cache, weights_of_all_forms()), cache.find()
    assert found is not None
    (file,) = cache.path.iterdir()
    for weights in (kept, found):
        for tensor in (weights["int8"].panels, weights["router"], weights["not dense"]):
            assert mapped_file(tensor) == file.name
        assert mapped_file(weights["norm"]) != file.name
    assert cache.mapped_bytes == (12 << 20) + (12 << 20) + (8 << 20)
    assert file.stat().st_mode & 0o777 == 0o600
    assert cache.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("quantization", [None, "int8", "w8a8", "int4"])
def test_a_loaded_model_is_found_as_it_was_loaded(
    quantization: str | None, tmp_path: Path, ops: NativeCpuOps, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MOESPAN_CACHE", str(tmp_path))
    model = Oracle("sixteen")
    placement = place(model.config, Layout(), 0, quantization=quantization)
    cache = ops.kept_weights(placement, model.source().identity, torch.bfloat16, 1 << 30)
    assert cache is not None
    with cache.keeping() as keep_one:
        loaded, _ = load_weights(
            placement,
            model.source(),
            torch.bfloat16,
            CPU,
            new_builder=ops.builder,
            keep=keep_one,
        )
    assert_same(cache.find(), loaded)


def test_other_weights_have_another_key(
    tmp_path: Path, ops: NativeCpuOps, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MOESPAN_CACHE", str(tmp_path))
    config = Oracle("sixteen").config
    whole, int8 = (place(config, Layout(), 0, quantization=one) for one in (None, "int8"))
    halves = [place(config, Layout(tp=2, dp=2), rank) for rank in range(4)]
    given = [(whole, "a"), (whole, "b"), (int8, "a"), *((half, "a") for half in halves)]
    caches = [ops.kept_weights(one, source, torch.bfloat16, 1) for one, source in given]
    monkeypatch.setattr(ops, "_flags", ("-march=other",))
    caches.append(ops.kept_weights(whole, "a", torch.bfloat16, 1))
    keys = [one.made_from for one in caches if one is not None]
    assert keys[3:5] == keys[5:7], "replicas hold the same weights"
    assert len(set(keys)) == len(keys) - 2 == 6


@pytest.mark.parametrize("kept_bytes", [0, 10, 40, 4096, 5 << 20, -1])
def test_a_cut_file_counts_as_missing_and_is_written_again(
    kept_bytes: int, cache: WeightCache, capsys: pytest.CaptureFixture[str]
):
    weights = weights_of_all_forms()
    keep(cache, weights)
    (file,) = cache.path.iterdir()
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert cache.find() is None
    assert "is damaged; its weights are loaded and written again" in capsys.readouterr().err
    keep(cache, weights)
    assert_same(cache.find(), weights)


@pytest.mark.parametrize("place_in_file", [0.0, 0.3, 0.999, 1.0])
def test_a_changed_bit_anywhere_in_a_tensor_or_the_table_is_found(
    place_in_file: float, cache: WeightCache
):
    tensor = torch.arange(6 << 20, dtype=torch.int32)
    keep(cache, {"one": tensor})
    (file,) = cache.path.iterdir()
    data = bytearray(file.read_bytes())
    data[int(place_in_file * (len(data) - 1))] ^= 16
    file.write_bytes(data)
    assert cache.find() is None


def test_exchanged_parts_of_a_tensor_are_found(cache: WeightCache):
    keep(cache, {"one": torch.arange(6 << 20, dtype=torch.int32)})
    (file,) = cache.path.iterdir()
    data = bytearray(file.read_bytes())
    data[:64], data[64:128] = data[64:128], data[:64]
    data[: 4 << 20], data[4 << 20 : 8 << 20] = data[4 << 20 : 8 << 20], data[: 4 << 20]
    file.write_bytes(data)
    assert cache.find() is None


def test_the_file_of_another_key_is_not_used_under_our_name(cache: WeightCache):
    other = replace(cache, made_from="another model")
    keep(other, {"one": torch.ones(3)})
    (file,) = cache.path.iterdir()
    file.rename(cache.path / f"{cache._name}.weights")
    assert cache.find() is None


def can_ask_for_pages() -> bool:
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(22)  # MADV_POPULATE_READ
    except OSError:
        return False
    return True


@pytest.mark.skipif(not can_ask_for_pages(), reason="Linux is older than 5.14, or emulated")
def test_pages_that_cannot_be_read_are_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, ops: NativeCpuOps
):
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 8 << 20)
        os.ftruncate(file.fileno(), 4 << 20)
        data = torch.frombuffer(memory, dtype=torch.uint8)
        with pytest.raises(OSError):
            ops._checksum(data)
        assert ops._checksum(data[: 4 << 20]) == ops._checksum(
            torch.zeros(4 << 20, dtype=torch.uint8)
        )


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_not_used(
    mode: int, cache: WeightCache, capsys: pytest.CaptureFixture[str]
):
    keep(cache, {"one": torch.ones(3)})
    (file,) = cache.path.iterdir()
    file.chmod(mode)
    assert cache.find() is None
    assert "may be written by others" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_the_file_of_a_stranger_is_not_used(cache: WeightCache, capsys: pytest.CaptureFixture[str]):
    keep(cache, {"one": torch.ones(3)})
    (file,) = cache.path.iterdir()
    os.chown(file, STRANGER, -1)
    assert cache.find() is None
    assert "belongs to another user, and nothing from it is used" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["link", "FIFO", "folder"])
def test_what_is_no_file_is_neither_read_nor_followed(
    what: str, cache: WeightCache, tmp_path: Path
):
    keep(cache, {"one": torch.ones(3)})
    (file,) = cache.path.iterdir()
    file.rename(tmp_path / "elsewhere")
    if what == "link":
        file.symlink_to(tmp_path / "elsewhere")
    elif what == "FIFO":
        os.mkfifo(file)
    else:
        file.mkdir()
    assert cache.find() is None


def test_the_files_used_longest_ago_make_room(cache: WeightCache):
    caches = [replace(cache, made_from=name, limit_bytes=40 << 20) for name in "abcd"]
    for age, one in zip((5000, 9000, 7000), caches, strict=False):
        keep(one, {"one": torch.ones(3 << 20)})
        file = one.path / f"{one._name}.weights"
        os.utime(file, (0, file.stat().st_mtime - age))
    assert caches[1].find() is not None, "which makes it the one used last"
    keep(caches[3], {"one": torch.ones(3 << 20)})
    assert [one.find() is not None for one in caches] == [True, True, False, True]


def test_files_used_just_now_are_not_removed(
    cache: WeightCache, capsys: pytest.CaptureFixture[str]
):
    first, second = (replace(cache, made_from=name, limit_bytes=20 << 20) for name in "ab")
    tensor = torch.ones(3 << 20)
    keep(first, {"one": tensor})
    kept = keep(second, {"one": tensor})
    assert_same(kept, {"one": tensor})
    assert "do not fit into" in (said := capsys.readouterr().err) and "weight_cache_gb" in said
    assert first.find() is not None and second.find() is None
    assert len([*cache.path.iterdir()]) == 1


def test_while_another_process_writes_the_same_weights_nothing_is_kept(cache: WeightCache):
    weights = {"one": torch.ones(3)}
    with cache.keeping() as keep_one:
        keep_one("one", weights["one"])
        assert_same(keep(cache, {"one": torch.zeros(3)}), {"one": torch.zeros(3)})
        assert cache.find() is None
    assert_same(cache.find(), weights)


def test_the_draft_of_a_killed_process_is_overwritten_or_removed(cache: WeightCache):
    keep(cache, {"one": torch.ones(3)})
    for name in (cache._name, "other"):
        (cache.path / f"{name}.draft").write_bytes(bytes(1 << 20))
    keep(cache, {"one": torch.ones(4)})
    assert [file.name for file in cache.path.iterdir()] == [f"{cache._name}.weights"]
    assert_same(cache.find(), {"one": torch.ones(4)})


def test_a_draft_that_is_being_written_stays_and_counts(cache: WeightCache):
    keep(cache, {"one": torch.ones(3)})
    draft = cache.path / "other.draft"
    draft.write_bytes(bytes(99 << 20))
    with draft.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        keep(cache, {"one": torch.ones(4)})
    assert draft.exists()
    assert_same(cache.find(), {"one": torch.ones(3)})


def test_an_error_while_loading_leaves_no_draft(cache: WeightCache):
    with pytest.raises(ZeroDivisionError), cache.keeping() as keep_one:
        keep_one("one", torch.ones(3))
        raise ZeroDivisionError
    assert not [*cache.path.iterdir()] and cache.find() is None


@pytest.mark.parametrize("after", [0, 1, 2])
def test_on_a_full_disk_the_weights_are_right_and_nothing_is_kept(
    after: int,
    cache: WeightCache,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    weights = {name: torch.full((1 << 20,), i, dtype=torch.int32) for i, name in enumerate("abc")}
    calls = iter(range(10))

    def allocate(*_: int) -> None:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    assert_same(keep(cache, weights), weights)
    said = capsys.readouterr().err
    assert "the packed weights are not kept for the next start" in said and "No space" in said
    assert not [*cache.path.iterdir()] and cache.find() is None


def test_a_disk_with_too_little_room_is_named_before_anything_is_written(
    cache: WeightCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    status = SimpleNamespace(f_bavail=1, f_frsize=4 << 20)
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: status)
    assert_same(keep(cache, {"one": torch.ones(3)}), {"one": torch.ones(3)})
    said = capsys.readouterr().err
    assert "has 4.19 MB free, and they take 5.24 MB; set MOESPAN_CACHE" in said
    assert not [*cache.path.iterdir()]


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, cache: WeightCache, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    blocked = replace(cache, path=tmp_path / "file" / "weights")
    assert_same(keep(blocked, {"one": torch.ones(3)}), {"one": torch.ones(3)})
    assert "set MOESPAN_CACHE to a folder of your own" in capsys.readouterr().err
