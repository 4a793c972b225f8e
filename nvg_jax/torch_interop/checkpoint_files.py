"""Reads the tensors of PyTorch checkpoints without PyTorch and without executing their pickles.

`torch.save` writes one of two containers: a zip with the pickled object in `*/data.pkl` and each
storage in `*/data/KEY`, or, in older files, a stream of pickles followed by the storages. A pickle
is a program that may call anything. Here, `_run` interprets it: tuples, lists, dictionaries,
strings and numbers are built as they are, PyTorch's calls that rebuild a tensor become `_Tensor`
records, and everything else (callbacks, hyperparameters, optimizers) becomes a `_Placeholder`.
`_run` imports nothing and calls nothing, so a hostile file has nothing to attack.

A `pickle.Unpickler` with a harmless `find_class` would be shorter but not safe: a nine-byte pickle
makes it allocate gigabytes (a large memo index), and a deeply nested tuple as a dictionary key
overflows the C stack when it is hashed.
"""

import dataclasses
import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from nvg_jax.errors import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# A storage is pickled with the name of its class, which determines the element type.
_STORAGE_DTYPES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
# Opcodes that push their argument: a number, a string or bytes.
_LITERALS = {
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.arg and opcode.stack_after and opcode.stack_after[0] != pickletools.anyobject
}


