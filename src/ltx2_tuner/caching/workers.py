"""Processes that decode media while the main process encodes.

Each worker has one pipe of its own and takes one job at a time, so at most as many clips are in flight as there are
workers, results come back in order, and a full pipe holds a worker back. The far end of a pipe closes with the process
that holds it: when the main process is killed its workers end, when a decoder crashes its worker is replaced and only
that job fails.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import numpy as np

Job = TypeVar("Job")
Piece = TypeVar("Piece")

_PIECE, _END, _ERROR = range(3)
# A connection's own methods for bytes copy them several times; where it is a file descriptor none is needed.
_RAW = hasattr(os, "readv")


class Workers:
    """`count` processes, started by spawn when they are first needed; 0 does the work in this process.

    A context manager: leaving it ends the processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._running: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for worker in self._running:
            worker.stop()
        self._running.clear()

    def stream(
        self, function: Callable[[Job], Iterable[Piece]], jobs: Iterable[Job], crashed: Callable[[Job], Piece]
    ) -> Iterator[tuple[Job, Piece]]:
        """Run a generator function over jobs; yields every piece with its job, in the order of the jobs.

        Args:
            function: importable by name; its pieces must pickle.
            crashed: the piece that stands in for the rest of a job whose process died.
        """
        if self.count == 0:
            for job in jobs:
                for piece in function(job):
                    yield job, piece
            return
        waiting = iter(jobs)
        queue: list[tuple[_Worker, Job]] = []
        finished = False
        try:
            for job in waiting:
                worker = self._worker(len(queue))
                worker.send(function, job)
                queue.append((worker, job))
                if len(queue) == self.count:
                    break
            while queue:
                worker, job = queue.pop(0)
                for piece in worker.pieces(crashed, job):
                    yield job, piece
                following = next(waiting, None)
                if following is not None:
                    worker.send(function, following)
                    queue.append((worker, following))
            finished = True
        finally:
            if not finished:
                self.close()  # pieces nobody asked for are still in the pipes

    def map(
        self, function: Callable[[Job], Piece], jobs: Iterable[Job], crashed: Callable[[Job], Piece]
    ) -> list[Piece]:
        """The results of a function in order; `crashed` gives the result of a job whose process died."""
        return [piece for _, piece in self.stream(_Single(function), jobs, crashed)]

    def _worker(self, number: int) -> _Worker:
        while len(self._running) <= number:
            self._running.append(_Worker())
        return self._running[number]


def ahead(pieces: Generator[Piece, None, None], count: int) -> Generator[Piece, None, None]:
    """The same pieces in the same order, fetched by a thread while the caller is busy with the last one.

    Close the generator (contextlib.closing) where not all of it may be used: that waits for the thread, which closes
    `pieces`.

    Args:
        count: pieces that may wait to be used.
    """
    ready: queue.Queue[tuple[int, Any]] = queue.Queue(count)
    stopped = threading.Event()

    def put(kind: int, value: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                continue

    def fetch() -> None:
        try:
            for piece in pieces:
                put(_PIECE, piece)
                if stopped.is_set():
                    break
            pieces.close()
            put(_END, None)
        except BaseException as error:
            put(_ERROR, error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == _END:
                return
            if kind == _ERROR:
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()


class _Single:
    """A function as a generator function of one piece."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, job: Any) -> Iterator[Any]:
        yield self.function(job)


class _Worker:
    """One process and our end of its pipe."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def send(self, function: Callable, job: object) -> None:
        try:
            self.connection.send((function, job))
        except OSError:  # it died while idle
            self.stop()
            self._start()
            self.connection.send((function, job))

    def pieces(self, crashed: Callable[[Job], Piece], job: Job) -> Iterator[Piece]:
        while True:
            try:
                kind, piece = _receive(self.connection)
            except (EOFError, OSError):
                self.stop()
                self._start()
                yield crashed(job)
                return
            if kind == _END:
                return
            if kind == _ERROR:
                raise RuntimeError(f"a decode worker failed on {job}:\n{piece}")
            yield piece

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def _send(connection: Connection, message: object) -> None:
    """Send a message, the bytes of its arrays as they are beside it: pickled, a clip would be copied twice more."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
    views = [array.raw() for array in arrays]
    connection.send((head, [view.nbytes for view in views]))
    for view in views:
        if not _RAW:
            connection.send_bytes(view)
        while _RAW and view:
            view = view[os.write(connection.fileno(), view) :]


def _receive(connection: Connection) -> Any:
    """What `_send` sent."""
    head, sizes = connection.recv()
    buffers = [np.empty(size, dtype=np.uint8) for size in sizes]
    for buffer in buffers:
        view = memoryview(buffer)
        if not _RAW:
            connection.recv_bytes_into(view)
        while _RAW and view:
            count = os.readv(connection.fileno(), [view])
            if not count:
                raise EOFError
            view = view[count:]
    return pickle.loads(head, buffers=buffers)


def _serve(connection) -> None:
    """The main loop of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what an interrupt means
    while True:
        try:
            function, job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            for piece in function(job):
                _send(connection, (_PIECE, piece))
            _send(connection, (_END, None))
        except OSError:  # nobody listens any more
            return
        except Exception:
            _send(connection, (_ERROR, traceback.format_exc()))
