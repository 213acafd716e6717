"""Page locks never outlive their memory, whatever becomes of those who had it locked."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ltx2_tuner.memory.host_blocks import HostBlocks
from ltx2_tuner.memory.host_memory import HostMemory
from ltx2_tuner.memory.options import CompileOptions, MemoryOptions
from ltx2_tuner.memory.prepare import prepare_model, rearrange
from ltx2_tuner.memory.streaming import BlockStore
from tests.memory.blocks import BLOCKS, adapted, gradients
from tests.memory.driver import OUT_OF_MEMORY, Driver, installed

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
EAGER = CompileOptions(enabled=False)


@pytest.fixture
def driver(monkeypatch) -> Iterator[Driver]:
    driver = installed(monkeypatch)
    yield driver
    gc.collect()
    assert not driver.mistakes
    assert not driver.locked, "locks are left over"


def streamed(count: int) -> MemoryOptions:
    return MemoryOptions(blocks_to_swap=count)


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected))


def test_a_dropped_model_leaves_no_lock(driver):
    for _ in range(2):
        model, network = adapted("fp8")
        prepare_model(model, streamed(BLOCKS - 1), EAGER, CPU)
        assert model.block_runner._host.keys() == set(model.block_runner.streamed)
        assert len(driver.locked) == BLOCKS - 1
        gradients(model, network)
        model.itself = [model]  # more cycles than there are
        del model, network
        gc.collect()
        assert not driver.locked and driver.freed == driver.granted


def test_locks_follow_what_is_streamed(driver):
    model, network = adapted("nf4")
    expected = gradients(model, network)
    plan = prepare_model(model, streamed(1), EAGER, CPU)
    for count in (3, 1, 2, 3, 2):
        plan = rearrange(model, plan, streamed(count), CPU)
        assert len(driver.locked) == count == len(plan.store.streamed)
        assert equal(gradients(model, network), expected)
    plan.store.close()
    assert not driver.locked


def without_room(monkeypatch, after: int) -> Callable[[], None]:
    """From now on the device has room for `after` more blocks; call the result to end that."""
    to, taken = torch.Tensor.to, []

    def limited(tensor, *arguments, **named):
        if named.get("copy"):
            if len(taken) == after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            taken.append(tensor.shape)
        return to(tensor, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "to", limited)
    return lambda: monkeypatch.setattr(torch.Tensor, "to", to)


@pytest.mark.parametrize("room", [0, 1])
def test_a_store_without_room_to_bring_blocks_home_can_be_told_again(driver, monkeypatch, room):
    """The block that did not fit keeps its memory; to stream it again must not give it other memory and no weights."""
    model, network = adapted("fp8")
    expected = gradients(model, network)
    store = BlockStore(model.transformer_blocks, (0, 1), CPU)
    model.block_runner = store
    enough = without_room(monkeypatch, room)
    with pytest.raises(torch.OutOfMemoryError):
        store.restream(model.transformer_blocks, (2, 3), 2)
    enough()
    assert len(store.streamed) == BLOCKS - room == len(driver.locked)
    assert equal(gradients(model, network), expected)
    for indices in ((0, 1, 3), (1, 2)):
        store.restream(model.transformer_blocks, indices, 2)
        assert store.streamed == indices and len(driver.locked) == len(indices)
        assert equal(gradients(model, network), expected)


def filled(model: torch.nn.Module, *indices: int) -> HostBlocks:
    hosts = HostBlocks(indices, CPU)
    for index, block in enumerate(model.transformer_blocks):
        hosts.take(index, block)
    hosts._wait()
    return hosts


def test_memory_that_was_locked_while_loading_is_handed_over_with_its_locks(driver):
    model, network = adapted("fp8")
    expected = gradients(model, network)
    hosts = filled(model, 0, 2, 3)
    assert len(driver.locked) == 3
    # Block 1 is new to the host, and nobody streams 3.
    model.block_runner = BlockStore(model.transformer_blocks, (0, 1, 2), CPU, hosts=hosts)
    assert driver.granted == 4
    del hosts
    gc.collect()
    assert driver.locked.keys() >= {memory.bytes.data_ptr() for memory in model.block_runner._host.values()}
    assert equal(gradients(model, network), expected)


def test_memory_that_nobody_took_over_is_unlocked(driver):
    model, network = adapted("fp8")
    expected = gradients(model, network)
    hosts = filled(model, 0, 2)
    assert len(driver.locked) == 2
    del hosts
    gc.collect()
    assert not driver.locked
    assert equal(gradients(model, network), expected), "the blocks still use it"


def test_a_refusal_in_the_middle_leaves_the_locks_before_it(driver, caplog):
    driver.refuses_after = 2
    model, network = adapted("fp8")
    expected = gradients(model, network)
    with caplog.at_level(logging.WARNING):
        plan = prepare_model(model, streamed(3), EAGER, CPU)
    assert f"cannot be page-locked here (CUDA status {OUT_OF_MEMORY})" in caplog.text
    assert len(driver.locked) == 2 and not plan.store.recordable
    assert equal(gradients(model, network), expected)
    rearrange(model, plan, streamed(1), CPU)
    assert equal(gradients(model, network), expected)


def test_a_store_tries_again_what_was_refused_while_loading(driver):
    driver.refuses_after = 1
    model, _ = adapted("fp8")
    hosts = filled(model, 0, 2, 3)
    assert len(driver.locked) == 1
    driver.refuses_after = None
    store = BlockStore(model.transformer_blocks, (0, 2, 3), CPU, hosts=hosts)
    assert all(memory.locked for memory in store._host.values()) and driver.granted == 3


def test_a_store_that_could_not_be_made_leaves_no_lock(driver, monkeypatch):
    register, calls = driver.cudaHostRegister, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("the device is gone")
        return register(*arguments)

    driver.cudaHostRegister = failing
    model, _ = adapted("fp8")
    with pytest.raises(RuntimeError, match="gone"):
        BlockStore(model.transformer_blocks, (0, 1, 2, 3), CPU)
    gc.collect()
    assert not driver.locked and driver.freed == 3
    driver.mistakes.remove("unlocked without a lock")  # nobody knew what had become of the third


def locked_memory() -> HostMemory:
    memory = HostMemory(5000)
    assert not memory.locked and memory.lock(CPU) == 0 and memory.locked
    assert memory.lock(CPU) == 0, "once is enough"
    return memory


def test_a_view_may_outlive_the_lock(driver):
    memory = locked_memory()
    view = memory.bytes.fill_(7)[10:20].view(torch.int16)
    del memory
    assert not driver.locked and driver.freed == 0
    assert view.tolist() == [0x0707] * 5
    del view
    assert driver.freed == 1


@pytest.mark.parametrize(
    "trouble",
    [{"status": 999}, {"error": RuntimeError}, {"error": KeyboardInterrupt}],
    ids=["refused", "device lost", "interrupted"],
)
def test_what_cannot_be_unlocked_now_is_kept_until_it_can(driver, trouble):
    memory = locked_memory()
    usual = {name: getattr(driver, name) for name in trouble}
    vars(driver).update(trouble)
    if trouble.get("error") is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            memory.unlock()
    del memory
    gc.collect()
    assert driver.freed == 0 and len(driver.locked) == 1
    vars(driver).update(usual)
    HostMemory(1)
    assert not driver.locked and driver.freed == 2


def test_garbage_that_is_collected_during_a_recording_waits_for_its_end(driver, monkeypatch):
    """Waiting for the device would end the recording with an error."""
    memory = locked_memory()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    del memory
    assert driver.waits == 0 and driver.freed == 0 and len(driver.locked) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    HostMemory(1)
    assert not driver.locked


LEAVING = """
import pytest, torch
from tests.memory.driver import installed
from ltx2_tuner.memory.host_memory import HostMemory
driver = installed(pytest.MonkeyPatch())
kept = HostMemory(5000)
kept.lock(torch.device("cpu"))
def refuse(*arguments):
    print("waited for the device", flush=True)
    raise RuntimeError("too late")
torch.cuda.synchronize = refuse
"""


def test_leaving_the_interpreter_waits_for_nothing():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
