"""What a user may call a model, and a small stand-in for the hub on this machine."""

import http.server
import json
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedjax_llm.errors import UserError
from fedjax_llm.models import sources
from fedjax_llm.models.sources import open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VALUE = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"a": VALUE}, folder / "model.safetensors")
    return folder


@dataclass
class Hub:
    """Serves the files of one folder as the repository ``org/name``; ``error`` is the hub's name of a refusal."""

    folder: Path
    status: int = 200
    error: str = ""
    asked: list[str] = field(default_factory=list)


def point_hub_at(address: str, tmp_path: Path, monkeypatch):
    """What HF_ENDPOINT and HF_HOME do, which the library reads once, when it is imported."""
    import huggingface_hub.constants as constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    state = Hub(model)

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body: bytes, **headers: str):
            self.send_response(state.status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            state.asked.append(self.path)
            if state.error or state.status != 200:
                return self.answer(b"{}", X_Error_Code=state.error, X_Error_Message=state.error)
            paths = [path for path in state.folder.rglob("*") if path.is_file()]
            names = {path.relative_to(state.folder).as_posix(): path.stat().st_size for path in paths}
            if "/tree/" in self.path:
                tree = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in names.items()]
                return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            if self.path.startswith("/api/"):
                about = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                return self.answer(json.dumps(about).encode(), Content_Type="application/json")
            body = (state.folder / self.path.split(f"{COMMIT}/")[1]).read_bytes()
            return self.answer(body, ETag=f'"{hash(body):x}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
    point_hub_at(f"http://127.0.0.1:{listener.server_port}", tmp_path, monkeypatch)
    yield state
    listener.shutdown()
    listener.server_close()


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    point_hub_at("http://127.0.0.1:9", tmp_path, monkeypatch)


def test_folder(model):
    checkpoint = open_checkpoint(str(model))
    np.testing.assert_array_equal(checkpoint.tensors["a"], VALUE)
    assert checkpoint.source == str(model)


def test_folder_in_the_home_directory(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    np.testing.assert_array_equal(open_checkpoint("~/model").tensors["a"], VALUE)


def test_a_folder_goes_before_a_hub_id(model, monkeypatch, no_network):
    monkeypatch.chdir(model.parent.parent)
    np.testing.assert_array_equal(open_checkpoint(f"{model.parent.name}/model").tensors["a"], VALUE)


def test_gguf_file(tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"small\.gguf is damaged or no GGUF file"):
        open_checkpoint(str(tmp_path / "small.gguf"))
    with pytest.raises(UserError, match=r"There is no file .*smal\.gguf; did you mean 'small\.gguf'"):
        open_checkpoint(str(tmp_path / "smal.gguf"))
    with pytest.raises(UserError, match=r"There is no file models/small\.gguf"):
        open_checkpoint("models/small.gguf")


@pytest.mark.parametrize("name", ["smollm2-135m-instrct", "nothing", "./nothing/here", "a/b/c"])
def test_unknown_names(name):
    with pytest.raises(UserError, match=r"'smollm2-135m-instruct'|known: smollm2-135m-instruct"):
        open_checkpoint(name)


def test_hub(hub, model):
    (model / "pytorch_model.bin").write_bytes(b"not wanted")
    (model / "original").mkdir()
    (model / "original" / "consolidated.safetensors").write_bytes(b"not wanted")
    checkpoint = open_checkpoint("org/name")
    np.testing.assert_array_equal(checkpoint.tensors["a"], VALUE)
    assert checkpoint.source == f"org/name@{COMMIT}"
    assert not any("not wanted" in path or ".bin" in path or "original" in path for path in hub.asked)
    assert open_checkpoint("org/name@v1").fingerprint == checkpoint.fingerprint
    assert any(path.startswith("/api/models/org/name/revision/v1") for path in hub.asked)


def test_a_cached_hub_model_needs_no_hub(hub, tmp_path, monkeypatch):
    first = open_checkpoint("org/name")
    hub.status = 503
    assert open_checkpoint("org/name").fingerprint == first.fingerprint
    point_hub_at("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert open_checkpoint("org/name").fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (404, "RepoNotFound", r"no model 'org/name', or it is private.*HF_TOKEN.*no file or folder 'org/name'"),
        (403, "GatedRepo", r"org/name@v1 is gated.*HF_TOKEN"),
        (404, "RevisionNotFound", r"'org/name' has no revision 'v1'"),
        (403, "", r"Cannot download org/name@v1 from the hub"),
    ],
)
def test_the_hub_refuses(hub, status, error, message):
    hub.status, hub.error = status, error
    with pytest.raises(UserError, match=message):
        open_checkpoint("org/name@v1")


def test_a_hub_model_without_safetensors(hub, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors files"):
        open_checkpoint("org/name")


def test_the_hub_is_out_of_reach(no_network):
    with pytest.raises(UserError, match=r"(?s)Cannot download org/name.*give its folder.*smollm2-135m-instruct"):
        open_checkpoint("org/name")


def test_import_is_light():
    code = "import sys, fedjax_llm.models.sources; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    slow = {
        "torch",
        "transformers",
        "huggingface_hub",
        "jax",
        "gguf",
        "tokenizers",
        "safetensors",
        "requests",
        "jinja2",
    }
    assert not slow & set(loaded)


@pytest.mark.model
def test_built_in_model():
    checkpoint = open_checkpoint("smollm2-135m-instruct")
    assert checkpoint.source == "smollm2-135m-instruct"
    assert checkpoint.fingerprint == sources.BUILT_IN["smollm2-135m-instruct"].sha256
    assert checkpoint.tensors.shape("model.embed_tokens.weight") == (49152, 576)
    assert checkpoint.tokenizer is not None
