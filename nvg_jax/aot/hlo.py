"""Parses XLA's HLO text and counts a program's FLOPs, memory traffic and collectives.

XLA's own cost analysis counts the body of a loop once; here, bodies are multiplied by their trip
counts. This module knows no model, and only counts: nothing is timed.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from nvg_jax.errors import UserError

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BITS = {"pred": 8, "token": 0, "opaque": 0}  # per element; other dtype names contain their bits
# No memory traffic: views of existing arrays, or the end of a transfer that is already counted.
FREE = frozenset(
    "after-all bitcast bitcast-convert constant domain get-tuple-element opt-barrier parameter "
    "partition-id replica-id tuple while conditional call async-start async-update".split()
)
# TPU custom calls that neither compute nor move data themselves.
MEMORY_CALLS = (
    "AllocateBuffer", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "PrepareAsyncCallDone", "PrepareAsyncCallStart",
)  # fmt: skip
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)((?::[^{}]*)?)\})?")
NAME = re.compile(r"%([\w.\-]+)")
MODULE = re.compile(r"(?<=[/(])[A-Z]\w*(\.\w+)?")  # flax.linen names its scopes so


class Array(NamedTuple):
    """One array of an instruction's result.

    dims: sizes. order: dimensions, the fastest varying first. tile: sizes of the tile over the
    fastest dimensions, slowest first; () if untiled. in_hbm: whether it is in main memory, not in a
    faster one.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    in_hbm: bool

    def bytes(self, padded: bool = True) -> int:
        """Size of the array, by default including the padding to whole tiles."""
        dims = [self.dims[i] for i in self.order]  # fastest first
        if padded:
            dims += [1] * (len(self.tile) - len(dims))
            for i, size in enumerate(reversed(self.tile)):
                dims[i] = -(-dims[i] // size) * size
        bits = BITS.get(self.dtype)
        if bits is None:
            bits = int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(dims) * bits // 8


@dataclasses.dataclass
class Instruction:
    """One line: `%name = result opcode(operands), attributes`.

    text: operands and attributes. root: whether this is the result of its computation.
    """

    name: str
    opcode: str
    result: list[Array]
    operands: list[str]
    text: str
    root: bool

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.text)
        return match[1] if match else None

    def required(self, pattern: str) -> str:
        """An attribute that every instruction of this kind has."""
        value = self.attribute(pattern)
        assert value is not None, f"no {pattern} in {self.name}"
        return value

    @property
    def op_name(self) -> str:
        """The operation of the Python program that the instruction comes from."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def module(self) -> str:
        """The outermost Flax module and method that it comes from, such as "Tokenizer.decode".

        "other" for what no module computes, such as random numbers, sorting and the optimizer.
        """
        module = MODULE.search(self.op_name)
        return module[0] if module else "other"

    @property
    def target(self) -> str | None:
        """The target of a custom call."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def called(self) -> list[str]:
        """The computations of a fusion, call or asynchronous start; a conditional's branches."""
        if self.opcode not in ("fusion", "call", "async-start", "conditional"):
            return []
        branches = self.attribute(r"branch_computations=\{([^}]*)\}")
        if branches is not None:
            return operand_names(branches)
        return re.findall(r"(?:calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)", self.text)


class Computation:
    """A named list of instructions."""

    def __init__(self, instructions: list[Instruction]):
        self.instructions = instructions
        self.by_name = {instruction.name: instruction for instruction in instructions}
        self.root = next(i for i in instructions if i.root)
        self.users = collections.defaultdict(list)
        for instruction in instructions:
            for operand in set(instruction.operands):
                self.users[operand].append(instruction)

    def parameter(self, number: int) -> Instruction:
        return next(
            i
            for i in self.instructions
            if i.opcode == "parameter" and i.text.startswith(f"{number})")
        )

    def operand(self, instruction: Instruction, number: int) -> Instruction:
        """An operand, looking through copies, reshapes and conversions."""
        source = self.by_name[instruction.operands[number]]
        while source.opcode in ("bitcast", "copy", "copy-done", "copy-start", "reshape", "convert"):
            source = self.by_name[source.operands[0]]
        return source


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


