"""Reads the tensors of checkpoints without PyTorch and without running their pickles.

`torch.save` writes one of two containers: a zip with the pickled object in `*/data.pkl` and each
storage in `*/data/KEY`, or, in older files, a stream of pickles followed by the storages. A pickle
is a program that may call anything. `_Unpickler` imports nothing: every name in a pickle becomes a
class of its own that only records the arguments it is called with, and PyTorch's records are read
as tensors afterwards. Everything else (callbacks, hyperparameters, optimizers) is passed over.

A hostile file cannot run code, but it can still hang or end the process: hashing a dictionary key
of 64 nested pairs takes centuries, and one of a million nested tuples exhausts the stack.
"""

import contextlib
import dataclasses
import functools
import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nvg_jax.errors import UserError, listed, reported

EXPECTED = "Expected a complete checkpoint, written by torch.save or as safetensors"
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


def read_state_dict(
    path: str | Path, keep: Callable[[str], bool] | None = None
) -> dict[str, np.ndarray]:
    """Returns the tensors of a checkpoint's "state_dict" (Lightning), or of the file itself.

    Args:
        path: file written by `torch.save`, in either container, or a safetensors file.
        keep: predicate on names; None keeps all. Other tensors are neither read nor checked.

    Returns:
        {name: array} in the file's order, with PyTorch's shapes and element types (bfloat16 from
        `ml_dtypes`). A PyTorch file's arrays are read-only views of the memory-mapped file,
        whatever their strides: only the pages that are read take memory, and the file must not
        change while the arrays are in use.

    Raises:
        UserError: the file is missing, unreadable, empty, truncated, damaged or of neither kind, or
            its state_dict is not a dictionary of tensors with supported element types.
    """
    path = Path(path)
    with reported(f"{path} cannot be read"), path.open("rb") as file:
        if not file.read(1):
            raise UserError(f"{path} is empty. {EXPECTED}.")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        if _is_safetensors(data):
            with _open_safetensors(path) as file:
                return {k: _numpy(file, k) for k in file.keys() if keep is None or keep(k)}
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
        for name, value in state.items():
            if not isinstance(name, str):
                raise UserError(f"its state_dict has {_describe(name)} where a name is expected")
            if keep is None or keep(name):
                if (tensor := _tensor(value)) is None:
                    raise UserError(
                        f"its state_dict has {_describe(value)} as {name!r}, which is not a tensor"
                    )
                arrays[name] = _view(data, locate, *tensor)
        return arrays
    except ValueError as error:
        raise UserError(f"Cannot read {path}: {error}. {EXPECTED}.") from error


