"""Tensors as cells: unsigned integers that hold the exact bits, without a copy where that is possible."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from thinwire.errors import MisuseError, UnsupportedError
from thinwire.wire.spec import DTYPES, DType

__all__ = ["cells_of", "dtype_of_tensor", "is_host_view", "shape_of", "tensor_of", "torch_dtype"]

Cells = npt.NDArray[np.unsignedinteger]

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F4": "float4_e2m1fn_x2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
_TO_TORCH: dict[str, torch.dtype] = {k: getattr(torch, v) for k, v in _NAMES.items() if hasattr(torch, v)}
_FROM_TORCH = {v: DTYPES[k] for k, v in _TO_TORCH.items()}
_SIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_of_tensor(tensor: torch.Tensor) -> DType:
    """The safetensors data type of a tensor.

    Raises:
        UnsupportedError: safetensors has none for it (complex128, quantised types).
    """
    if tensor.dtype not in _FROM_TORCH:
        raise UnsupportedError(f"{tensor.dtype} has no safetensors data type; convert the tensor first")
    return _FROM_TORCH[tensor.dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors data type.

    Raises:
        UnsupportedError: this torch release has none for it.
    """
    if name not in _TO_TORCH:
        raise UnsupportedError(f"this torch release has no {name}; upgrade torch", dtype=name)
    return _TO_TORCH[name]


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape in safetensors' terms: packed float4 counts single elements.

    Raises:
        UnsupportedError: a float4 tensor without dimensions.
    """
    shape = tuple(tensor.shape)
    if _FROM_TORCH.get(tensor.dtype) is DTYPES["F4"]:
        if not shape:
            raise UnsupportedError("safetensors cannot hold a float4 tensor without dimensions; reshape it to (1,)")
        return (*shape[:-1], shape[-1] * 2)
    return shape


def is_host_view(tensor: torch.Tensor) -> bool:
    """Whether :func:`cells_of` gives a view: writes to the cells are writes to the tensor."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def cells_of(tensor: torch.Tensor) -> Cells:
    """The bits of a tensor in C order as a 1-d array of uint8, uint16, uint32 or uint64.

    A view of the tensor's memory if :func:`is_host_view`, else a copy on the host.

    Raises:
        UnsupportedError: no safetensors data type.
        MisuseError: a sparse, meta or distributed tensor, which has no plain memory.

    >>> cells_of(torch.tensor([1.0, -0.0], dtype=torch.bfloat16)).tolist()
    [16256, 32768]
    """
    dtype = dtype_of_tensor(tensor)
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        raise MisuseError(f"a {tensor.layout} tensor on {tensor.device} has no plain memory to publish")
    if hasattr(tensor, "full_tensor"):
        raise MisuseError(
            "this is a DTensor: publish with thinwire.ShardedPublisher and load with thinwire.ShardedConsumer, or "
            "gather it first (tensor.full_tensor(), get_model_state_dict(full_state_dict=True))"
        )
    plain = tensor.detach()
    if plain.numel() == 0:
        return np.empty(0, dtype.cells)
    plain = plain.resolve_conj().resolve_neg().contiguous().to("cpu").reshape(-1)
    if plain.dtype == torch.bool:
        plain = plain.view(torch.uint8)
    if dtype.name == "C64":
        plain = torch.view_as_real(plain).reshape(-1)
    bits = plain.view(_SIGNED[dtype.cell_bytes]).numpy()
    return bits.view(dtype.cells)


def tensor_of(cells: Cells, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over ``cells`` (sharing their memory if it is writable), the inverse of :func:`cells_of`."""
    kind = torch_dtype(dtype)
    if dtype == "F4":
        shape = (*shape[:-1], shape[-1] // 2)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=kind)
    writable = cells if cells.flags.writeable else cells.copy()
    return (
        torch.from_numpy(writable.view(f"i{cells.itemsize}" if cells.itemsize > 1 else "u1")).view(kind).reshape(shape)
    )
