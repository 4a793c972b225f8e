"""The reader of PyTorch's files: every layout of tensors, and no way in for a hostile pickle."""

import collections
import contextlib
import copyreg
import functools
import os
import pickle
import signal
import struct
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_files import call, code, name, ordered, storage, tensor, write_legacy, write_zip

from nvg_jax.errors import UserError
from nvg_jax.torch_interop import checkpoint_files
from nvg_jax.torch_interop.checkpoint_files import read_state_dict

WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])
X = np.arange(24, dtype=np.float32)


@WRITERS
@pytest.mark.parametrize(
    "kind, dtype",
    [
        ("DoubleStorage", np.float64),
        ("FloatStorage", np.float32),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
    ],
)
def test_element_types(tmp_path, write, kind, dtype):
    values = np.array([0, 1, 0, 3, 1, 5], np.float32).astype(dtype)
    # An odd number of bytes before it, so that the elements are not aligned in the older container.
    content = {
        "odd": tensor(storage("0", 1, "ByteStorage"), 0, (1,), (1,)),
        "x": tensor(storage("1", 6, kind), 0, (2, 3), (3, 1)),
    }
    path = write(tmp_path / "x.ckpt", content, {"0": np.uint8([7]), "1": values})
    x = read_state_dict(path)["x"]
    assert x.dtype == dtype and x.shape == (2, 3)
    assert x.tobytes() == values.tobytes()
    np.testing.assert_array_equal(x.astype(np.float64).ravel(), values.astype(np.float64))


@WRITERS
@pytest.mark.parametrize(
    "offset, shape, strides, expected",
    [
        (0, (4, 6), (6, 1), X.reshape(4, 6)),
        (0, (6, 4), (1, 6), X.reshape(4, 6).T),
        (2, (4,), (6,), X.reshape(4, 6)[:, 2]),
        (6, (2, 2), (12, 3), X.reshape(4, 6)[1::2, ::3]),
        (5, (), (), X[5]),
        (0, (0, 3), (3, 1), X[:0].reshape(0, 3)),
        (7, (2, 1000), (0, 0), np.full((2, 1000), X[7])),
        (0, (20, 5), (1, 1), np.lib.stride_tricks.sliding_window_view(X, 5)),
        (23, (1,), (2**70,), X[23:]),
    ],
)
def test_views(tmp_path, write, offset, shape, strides, expected):
    view = tensor(storage("0", 24), offset, shape, strides)
    content = {"view": view, "whole": tensor(storage("0", 24), 0, (24,), (1,))}
    arrays = read_state_dict(write(tmp_path / "x.ckpt", content, {"0": X}))
    np.testing.assert_array_equal(arrays["view"], expected)
    np.testing.assert_array_equal(arrays["whole"], X)
    assert not arrays["whole"].flags.writeable


def test_views_of_the_first_releases(tmp_path):
    """The older container once wrote a view of a storage beside its persistent id."""
    view = storage("0", 24, "FloatStorage", ("view", 6, 4))
    x = call(name("torch._utils", "_rebuild_tensor"), view, 1, (3,), (1,))
    arrays = read_state_dict(write_legacy(tmp_path / "x.pth", {"x": x}, {"0": X}))
    np.testing.assert_array_equal(arrays["x"], [7, 8, 9])


@WRITERS
def test_lightning_file_with_callbacks(tmp_path, write):
    """Only the state_dict comes out; classes, optimizers and odd keys are passed over."""
    x = tensor(storage("0", 24), 0, (24,), (1,))
    parameter = call(PARAMETER, x, True, ordered())
    callback = call(name("callbacks", "EMA"), 999) + code({"decay": 1, "x": x}) + b"b"
    made_new = name("lightning", "Trainer") + b")\x81" + code({"a": 1}) + b"b"
    by_instance = b"(" + code("argument") + b"ilightning\nHook\n"
    filled = call(name("collections", "defaultdict"), name("builtins", "int"))
    content = {
        "epoch": 3,
        "callbacks": {callback: made_new, ("a", "b"): [by_instance], (): {made_new: None}},
        "optimizer_states": [filled + b"(" + code("step") + code(1) + b"u"],
        "set": call(name("__builtin__", "set"), [b"U\x01\xe9", 2]),  # a string of Python 2
        "state_dict": ordered("weight", parameter, "again", x),
    }
    arrays = read_state_dict(write(tmp_path / "x.ckpt", content, {"0": X}))
    assert list(arrays) == ["weight", "again"]
    np.testing.assert_array_equal(arrays["weight"], X)
    assert "torch" not in sys.modules


