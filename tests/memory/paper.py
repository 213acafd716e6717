"""CUDA graphs on paper: operators on the CPU are written down and run again, under some of CUDA's rules of capture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Paper:
    """The device: which stream is current, and which streams are within the capture that is under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default = self.current = Stream(self)
        self.graph: Graph | None = None
        self.invalid = False  # what is being captured
        self.origin: Stream | None = None
        self.within: set[Stream] = set()
        self.apart: set[Stream] = set()  # streams within that have not come back
        self.launched: list[Graph] = []
        self.allocating: list[object] = []  # pools whose capture has not ended, for all that the allocator knows
        self.held: list[object] = []  # pools that such a capture holds
        self.generator = Generator()
        stand_ins = {
            "Stream": lambda priority=0: Stream(self),
            "Event": lambda: Event(self),
            "CUDAGraph": lambda: Graph(self),
            "stream": lambda stream: Current(self, stream),
            "current_stream": lambda device=None: self.current,
            "is_current_stream_capturing": lambda: self.current in self.within,
            "current_device": lambda: 0,
            "default_generators": (self.generator,),
            "synchronize": self.synchronize,
            "empty_cache": lambda: None,
            "graph_pool_handle": object,
            "mem_get_info": lambda: (2**40, 2**40),
            "get_per_process_memory_fraction": lambda: 1.0,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        for name in ("memory_reserved", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda: 0)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_allocation, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: self.held.remove(pool), raising=False)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def _end_allocation(self, device: int, pool: object) -> None:
        if pool not in self.allocating:
            raise RuntimeError("not currently recording to this pool")
        self.allocating.remove(pool)

    def synchronize(self, device: object = None) -> None:
        if self.graph is not None:
            self.invalid = True
            raise RuntimeError("synchronised within a capture")


class Generator:
    """The default one of the device, which draws only where it takes itself to be outside of captures."""

    capturing = False

    def clone_state(self) -> Generator:
        return Generator()

    def graphsafe_set_state(self, state: Generator) -> None:
        self.capturing = state.capturing


class Stream:
    def __init__(self, paper: Paper) -> None:
        self.paper = paper

    def wait_stream(self, other: Stream) -> None:
        paper = self.paper
        if paper.graph is None:
            return
        if paper.invalid:
            raise RuntimeError("the capture was invalidated before")
        assert other in paper.within, "work within a capture waits for work outside"
        self._enter()
        if self is paper.origin:
            paper.apart.discard(other)

    def wait_event(self, event: Event) -> None:
        assert event.graph is self.paper.graph, "an event counts within its capture only"
        if event.graph is not None:
            self._enter()

    def _enter(self) -> None:
        self.paper.within.add(self)
        if self is not self.paper.origin:
            self.paper.apart.add(self)


class Event:
    def __init__(self, paper: Paper) -> None:
        self.paper, self.graph = paper, None

    def record(self) -> None:
        self.graph = self.paper.graph if self.paper.current in self.paper.within else None


class Current:
    """`torch.cuda.stream`; no generator, which would come back when it is collected."""

    def __init__(self, paper: Paper, stream: Stream) -> None:
        self.paper, self.stream = paper, stream

    def __enter__(self) -> None:
        self.before, self.paper.current = self.paper.current, self.stream

    def __exit__(self, *error: object) -> None:
        self.paper.current = self.before


class Graph(TorchDispatchMode):
    """What `torch.cuda.graph` captures into. Memory is not used twice: every tensor made stays as long as the graph."""

    def __init__(self, paper: Paper) -> None:
        super().__init__()
        self.paper = paper
        self.calls: list[tuple] = []

    def capture_begin(self, pool: object, **settings: object) -> None:
        paper = self.paper
        assert paper.graph is None and pool is not None
        paper.graph, paper.origin, paper.within, paper.apart = self, paper.current, {paper.current}, set()
        paper.allocating.append(pool)
        paper.held.append(pool)
        paper.generator.capturing = True
        self.__enter__()

    def capture_end(self) -> None:
        paper = self.paper
        self.__exit__(None, None, None)
        invalid, paper.invalid, paper.graph, paper.within = paper.invalid, False, None, set()
        if invalid or paper.apart or paper.current is not paper.origin:
            raise RuntimeError("a capture ended that was invalid or without all of its streams")
        paper.allocating.pop()
        paper.held.pop()  # from here on by the graph
        paper.generator.capturing = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        self.paper.launched.append(self)
        for func, args, kwargs, made in self.calls:
            views = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
            if views or "empty" in func._schema.name:
                continue
            for place, value in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs))):
                if isinstance(place, Tensor) and place is not value:
                    place.copy_(value)
