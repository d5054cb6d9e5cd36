"""Frozen matrices in 4 or 8 bits, quantized and multiplied by bitsandbytes, as in QLoRA (arXiv 2305.14314)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import re
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptj_train.errors import UserError

Quantization = Literal["none", "nf4", "int8"]
"""How the matrices of the blocks are stored.

nf4: 4 bits a weight, a scale for 64 of them; the scales take 8 bits each (double quantization). int8: 8 bits a weight,
a scale for each row.
"""

_BLOCK = 64  # weights that share a scale in nf4, as in the paper and in bitsandbytes
_SCALE_BLOCK = 256  # scales that share a scale of their own; bitsandbytes' kernels know no other number
_CHUNK = 1 << 22  # elements quantized together; bitsandbytes' temporaries take 20 bytes an element on a CPU
_BLOCK_MATRIX = re.compile(r"(transformer\.)?h\.\d+\.(attn|mlp)\.\w+\.weight")


def is_quantized(name: str) -> bool:
    """Return whether a parameter is a matrix of a block, which ``quantize`` stores in fewer bits."""
    return _BLOCK_MATRIX.fullmatch(name) is not None


@functools.cache
def bitsandbytes() -> Any:
    """Return the package bitsandbytes, which only quantization needs.

    Raises:
        UserError: it is not installed.
    """
    # It warns of an optional package that would download code.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise UserError("quantize needs the package bitsandbytes: pip install 'gptj_train[quantize]'") from None


class QuantizedMatrix(nn.Module):
    """A frozen matrix in few bits, in the place of a linear layer's ``weight``.

    All buffers hold integers. DeepSpeed calls ``module.bfloat16()``, which would round scales in fp32; it moves
    integers, and leaves their values.

    Attributes:
        packed: the weights; nf4: (out * in / 2, 1) uint8, two weights a byte; int8: (out, in) int8.
        scales: nf4: (out * in / 64) uint8; int8: empty.
        fp32_bits: int32, the bits of fp32 numbers; nf4: the scales of the scales, then their offset; int8: (out), the
            largest magnitude of each row.
    """

    packed: Tensor
    scales: Tensor
    fp32_bits: Tensor

    def __init__(self, matrix: Tensor, kind: Quantization) -> None:
        """Quantize (out, in), on its device.

        Raises:
            UserError: no bitsandbytes, or rows that nf4 cannot divide.
        """
        super().__init__()
        if kind == "nf4" and matrix.shape[1] % _BLOCK:
            # bitsandbytes 0.50.2 dequantizes rows of 32 or 96 to other numbers on a CPU with AVX-512.
            raise UserError(f"quantize=nf4 needs n_embd and n_inner to be multiples of {_BLOCK}, got {matrix.shape[1]}")
        self.kind = kind
        self.shape = matrix.shape
        packed, scales, fp32 = _nf4(matrix) if kind == "nf4" else _int8(matrix)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("fp32_bits", fp32.view(torch.int32))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x @ matrix.T + bias``: (..., in) -> (..., out). The matrix gets no gradient."""
        if self.kind == "nf4":
            # It dequantizes again in the backward, so that no dequantized matrix is kept between the two.
            out: Tensor = bitsandbytes().matmul_4bit(x, self.packed, quant_state=self._nf4_state(x.dtype), bias=bias)
            return out
        return _Int8Product.apply(x, bias, self)  # type: ignore[no-untyped-call,no-any-return]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix (out, in) that the products see."""
        if self.kind == "nf4":
            matrix: Tensor = bitsandbytes().functional.dequantize_4bit(self.packed, self._nf4_state(dtype))
            return matrix
        largest = self.fp32_bits.view(torch.float32)
        return self.packed.to(dtype).mul_((largest / 127).unsqueeze(1))

    def _nf4_state(self, dtype: torch.dtype) -> Any:
        """Return bitsandbytes' description of ``packed``; made anew, because buffers move between devices."""
        state = bitsandbytes().functional.QuantState
        fp32 = self.fp32_bits.view(torch.float32)
        codes, scale_codes = _codes(self.packed.device)
        return state(
            absmax=self.scales,
            shape=self.shape,
            code=codes,
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=fp32[-1],
            state2=state(absmax=fp32[:-1], code=scale_codes, blocksize=_SCALE_BLOCK, dtype=torch.float32),
        )


