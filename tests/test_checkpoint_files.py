"""The reader of PyTorch's files: every layout of tensors, and no way in for a hostile pickle."""

import struct
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_files import call, code, name, ordered, storage, tensor, write_legacy, write_zip

from nvg_jax.torch_interop.checkpoint_files import read_state_dict

OWN_MODULE = "nvg_jax.torch_interop.checkpoint_files"
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
    parameter = call(name("torch._utils", "_rebuild_parameter"), x, True, ordered())
    callback = call(name("callbacks", "EMA"), 999) + code({"decay": 1, "x": x}) + b"b"
    made_new = name("lightning", "Trainer") + b")\x81" + code({"a": 1}) + b"b"
    by_instance = b"(" + code("argument") + b"ilightning\nHook\n"
    filled = call(name("collections", "defaultdict"), name("builtins", "int"))
    content = {
        "epoch": 3,
        "callbacks": {callback: made_new, ("a", "b"): [by_instance], (): {code([1]): None}},
        "optimizer_states": [filled + b"(" + code("step") + code(1) + b"u"],
        "set": call(name("__builtin__", "set"), [1, 2]),
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
    with pytest.raises(ValueError, match="data/1' is missing"):
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


def attacks(marker) -> dict[str, bytes]:
    """Opcodes that would leave the file `marker` if anything of theirs were called or imported."""
    touch = f"open({str(marker)!r}, 'w')"
    shell = f"touch {marker}"
    get = name("builtins", "getattr")
    module_name, function_name = code("os"), code("system")
    return {
        "system": call(name("os", "system"), shell),
        "posix": call(name("posix", "system"), shell),
        "eval": call(name("builtins", "eval"), touch),
        "python 2": call(name("__builtin__", "eval"), touch),
        "exec by instance": b"(" + code(touch) + b"ibuiltins\nexec\n",
        "eval by object": b"(" + name("builtins", "eval") + code(touch) + b"o",
        "eval by new": name("builtins", "eval") + code((touch,)) + b"\x81",
        "eval by new with keywords": name("builtins", "eval") + code((touch,)) + b"}\x92",
        "stack global": call(module_name + function_name + b"\x93", shell),
        "getattr": call(call(get, name("os", "path"), "system"), shell),
        "dotted name": call(name(OWN_MODULE, "io.open"), str(marker), "w"),
        "our own function": call(name(OWN_MODULE, "mmap.mmap"), -1, 10),
        "import": name("evil_module", "anything"),
        "placeholder called": call(call(name("a", "B")), touch),
        "placeholder from a tensor recipe": call(call(REBUILD, name("os", "system")), shell),
        "state": call(name("a", "B")) + code({"__reduce__": touch, "__setstate__": touch}) + b"b",
        "state of a function": REBUILD + code((None, {"__code__": touch})) + b"b",
        "typed": call(
            name("torch._tensor", "_rebuild_from_type_v2"),
            name("os", "system"), name("torch", "Tensor"), (shell,), {},
        ),
        "hooks": call(
            REBUILD, storage("0", 24), 0, (24,), (1,), False, call(name("os", "system"), shell)
        ),
        "module id": code(("module", name("os", "system"), shell, shell)) + b"Q",
        "numpy": call(name("numpy", "memmap"), str(marker), "float32", "w+", 0, 4),
        "loads": call(name("pickle", "loads"), b"C\x01."),
    }  # fmt: skip


@WRITERS
@pytest.mark.parametrize("attack", attacks(""))
def test_nothing_in_a_pickle_is_called_or_imported(tmp_path, monkeypatch, write, attack):
    marker = tmp_path / "marker"
    (tmp_path / "evil_module.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    opcodes = attacks(marker)[attack]
    for content in ({"state_dict": {"x": GOOD}, "callbacks": opcodes}, {"x": opcodes}):
        path = write(tmp_path / "x.ckpt", content, {"0": X})
        if "x" in content and attack != "hooks":
            with pytest.raises(ValueError, match="not a tensor"):
                read_state_dict(path)
        else:
            assert list(read_state_dict(path)) == ["x"]
        assert not marker.exists()
        assert "evil_module" not in sys.modules


@WRITERS
@pytest.mark.parametrize(
    "opcodes, sentence",
    [
        (tensor(storage("0", 24), 1, (24,), (1,)), "reaches outside"),
        (tensor(storage("0", 24), 0, (5, 5), (5, 1)), "reaches outside"),
        (tensor(storage("0", 24), 0, (2,), (10**30,)), "reaches outside"),
        (tensor(storage("0", 24), 0, (2**62,), (1,)), "reaches outside"),
        (tensor(storage("0", 24), 0, (2**40, 2**40), (0, 0)), "too large"),
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
        (code(("storage",)) + b"Q", "describes no storage"),
        (code("storage") + b"Q", "describes no storage"),
        (code(("storage", "torch.FloatStorage", "0", "cpu", 24)) + b"Q", "describes no storage"),
        (code(("storage", name("torch", "FloatStorage"), 0, "cpu", 24)) + b"Q", "no storage"),
        (b"Pstorage\n", "PERSID"),
        (b"\x82\x01", "EXT1"),
        (b"\x98", "unknown|READONLY_BUFFER"),
        (b"h\x63", "damaged"),
        (b"R", "damaged|not a function"),
        (b"0" * 9, "damaged"),
        (b"e", "malformed dictionary"),
        (b"(u", "not a container"),
        (code("a") + code("b") + b"a", "not a container"),
        (b"B\xff\xff\xff\x7f", "bytes"),
        (b"\x8e" + b"\xff" * 7 + b"\x7f", "bytes"),
        (call(name("collections", "OrderedDict"), [(1, 2, 3)]), "malformed dictionary"),
        (call(code("print"), 1), "not a function"),
        (code(1) + code(2) + b"\x93", "not a string"),
    ],
)
def test_malformed_pickles_are_refused(tmp_path, write, opcodes, sentence):
    path = write(tmp_path / "x.ckpt", {"x": GOOD, "y": opcodes}, {"0": X})
    with pytest.raises(ValueError, match=sentence) as error:
        read_state_dict(path)
    assert str(path) in str(error.value)


@WRITERS
def test_a_large_memo_index_takes_no_memory(tmp_path, write):
    """An array of so many slots, as pickle.Unpickler keeps, would take 512 MiB."""
    content = {"state_dict": {"x": GOOD}, "other": b"]r" + struct.pack("<I", 2**26)}
    path = write(tmp_path / "x.ckpt", content, {"0": X})
    tracemalloc.start()
    arrays = read_state_dict(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(arrays["x"], X)
    assert peak < 2**20


@WRITERS
@pytest.mark.parametrize("opcodes", [b"\x85" * 300_000, b"2\x86" * 64], ids=["deep", "wide"])
def test_nested_tuples_as_keys_are_not_hashed(tmp_path, write, opcodes):
    """Hashing ((((...,),),),) overflows the C stack; 64 levels of (t, t) have 2**64 elements."""
    content = {"state_dict": {"x": GOOD}, "other": b"})" + opcodes + b"Ns"}
    arrays = read_state_dict(write(tmp_path / "x.ckpt", content, {"0": X}))
    np.testing.assert_array_equal(arrays["x"], X)


@WRITERS
@pytest.mark.parametrize(
    "content, sentence",
    [
        ({}, "empty dictionary"),
        ([GOOD], "a list"),
        (GOOD, "a tensor"),
        (3, "is an int, not a dictionary"),
        ({"state_dict": [GOOD]}, "a list"),
        ({"state_dict": None}, "is None, not a dictionary"),
        ({"x": GOOD, "epoch": 3}, "an int as 'epoch'"),
        ({1: GOOD}, "where a name is expected"),
        ({"x": name("torch.nn", "Linear")}, "torch.nn.Linear as 'x'"),
        (
            {"x": tensor(storage("0", 24, "QInt8Storage"), 0, (2,), (1,))},
            "not a tensor|unknown type",
        ),
        ({"x": tensor(storage("1", 24), 0, (2,), (1,))}, "missing|unknown type"),
        ({"x": tensor(storage("0", 25), 0, (25,), (1,))}, "25 elements|100 are expected"),
    ],
)
def test_other_contents_are_refused(tmp_path, write, content, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_state_dict(write(tmp_path / "x.ckpt", content, {"0": X}))


def test_lazily_conjugated_tensors_are_refused(tmp_path):
    store = storage("0", 24)
    x = call(REBUILD, store, 0, (24,), (1,), False, ordered(), {"conj": True})
    with pytest.raises(ValueError, match="not a tensor"):
        read_state_dict(write_zip(tmp_path / "x.ckpt", {"x": x}, {"0": X}))


def test_big_endian_is_refused(tmp_path):
    with pytest.raises(ValueError, match="big-endian"):
        read_state_dict(write_zip(tmp_path / "x.ckpt", {"x": GOOD}, {"0": X}, byteorder=b"big"))
    with pytest.raises(ValueError, match="big-endian"):
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
    with pytest.raises(ValueError, match=sentence):
        read_state_dict(path)


def test_other_zips_are_refused(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme", "hello")
    with pytest.raises(ValueError, match="one data.pkl, this one has 0"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(ValueError, match="compressed"):
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
        with pytest.raises(ValueError, match="y.ckpt"):
            read_state_dict(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="ends within storage '0'|zip directory"):
        read_state_dict(path)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        body = np.frombuffer(whole, np.uint8).copy()
        body[rng.integers(len(body), size=rng.integers(1, 4))] = rng.integers(256)
        path.write_bytes(body.tobytes())
        try:
            arrays = read_state_dict(path)
        except ValueError:
            refused += 1
        else:
            if write is write_zip:  # the checksums leave only the zip's own fields
                np.testing.assert_array_equal(arrays["x"], X)
    assert refused > 50