def read_state_dict(
    path: str | Path, keep: Callable[[str], bool] | None = None
) -> dict[str, np.ndarray]:
    """Returns the tensors of a checkpoint's "state_dict" (Lightning), or of the file itself.

    Args:
        path: file written by `torch.save`, in either container.
        keep: predicate on names; None keeps all. Other tensors are neither read nor checked.

    Returns:
        {name: array} in the file's order, with PyTorch's shapes and element types (bfloat16 from
        `ml_dtypes`). The arrays are read-only views of the memory-mapped file, whatever their
        strides: only the pages that are read take memory, and the file must not change while the
        arrays are in use.

    Raises:
        UserError: the file is empty, truncated, damaged or not a PyTorch container, or its
            state_dict is not a dictionary of tensors with supported element types.
    """
    path = Path(path)
    with path.open("rb") as file:
        if not file.read(1):
            raise UserError(f"{path} is empty. Expected a checkpoint written by torch.save.")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        if data[:4] == b"PK\x03\x04":
            content, locate = _open_zip(data, path)
        elif data[:1] == pickle.PROTO:
            content, locate = _open_legacy(data)
        else:
            raise UserError("it is neither PyTorch's zip nor its older stream of pickles")
        state = content.get("state_dict", content) if isinstance(content, dict) else content
        if not isinstance(state, dict) or not state:
            raise UserError(f"its state_dict is {_describe(state)}, not a dictionary of tensors")
        arrays = {}
        for name, tensor in state.items():
            if not isinstance(name, str):
                raise UserError(f"its state_dict has {_describe(name)} where a name is expected")
            if keep is None or keep(name):
                if not isinstance(tensor, _Tensor):
                    raise UserError(
                        f"its state_dict has {_describe(tensor)} as {name!r}, which is not a tensor"
                    )
                arrays[name] = _view(data, locate(tensor.storage), tensor)
        return arrays
    except ValueError as error:
        raise UserError(
            f"Cannot read {path}: {error}. Expected a complete checkpoint written by torch.save."
        ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class _Placeholder:
    """Stands for a class or function that a pickle names, or for the result of calling it."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """Elements start .. start + size - 1 of the storage `key`, which has `total` elements."""

    key: str
    dtype: np.dtype
    total: int
    start: int
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """A strided view that lies within its storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _describe(value) -> str:
    if isinstance(value, _Placeholder):
        return f"an object of {value.name}"
    if value is None or value == {}:
        return "None" if value is None else "an empty dictionary"
    kind = type(value).__name__.strip("_").lower()
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _open_zip(data: mmap.mmap, path: Path):
    """(content, function from a storage to its byte position) of the zip container."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise UserError(f"its zip directory is missing or damaged ({error})") from error
    roots = [name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError(f"a PyTorch zip has one data.pkl, this one has {len(roots)}")
    checked = {}

    def position(name: str, size: int | None = None) -> int:
        """The position of the first byte of a member, after checking its size and checksum."""
        if name not in members:
            raise UserError(f"{name!r} is missing from the zip")
        info = members[name]
        if size is not None and info.file_size < size:
            raise UserError(f"{name!r} has {info.file_size} bytes where {size} are expected")
        if name not in checked:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise UserError(f"{name!r} is compressed or encrypted, unlike PyTorch's zips")
            header = data[info.header_offset : info.header_offset + 30]
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise UserError(f"{name!r} is not where the zip directory says")
            begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            with memoryview(data) as view, view[begin : begin + info.file_size] as body:
                # PyTorch can be configured to omit checksums, which are then 0.
                if len(body) < info.file_size or info.CRC not in (0, zlib.crc32(body)):
                    raise UserError(f"the checksum of {name!r} does not match its bytes")
            checked[name] = begin
        return checked[name]

    def member(name: str) -> bytes:
        begin = position(name)
        return data[begin : begin + members[name].file_size]

    (root,) = roots
    if root + "byteorder" in members and member(root + "byteorder") != b"little":
        raise UserError("it was written on a big-endian machine, only little-endian is supported")
    content = _run(io.BytesIO(member(root + "data.pkl")), _storage)
    return content, lambda storage: position(
        f"{root}data/{storage.key}", storage.total * storage.dtype.itemsize
    )


def _open_legacy(data: mmap.mmap):
    """(content, function from a storage to its byte position) of the older container."""
    storages = {}

    def load(identifier):
        storage = _storage(identifier)
        if isinstance(storage, _Storage):
            storages[storage.key] = storage
        return storage

    if _run(data, load) != _LEGACY_MAGIC:
        raise UserError("it is a pickle, but not one written by torch.save")
    version, system = _run(data, load), _run(data, load)
    if version != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise UserError(f"its container is not of version {_LEGACY_PROTOCOL}")
    if system.get("little_endian") is not True:
        raise UserError("it was written on a big-endian machine, only little-endian is supported")
    content, keys = _run(data, load), _run(data, load)
    if not isinstance(keys, list):
        raise UserError("the list of its storages is missing")
    positions, end = {}, data.tell()
    for key in keys:
        if not isinstance(key, str) or key not in storages:
            raise UserError("it has a storage of unknown type")
        storage, head = storages[key], data[end : end + 8]
        begin, end = end + 8, end + 8 + storage.total * storage.dtype.itemsize
        if len(head) == 8 and int.from_bytes(head, "little") != storage.total:
            raise UserError(f"storage {key!r} does not have the expected {storage.total} elements")
        if end > len(data):
            raise UserError(f"it ends within storage {key!r}")
        positions[key] = begin

    def position(storage: _Storage) -> int:
        if storage.key not in positions:
            raise UserError(f"storage {storage.key!r} is missing")
        if storage.total * storage.dtype.itemsize != (
            storages[storage.key].total * storages[storage.key].dtype.itemsize
        ):
            raise UserError(f"storage {storage.key!r} is declared with two sizes")
        return positions[storage.key]

    return content, position


def _view(data: mmap.mmap, position: int, tensor: _Tensor) -> np.ndarray:
    """The tensor whose storage begins at byte `position`, without copying."""
    storage = tensor.storage
    if 0 in tensor.shape:
        return np.empty(tensor.shape, storage.dtype)
    item = storage.dtype.itemsize
    strides = [
        stride * item if n > 1 else 0
        for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    position += (storage.start + tensor.offset) * item
    return np.ndarray(tensor.shape, storage.dtype, data, position, strides)


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of elements from a tensor's first to its last; 0 for an empty tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _is_count(*values) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _storage(identifier) -> _Storage | _Placeholder:
    """The storage of a persistent id ("storage", class, key, device, elements).

    The older container appends None, or (key, start, size) for a view of the storage. It also
    writes ("module", class, file, source), which stands for the class. A storage of an unsupported
    element type becomes a placeholder.
    """
    match identifier:
        case ("module", _Placeholder() as module, *_):
            return module
        case ("storage", _Placeholder(name=name), str(key), _, total, *rest) if _is_count(total):
            match rest:
                case [] | [None]:
                    start, size = 0, total
                case [(_, start, size)] if _is_count(start, size) and start + size <= total:
                    pass
                case _:
                    raise UserError(f"storage {key!r} has a malformed view")
            dtype = _STORAGE_DTYPES.get(name.replace("torch.cuda.", "torch."))
            if dtype is None:
                return _Placeholder(name)
            return _Storage(key, np.dtype(dtype), total, start, size)
    raise UserError("a persistent id in its pickle describes no storage")


def _tensor(storage, offset, shape, strides) -> _Tensor | _Placeholder:
    """The tensor that PyTorch would rebuild; a placeholder if the storage is one."""
    if isinstance(storage, _Placeholder):
        return storage
    if not (
        isinstance(storage, _Storage)
        and isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides) <= 64
        and _is_count(offset, *shape, *strides)
    ):
        raise UserError("its pickle describes a malformed tensor")
    if offset + _extent(shape, strides) > storage.size:
        raise UserError(f"a tensor of shape {shape} reaches outside storage {storage.key!r}")
    if math.prod(shape) * storage.dtype.itemsize > np.iinfo(np.intp).max:
        raise UserError(f"a tensor of shape {shape} is too large for any memory")
    return _Tensor(storage, offset, shape, strides)


def _reduce(function, arguments):
    """What the call function(*arguments) in a pickle stands for."""
    if not isinstance(function, _Placeholder) or not isinstance(arguments, tuple):
        raise UserError("its pickle calls something that is not a function")
    name = function.name
    if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:
        function, _, arguments, _ = arguments  # a tensor with attributes, which are dropped
        if isinstance(function, _Placeholder) and isinstance(arguments, tuple):
            name = function.name
    match name, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "collections.OrderedDict", (list(pairs),):
            return _fill({}, [value for pair in pairs for value in _pair(pair)])
        case ("torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2", _) if len(
            arguments
        ) >= 4 and arguments[6:] in ((), (None,), ({},)):
            return _tensor(*arguments[:4])
        case (
            "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
            (_Tensor() as tensor, *_),
        ):
            return tensor
    return _Placeholder(name)


def _pair(value) -> tuple:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UserError("its pickle has a malformed dictionary")
    return tuple(value)


def _fill(container, values: list):
    """Adds [value, ...] to a list or [key, value, ...] to a dictionary; a placeholder ignores them.

    Compound keys are replaced before anything hashes them.
    """
    if isinstance(container, list):
        container.extend(values)
    elif isinstance(container, dict):
        if len(values) % 2:
            raise UserError("its pickle has a malformed dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            plain = key is None or isinstance(key, str | bytes | int | float)
            container[key if plain else _Placeholder("a compound key")] = value
    elif not isinstance(container, _Placeholder):
        raise UserError("its pickle adds elements to something that is not a container")
    return container


def _run(stream, load: Callable):
    """Interprets one pickle of `stream` up to its STOP; `load` resolves persistent ids."""
    stack, outer, memo = [], [], {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            match opcode.name:
                case name if name in _LITERALS:
                    stack.append(argument)
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    outer.append(stack)
                    stack = []
                case "POP":
                    if stack:
                        stack.pop()
                    else:
                        stack = outer.pop()
                case "POP_MARK":
                    stack = outer.pop()
                case "DUP":
                    stack.append(stack[-1])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_SET":
                    stack.append(_Placeholder("builtins.set"))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    if len(stack) < count:
                        raise IndexError
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                    values, stack = stack, outer.pop()
                    if opcode.name == "TUPLE":
                        stack.append(tuple(values))
                    elif opcode.name == "FROZENSET":
                        stack.append(_Placeholder("builtins.frozenset"))
                    else:
                        stack.append(_fill([] if opcode.name == "LIST" else {}, values))
                case "APPEND":
                    value = stack.pop()
                    _fill(stack[-1], [value])
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _fill(stack[-1], [key, value])
                case "APPENDS" | "SETITEMS" | "ADDITEMS":
                    values, stack = stack, outer.pop()
                    _fill(stack[-1], values)
                case "GLOBAL":
                    stack.append(_Placeholder(argument.replace(" ", ".", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    if not isinstance(module, str) or not isinstance(name, str):
                        raise UserError("its pickle has a class name that is not a string")
                    stack.append(_Placeholder(f"{module}.{name}"))
                case "INST":
                    stack = outer.pop()
                    stack.append(_Placeholder(argument.replace(" ", ".", 1)))
                case "OBJ":
                    values, stack = stack, outer.pop()
                    stack.append(_reduce(values[0], tuple(values[1:])))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_reduce(function, arguments))
                case "NEWOBJ_EX":
                    _, arguments, function = stack.pop(), stack.pop(), stack.pop()
                    stack.append(_reduce(function, arguments))
                case "BUILD":
                    stack.pop()  # attributes are dropped
                    stack[-1]  # damaged if there is no object
                case "BINPERSID":
                    stack.append(load(stack.pop()))
                case name:
                    raise UserError(f"torch.save never writes the pickle opcode {name}")
    except (IndexError, KeyError) as error:
        raise UserError("its pickle is damaged") from error
    raise UserError("its pickle has no end")
