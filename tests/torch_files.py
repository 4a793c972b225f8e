"""Writes files as `torch.save` does, from pickle opcodes, so that no test needs PyTorch."""

import struct
import zipfile


def code(value) -> bytes:
    """Pickle opcodes that build `value`; bytes are opcodes already."""
    match value:
        case bytes():
            return value
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"L%dL\n" % value
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(code(k) + code(v) for k, v in value.items()) + b"u"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments) -> bytes:
    return function + code(arguments) + b"R"


def storage(key: str, elements: int, kind: str = "FloatStorage", *rest) -> bytes:
    return code(("storage", name("torch", kind), key, "cpu", elements, *rest)) + b"Q"


def tensor(store: bytes, offset, shape, strides) -> bytes:
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, store, offset, shape, strides, False, ordered())


def ordered(*items) -> bytes:
    """An OrderedDict with its items and, as in a real state_dict, an attribute."""
    made = call(name("collections", "OrderedDict")) + b"(" + b"".join(map(code, items)) + b"u"
    return made + code({"_metadata": {}}) + b"b"


def write_zip(path, content, storages, byteorder=b"little"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + code(content) + b".")
        archive.writestr("archive/byteorder", byteorder)
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return path


def write_legacy(path, content, storages, little_endian=True):
    storages = {key: array for key, array in storages.items() if code(key) in code(content)}
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": little_endian}, content, list(storages)]
    body = b"".join(b"\x80\x02" + code(value) + b"." for value in head)
    for array in storages.values():
        body += struct.pack("<q", array.size) + array.tobytes()
    path.write_bytes(body)
    return path
