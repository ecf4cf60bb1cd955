"""Numba intrinsics that emit LLVM vector IR: 64 elements compared at once, and bit counts.

LLVM lowers each to the widest vectors at hand (AVX-512, AVX2, NEON), so the kernels that use them run at memory speed
on any machine without a compiler being installed there.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "differing_lanes",
    "hot_lanes",
    "leading_zeros",
    "load_u16",
    "load_u64",
    "ones",
    "prefetch",
    "store_u16",
    "store_u64",
    "trailing_zeros",
]

LANES = 64
"""Elements that one mask covers."""


def _load_vector(context: Any, builder: Any, array_type: Any, array: Any, start: Any) -> Any:
    width = array_type.dtype.bitwidth
    vector = ir.VectorType(ir.IntType(width), LANES)
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.bitcast(builder.gep(data, [start]), vector.as_pointer())
    return builder.load(pointer, align=width // 8)


@intrinsic
def differing_lanes(typingctx: Any, a: Any, b: Any, start: Any) -> Any:
    """Bit j of the result is set where ``a[start + j] != b[start + j]``, for j in 0..63."""
    signature = types.uint64(a, b, types.int64)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left = _load_vector(context, builder, sig.args[0], args[0], args[2])
        right = _load_vector(context, builder, sig.args[1], args[1], args[2])
        return builder.bitcast(builder.icmp_unsigned("!=", left, right), ir.IntType(64))

    return signature, codegen


@intrinsic
def hot_lanes(typingctx: Any, a: Any, start: Any, magnitude: Any, limit: Any) -> Any:
    """Bit j of the result is set where ``(a[start + j] & magnitude) < limit``, for j in 0..63."""
    signature = types.uint64(a, types.int64, a.dtype, a.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = _load_vector(context, builder, sig.args[0], args[0], args[1])
        scalar = ir.IntType(sig.args[0].dtype.bitwidth)

        def spread(value: Any) -> Any:
            first = builder.insert_element(
                ir.Constant(values.type, ir.Undefined), value, ir.Constant(ir.IntType(32), 0)
            )
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            return builder.shuffle_vector(first, ir.Constant(values.type, ir.Undefined), zeros)

        assert args[2].type == scalar
        lanes = builder.icmp_unsigned("<", builder.and_(values, spread(args[2])), spread(args[3]))
        return builder.bitcast(lanes, ir.IntType(64))

    return signature, codegen


def _count(name: str, doc: str) -> Any:
    def typed(typingctx: Any, word: Any) -> Any:
        signature = types.int64(types.uint64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            if name == "ctpop":
                return builder.ctpop(args[0])
            # zero_is_poison is false: the count of an empty word is 64 on every processor.
            return getattr(builder, name)(args[0], ir.Constant(ir.IntType(1), 0))

        return signature, codegen

    typed.__doc__ = doc
    return intrinsic(typed)


trailing_zeros = _count("cttz", "Index of the lowest set bit of a uint64; 64 for zero.")
leading_zeros = _count("ctlz", "Zero bits above the highest set bit of a uint64; 64 for zero.")
ones = _count("ctpop", "Number of set bits of a uint64.")


def _load(width: int, doc: str) -> Any:
    def typed(typingctx: Any, data: Any, at: Any) -> Any:
        signature = types.uint64(data, types.int64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            base = context.make_array(sig.args[0])(context, builder, args[0]).data
            pointer = builder.bitcast(builder.gep(base, [args[1]]), ir.IntType(width).as_pointer())
            word = builder.load(pointer, align=1)
            return word if width == 64 else builder.zext(word, ir.IntType(64))

        return signature, codegen

    typed.__doc__ = doc
    return intrinsic(typed)


def _store(width: int, doc: str) -> Any:
    def typed(typingctx: Any, data: Any, at: Any, value: Any) -> Any:
        signature = types.void(data, types.int64, types.uint64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            base = context.make_array(sig.args[0])(context, builder, args[0]).data
            pointer = builder.bitcast(builder.gep(base, [args[1]]), ir.IntType(width).as_pointer())
            builder.store(args[2] if width == 64 else builder.trunc(args[2], ir.IntType(width)), pointer, align=1)
            return context.get_dummy_value()

        return signature, codegen

    typed.__doc__ = doc
    return intrinsic(typed)


# Unaligned and unchecked; of the processor's byte order, which spec.py requires to be little-endian.
load_u16 = _load(16, "The two bytes from byte ``at`` of a uint8 array.")
load_u64 = _load(64, "The eight bytes from byte ``at`` of a uint8 array.")
store_u16 = _store(16, "Write two bytes at byte ``at`` of a uint8 array.")
store_u64 = _store(64, "Write eight bytes at byte ``at`` of a uint8 array.")


def _prefetch() -> Any:
    def typed(typingctx: Any, array: Any, index: Any) -> Any:
        signature = types.void(array, types.int64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            data = context.make_array(sig.args[0])(context, builder, args[0]).data
            pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
            word, name = ir.IntType(32), "llvm.prefetch.p0"
            kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
            call = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
            builder.call(call, [pointer, word(1), word(3), word(1)])  # for writing, into all levels, data
            return context.get_dummy_value()

        return signature, codegen

    typed.__doc__ = "Ask for the cache line of ``array[index]``, which need not exist, to be written soon."
    return intrinsic(typed)


prefetch = _prefetch()
