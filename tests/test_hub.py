"""Models of a hub: one of our own, over HTTP on this machine, with its refusals and its faults."""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import jax
import numpy as np
import pytest
from etils import epath
from helpers import random_like, tiny_config
from huggingface_hub import constants
from test_convert import SQUARE, command, write_autoencoder

from nvg_jax import Adapters, Pipeline, hub, lora
from nvg_jax.errors import UserError
from nvg_jax.jobs import conversion
from nvg_jax.parts import CHOICES
from nvg_jax.runtime import sharding
from nvg_jax.runtime.storage import fingerprint
from nvg_jax.training import checks, initial
from nvg_jax.training.run import open_run

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Repositories {name: {file: bytes}}, and what goes wrong with them.

    Attributes:
        gated: names whose files are refused without the token "good"; private: likewise, wholly.
        cuts: how many of the next transfers end in the middle. asked: (method, path) of requests.
        starts: the first bytes that transfers asked for.
    """

    def __init__(self):
        address = urlsplit(os.environ["HF_ENDPOINT"])
        super().__init__((address.hostname, address.port), Handler)
        self.repositories, self.gated, self.private = {}, set(), set()
        self.cuts, self.asked, self.starts = 0, [], []

    def put(self, name, folder):
        self.repositories[name] = {f.name: f.read_bytes() for f in folder.iterdir()}


class Handler(BaseHTTPRequestHandler):
    server: Hub  # HTTP/1.0: no connection outlives its server

    def log_message(self, *_):
        pass

    def reply(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        headers = {"Content-Length": len(content), "X-Repo-Commit": COMMIT} | headers
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code=""):
        self.reply(status, {"error": code}, **({"X_Error_Code": code} if code else {}))

    def allowed(self, names) -> bool:
        return self.headers.get("Authorization") == "Bearer good" or not names

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        repositories = self.server.repositories
        if path.startswith("/cdn/"):
            return self.send_blob(path.removeprefix("/cdn/"))
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        name = "/".join(parts[:2])
        private = name in self.server.private and not self.allowed([name])
        if name not in repositories or private:
            return self.refuse(
                401, "RepoNotFound"
            )  # as for what does not exist, so that nobody can tell
        files = repositories[name]
        if not path.startswith("/api/"):  # /org/name/resolve/REVISION/FILE
            if name in self.server.gated and not self.allowed([name]):
                return self.refuse(403, "GatedRepo")
            if parts[4] not in files:
                return self.refuse(404, "EntryNotFound")
            content = files[parts[4]]
            sha = hashlib.sha256(content).hexdigest()
            headers = dict(X_Linked_Etag=f'"{sha}"', X_Linked_Size=len(content))
            place = f"http://localhost:{self.server.server_port}/cdn/{sha}"  # another host
            return self.reply(302, Location=place, ETag=f'"{sha}"', **headers)
        if len(parts) > 3 and parts[2] in ("revision", "tree") and parts[3] not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if "tree" in parts:
            return self.reply(200, [
                {"type": "file", "path": f, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                for f, x in files.items()
            ])  # fmt: skip
        siblings = [{"rfilename": file} for file in files]
        self.reply(200, {"id": name, "sha": COMMIT, "siblings": siblings,
                         "cardData": {"license": "cc-by-nc-4.0"}})  # fmt: skip

    def send_blob(self, sha):
        blobs = [x for files in self.server.repositories.values() for x in files.values()]
        content = next(x for x in blobs if hashlib.sha256(x).hexdigest() == sha)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.starts.append(start)
        part = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{sha}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cuts and len(part) > 2**20:
            self.server.cuts -= 1
            self.wfile.write(part[: 2**20])
            self.close_connection = True
        else:
            self.wfile.write(part)

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            errors = [{"message": '"license" must be one of'}] if b"license: mine" in body else []
            return self.reply(400 if errors else 200, {"errors": errors, "warnings": []})
        if not self.allowed([path]):
            return self.refuse(403)
        if path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content['organization']}/{content['name']}"
            self.server.repositories.setdefault(name, {})
            if content.get("private") or content.get("visibility") == "private":
                self.server.private.add(name)
            return self.reply(200, {"url": f"{os.environ['HF_ENDPOINT']}/{name}"})
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if "preupload" in path:
            return self.reply(200, {"files": [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        files = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{os.environ['HF_ENDPOINT']}/{name}/commit/{COMMIT}"
        self.reply(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running hub, an empty cache, and no token."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_model_is_downloaded_through_redirects_and_kept(server, pipe, exported):
    server.put("org/digits", exported)
    for name in ("org/digits", "hf://org/digits"):
        found = Pipeline.from_pretrained(name)
        assert found.metadata == pipe.metadata
        jax.tree.map(np.testing.assert_array_equal, found.params, pipe.params)
    downloads = [path for method, path in server.asked if method == "GET" and "/cdn/" in path]
    assert len(downloads) == 2  # config.json and the weights, once
    server.shutdown()
    server.server_close()  # no hub: the cache is enough
    assert Pipeline.from_pretrained("org/digits").metadata == pipe.metadata


def test_a_training_starts_from_a_model_of_the_hub(server, pipe, exported):
    server.put("org/digits", exported)
    name = "hf://org/digits"
    config = tiny_config(part="generators", init_from=name, tokenizer_workdir=name)
    checks.check_config(config)
    initial.check_init(config, CHOICES["generators"])
    run = open_run(config, epath.Path("/nowhere"), sharding.make_mesh())
    assert run.tokenizer_workdir == name
    assert run.resize_filter == pipe.metadata.resize_filter


def test_a_folder_wins_over_the_hub(server, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("org/digits")
    assert Pipeline.from_pretrained("org/digits").metadata == pipe.metadata
    assert not server.asked


def test_a_broken_transfer_goes_on_where_it_stopped(server, pipe, exported, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**19)  # which it writes at once
    server.put("org/digits", exported)
    server.cuts = 1
    found = Pipeline.from_pretrained("org/digits")
    jax.tree.map(np.testing.assert_array_equal, found.params, pipe.params)
    assert server.cuts == 0 and 2**20 in server.starts


def test_a_wrong_checksum_is_refused_with_the_file_to_delete(server, exported):
    server.put("org/digits", exported)
    weights = bytearray(server.repositories["org/digits"]["model.safetensors"])
    weights[-1] ^= 1
    server.repositories["org/digits"]["model.safetensors"] = bytes(weights)
    with pytest.raises(UserError, match="damaged .its SHA-256 differs.*Delete") as error:
        Pipeline.from_pretrained("org/digits")
    blob = str(error.value).split(" is damaged")[0]
    os.unlink(blob)
    server.put("org/digits", exported)
    Pipeline.from_pretrained("org/digits")


def test_what_the_hub_refuses_ends_in_a_sentence(server, exported, monkeypatch):
    server.put("org/gated", exported)
    server.put("org/private", exported)
    server.gated.add("org/gated")
    server.private.add("org/private")
    server.repositories["org/other"] = {"config.json": b"{}", "model.safetensors": b""}
    server.repositories["org/empty"] = {"README.md": b""}
    for name, message in (
        (
            "org/gated",
            "org/gated is gated: accept its license on its page of the hub, and give a t",
        ),
        ("org/private", "The hub has no model org/private, or it is private. Check the name, or g"),
        (
            "org/nothing",
            "There is no folder org/nothing, so it must be a model .* no model org/not",
        ),
        ("org/other", "org/other is no model of nvg_jax: it has no config.json of ours"),
        ("org/empty", "org/empty is no model of nvg_jax"),
        ("org/a--b", "org/a--b is not a name of the hub: "),
    ):
        with pytest.raises(UserError, match=message):
            Pipeline.from_pretrained(name)
    with pytest.raises(UserError, match="org/gated has no revision 'v2'"):
        Pipeline.from_pretrained("org/gated", revision="v2")
    with pytest.raises(UserError, match="'v2' is for models of the hub, and emoji is not"):
        Pipeline.from_pretrained("emoji", revision="v2")
    monkeypatch.setenv("HF_TOKEN", "good")
    for name in ("org/gated", "hf://org/private"):
        Pipeline.from_pretrained(name, revision="main")


def test_without_a_network_the_sentence_says_so(server, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="There is no folder runs/digts, so .* cannot be reached"):
        Pipeline.from_pretrained("runs/digts")
    monkeypatch.setenv("NVG_HEARTBEAT", "/a/file")  # a launcher's: a restart may mend it
    with pytest.raises(ConnectionError, match="cannot be reached"):
        Pipeline.from_pretrained("hf://runs/digts")
    with pytest.raises(ConnectionError, match="There is no folder runs/digts, so .* be reached"):
        Pipeline.from_pretrained("runs/digts")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and this needs the hub; unset it"):
        hub.download_published("authors/model")


def test_an_upload_needs_a_whole_name(pipe, tmp_path):
    for upload in (
        lambda: pipe.push_to_hub("mine"),
        lambda: conversion.export_model(tmp_path, "hf://mine"),
    ):
        with pytest.raises(UserError, match="mine is not a model of the hub; expected hf://ORG/NA"):
            upload()


def test_an_upload_replaces_the_one_before_and_has_a_card(server, pipe, monkeypatch):
    config = {"data": {"name": "digits", "data_dir": "/disk/data", "credits": "Ann, CC-BY 4.0"}}
    pipe = Pipeline(pipe.metadata.replace(config=config, step=1500, fid=0.25), pipe.params)
    with pytest.raises(UserError, match="does not permit this for org/mine .403.. Give a token"):
        pipe.push_to_hub("org/mine")
    monkeypatch.setenv("HF_TOKEN", "good")
    with pytest.raises(UserError, match='refuses it: Invalid .* - "license" must be one of'):
        pipe.push_to_hub("org/mine", license="mine")
    server.repositories["org/mine"] = {"model-00001-of-00002.safetensors": b"old"}
    assert pipe.push_to_hub("org/mine", "float16", license="mit").startswith("http")
    files = server.repositories["org/mine"]
    assert files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert b"/disk/data" not in files["config.json"]
    card = files["README.md"].decode()
    for text in (
        "license: mit\n",
        '("org/mine")\n    pipe.sample(["0"]).images\n',
        "| images | 8 x 8 pixels |\n| classes | 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |",
        "| data | digits |\n| credits | Ann, CC-BY 4.0 |\n| training | 1500 steps |",
        "| FID | 0.25 (the best of its training) |",
        "| parameters | content ",
    ):
        assert text in card
    assert Pipeline.from_pretrained("org/mine").metadata.step == 1500


@pytest.mark.parametrize(
    "base, named",
    [
        ("fashion_mnist", "fashion_mnist"),
        ("hf://org/base", "hf://org/base"),
        ("models/d16", "THE MODEL THAT THEY WERE TRAINED ON"),
        ("/disk/d16", "THE MODEL THAT THEY WERE TRAINED ON"),
    ],
)
def test_adapters_are_uploaded_and_opened(server, pipe, monkeypatch, base, named):
    monkeypatch.setenv("HF_TOKEN", "good")
    params = {"content": jax.device_get(pipe.params["content"])}
    shapes = jax.eval_shape(lambda key: lora.init(params["content"], 2, key), jax.random.key(0))
    metadata = pipe.metadata.replace(
        config={"init_from": base, "lora": {"rank": 2}},
        base={"content": fingerprint(params["content"])},
        base_workdir="/disk/model",
    )
    adapters = Adapters(metadata, {"content": random_like(shapes, 0.1)})
    adapters.push_to_hub("org/adapters")
    files = server.repositories["org/adapters"]
    assert b"/disk/model" not in files["config.json"]
    card = files["README.md"].decode()
    opened = f'("{named}")\n    pipe = pipe.load_lora("org/adapters")\n    pipe.sample'
    assert opened in card and f"| adapters | of rank 2, for {named} |" in card
    tuned = pipe.load_lora("org/adapters", 0.5).params
    expected = lora.merge(params["content"], adapters.params["content"], 0.5)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tuned["content"]), expected)
    with pytest.raises(UserError, match="holds adapters. Open the model .* Pipeline.load_lora"):
        Pipeline.from_pretrained("org/adapters")


def test_a_folder_is_exported_to_the_hub(server, pipe, exported, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "good")
    conversion.export_model(exported, "hf://org/half", "float16", license="mit", private=True)
    assert "org/half" in server.private
    assert b"license: mit\n" in server.repositories["org/half"]["README.md"]
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float16), pipe.params)
    found = Pipeline.from_pretrained("org/half").params
    jax.tree.map(np.testing.assert_array_equal, found, rounded)


@pytest.mark.slow
def test_published_checkpoints_are_found_in_a_repository(server, tmp_path, caplog, monkeypatch):
    autoencoder = write_autoencoder(tmp_path / "ae.ckpt", SQUARE)
    server.repositories["authors/model"] = {"ae.ckpt": autoencoder.read_bytes(), "README.md": b""}
    monkeypatch.setenv("HF_TOKEN", "good")
    for flags, license in (([], "cc-by-nc-4.0"), (["--license=mit"], "mit")):
        with caplog.at_level("INFO", "nvg_jax"):
            command(monkeypatch, "--from_hub=authors/model", "--out=hf://org/mine", *flags)
        assert f"license: {license}\n" in server.repositories["org/mine"]["README.md"].decode()
    assert "license of authors/model: cc-by-nc-4.0" in caplog.text
    assert Pipeline.from_pretrained("org/mine").metadata.sources["autoencoder"]["file"] == "ae.ckpt"
    files = server.repositories["authors/model"]
    files |= {"d16.ckpt": b"16", "d20.ckpt": b"20"}
    with pytest.raises(UserError, match="Give --generator=FILE, one of: ae.ckpt, d16.ckpt, d20.c"):
        hub.download_published("authors/model")
    _, generator = hub.download_published("authors/model", generator="d20.ckpt")
    assert generator.read_bytes() == b"20"
    assert hub.download_published("authors/model", autoencoder="ae.ckpt")[1] is None
    del files["d16.ckpt"]
    _, generator = hub.download_published("authors/model", autoencoder="ae.ckpt")
    assert generator.read_bytes() == b"20"
    files["d16.ckpt"] = b"16"
    server.gated.add("authors/model")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="authors/model is gated"):
        hub.download_published("authors/model", generator="d16.ckpt")
