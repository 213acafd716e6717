"""Runs a script in a process of its own and watches its host memory; shared by the benchmarks of whole scripts."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL = 0.1  # seconds between looks at the processes
_GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """How a script ended. host_peak, driver_peak: bytes, see `MemoryWatch`. output, error_text: stdout and stderr."""

    status: int
    seconds: float
    host_peak: int
    driver_peak: int
    output: str
    error_text: str

    def memory(self) -> dict[str, float]:
        """The two peaks in GiB, for a JSON line."""
        return {
            "host_peak_gib": round(self.host_peak / _GIB, 2),
            "driver_mapped_gib": round(self.driver_peak / _GIB, 2),
        }


def run_watched(command: Sequence[str], heard: Callable[[str], None] = lambda text: None) -> Outcome:
    """Run a command to its end.

    Args:
        heard: called with each piece of stderr as soon as it is there.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace"
        )
        watch = MemoryWatch(process.pid)
        pieces = []
        while piece := process.stderr.read(1):
            pieces.append(piece)
            heard(piece)
        status = process.wait()
        seconds = time.perf_counter() - start
        watch.join()
        output.seek(0)
        return Outcome(status, seconds, watch.host_peak, watch.driver_peak, output.read(), "".join(pieces))


class MemoryWatch(threading.Thread):
    """Follows a process and its children until it ends.

    Attributes:
        host_peak: most bytes of memory that is theirs: anonymous and shared memory, page-locked or not. Pages of mapped
            files are not counted: they belong to the page cache.
        driver_peak: most bytes that the main process has mapped from the graphics driver. Where the driver allocates
            page-locked memory itself it is among these, and not in host_peak.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.host_peak = self.driver_peak = 0
        self.start()

    def run(self) -> None:
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(self.pid)
            while True:
                total = own_bytes(process)
                for child in process.children(recursive=True):
                    with contextlib.suppress(psutil.Error, OSError):  # it ended meanwhile
                        total += proportional_bytes(child)
                self.host_peak = max(self.host_peak, total)
                self.driver_peak = max(self.driver_peak, driver_bytes(self.pid))
                time.sleep(INTERVAL)


def own_bytes(process: psutil.Process) -> int:
    """Anonymous and shared memory of a process that is in RAM."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.is_file():  # not Linux
        memory = process.memory_info()
        return memory.rss - getattr(memory, "shared", 0)
    return _kilobytes(status, ("RssAnon:", "RssShmem:"))


def proportional_bytes(process: psutil.Process) -> int:
    """The same of a child, its share of what it has in common with others (slow on a big process)."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    return _kilobytes(rollup, ("Pss_Anon:", "Pss_Shmem:")) if rollup.is_file() else own_bytes(process)


def driver_bytes(pid: int) -> int:
    """Bytes mapped from /dev/nvidia*; of nvidia-uvm's only address space is mapped."""
    maps = Path(f"/proc/{pid}/maps")
    total = 0
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.is_file() else ():
        if "/dev/nvidia" in line and "/dev/nvidia-uvm" not in line:
            first, last = line.split(maxsplit=1)[0].split("-")
            total += int(last, 16) - int(first, 16)
    return total


def _kilobytes(path: Path, names: tuple[str, ...]) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))
