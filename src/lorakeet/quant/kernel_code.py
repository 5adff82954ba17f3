"""The kernels of quantised weights, written in LLVM's language.

Two of them: ``expand`` writes W as floats, levels[codes] * scales in 4 bits and codes *
scales in 8, and ``multiply`` forms y = x W' for few rows of x without ever writing W.  Both
read 64 weights at a time, the smallest block of NF4, so each read has one scale.

How 32 NF4 codes become floats: a 4-bit code is an index into 16 levels, and a level is
4 bytes.  One instruction (``pshufb``) looks up 32 bytes in a table of 16, so four of
them fetch the bytes of 32 levels, and interleaving those in pairs joins the bytes to
floats.  The result is the level to the last bit, and the product with the scale is the
same rounding as in the reference: ``expand`` equals it exactly.

The sum in y = x W' runs over lanes of 8 in the order of the columns, whatever the number
of rows or threads: a row's answer does not depend on the rows beside it.  Lanes are added
up once, at the last column; between chunks of columns they wait on the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llvmlite import ir

from lorakeet.quant.vector_code import (
    F32,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    LANES,
    POINTER,
    VectorCode,
    to_index,
)

STEP = 64  # weights that one turn reads
CACHE_FLOATS = 5120  # of x, which stay in the first cache (32 KiB) while rows of W pass
GROUP = 64  # outputs whose sums wait on the stack between chunks of columns
POINTERS = ("x", "y", "codes", "scales", "levels", "block_scales", "scale_levels", "offset")
SIZES = ("num_in", "num_out", "block_bits")
_BYTES, _WORDS = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
# Each byte of codes twice, in the order in which interleaving joins the floats.
_TWICE = [byte for half in (0, 2) for four in (0, 4, 8, 12) for byte in
          (four + half, four + half, four + half + 1, four + half + 1)]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KernelForm:
    """Which kernel is to be written.

    Args:
        num_rows: of x; 0 expands the weight instead of multiplying.
        is_int8: codes are int8 with a scale for each output; else 4 bits with blocks.
        has_double_scales: the scales of 4-bit blocks are in 8 bits.
        streams: expanded weights go past the caches, which need not read the old ones then;
            y must begin at a multiple of 32 bytes.
    """

    num_rows: int
    is_int8: bool = False
    has_double_scales: bool = False
    streams: bool = False

    @property
    def num_outputs(self) -> int:
        """Outputs formed side by side: the fastest that were measured on AVX2."""
        if self.is_int8:
            return {1: 8, 2: 4, 3: 2, 4: 2}.get(self.num_rows, 1)
        return 2 if self.num_rows in (1, 2) else 1

    @property
    def num_columns(self) -> int:
        """Columns of a chunk: so much of x as the first cache holds, in whole steps."""
        return CACHE_FLOATS // max(1, self.num_rows) // STEP * STEP


Read = Callable[[ir.Value], Iterator[ir.Value]]


def build_kernel(form: KernelForm, *, is_threaded: bool) -> ir.Module:
    """A module with one function, ``kernel``, of one argument.

    Args:
        is_threaded: whether it asks OpenMP which part of the outputs is its own.

    Returns:
        The argument is a pointer to 64-bit numbers: ``POINTERS``, then ``SIZES``.
    """
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), "kernel")
    code = VectorCode(function)
    builder = code.builder
    (argument,) = function.args
    numbers = {
        name: code.load(I64, argument, to_index(place))
        for place, name in enumerate((*POINTERS, *SIZES))
    }
    given = {name: builder.inttoptr(numbers[name], POINTER) for name in POINTERS}
    given.update((name, numbers[name]) for name in SIZES)
    read = _read_int8(code, given) if form.is_int8 else _read_nf4(code, given, form)
    own = _own_part(code, given["num_out"], form.num_outputs, is_threaded)
    if form.num_rows:
        _write_multiply(code, given, form, read, own)
    else:
        _write_expand(code, given, form, read, own)
    builder.ret_void()
    return module


def _own_part(
    code: VectorCode, num_out: ir.Value, width: int, is_threaded: bool
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """First output, end of the whole groups and end of the outputs of this thread."""
    builder = code.builder
    whole = builder.sdiv(num_out, to_index(width))
    if not is_threaded:
        return to_index(0), builder.mul(whole, to_index(width)), num_out
    place = builder.sext(code.call("omp_get_thread_num", I32), I64)
    parts = builder.sext(code.call("omp_get_num_threads", I32), I64)
    after = code.sum_of(place, 1)
    first, end = (
        builder.mul(builder.sdiv(builder.mul(whole, part), parts), to_index(width))
        for part in (place, after)
    )
    is_last = builder.icmp_signed("==", after, parts)
    return first, end, builder.select(is_last, num_out, end)


def _read_int8(code: VectorCode, given: dict[str, ir.Value]) -> Read:
    """Eight codes at a time, as floats without their scale."""
    builder = code.builder

    def read(start: ir.Value) -> Iterator[ir.Value]:
        for offset in range(0, STEP, LANES):
            place = code.sum_of(start, offset)
            codes = code.load(ir.VectorType(I8, LANES), given["codes"], place)
            yield builder.sitofp(builder.sext(codes, ir.VectorType(I32, LANES)), FLOATS)

    return read


def _read_nf4(code: VectorCode, given: dict[str, ir.Value], form: KernelForm) -> Read:
    """64 codes of 4 bits as levels times their scale."""
    builder = code.builder
    half = ir.VectorType(I8, 16)
    planes = [code.load(half, given["levels"], to_index(16 * byte)) for byte in range(4)]
    tables = [code.pick(plane, plane, [*range(16)] * 2) for plane in planes]

    def read(start: ir.Value) -> Iterator[ir.Value]:
        block = builder.lshr(start, given["block_bits"])
        scale = code.spread(_read_scale(code, given, block, form.has_double_scales))
        first = builder.lshr(start, to_index(1))
        for offset in range(0, STEP // 2, 16):
            codes = code.load(half, given["codes"], code.sum_of(first, offset))
            for levels in _look_up(code, codes, tables):
                yield builder.fmul(levels, scale)

    return read


def _read_scale(
    code: VectorCode, given: dict[str, ir.Value], block: ir.Value, has_double_scales: bool
) -> ir.Value:
    """s, or offset + s2 * LEVELS8[code], rounded after each of the two."""
    if not has_double_scales:
        return code.load(F32, given["scales"], block)
    builder = code.builder
    place = builder.zext(code.load(I8, given["scales"], block), I64)
    level = code.load(F32, given["scale_levels"], place)
    outer = code.load(F32, given["block_scales"], builder.lshr(block, to_index(8)))
    return builder.fadd(builder.fmul(level, outer), code.load(F32, given["offset"], to_index(0)))


def _look_up(code: VectorCode, codes: ir.Value, tables: list[ir.Value]) -> Iterator[ir.Value]:
    """16 bytes of codes as four vectors of levels, in the order of the weights."""
    builder = code.builder

    def fetch(table: ir.Value, places: ir.Value) -> ir.Value:
        return code.call("llvm.x86.avx2.pshuf.b", _BYTES, table, places)

    both = code.pick(codes, codes, [*range(16)] * 2)
    words = builder.bitcast(fetch(both, ir.Constant(_BYTES, _TWICE)), _WORDS)
    earlier = builder.and_(
        builder.lshr(words, ir.Constant(_WORDS, [4] * 16)), ir.Constant(_WORDS, [0x000F] * 16)
    )
    later = builder.and_(words, ir.Constant(_WORDS, [0x0F00] * 16))
    places = builder.bitcast(builder.or_(earlier, later), _BYTES)
    planes = [fetch(table, places) for table in tables]
    for half in (0, 1):
        low, high = (
            builder.bitcast(code.pick(a, b, _interleave(32, half)), _WORDS)
            for a, b in (planes[:2], planes[2:])
        )
        for quarter in (0, 1):
            yield builder.bitcast(code.pick(low, high, _interleave(16, quarter)), FLOATS)


def _interleave(size: int, half: int) -> list[int]:
    """Places that alternate between two vectors, for a half of each 16 bytes."""
    quarter = size // 4
    starts = (lane * size // 2 + half * quarter for lane in (0, 1))
    return [place for s in starts for i in range(s, s + quarter) for place in (i, size + i)]


def _write_expand(
    code: VectorCode, given: dict[str, ir.Value], form: KernelForm, read: Read, own: tuple
) -> None:
    """y[i] = weight i; an output is a row of INT8 codes, or a step of 64 codes of 4 bits."""

    def step(start: ir.Value, scale: list[ir.Value]) -> list[ir.Value]:
        for place, weights in enumerate(read(start)):
            scaled = code.builder.fmul(weights, scale[0]) if scale else weights
            at = code.sum_of(start, place * LANES)
            code.store(scaled, given["y"], at, streams=form.streams)
        return scale

    def output(group: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        if not form.is_int8:
            return step(code.builder.mul(group, to_index(STEP)), [])
        scale = code.spread(code.load(F32, given["scales"], group))
        start = code.builder.mul(group, given["num_in"])
        code.repeat((start, code.sum_of(start, given["num_in"]), STEP), step, [scale])
        return []

    code.repeat((own[0], own[2], 1), output)
    if form.streams:
        code.builder.fence("seq_cst")


def _write_multiply(
    code: VectorCode, given: dict[str, ir.Value], form: KernelForm, read: Read, own: tuple
) -> None:
    """y[m, o] = sum_k x[m, k] W[o, k], chunk of columns by chunk, a tile of outputs at once."""
    first, whole, end = own
    num_in = given["num_in"]
    sums = code.builder.alloca(FLOATS, size=GROUP * form.num_rows)

    def write_group(start: ir.Value, stop: ir.Value, width: int) -> None:
        def chunk(column: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            span = (column, code.smaller_of(code.sum_of(column, form.num_columns), num_in), STEP)

            def tile(output: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                place = code.builder.mul(code.builder.sub(output, start), to_index(form.num_rows))
                held = [code.place_of(FLOATS, sums, code.sum_of(place, n))
                        for n in range(form.num_rows * width)]  # fmt: skip
                _write_tile(code, given, read, (form, output, held, span))
                return []

            code.repeat((start, stop, width), tile)
            return []

        code.repeat((to_index(0), num_in, form.num_columns), chunk)

    def group(start: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        write_group(start, code.smaller_of(code.sum_of(start, GROUP), whole), form.num_outputs)
        return []

    code.repeat((first, whole, GROUP), group)
    if form.num_outputs > 1:
        write_group(whole, end, 1)  # fewer than a tile are left


def _write_tile(code: VectorCode, given: dict[str, ir.Value], read: Read, tile: tuple) -> None:
    """Adds the columns of ``span`` to the sums of y[:, output : output + width] at ``held``."""
    form, output, held, span = tile
    builder, rows, width = code.builder, range(form.num_rows), len(held) // form.num_rows
    outputs = [code.sum_of(output, n) for n in range(width)]
    starts = [builder.mul(one, given["num_in"]) for one in outputs]
    lines = [builder.mul(given["num_in"], to_index(m)) for m in rows]

    def step(column: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        sums = list(sums)
        for n, start in enumerate(starts):
            for place, weights in enumerate(read(code.sum_of(start, column))):
                for m in rows:
                    at = code.sum_of(lines[m], column, place * LANES)
                    x, total = code.load(FLOATS, given["x"], at), m * width + n
                    sums[total] = code.call("llvm.fma.v8f32", FLOATS, weights, x, sums[total])
        return sums

    is_first = builder.icmp_signed("==", span[0], to_index(0))
    is_last = builder.icmp_signed("==", span[1], given["num_in"])
    ends = [code.sum_of(builder.mul(given["num_out"], to_index(m)), one)
            for m in rows for one in outputs]  # fmt: skip
    zeros = code.zeros()
    before = [builder.load(builder.select(is_first, zeros, at), typ=FLOATS, align=4) for at in held]
    sums = code.repeat(span, step, before)
    with builder.if_else(is_last) as (at_the_end, between):
        with at_the_end:
            for place, (at, lanes) in enumerate(zip(ends, sums, strict=True)):
                total = code.add_lanes(lanes)
                if form.is_int8:
                    scale = code.load(F32, given["scales"], outputs[place % width])
                    total = builder.fmul(total, scale)
                code.store(total, given["y"], at)
        with between:
            for at, lanes in zip(held, sums, strict=True):
                builder.store(lanes, at, align=4)