class Collective(NamedTuple):
    """A collective operation between the devices of a group, with all its executions.

    kind: one of COLLECTIVES. count: number of executions. bytes: data on one device per execution
    (for an all-gather, the gathered result). group: number of devices taking part. shapes: of the
    results. op_name: the operation of the Python program.
    """

    kind: str
    count: int
    bytes: int
    group: int
    shapes: tuple[str, ...]
    op_name: str

    @property
    def bytes_sent(self) -> float:
        """Bytes that one device sends to its neighbors in all executions, by the ring algorithm."""
        rounds = {"all-reduce": 2, "collective-permute": self.group / max(self.group - 1, 1)}
        share = (self.group - 1) / self.group * rounds.get(self.kind, 1)
        return self.count * self.bytes * share


@dataclasses.dataclass
class Cost:
    """What one device executes in one run of a program.

    flops_by_module: multiplications and additions of matrix products and convolutions.
    bytes_by_module: estimated bytes read from and written to main memory; both by
    `Instruction.module`. unknown_loops: the Python operations of loops whose trip count depends on
    the data; each counts as one trip. kernels: {name: executions} of the custom calls whose FLOPs
    are known and counted. custom_calls: the same for all others.
    """

    flops_by_module: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    bytes_by_module: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    custom_calls: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def flops(self) -> int:
        return self.flops_by_module.total()

    @property
    def hbm_bytes(self) -> int:
        return self.bytes_by_module.total()


def parse(text: str) -> Module:
    """Parses a module from `lowered.as_text("hlo")` or `compiled.as_text()`.

    Raises:
        UserError: the text has no entry computation.
    """
    computations, entry, lines, name = {}, None, None, ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and not line.startswith("HloModule"):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line.startswith("}") and lines:
            computations[name], lines = Computation(lines), None
        elif lines is not None and " = " in line:
            lines.append(parse_instruction(line))
    if entry is None:
        raise UserError("Not the text of an HLO module: it has no ENTRY computation.")
    return Module(computations, entry)


def parse_instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    root = left.startswith("ROOT ")
    end = closing(right) + 1 if right.startswith("(") else right.index(" ")
    opcode, text = right[end:].strip().split("(", 1)
    operands = "(" + text
    operands = operands[1 : closing(operands)]
    return Instruction(
        name=left.removeprefix("ROOT ").removeprefix("%"),
        opcode=opcode,
        result=parse_arrays(right[:end]),
        operands=operand_names(operands) if opcode not in ("constant", "parameter") else [],
        text=text,
        root=root,
    )


def operand_names(text: str) -> list[str]:
    """The names in "f32[2,3]{1,0} %a, b", with or without types, with or without "%"."""
    if "%" in text:
        return NAME.findall(text)
    return re.findall(r"([A-Za-z_][\w.\-]*)\s*(?:,|$)", text)