def read_header(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for other files."""
    with _safetensors_or_none(path) as file:
        return (file and file.metadata()) or {}


def safetensors_names(path: str | Path) -> list[str] | None:
    """The names of the tensors in a safetensors file; None for other files."""
    with _safetensors_or_none(path) as file:
        return None if file is None else list(file.keys())


@contextlib.contextmanager
def _safetensors_or_none(path: str | Path):
    with reported(f"{path} cannot be read"), Path(path).open("rb") as file:
        is_safetensors = _is_safetensors(file.read(9))
    try:
        with _open_safetensors(path) if is_safetensors else contextlib.nullcontext() as file:
            yield file
    except UserError as error:
        raise UserError(f"Cannot read {path}: {error}.") from error


def _numpy(file, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError) as error:  # a type that NumPy lacks, such as float8
        raise UserError(f"the element type of {name!r} is not supported ({error})") from error


def _is_safetensors(start) -> bool:
    return start[8:9] == b"{"  # after the length of its header, which is JSON


@contextlib.contextmanager
def _open_safetensors(path: str | Path):
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"it is damaged ({error})") from error


def check_tensors(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """One line for each way in which tensors differ from the expected ones; empty if they agree.

    Args:
        tensors: name -> array.
        shapes: name -> shape of each expected tensor. Their type may be float32, float16 or
            bfloat16.
    """
    problems = {
        "missing": [f"{name} {shape}" for name, shape in shapes.items() if name not in tensors],
        "unexpected": [name for name in tensors if name not in shapes],
        "of another shape": [
            f"{name} {tensors[name].shape}, expected {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "of another type": [
            f"{name} {tensor.dtype}"
            for name, tensor in tensors.items()
            if tensor.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16)
        ],
    }
    return "\n".join(f"{what} ({len(x)}): {listed(x)}" for what, x in problems.items() if x)


def _ignore(*_):
    """Replaces the methods with which a pickle changes an object, or a class, that it has made."""


class _Object:
    """Stands for what a pickle makes of a name: a subclass for the name, an instance for its call.

    Attributes:
        args: arguments of the call. Its keywords and all changes made later are dropped.
    """

    __slots__ = ("args",)

    def __new__(cls, /, *args, **_):
        self = object.__new__(cls)
        self.args = args
        return self

    def __call__(self, /, *_, **__):
        return self

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _OrderedDict(dict):
    """What a pickle makes of `OrderedDict`; a real one has attributes, which are dropped."""

    __slots__ = ()
    __setstate__ = _ignore


@dataclasses.dataclass(slots=True, eq=False)
class _Storage:
    """Elements start .. start + size - 1 of the storage `key`, which has `total` elements."""

    key: str
    dtype: np.dtype
    total: int
    start: int
    size: int

    __setstate__ = _ignore

    @property
    def num_bytes(self) -> int:
        return self.total * self.dtype.itemsize


class _Unpickler(pickle.Unpickler):
    """Makes numbers, strings, tuples, lists, dictionaries, sets, and the classes above.

    These classes define `__setstate__` because without it a pickle could set their attributes.
    """

    def __init__(self, stream: io.BytesIO, storages: dict[str, _Storage]):
        super().__init__(stream, encoding="latin-1")
        self.storages = storages

    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("collections", "OrderedDict"):
            return _OrderedDict
        return type(f"{module}.{name}", (_Object,), {"__slots__": ()})

    def persistent_load(self, identifier) -> _Storage | type:
        """The storage of a persistent id ("storage", class, key, device, elements).

        The older container appends None, or (key, start, size) for a view of the storage. It also
        writes ("module", class, file, source), which stands for the class. A storage of an
        unsupported element type becomes its class.
        """
        match identifier:
            case ("module", type() as module, *_):
                return module
            case ("storage", type() as kind, str(key), _, total, *view) if _is_count(total):
                pass
            case _:
                raise UserError("a persistent id in its pickle describes no storage")
        match view:
            case [] | [None]:
                start, size = 0, total
            case [(_, start, size)] if _is_count(start, size) and start + size <= total:
                pass
            case _:
                raise UserError(f"storage {key!r} has a malformed view")
        dtype = _STORAGE_DTYPES.get(kind.__name__.replace("torch.cuda.", "torch."))
        if dtype is None:
            return kind
        storage = _Storage(key, np.dtype(dtype), total, start, size)
        if self.storages.setdefault(key, storage).num_bytes != storage.num_bytes:
            raise UserError(f"storage {key!r} is declared with two sizes")
        return storage


def _load(stream: io.BytesIO | mmap.mmap, storages: dict[str, _Storage]):
    """The object of the pickle at the stream's position; adds the storages that it mentions."""
    start = stream.tell()
    try:
        # The stub asks for IO[bytes]; `genops` calls only read, readline and tell.
        operations = pickletools.genops(stream)  # pyright: ignore[reportArgumentType]
        for opcode, argument, position in operations:
            assert position is not None  # the stream has `tell`
            # These take objects from a registry of this process (copyreg), not from find_class.
            if opcode.name in ("EXT1", "EXT2", "EXT4"):
                raise UserError(f"torch.save never writes the pickle opcode {opcode.name}")
            # The unpickler allocates as many slots as the largest index.
            if opcode.name.endswith("PUT") and int(argument or 0) > position - start:
                raise UserError("its pickle is damaged (a large memo index)")
        stream.seek(start)
        return _Unpickler(io.BytesIO(stream.read(position + 1 - start)), storages).load()
    except UserError:
        raise
    except Exception as error:  # the unpickler raises nearly everything for damaged bytes
        raise UserError(f"its pickle is damaged ({type(error).__name__}: {error})") from error


def _describe(value) -> str:
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, _Object):
        return f"an object of {kind.__name__}"
    if value is None or value == {}:
        return "None" if value is None else "an empty dictionary"
    kind = kind.__name__.strip("_").lower()
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
    (root,) = roots

    @functools.cache
    def span(name: str) -> tuple[int, int]:
        """The first byte of a member and the end of it, after checking its checksum."""
        if name not in members:
            raise UserError(f"{name!r} is missing from the zip")
        info = members[name]
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
        return begin, begin + info.file_size

    def position(storage: _Storage) -> int:
        name = f"{root}data/{storage.key}"
        begin, end = span(name)
        if end - begin < storage.num_bytes:
            raise UserError(
                f"{name!r} has {end - begin} bytes where {storage.num_bytes} are expected"
            )
        return begin

    if root + "byteorder" in members and data[slice(*span(root + "byteorder"))] != b"little":
        raise UserError("it was written on a big-endian machine, only little-endian is supported")
    return _load(io.BytesIO(data[slice(*span(root + "data.pkl"))]), {}), position