class _Int8Product(torch.autograd.Function):
    """The product with a dequantized matrix, which is made again in the backward instead of being kept.

    bitsandbytes trains so on a CPU. Its product on a GPU also rounds the activations to 8 bits, which costs accuracy
    and saves no memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: QuantizedMatrix) -> Tensor:
        ctx.matrix = matrix
        return F.linear(x, matrix.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.matrix.dequantized(grad.dtype), None, None


def linear(x: Tensor, weight: Tensor | QuantizedMatrix, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias`` for a weight that may be quantized."""
    if isinstance(weight, QuantizedMatrix):
        return weight.product(x, bias)
    return F.linear(x, weight, bias)


def quantize_blocks(
    model: nn.Module, kind: Quantization, read: Callable[[str], Tensor], device: torch.device | None = None
) -> None:
    """Replace the matrices of every block, one after the other, so that one of them is in memory unquantized.

    Args:
        model: its matrices may be on the meta device.
        read: returns the parameter of a name in the dtype to compute in; the tensor is dropped after its use.
        device: where the quantized matrices will be; None is the host.
    """
    for name, _ in list(model.named_parameters()):
        if not is_quantized(name):
            continue
        module = model.get_submodule(name.removesuffix(".weight"))
        matrix = QuantizedMatrix(read(name).to(device), kind)
        # A module cannot take a parameter's place.
        del module.weight
        module.weight = matrix
        _trim_heap()


def _trim_heap() -> None:
    """Give freed memory back to the system, where the C library is glibc.

    Otherwise it keeps the holes that temporaries leave between quantized matrices: 0.1 to 0.2 GB for each block of 6B,
    more than the block takes in 4 bits.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def stored_bytes(shapes: Mapping[str, tuple[int, ...]], kind: Quantization, element: int) -> int:
    """Return the bytes of all parameters, those of the blocks' matrices quantized.

    Args:
        element: bytes of an element that is not quantized.
    """
    total = 0
    for name, shape in shapes.items():
        count = prod(shape)
        if kind == "none" or not is_quantized(name):
            total += element * count
        elif kind == "int8":
            total += count + 4 * shape[0]
        else:
            scales = -(-count // _BLOCK)
            total += -(-count // 2) + scales + 4 * -(-scales // _SCALE_BLOCK) + 4
    return total


def product_bytes(shapes: Mapping[str, tuple[int, ...]], kind: Quantization, element: int) -> int:
    """Return the bytes that a product with a quantized matrix takes for a moment: the largest matrix, dequantized."""
    if kind == "none":
        return 0
    return element * max(prod(shape) for name, shape in shapes.items() if is_quantized(name))


def _nf4(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed weights, scales, and the fp32 numbers behind the scales.

    Equal to bitsandbytes' ``quantize_4bit(matrix, compress_statistics=True, quant_type="nf4")``, which takes more
    memory: a GB for the largest matrices of GPT-J 6B.
    """
    functional = bitsandbytes().functional
    flat = matrix.reshape(-1)
    # In one piece from the start: pieces joined at the end would exist twice.
    packed = torch.empty((-(-len(flat) // 2), 1), dtype=torch.uint8, device=matrix.device)
    scale = torch.empty(-(-len(flat) // _BLOCK), dtype=torch.float32, device=matrix.device)
    for start in range(0, len(flat), _CHUNK):
        # A multiple of the block: a chunk begins where a block does.
        bits, state = functional.quantize_4bit(flat[start : start + _CHUNK], blocksize=_BLOCK, quant_type="nf4")
        packed[start // 2 : start // 2 + len(bits)] = bits
        scale[start // _BLOCK : start // _BLOCK + len(state.absmax)] = state.absmax
    offset = scale.mean()
    bits_of_scales, state = functional.quantize_blockwise(scale - offset, blocksize=_SCALE_BLOCK)
    return packed, bits_of_scales, torch.cat((state.absmax, offset.view(1)))


def _int8(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights (out, in), no scales, and the largest magnitude of each row."""
    functional = bitsandbytes().functional
    packed = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    largest = torch.empty(matrix.shape[0], dtype=torch.float32, device=matrix.device)
    rows = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        chunk = slice(start, start + rows)
        # bitsandbytes quantizes from fp16 only.
        packed[chunk], largest[chunk], _ = functional.int8_vectorwise_quant(matrix[chunk].to(torch.float16))
    return packed, matrix.new_empty(0, dtype=torch.uint8), largest


@functools.cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 16 values of nf4, and the 256 that scales can have, once for a device."""
    functional = bitsandbytes().functional
    return functional.get_4bit_type("nf4", device=device), functional.create_dynamic_map().to(device)
