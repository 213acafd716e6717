"""Products with GELU, or its derivative, in them: by cuBLASLt itself, which torch does not ask for these.

A kernel of its own reads and writes the widest rows of a block once more. Of the algorithms that cuBLASLt proposes, the
first is not always the fastest; so the first call of a shape times them, in turns.

cuBLASLt is the library that torch has loaded. Its C interface (https://docs.nvidia.com/cuda/cublas, "Using the cuBLASLt
API") is stable within a major version; `available` compares what comes out. T rows, n outputs, k inputs of a weight.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import statistics
import sys
import threading
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p, sizeof
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

SMALLEST = 10**10  # operations: with smaller products GELU costs little
_WORKSPACE = 32 << 20  # bytes, NVIDIA's advice for Hopper
_ALIGNMENT = 256  # bytes, which cuBLASLt assumes
_PROPOSALS, _ROUNDS = 16, 8
_GAIN = 0.985  # what another algorithm than the first has to take of the first one's time

# cublasLt.h, library_types.h
_COMPUTE_32F, _R_32F = 68, 0
_TYPES = {torch.bfloat16: 14, torch.float16: 2}
_TRANSPOSE_A, _EPILOGUE, _BIAS, _AUX, _AUX_STRIDE = 3, 7, 8, 11, 12  # attributes of a product
_MAX_WORKSPACE = 1  # attribute of a preference
_GELU, _GELU_WITH_BIAS, _GELU_GRADIENT = 32 | 128, 32 | 128 | 4, 64 | 128  # all with GELU's input as another tensor


class _RefusedError(RuntimeError):
    """cuBLASLt does not do it."""


class _Result(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


class _Kind(NamedTuple):
    """What an algorithm depends on."""

    device: int
    dtype: torch.dtype
    rows: int
    outputs: int
    inputs: int
    stride: int  # of the weight's rows
    epilogue: int


class _Operands(NamedTuple):
    weight: Tensor  # (n, k)
    given: Tensor  # (T, k), for the gradient (T, n)
    result: Tensor  # (T, n), for the gradient (T, k)
    pre: Tensor  # like the result: what GELU is applied to
    bias: Tensor | None  # (n,)


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of x (..., k) with `weight` (n, k) is worth asking for, where this is `available`."""
    if not (x.is_cuda and weight.is_cuda and x.dtype == weight.dtype and x.dtype in _TYPES):
        return False
    operations = 2 * x.numel() * weight.shape[0]
    return isinstance(operations, int) and operations >= SMALLEST


def gelu_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (T, k), weight (n, k), bias (n,) -> tanh-GELU of the product with its bias, and what GELU is applied to."""
    result, pre = (x.new_empty(x.shape[0], weight.shape[0]) for _ in range(2))
    operands = _Operands(weight, x.contiguous(), result, pre, bias)
    if x.is_cuda and available() and _run(operands, _GELU if bias is None else _GELU_WITH_BIAS):
        return result, pre
    pre = F.linear(x, weight, bias)
    return F.gelu(pre, approximate="tanh"), pre


def gelu_input_gradient(gradient: Tensor, weight: Tensor, pre: Tensor) -> Tensor:
    """gradient (T, n), weight (n, k), pre (T, k) -> gradient (T, k) of `pre`, whose tanh-GELU `weight` multiplied."""
    result = torch.empty_like(pre)
    operands = _Operands(weight, gradient.contiguous(), result, pre, None)
    if gradient.is_cuda and available() and _run(operands, _GELU_GRADIENT):
        return result
    return torch.ops.aten.gelu_backward(gradient @ weight, pre, approximate="tanh")


@functools.cache
def available() -> bool:
    """Whether the library answers and agrees with torch."""
    if not torch.cuda.is_available() or torch.version.hip:
        return False
    try:
        return _agrees()
    except (OSError, AttributeError, RuntimeError) as error:
        logger.info("no products with GELU by cuBLASLt here (%s); GELU is a kernel of its own", error)
        return False


@torch.no_grad()
def _agrees() -> bool:
    """Whether small products are what torch gives."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight, bias, gradient, second = (
        torch.randn(*shape, generator=generator, device="cuda").to(torch.bfloat16)
        for shape in ((64, 128), (256, 128), (256,), (64, 128), (128, 256))
    )
    pre, hidden, of_pre = (x.new_empty(64, 256) for _ in range(3))
    forward, backward = _Operands(weight, x, hidden, pre, bias), _Operands(second, gradient, of_pre, pre, None)
    if not (_run(forward, _GELU_WITH_BIAS) and _run(backward, _GELU_GRADIENT)):
        return False
    wanted = F.linear(x.float(), weight.float(), bias.float())
    of_hidden = gradient.float() @ second.float()
    pairs = [
        (pre, wanted),
        (hidden, F.gelu(wanted, approximate="tanh")),
        (of_pre, torch.ops.aten.gelu_backward(of_hidden, pre.float(), approximate="tanh")),
    ]
    return all(bool((one.float() - other).norm() <= 1e-2 * other.norm()) for one, other in pairs)


def _run(operands: _Operands, epilogue: int) -> bool:
    """Multiply into `operands.result`; False where cuBLASLt cannot."""
    tensors = [tensor for tensor in operands if tensor is not None]
    if any(tensor.data_ptr() % _ALIGNMENT for tensor in tensors) or operands.weight.stride(1) != 1:
        return False
    weight = operands.weight
    sizes = operands.given.shape[0], *weight.shape, weight.stride(0)
    kind = _Kind(weight.device.index, weight.dtype, *sizes, epilogue)
    with torch.cuda.device_of(weight):
        try:
            plan = _plans[kind] if kind in _plans else _plans.setdefault(kind, _Plan(kind, operands))
            if plan is None:
                return False
            if plan.chosen is None and not torch.cuda.is_current_stream_capturing():
                plan.choose(operands)
            plan.run(operands)
        except _RefusedError as error:
            logger.warning("GELU is a kernel of its own from now on for %s: %s", kind, error)
            _plans[kind] = None
            return False
    return True