def closing(text: str) -> int:
    """Index of the parenthesis that closes the one at the start of the text."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    raise UserError(f"Unbalanced parentheses in {text[:80]!r}.")


def parse_arrays(text: str) -> list[Array]:
    """The arrays of a type; for a tuple, in order."""
    arrays = []
    for dtype, dims, order, layout in ARRAY.findall(text):
        dims = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        order = tuple(map(int, order.split(","))) if order else tuple(reversed(range(len(dims))))
        tile = re.search(r"T\(([\d,]+)\)", layout)
        space = re.search(r"S\((\d+)\)", layout)
        arrays.append(
            Array(
                dtype=dtype,
                dims=dims,
                order=order,
                tile=tuple(map(int, tile[1].split(","))) if tile else (),
                in_hbm=space is None or space[1] == "0",
            )
        )
    return arrays


def cost(module: Module) -> Cost:
    """The cost of one run of the module on one device."""
    total = Cost()
    _walk(module, module.entry, 1, None, total)
    return total


def _walk(module: Module, name: str, times: int, channels: set[str] | None, total: Cost):
    """Adds `times` executions of a computation to `total`.

    Args:
        channels: inside a fusion, the channel ids of the collectives counted so far in the
            enclosing computation; None outside. Instructions inside a fusion cause no memory
            traffic of their own. A collective that overlaps with arithmetic appears in several
            fusions under one channel id.
    """
    fused = channels is not None
    channels = set() if channels is None else channels
    computation = module.computations[name]
    for instruction in computation.instructions:
        opcode = instruction.opcode
        if opcode == "while":
            trips = trip_count(module, computation, instruction)
            if trips is None:
                total.unknown_loops.append(instruction.op_name)
                trips = 1
            for part in ("condition", "body"):
                inner = instruction.required(part + r"=%?([\w.\-]+)")
                _walk(module, inner, times * trips, None, total)
            continue
        for inner in instruction.called:
            inside = channels if fused or opcode == "fusion" else None
            _walk(module, inner, times, inside, total)
        if opcode == "dot":
            total.flops_by_module[instruction.module] += times * dot_flops(computation, instruction)
        elif opcode == "convolution":
            flops = convolution_flops(computation, instruction)
            total.flops_by_module[instruction.module] += times * flops
        elif opcode == "custom-call" and not fused and instruction.target not in MEMORY_CALLS:
            flops = kernel_flops(computation, instruction)
            if flops is None:
                total.custom_calls[instruction.target] += times
            else:
                total.flops_by_module[instruction.module] += times * flops
                total.kernels[kernel_name(instruction)] += times
        kind = opcode.removesuffix("-start")
        channel = instruction.attribute(r"channel_id=(\d+)")
        communicates = kind in COLLECTIVES and channel not in channels
        if communicates:
            if channel is not None:
                channels.add(channel)
            total.collectives.append(collective(computation, instruction, kind, times))
        if communicates or not fused:
            size = hbm_bytes(module, computation, instruction)
            total.bytes_by_module[instruction.module] += times * size


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trip count of a loop: from XLA's annotation or a counter with constant start and limit.

    None if it depends on the data.
    """
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition, body = (
        module.computations[loop.required(part + r"=%?([\w.\-]+)")]
        for part in ("condition", "body")
    )
    test = condition.root
    operands = [condition.operand(test, i) for i in range(len(test.operands))]
    if test.opcode == "fusion":
        inner = module.computations[test.called[0]]
        test = inner.root
        if test.opcode == "compare":
            numbers = [inner.operand(test, i) for i in (0, 1)]
            operands = [
                operands[int(i.text.split(")")[0])] if i.opcode == "parameter" else i
                for i in numbers
            ]
    if test.opcode != "compare" or test.attribute(r"direction=(\w+)") != "LT":
        return None
    counter, limit = operands
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    index = int(counter.required(r"index=(\d+)"))
    start = computation.operand(computation.operand(loop, 0), index)
    step = body.operand(body.root, index)
    if start.opcode != "constant" or step.opcode != "add":
        return None
    addends = [body.operand(step, i) for i in (0, 1)]
    steps = [constant(i) for i in addends if i.opcode == "constant"]
    if len(steps) != 1 or steps[0] < 1:
        return None
    return max(0, math.ceil((constant(limit) - constant(start)) / steps[0]))


def constant(instruction: Instruction) -> int:
    return int(instruction.text.split(")")[0])


def dot_flops(computation: Computation, instruction: Instruction) -> int:
    """Two FLOPs for each element of the result and each contracted index."""
    left = computation.by_name[instruction.operands[0]].result[0]
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    size = math.prod(left.dims[int(i)] for i in contracted.split(",") if i)
    return 2 * math.prod(instruction.result[0].dims) * size


def dim_labels(instruction: Instruction) -> tuple[str, str, str]:
    """The axes of a convolution's inputs, kernel and output, such as b01f, 01io, b01f."""
    labels = instruction.required(r"dim_labels=([\w?]+->[\w?]+)")
    inputs, kernel, output = re.findall(r"(\w+)_(\w+)->(\w+)", labels)[0]
    return inputs, kernel, output


def convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """Two FLOPs for each product of an input and a kernel element; padding does not count.

    On TPUs every matrix product is written as a convolution, with batches as dilated windows.
    """
    inputs, kernel, output = dim_labels(instruction)
    sizes = [computation.by_name[name].result[0].dims for name in instruction.operands[:2]]
    inputs, kernel = (dict(zip(part, dims)) for part, dims in zip((inputs, kernel), sizes))
    output = dict(zip(output, instruction.result[0].dims))
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=(\S+)", window)}
    products = output["b"] * output["f"] * kernel["i"]
    for axis in sorted(key for key in kernel if key.isdigit()):
        number = int(axis)
        get = lambda key, default: window[key][number] if key in window else default
        products *= window_products(
            inputs[axis],
            kernel[axis],
            output[axis],
            stride=int(get("stride", 1)),
            low=int(str(get("pad", "0_0")).split("_")[0]),
            input_dilation=int(get("lhs_dilate", 1)),
            kernel_dilation=int(get("rhs_dilate", 1)),
        )
    return 2 * products


def kernel_name(instruction: Instruction) -> str:
    """The target of a custom call; for a Pallas kernel, the kernel's name."""
    kernel = re.search(r"(\w+)/pallas_call|/(\w+)$", instruction.op_name)
    if instruction.target == "tpu_custom_call" and kernel:
        return kernel[1] or kernel[2]
    return instruction.target or ""


def kernel_flops(computation: Computation, instruction: Instruction) -> int | None:
    """FLOPs of a custom call: its author's estimate or, for NVIDIA's libraries, computed here.

    None if unknown. cuDNN's attention computes two products of the scores' size, its gradient five.
    """
    estimate = instruction.attribute(r'"cost_estimate":\{"flops":"(\d+)"')
    if estimate is not None:
        return int(estimate)
    target = instruction.target or ""
    if target.startswith("__cublas$"):
        left = computation.by_name[instruction.operands[0]].result[0]
        contracted = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
        size = math.prod(left.dims[int(i)] for i in re.findall(r"\d+", contracted))
        return 2 * math.prod(instruction.result[0].dims) * size
    if target.startswith("__cudnn$fmha"):
        shape = instruction.required(r'"intermediate_tensor_shape":[^\]]*?\[([^\]]*)\]')
        scores = math.prod(map(int, re.findall(r"\d+", shape)))
        head_dim = computation.by_name[instruction.operands[0]].result[0].dims[-1]
        return 2 * scores * head_dim * (5 if "Backward" in target else 2)
    if target.startswith("__cudnn$conv"):
        return cudnn_convolution_flops(computation, instruction)
    return None


def cudnn_convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """Two FLOPs for each product; a gradient counts the same as the convolution itself."""
    inputs, kernel, output = dim_labels(instruction)
    arrays = [computation.by_name[name].result[0].dims for name in instruction.operands[:2]]
    arrays.append(instruction.result[0].dims)
    order = {"BackwardInput": (2, 1, 0), "BackwardFilter": (0, 2, 1)}
    target = instruction.target or ""
    numbers = next((numbers for kind, numbers in order.items() if kind in target), (0, 1, 2))
    images, weights, results = (arrays[i] for i in numbers)
    images, weights, results = (
        dict(zip(names, dims))
        for names, dims in ((inputs, images), (kernel, weights), (output, results))
    )
    taps = math.prod(size for axis, size in weights.items() if axis.isdigit())
    pixels = math.prod(size for axis, size in results.items() if axis.isdigit())
    return 2 * results["b"] * pixels * taps * weights["i"] * weights["o"]


def window_products(
    inputs: int,
    kernel: int,
    outputs: int,
    stride: int = 1,
    low: int = 0,
    input_dilation: int = 1,
    kernel_dilation: int = 1,
) -> int:
    """Number of (output, kernel) position pairs along one axis that hit an input element."""
    count = 0
    for output, tap in itertools.product(range(outputs), range(kernel)):
        position = output * stride + tap * kernel_dilation - low
        count += 0 <= position < inputs * input_dilation and position % input_dilation == 0
    return count


def collective(
    computation: Computation, instruction: Instruction, kind: str, times: int
) -> Collective:
    operands = [a for name in instruction.operands for a in computation.by_name[name].result]
    results = results_of(instruction, len(operands))
    counted = results if kind == "all-gather" else operands
    return Collective(
        kind=kind,
        count=times,
        bytes=sum(array.bytes(padded=False) for array in counted),
        group=group_size(instruction),
        shapes=tuple(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in results),
        op_name=instruction.op_name,
    )


