"""Loops and vectors in LLVM's language: what the kernels of quantised weights are written in.

Python is too slow for a loop over weights, and a C compiler is not on every machine.
llvmlite is a wheel that carries LLVM: it turns this language into instructions of the
processor it runs on, in memory, in some hundredths of a second.  A vector here has 8
floats, the width of AVX2; an index counts elements, never bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

LANES = 8
POINTER = ir.PointerType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
FLOATS = ir.VectorType(F32, LANES)

Values = list[ir.Value]


def to_index(number: int) -> ir.Constant:
    """A number as a 64-bit constant."""
    return ir.Constant(I64, number)


class VectorCode:
    """Writes the body of one function.

    Args:
        function: without a body; ``builder`` stands at the end of what has been written.
    """

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.builder = ir.IRBuilder(function.append_basic_block())

    def sum_of(self, *indices: ir.Value | int) -> ir.Value:
        """Indices and numbers added up."""
        total, *rest = (to_index(i) if isinstance(i, int) else i for i in indices)
        for index in rest:
            total = self.builder.add(total, index)
        return total

    def place_of(self, kind: ir.Type, pointer: ir.Value, index: ir.Value) -> ir.Value:
        """The address of element ``index``."""
        return self.builder.gep(pointer, [index], source_etype=kind)

    def zeros(self) -> ir.Value:
        """The address of a vector of zeros."""
        module = self.function.module
        if "zeros" not in module.globals:
            held = ir.GlobalVariable(module, FLOATS, name="zeros")
            held.initializer, held.global_constant = ir.Constant(FLOATS, [0.0] * LANES), True
            held.linkage = "internal"
        return module.globals["zeros"]

    def load(self, kind: ir.Type, pointer: ir.Value, index: ir.Value) -> ir.Value:
        """A number, or a vector of neighbours, from element ``index`` on."""
        element = kind.element if isinstance(kind, ir.VectorType) else kind
        return self.builder.load(self.place_of(element, pointer, index), align=1, typ=kind)

    def store(
        self, value: ir.Value, pointer: ir.Value, index: ir.Value, *, streams: bool = False
    ) -> None:
        """Writes floats, one or a vector, from element ``index`` on; past the caches if it streams.

        A stream needs an address that the vector's size divides, and a fence after it.
        """
        place = self.place_of(F32, pointer, index)
        written = self.builder.store(value, place, align=4 * LANES if streams else 4)
        if streams:
            mark = self.function.module.add_metadata([ir.Constant(I32, 1)])
            written.set_metadata("nontemporal", mark)

    def call(self, name: str, kind: ir.Type, *values: ir.Value) -> ir.Value:
        """The answer of a function of LLVM's, the processor's or the process's."""
        known = self.function.module.globals.get(name)
        form = ir.FunctionType(kind, [value.type for value in values])
        return self.builder.call(known or ir.Function(self.function.module, form, name), values)

    def pick(self, first: ir.Value, second: ir.Value, places: Sequence[int]) -> ir.Value:
        """Elements of two vectors laid end to end, by their places."""
        mask = ir.Constant(ir.VectorType(I32, len(places)), list(places))
        return self.builder.shuffle_vector(first, second, mask)

    def spread(self, number: ir.Value) -> ir.Value:
        """A float in every lane."""
        empty = ir.Constant(FLOATS, ir.Undefined)
        one = self.builder.insert_element(empty, number, ir.Constant(I32, 0))
        return self.pick(one, empty, [0] * LANES)

    def add_lanes(self, vector: ir.Value) -> ir.Value:
        """The sum of a vector, always in the same order: halves, quarters, eighths."""
        for step in (4, 2, 1):
            turned = self.pick(vector, vector, [(i + step) % LANES for i in range(LANES)])
            vector = self.builder.fadd(vector, turned)
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def smaller_of(self, first: ir.Value, second: ir.Value) -> ir.Value:
        """The minimum of two indices."""
        return self.builder.select(self.builder.icmp_signed("<", first, second), first, second)

    def repeat(
        self,
        span: tuple[ir.Value, ir.Value, int],
        body: Callable[[ir.Value, Values], Sequence[ir.Value]],
        carried: Sequence[ir.Value] = (),
    ) -> Values:
        """A loop.

        Args:
            span: start, stop and step.
            body: writes one turn; takes the index and the carried values, returns the new ones.
            carried: the values before the first turn.

        Returns:
            The values after the last.
        """
        start, stop, step = span
        builder = self.builder
        before = builder.block
        head, inside, after = (self.function.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        held = [builder.phi(value.type) for value in (start, *carried)]
        for phi, value in zip(held, (start, *carried), strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", held[0], stop), inside, after)
        builder.position_at_end(inside)
        results = body(held[0], held[1:])
        for phi, value in zip(held, (self.sum_of(held[0], step), *results), strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return held[1:]