_plans: dict[_Kind, _Plan | None] = {}  # None where cuBLASLt refused


class _Plan:
    """A kind of product: its description for cuBLASLt, the algorithms proposed, and the one chosen."""

    def __init__(self, kind: _Kind, operands: _Operands) -> None:
        self.lock = threading.Lock()  # the description holds pointers of the call that is being made
        self.handle = _handle(kind.device)
        self.chosen: _Result | None = None
        type_, backward = _TYPES[kind.dtype], kind.epilogue == _GELU_GRADIENT
        width, summed = (kind.inputs, kind.outputs) if backward else (kind.outputs, kind.inputs)
        # cuBLAS knows matrices by columns: to it our rows are columns, the weight is (k, n) and the result (width, T).
        self.product = c_void_p()
        _check(_library().cublasLtMatmulDescCreate(byref(self.product), _COMPUTE_32F, _R_32F))
        self._set(_TRANSPOSE_A, c_int32(not backward))
        self._set(_EPILOGUE, c_int32(kind.epilogue))
        self._set(_AUX_STRIDE, c_int64(width))
        self._point(operands)
        self.layouts = [
            _layout(type_, kind.inputs, kind.outputs, kind.stride),
            _layout(type_, summed, kind.rows, summed),
            _layout(type_, width, kind.rows, width),
        ]
        self.proposals = self._proposals()

    def _proposals(self) -> list[_Result]:
        library, preference, most = _library(), c_void_p(), c_size_t(_WORKSPACE)
        _check(library.cublasLtMatmulPreferenceCreate(byref(preference)))
        try:
            _check(library.cublasLtMatmulPreferenceSetAttribute(preference, _MAX_WORKSPACE, byref(most), sizeof(most)))
            found, count = (_Result * _PROPOSALS)(), c_int()
            weight, given, result = self.layouts
            status = library.cublasLtMatmulAlgoGetHeuristic(
                self.handle, self.product, weight, given, result, result, preference, _PROPOSALS, found, byref(count)
            )
        finally:
            library.cublasLtMatmulPreferenceDestroy(preference)
        proposals = [one for one in found[: count.value] if one.state == 0]
        if status or not proposals:
            raise _RefusedError(f"cuBLASLt proposes no algorithm (status {status})")
        return proposals

    def choose(self, operands: _Operands) -> None:
        """Time all algorithms in turns: clocks fall while a GPU is busy, and the next one would pay for the last."""
        runs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in self.proposals]
        for _ in range(_ROUNDS):
            for algorithm, timed in zip(self.proposals, runs):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                self.run(operands, algorithm)
                end.record()
                timed.append((start, end))
        torch.cuda.synchronize()
        times = [statistics.median(start.elapsed_time(end) for start, end in timed) for timed in runs]
        best = min(range(len(times)), key=times.__getitem__)
        self.chosen = self.proposals[best if times[best] < _GAIN * times[0] else 0]

    def run(self, operands: _Operands, algorithm: _Result | None = None) -> None:
        """Multiply by an algorithm: if none is given, by the one chosen."""
        algorithm = algorithm or self.chosen or self.proposals[0]
        workspace = operands.result.new_empty(algorithm.workspace, dtype=torch.uint8)
        weight, given, result = self.layouts
        with self.lock:
            self._point(operands)
            _check(
                _library().cublasLtMatmul(
                    self.handle, self.product, byref(_ONE), _address(operands.weight), weight,
                    _address(operands.given), given, byref(_ZERO), _address(operands.result), result,
                    _address(operands.result), result, byref(algorithm.algorithm), _address(workspace),
                    c_size_t(algorithm.workspace), c_void_p(torch.cuda.current_stream().cuda_stream),
                )
            )  # fmt: skip

    def _point(self, operands: _Operands) -> None:
        self._set(_AUX, c_uint64(operands.pre.data_ptr()))
        if operands.bias is not None:
            self._set(_BIAS, c_uint64(operands.bias.data_ptr()))

    def _set(self, attribute: int, value: ctypes._SimpleCData) -> None:
        _check(_library().cublasLtMatmulDescSetAttribute(self.product, attribute, byref(value), sizeof(value)))


_ONE, _ZERO = c_float(1.0), c_float(0.0)


def _address(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _layout(type_: int, rows: int, columns: int, stride: int) -> c_void_p:
    made, shape = c_void_p(), (c_uint64(rows), c_uint64(columns), c_int64(stride))
    _check(_library().cublasLtMatrixLayoutCreate(byref(made), type_, *shape))
    return made


@functools.cache
def _library() -> ctypes.CDLL:
    """The library that torch uses: it is loaded already, so its name is enough."""
    major = torch.version.cuda.split(".")[0]
    name = f"cublasLt64_{major}.dll" if sys.platform == "win32" else f"libcublasLt.so.{major}"
    return ctypes.CDLL(name)


@functools.cache
def _handle(device: int) -> c_void_p:
    made = c_void_p()
    _check(_library().cublasLtCreate(byref(made)))
    return made


def _check(status: int) -> None:
    if status:
        raise _RefusedError(f"cuBLASLt returned status {status}")