def test_only_what_is_asked_for_is_read(tmp_path):
    """Another tensor's storage may be missing, or fill the disk."""
    content = {
        "want": tensor(storage("0", 24), 0, (24,), (1,)),
        "lost": tensor(storage("1", 10**15), 0, (10**15,), (1,)),
        "object": name("any", "thing"),
    }
    path = write_zip(tmp_path / "x.ckpt", content, {"0": X})
    arrays = read_state_dict(path, keep=lambda key: key == "want")
    assert list(arrays) == ["want"]
    with pytest.raises(UserError, match="data/1' is missing"):
        read_state_dict(path, keep=lambda key: key != "object")


@WRITERS
def test_memory_holds_no_copy(tmp_path, write):
    big = np.zeros(2**23, np.float32)
    x = tensor(storage("0", big.size), 0, (2**10, 2**13), (1, 2**10))
    path = write(tmp_path / "x.ckpt", {"x": x}, {"0": big})
    tracemalloc.start()
    arrays = read_state_dict(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert arrays["x"].shape == (2**10, 2**13)
    assert peak < 2**20  # of 32 MiB


def test_pack_has_the_same_tensors_in_both_containers(parity_dir):
    new = read_state_dict(parity_dir / "ae.ckpt")
    old = read_state_dict(parity_dir / "ae.legacy.ckpt")
    assert set(old) == {key for key in new if not key.startswith("ema_model.")}
    assert len(old) > 100
    for key, value in old.items():
        assert (value.shape, value.dtype) == (new[key].shape, new[key].dtype), key
        assert value.tobytes() == new[key].tobytes(), key


GOOD = tensor(storage("0", 24), 0, (24,), (1,))
REBUILD = name("torch._utils", "_rebuild_tensor_v2")
PARAMETER = name("torch._utils", "_rebuild_parameter")
ORDERED = name("collections", "OrderedDict")
CONJUGATED = call(REBUILD, storage("0", 24), 0, (24,), (1,), False, ordered(), {"conj": True})


class Slots:
    __slots__ = ("a",)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_python_objects_are_passed_over(tmp_path, protocol):
    """As Python's own pickler writes them: with memo and frames, in every way of making objects."""
    slots = Slots()
    slots.a = [slots]
    keys = (tmp_path, slots, ("a", 2.5), len, 1j, signal.SIGINT, b"bytes", np.float32, -1)
    objects = [dict.fromkeys(keys), set(keys), frozenset(keys), collections.deque(keys)]
    objects += [collections.defaultdict(list, a=keys), collections.OrderedDict.fromkeys(keys)]
    objects += [bytearray(b"x"), np.arange(3), functools.partial(print, 1, end=""), str.upper]
    other = pickle.dumps([*objects, objects], protocol)[2:-1]
    path = write_zip(tmp_path / "x.ckpt", {"state_dict": {"x": GOOD}, "other": other}, {"0": X})
    np.testing.assert_array_equal(read_state_dict(path)["x"], X)


WATCHING = []  # the events of the block that watches; a hook stays for the life of the process


def record(event: str, arguments: tuple, watching=WATCHING):
    for events in watching:
        events.append((event, *arguments))


sys.addaudithook(record)


@contextlib.contextmanager
def nothing_runs(path):
    """Only the file at `path` is opened: no import, no call, no change of the reader's own."""

    def reader():
        values = vars(checkpoint_files).items()
        own = {k: v for k, v in values if getattr(v, "__module__", 0) == checkpoint_files.__name__}
        tables = {key: dict(value) for key, value in values if isinstance(value, dict)}
        return tables | {key: dict(vars(value)) for key, value in own.items()}

    before, modules = reader(), set(sys.modules)
    events = []
    WATCHING.append(events)
    try:
        yield
    finally:
        WATCHING.clear()
        assert {event[0] for event in events} <= {"open", "mmap.__new__"}, events
        assert {event[1] for event in events if event[0] == "open"} == {str(path)}, events
        assert reader() == before and set(sys.modules) == modules
        assert os.listdir(path.parent) == [path.name]


def uses(module: str, function: str, x) -> dict[str, bytes]:
    """Every way in which a pickle can call a name with `x`, or may make the reader do so."""
    f = name(module, function)
    state = {"__setstate__": f, "__call__": f, "__reduce__": f, "__class__": f, "args": (f, x)}
    return {
        "REDUCE": call(f, x),
        "STACK_GLOBAL": call(code(module) + code(function) + b"\x93", x),
        "INST": b"(" + code(x) + f"i{module}\n{function}\n".encode(),
        "OBJ": b"(" + f + code(x) + b"o",
        "NEWOBJ": f + code((x,)) + b"\x81",
        "NEWOBJ_EX": f + code((x,)) + b"}\x92",
        "NEWOBJ_EX by keyword": f + b")" + code({"cls": x, "self": f}) + b"\x92",
        "INST without arguments": f"(i{module}\n{function}\n".encode(),
        "REDUCE of the result": call(call(f, x), x),
        "REDUCE of an attribute": call(call(name("builtins", "getattr"), f, "__call__"), x),
        "BUILD of the class": f + 2 * (code(state) + b"b" + code((None, state)) + b"b") + b")R",
        "BUILD of the object": call(f, x) + 2 * (code(state) + b"b" + code((state, state)) + b"b"),
        "APPEND": call(f, x) + code(x) + b"a",
        "APPENDS": call(f, x) + b"(" + code(x) + f + b"e",
        "SETITEM": call(f, x) + code(x) + f + b"s",
        "SETITEMS": call(f, x) + b"(" + code(x) + f + b"u",
        "ADDITEMS": call(f, x) + b"(" + code(x) + f + b"\x90",
        "key": code({call(f, x): f, (f, call(f, x)): x}),
        "set": b"\x8f(" + call(f, x) + f + b"\x90",
        "pairs": call(ORDERED, [(x, call(f, x))]),
        "defaultdict": call(name("collections", "defaultdict"), f) + code(x) + f + b"s",
        "module": code(("module", f, x, x)) + b"Q",
        "storage": code(("storage", f, "0", "cpu", 24)) + b"Q",
        "tensor of a storage": tensor(code(("storage", f, "0", "cpu", 24)) + b"Q", 0, (2,), (1,)),
        "tensor of an object": tensor(call(f, x), 0, (24,), (1,)),
        "tensor with metadata": call(REBUILD, GOOD, 0, (24,), (1,), False, call(f, x), {"a": x}),
        "parameter": call(PARAMETER, call(f, x), True, ordered()),
        "subclass": call(name("torch._tensor", "_rebuild_from_type_v2"), f, f, (x,), {}),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    """os:system posix:system os:mkdir subprocess:getoutput builtins:eval builtins:exec
    __builtin__:eval builtins:open io:open builtins:__import__ importlib:import_module this:s
    builtins:getattr builtins:type builtins:dict operator:attrgetter functools:partial pickle:loads
    _pickle:Unpickler copyreg:add_extension copy_reg:_reconstructor torch:load numpy:load
    torch.storage:_load_from_bytes numpy:memmap numpy.core.multiarray:scalar nvg_jax.cli:setup
    collections:OrderedDict collections:OrderedDict.__class__ collections:OrderedDict.__setstate__
    collections:abc.sys.modules.clear {own}:zipfile.os.mkdir {own}:_STORAGE_DTYPES.clear
    {own}:_Storage {own}:_Unpickler.find_class {own}:_OrderedDict.__class__""".split(),
)
def test_nothing_in_a_pickle_runs(tmp_path, path):
    module, function = path.format(own=checkpoint_files.__name__).split(":")
    argument = f"open({str(tmp_path / 'marker')!r}, 'w')"
    refuses = [UserError] * (path == "collections:OrderedDict")  # its argument is not a dictionary
    for use, opcodes in uses(module, function, argument).items():
        # Protocols 4 and 5 allow dots in names, the others map Python 2's modules.
        for write, protocol in ((write_zip, b"\x80\x05"), (write_legacy, b"")):
            content = {"state_dict": {"x": GOOD}, "other": protocol + opcodes}
            file = write(tmp_path / "x.ckpt", content, {"0": X})
            with nothing_runs(file), contextlib.suppress(*refuses):
                assert list(read_state_dict(file)) == ["x"], use
            write(file, {"x": protocol + opcodes}, {"0": X})
            with nothing_runs(file), pytest.raises(UserError):
                read_state_dict(file)


@pytest.mark.parametrize("opcode", [b"\x82\xc8", b"\x83\xc8\0", b"\x84\xc8\0\0\0"])
@pytest.mark.parametrize("cache", [{}, {200: os.mkdir}])
def test_nothing_comes_from_the_extension_registry(tmp_path, monkeypatch, opcode, cache):
    """Unpicklers take objects from its cache without calling find_class, and put theirs there."""
    monkeypatch.setitem(copyreg._inverted_registry, 200, ("os", "mkdir"))
    for number, value in cache.items():
        monkeypatch.setitem(copyreg._extension_cache, number, value)
    content = {"state_dict": {"x": GOOD}, "other": call(opcode, str(tmp_path / "marker"))}
    path = write_zip(tmp_path / "x.ckpt", content, {"0": X})
    with nothing_runs(path), pytest.raises(UserError, match="opcode EXT"):
        read_state_dict(path)
    assert copyreg._extension_cache == cache


def test_deep_nesting_is_no_recursion(tmp_path):
    depth = 100_000
    deep = PARAMETER + b"q\0" + b"h\0" * (depth - 1) + GOOD + b"\x85R" * depth
    content = {"state_dict": {"x": deep}, "other": b")" + b"\x85" * depth}
    arrays = read_state_dict(write_zip(tmp_path / "x.ckpt", content, {"0": X}))
    np.testing.assert_array_equal(arrays["x"], X)


# States that would give storage "0" 99 elements, if a pickle could change it.
STATES = {"total": 99, "size": 99}, (None, {"size": 99}), ["0", None, 99, 0, 99]


@WRITERS
@pytest.mark.parametrize(
    "opcodes, sentence",
    [
        (tensor(storage("0", 24), 1, (24,), (1,)), "reaches outside"),
        (tensor(storage("0", 24), 0, (5, 5), (5, 1)), "reaches outside"),
        (tensor(storage("0", 24), 0, (2,), (10**30,)), "reaches outside"),
        (tensor(storage("0", 24), 0, (2**62,), (1,)), "reaches outside"),
        (tensor(storage("0", 24), 25, (0,), (1,)), "reaches outside"),
        (tensor(storage("0", 24), 0, (2**40, 2**40), (0, 0)), "too large"),
        (tensor(storage("0", 24), 0, (0, 2**70), (1, 1)), "too large"),
        (tensor(storage("0", 24), -4, (2,), (1,)), "malformed tensor"),
        (tensor(storage("0", 24), 0, (-1, -2), (1, 1)), "malformed tensor"),
        (tensor(storage("0", 24), 4, (2,), (-1,)), "malformed tensor"),
        (tensor(storage("0", 24), 0, (2, 3), (1,)), "malformed tensor"),
        (tensor(storage("0", 24), 0, ("2",), (1,)), "malformed tensor"),
        (tensor(storage("0", 24), 0, (True,), (1,)), "malformed tensor"),
        (tensor(storage("0", 24), 0, [2], [1]), "malformed tensor"),
        (tensor(storage("0", 24), 0, (1,) * 99, (1,) * 99), "malformed tensor"),
        (tensor(code("0"), 0, (2,), (1,)), "malformed tensor"),
        (tensor(storage("0", -24), 0, (2,), (1,)), "describes no storage"),
        (tensor(storage("0", 24, "FloatStorage", (1, 20, 5)), 0, (2,), (1,)), "malformed view"),
        (tensor(storage("0", 24, "FloatStorage", (1, 20, 4)), 1, (4,), (1,)), "reaches outside"),
        (tensor(storage("0", 24), 0, (b"\x8b\xff\x0f\0\0" + b"\1" * 4095,), (1,)), "digits"),
        *[
            (tensor(storage("0", 24) + code(state) + b"b", 0, (99,), (1,)), "reaches outside")
            for state in STATES
        ],
        (storage("0", 25), "declared with two sizes"),
        (code(("storage",)) + b"Q", "describes no storage"),
        (code("storage") + b"Q", "describes no storage"),
        (code(("storage", "torch.FloatStorage", "0", "cpu", 24)) + b"Q", "describes no storage"),
        (code(("storage", name("torch", "FloatStorage"), 0, "cpu", 24)) + b"Q", "no storage"),
        (code(("module", "torch.nn.Linear")) + b"Q", "no storage"),
        (b"Pstorage\n", "no storage"),
        (b"]r" + struct.pack("<I", 2**26), "large memo index"),  # would take 1 GiB
        (b"]p%d\n" % 2**26, "large memo index"),
        (b"B\xff\xff\xff\x7f", "bytes"),
        (b"\x8e" + b"\xff" * 7 + b"\x7f", "bytes"),
        (b"\xff", "unknown"),
        (b"h\x63", "damaged"),
        (b"R", "damaged"),
        (b"0" * 9, "damaged"),
        (b"e", "damaged"),
        (code("a") + code("b") + b"a", "damaged"),
        (code("a") + code({"b": 1}) + b"b", "damaged"),
        (code({1: [1]}) + b"(]Nu", "damaged"),
        (b"\x97", "damaged"),
        (b"\x80\x06", "damaged"),
        (call(ORDERED, [(1, 2, 3)]), "damaged"),
        (call(code("print"), 1), "damaged"),
        (code("print") + b")\x81", "damaged"),
        (code(1) + code(2) + b"\x93", "damaged"),
        (name("a\0b", "c"), "damaged"),
        (name("a", "B") + b")" + code({1: 2}) + b"\x92", "damaged"),
    ],
)
def test_malformed_pickles_are_refused(tmp_path, write, opcodes, sentence):
    path = write(tmp_path / "x.ckpt", {"x": GOOD, "y": opcodes}, {"0": X})
    with pytest.raises(UserError, match=sentence) as error:
        read_state_dict(path)
    assert str(path) in str(error.value)


@WRITERS
@pytest.mark.parametrize(
    "content, sentence",
    [
        ({}, "empty dictionary"),
        ([GOOD], "a list"),
        (GOOD, "an object of torch._utils._rebuild_tensor_v2"),
        (3, "is an int, not a dictionary"),
        ({"state_dict": [GOOD]}, "a list"),
        ({"state_dict": None}, "is None, not a dictionary"),
        ({"x": GOOD, "epoch": 3}, "an int as 'epoch'"),
        ({1: GOOD}, "where a name is expected"),
        ({"x": name("torch.nn", "Linear")}, "torch.nn.Linear as 'x'"),
        ({"x": CONJUGATED}, "_rebuild_tensor_v2 as 'x', which is not a tensor"),
        (
            {"x": tensor(storage("0", 24, "QInt8Storage"), 0, (2,), (1,))},
            "QInt8Storage, which is not supported|unknown type",
        ),
        ({"x": tensor(storage("1", 24), 0, (2,), (1,))}, "missing|unknown type"),
        ({"x": tensor(storage("0", 25), 0, (25,), (1,))}, "25 elements|100 are expected"),
    ],
)
def test_other_contents_are_refused(tmp_path, write, content, sentence):
    with pytest.raises(UserError, match=sentence):
        read_state_dict(write(tmp_path / "x.ckpt", content, {"0": X}))


def test_big_endian_is_refused(tmp_path):
    with pytest.raises(UserError, match="big-endian"):
        read_state_dict(write_zip(tmp_path / "x.ckpt", {"x": GOOD}, {"0": X}, byteorder=b"big"))
    with pytest.raises(UserError, match="big-endian"):
        read_state_dict(write_legacy(tmp_path / "y.ckpt", {"x": GOOD}, {"0": X}, False))


@pytest.mark.parametrize(
    "body, sentence",
    [
        (b"", "is empty"),
        (b"hello", "neither"),
        (b"\x93NUMPY\x01\x00", "neither"),
        (b"PK\x03\x04 and no more", "zip directory"),
        (b"\x80\x02}.", "not one written by torch.save"),
        (b"\x80", "not enough data"),
        (b"\x80\x02}", "pickle exhausted"),
    ],
)
def test_other_files_are_refused(tmp_path, body, sentence):
    path = tmp_path / "x.ckpt"
    path.write_bytes(body)
    with pytest.raises(UserError, match=sentence):
        read_state_dict(path)


def test_a_type_that_numpy_lacks_is_refused(tmp_path):
    header = b'{"half": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(UserError, match="x.safetensors: .*the element type of 'half' is not supp"):
        read_state_dict(tmp_path / "x.safetensors")


def test_other_zips_are_refused(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme", "hello")
    with pytest.raises(UserError, match="one data.pkl, this one has 0"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(UserError, match="compressed"):
        read_state_dict(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a string that damage made
@WRITERS
def test_truncated_and_damaged_files(tmp_path, write):
    """However a file is cut it is refused; changed bytes are refused, or leave a readable file."""
    content = {"state_dict": ordered("x", GOOD, "y", GOOD), "other": call(name("a", "B"), 1)}
    whole = write(tmp_path / "x.ckpt", content, {"0": X}).read_bytes()
    path = tmp_path / "y.ckpt"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="y.ckpt"):
            read_state_dict(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="ends within storage '0'|zip directory"):
        read_state_dict(path)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        body = np.frombuffer(whole, np.uint8).copy()
        body[rng.integers(len(body), size=rng.integers(1, 4))] = rng.integers(256)
        path.write_bytes(body.tobytes())
        try:
            arrays = read_state_dict(path)
        except UserError:
            refused += 1
        else:
            if write is write_zip:  # the checksums leave only the zip's own fields
                np.testing.assert_array_equal(arrays["x"], X)
    assert refused > 50