def _open_legacy(data: mmap.mmap):
    """(content, function from a storage to its byte position) of the older container."""
    storages = {}
    if _load(data, storages) != _LEGACY_MAGIC:
        raise UserError("it is a pickle, but not one written by torch.save")
    version, system = _load(data, storages), _load(data, storages)
    if version != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise UserError(f"its container is not of version {_LEGACY_PROTOCOL}")
    if system.get("little_endian") is not True:
        raise UserError("it was written on a big-endian machine, only little-endian is supported")
    content, keys = _load(data, storages), _load(data, storages)
    if not isinstance(keys, list):
        raise UserError("the list of its storages is missing")
    positions, end = {}, data.tell()
    for key in keys:
        if not isinstance(key, str) or key not in storages:
            raise UserError("it has a storage of unknown type")
        storage, head = storages[key], data[end : end + 8]
        begin, end = end + 8, end + 8 + storage.num_bytes
        if len(head) == 8 and int.from_bytes(head, "little") != storage.total:
            raise UserError(f"storage {key!r} does not have the expected {storage.total} elements")
        if end > len(data):
            raise UserError(f"it ends within storage {key!r}")
        positions[key] = begin

    def position(storage: _Storage) -> int:
        if storage.key not in positions:
            raise UserError(f"storage {storage.key!r} is missing")
        return positions[storage.key]

    return content, position


def _tensor(value) -> tuple | None:
    """(storage, offset, shape, strides), in elements, of the tensor that PyTorch would rebuild.

    Returns None for other objects, and for tensors that these four do not describe.
    """
    while isinstance(value, _Object):
        match type(value).__name__, value.args:
            case (
                "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
                (inner, *_),
            ):
                value = inner
            case "torch._tensor._rebuild_from_type_v2", (type() as function, _, tuple(args), _):
                # A tensor with attributes, which are dropped.
                value = function(*args) if issubclass(function, _Object) else None
            case (
                "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
                (storage, offset, shape, strides, *rest),
            ) if rest[2:] in ([], [None], [{}]):  # any other metadata changes the elements
                return storage, offset, shape, strides
            case _:
                return None
    return None


def _view(data: mmap.mmap, locate: Callable, storage, offset, shape, strides) -> np.ndarray:
    """The elements of a tensor, without copying, once it is known to lie within its storage."""
    if isinstance(storage, type):
        raise UserError(f"a tensor's elements are in a {storage.__name__}, which is not supported")
    if not (
        isinstance(storage, _Storage)
        and isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides) <= 64
        and _is_count(offset, *shape, *strides)
    ):
        raise UserError("its pickle describes a malformed tensor")
    item, empty = storage.dtype.itemsize, 0 in shape
    extent = 0 if empty else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
    if offset + extent > storage.size:
        raise UserError(f"a tensor of shape {shape} reaches outside storage {storage.key!r}")
    if math.prod(n or 1 for n in shape) * item > np.iinfo(np.intp).max:
        raise UserError(f"a tensor of shape {shape} is too large for any memory")
    position = locate(storage) + (storage.start + offset) * item
    if empty:
        return np.empty(shape, storage.dtype)
    strides = [stride * item if n > 1 else 0 for n, stride in zip(shape, strides)]
    return np.ndarray(shape, storage.dtype, data, position, strides)


def _is_count(*values) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