def results_of(instruction: Instruction, operands: int) -> list[Array]:
    """The results only; an asynchronous start also returns its operands and context."""
    if instruction.opcode in ("copy-start", "all-reduce-start"):  # (results, operands, ...)
        return instruction.result[:operands]
    if instruction.opcode.endswith("-start"):  # (operands, results, ...)
        return instruction.result[operands:][:operands]
    return instruction.result


def group_size(instruction: Instruction) -> int:
    """Number of devices that communicate with each other; 2 if only pairs are given."""
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", instruction.text)
    if axes:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", axes[1]))
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part or sizes[name]) for name, part in parts)
    iota = instruction.attribute(r"replica_groups=\[\d+,(\d+)\]<=")
    if iota:
        return int(iota)
    groups = instruction.attribute(r"replica_groups=\{\{([\d,]*)\}")
    return len(groups.split(",")) if groups else 2


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that an instruction outside fusions reads from and writes to main memory.

    Every operand and every result counts once, including padding; for a slice, only the slice
    counts, and for an in-place update, only the update.
    """
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done") or instruction.target in MEMORY_CALLS:
        return 0
    operands = [computation.by_name[name].result for name in instruction.operands]
    results = results_of(instruction, sum(map(len, operands)))
    if opcode == "fusion":
        inner = module.computations[instruction.called[0]]
        read = sum(
            int(min(sum(map(size_in_hbm, arrays)), read_bytes(module, inner, number)))
            for number, arrays in enumerate(operands)
        )
        return read + sum(written_bytes(module, inner, instruction.result))
    if opcode.removesuffix("-start") in ("dynamic-slice", "slice", "gather"):
        return size_in_hbm(results[0]) + operands[0][0].in_hbm * results[0].bytes()
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1 if opcode == "dynamic-update-slice" else -1][0]
        return size_in_hbm(update) + results[0].in_hbm * update.bytes()
    return sum(map(size_in_hbm, itertools.chain(*operands, results)))


def size_in_hbm(array: Array) -> int:
    return array.bytes() if array.in_hbm else 0


def passes(instruction: Instruction) -> bool:
    """Whether an instruction in a fusion only forwards arrays, or is a collective.

    Collectives are counted separately.
    """
    opcode = instruction.opcode
    return opcode == "tuple" or opcode in COLLECTIVES or instruction.target in MEMORY_CALLS


def read_bytes(module: Module, computation: Computation, number: int) -> float:
    """Bytes of a parameter that a fusion reads: its slices; infinite if it reads everything."""
    total, pending = 0, [computation.parameter(number)]
    while pending:
        value = pending.pop()
        for user in computation.users[value.name]:
            index = user.operands.index(value.name)
            if user.opcode == "bitcast":
                pending.append(user)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and index == 0:
                total += user.result[0].bytes()
            elif user.opcode == "dynamic-update-slice" and index == 0 or passes(user):
                pass
            elif user.opcode == "fusion":
                total += read_bytes(module, module.computations[user.called[0]], index)
            else:
                return math.inf
    return total


def written_bytes(module: Module, computation: Computation, result: list[Array]) -> Iterator[int]:
    """Bytes a fusion writes for each part of its result: the whole part, or an in-place update."""
    root = computation.root
    parts = [root]
    if root.opcode == "tuple":
        parts = [computation.by_name[name] for name in root.operands]
    elif passes(root):
        return
    if len(parts) != len(result):  # a nested fusion with several results
        yield from map(size_in_hbm, result)
        return
    for part, array in zip(parts, result):
        while part.opcode == "bitcast":
            part = computation.by_name[part.operands[0]]
        if not array.in_hbm or part.opcode == "parameter" or passes(part):
            yield 0
        elif part.opcode == "dynamic-update-slice":
            yield computation.by_name[part.operands[1]].result[0].bytes()
        elif part.opcode == "fusion" and len(part.result) == 1:
            yield from written_bytes(module, module.computations[part.called[0]], [array])
        else:
            yield array.bytes()
