"""Tensors that threads read before the loader asks for them."""

from __future__ import annotations

import collections
import threading

import pytest
import torch

from ltx2_tuner.checkpoint import Checkpoint, load_transformer, read_ahead, write_tiny_checkpoint
from ltx2_tuner.checkpoint.read_ahead import ReadAhead
from ltx2_tuner.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path):
    write_tiny_checkpoint(tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


class Recording(Checkpoint):
    """Remembers what was read by whom."""

    def read(self, name, device="cpu", dtype=None):
        self.reads.append((name, threading.current_thread().name))
        return super().read(name, device, dtype)

    def fill(self, name, tensor, start=0, stop=None):
        self.reads.append((name, threading.current_thread().name))
        super().fill(name, tensor, start, stop)


def opened(path) -> Recording:
    checkpoint = Recording.open(path)
    checkpoint.reads = []
    return checkpoint


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_what_is_announced_is_read_once_by_threads_and_the_rest_by_the_caller(path):
    checkpoint = opened(path)
    names = checkpoint.names("model.diffusion_model.transformer_blocks.")
    announced = names[::2]
    with ReadAhead(checkpoint, [(name, CPU) for name in announced]) as ahead:
        for name in names:
            assert torch.equal(ahead.read(name, CPU), Checkpoint.read(checkpoint, name))
        assert ahead.read(names[0], CPU, torch.float16).dtype == torch.float16
        assert readers()
    assert not readers()
    by_threads = [name for name, thread in checkpoint.reads if thread.startswith("checkpoint")]
    by_caller = [name for name, thread in checkpoint.reads if not thread.startswith("checkpoint")]
    assert sorted(by_threads) == sorted(announced) and by_caller == [*names[1::2], names[0]]


def test_no_more_is_read_ahead_than_the_limit(path):
    checkpoint = opened(path)
    names = checkpoint.names("model.diffusion_model.transformer_blocks.")
    limit = 3 * max(checkpoint.entry(name).nbytes for name in names)
    with ReadAhead(checkpoint, [(name, CPU) for name in names], limit) as ahead:
        for count, name in enumerate(names):
            ahead.read(name, CPU)
            started = {found for found, _ in list(checkpoint.reads)} - set(names[: count + 1])
            assert sum(checkpoint.entry(each).nbytes for each in started) <= limit
    with ReadAhead(checkpoint, [(name, CPU) for name in names], 0) as ahead:  # each is larger than that
        assert all(torch.equal(ahead.read(name, CPU), Checkpoint.read(checkpoint, name)) for name in names)


def test_threads_read_parts_of_one_tensor_at_the_same_time(path, monkeypatch):
    monkeypatch.setattr(read_ahead.os, "cpu_count", lambda: 2)
    checkpoint = opened(path)
    name = max(checkpoint.names(), key=lambda name: checkpoint.entry(name).nbytes)
    monkeypatch.setattr(read_ahead, "PART_BYTES", checkpoint.entry(name).nbytes // 2)
    together = threading.Barrier(2, timeout=20)
    monkeypatch.setattr(checkpoint, "fill", lambda *part: (together.wait(), Checkpoint.fill(checkpoint, *part)))
    with ReadAhead(checkpoint, [(name, CPU)]) as ahead:
        assert torch.equal(ahead.read(name, CPU), Checkpoint.open(path).read(name))


def test_no_thread_is_left_where_there_is_no_memory(path, monkeypatch):
    checkpoint = opened(path)
    names = checkpoint.names()
    reserve, reserved = checkpoint.reserve, []

    def short(name, device):
        reserved.append(name)
        if len(reserved) == 3:
            raise torch.OutOfMemoryError("no memory")
        return reserve(name, device)

    monkeypatch.setattr(checkpoint, "reserve", short)
    with pytest.raises(torch.OutOfMemoryError), ReadAhead(checkpoint, [(name, CPU) for name in names]):
        pass
    assert not readers()


def test_tensors_are_put_together_from_many_parts(path, monkeypatch):
    monkeypatch.setattr(read_ahead, "PART_BYTES", 100)
    checkpoint = opened(path)
    names = checkpoint.names("model.diffusion_model.transformer_blocks.")
    with ReadAhead(checkpoint, [(name, CPU) for name in names]) as ahead:
        for name in names:
            assert torch.equal(ahead.read(name, CPU), Checkpoint.read(checkpoint, name))
    parts = collections.Counter(name for name, _ in checkpoint.reads)
    assert parts == {name: -(-checkpoint.entry(name).nbytes // 100) for name in names}


@pytest.mark.parametrize("variant", ["av", "video"])
def test_the_loader_announces_what_it_reads(path, variant):
    """All but the biases of the block matrices, which are small."""
    checkpoint = opened(path)
    load_transformer(checkpoint, variant, progress=False)
    alone = [name for name, thread in checkpoint.reads if not thread.startswith("checkpoint")]
    assert all(name.endswith(".bias") for name in alone)
    assert len(checkpoint.reads) == len({name for name, _ in checkpoint.reads})


def test_a_file_cut_short_while_it_is_loaded_gives_one_sentence_and_leaves_no_thread(path):
    checkpoint = Checkpoint.open(path)
    with open(path, "r+b") as handle:
        handle.truncate(path.stat().st_size // 3)
    with pytest.raises(UserError, match="ended while it was read; copy or download it again"):
        load_transformer(checkpoint, progress=False)
    assert not readers()


def test_an_interrupted_load_leaves_no_thread(path):
    def interrupt(_index, _block):
        assert readers()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_transformer(Checkpoint.open(path), on_block=interrupt, progress=False)
    assert not readers()
