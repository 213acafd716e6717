"""Decode workers: order, bounds, crashes, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from ltx2_tuner.caching import workers as workers_module
from ltx2_tuner.caching.batching import lay_out
from ltx2_tuner.caching.workers import Workers, ahead


def double(value: int) -> int:
    return 2 * value


def pieces(value: int):
    yield from range(value)
    if value == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)


def broken(value: int) -> int:
    raise KeyError("a bug, not a bad file")


@pytest.mark.parametrize("count", [0, 2])
def test_results_keep_the_order_of_the_jobs(count):
    with Workers(count) as workers:
        assert workers.map(double, range(7), crashed=lambda job: -1) == [0, 2, 4, 6, 8, 10, 12]
        found = list(workers.stream(pieces, [2, 0, 1, 4], crashed=lambda job: -1))
    assert found == [(2, 0), (2, 1), (1, 0), (4, 0), (4, 1), (4, 2), (4, 3)]


def test_a_crash_fails_its_own_job_and_a_bug_is_shown():
    with Workers(1) as workers:
        found = list(workers.stream(pieces, [1, 3, 2], crashed=lambda job: -1))
        assert found == [(1, 0), (3, 0), (3, 1), (3, 2), (3, -1), (2, 0), (2, 1)]
        with pytest.raises(RuntimeError, match="a bug, not a bad file"):
            workers.map(broken, [1], crashed=lambda job: -1)
        # A reader that stops early leaves nothing in the pipes.
        assert next(workers.stream(pieces, [2, 2], crashed=lambda job: -1)) == (2, 0)
        assert workers.map(double, [4], crashed=lambda job: -1) == [8]


def test_workers_end_with_a_killed_main_process(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent("""
            import sys, time
            from ltx2_tuner.caching.workers import Workers
            if __name__ == "__main__":
                workers = Workers(1)
                workers.map(abs, [-1], crashed=abs)
                print(workers._running[0].process.pid, flush=True)
                time.sleep(60)
            """)
    )
    source = Path(__file__).parents[2] / "src"
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(source)}
    )
    worker = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate()
    worker.wait(timeout=10)
    assert not worker.is_running()


def test_batches_hold_equal_items_in_order_of_completion():
    items = ["a1", "b1", "a2", "a3", "b2", "c1"]
    assert lay_out(items, 2, key=lambda item: item[0]) == [("a1", "a2"), ("b1", "b2"), ("a3",), ("c1",)]
    assert lay_out([], 2, key=len) == []


def test_pieces_are_fetched_ahead_in_order_up_to_the_bound():
    fetched = []

    def slowly():
        for number in range(6):
            fetched.append(number)
            yield number

    taken = ahead(slowly(), 2)
    assert next(taken) == 0
    deadline = time.monotonic() + 5
    while len(fetched) < 4 and time.monotonic() < deadline:  # two wait, one is in the thread's hand
        time.sleep(0.01)
    time.sleep(0.2)
    assert fetched == [0, 1, 2, 3]
    assert list(taken) == [1, 2, 3, 4, 5]


def test_an_error_of_the_thread_arrives_after_the_pieces_before_it():
    def failing():
        yield 1
        raise KeyError("a bug")

    taken = ahead(failing(), 2)
    assert next(taken) == 1
    with pytest.raises(KeyError, match="a bug"):
        next(taken)


def test_closing_ends_the_thread_and_what_it_reads_from():
    closed = threading.Event()

    def endless():
        try:
            yield from iter(int, 1)
        finally:
            closed.set()

    before = threading.active_count()
    taken = ahead(endless(), 2)
    next(taken)
    taken.close()
    assert closed.is_set() and threading.active_count() == before


def arrays(value: int):
    """Clips larger than a pipe holds, among them one without values and one that is no whole block of memory."""
    yield value, np.arange(value * 100_000, dtype=np.int32).reshape(value, -1)
    yield value, np.zeros((0, 3), dtype=np.float32)
    yield value, np.arange(60_000, dtype=np.int64).reshape(200, 300)[::2, ::3]


@pytest.mark.parametrize("raw", [True, False])
def test_arrays_arrive_as_they_were_and_can_be_written_to(raw, monkeypatch):
    if raw and not hasattr(os, "readv"):
        pytest.skip("no readv here")
    monkeypatch.setattr(workers_module, "_RAW", raw)
    ours, theirs = multiprocessing.Pipe()
    for value in (1, 3):
        for piece in arrays(value):
            sender = threading.Thread(target=workers_module._send, args=(theirs, piece))
            sender.start()
            number, array = workers_module._receive(ours)
            sender.join()
            assert number == value and array.flags.writeable
            np.testing.assert_array_equal(array, piece[1], strict=True)


def test_arrays_come_out_of_a_process_in_order():
    with Workers(2) as workers:
        found = list(workers.stream(arrays, [2, 5], crashed=lambda job: None))
    expected = [(job, piece) for job in (2, 5) for piece in arrays(job)]
    assert [(job, piece[0]) for job, piece in found] == [(job, piece[0]) for job, piece in expected]
    for (_, mine), (_, theirs) in zip(found, expected):
        np.testing.assert_array_equal(mine[1], theirs[1], strict=True)
