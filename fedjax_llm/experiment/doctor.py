"""Whether this computer can run experiments, and what to do where it cannot."""

import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.table import Table
from rich.text import Text

from fedjax_llm import assets
from fedjax_llm.assets import WheelAsset
from fedjax_llm.runs.environment import usable_cores
from fedjax_llm.runs.progress import byte_size

NAME = "fedjax_llm"
_LEAST_MEMORY, _LEAST_DISK, _SOME_DISK = 3e9, 1e9, 5e9  # bytes; a run of the default model holds 1.6 GB
_SECONDS = 3.0  # that an answer of the network may take
_CLOCK = 300.0  # seconds that a clock may be wrong before certificates and tokens fail
_ACCELERATORS = {"/dev/nvidia0": ("cuda", "NVIDIA GPU"), "/dev/kfd": ("rocm", "AMD GPU"), "/dev/accel0": ("tpu", "TPU")}


class Finding(NamedTuple):
    """What one check found.

    Attributes:
      what: was looked at.
      found: there.
      advice: what to do; empty where all is well.
      must: whether experiments cannot run, or come out wrong, until that is done.
    """

    what: str
    found: str
    advice: str = ""
    must: bool = False


class Answer(NamedTuple):
    """What came back from the network: the server's time, or why nothing came."""

    time: datetime | None
    error: str = ""


def examine(folder: Path, *, offline: bool = False) -> list[Finding]:
    """All checks, in the order in which to read them.

    Args:
      folder: where runs are to be written.
      offline: leave the network alone.
    """
    requirements = [Requirement(line) for line in importlib.metadata.requires(NAME) or ()]
    cache = assets.cache_dir()
    answer = None if offline else ask_hub()
    return [
        python(importlib.metadata.metadata(NAME)["Requires-Python"], sys.version.split()[0]),
        packages(requirements, installed),
        pins(Path(__file__).parents[2] / "constraints.txt", installed),
        devices(present_accelerators(), installed),
        cores(usable_cores()),
        memory(available_memory()),
        *(disk(what, place) for what, place in (("disk, runs", folder), ("disk, cache", cache))),
        *(writable(what, place) for what, place in (("write access, runs", folder), ("write access, cache", cache))),
        compiled(cache / "compiled"),
        *(downloaded(asset, cache) for asset in (assets.SMOLLM2, assets.HPO)),
        hub(answer),
        clock(datetime.now(UTC), answer, Path(__file__).stat().st_mtime),
        extras(requirements, installed),
    ]


def python(wanted: str | None, version: str) -> Finding:
    """The interpreter against what the package asks for."""
    if wanted and version not in SpecifierSet(wanted, prereleases=True):
        return Finding("Python", version, f"install Python {wanted} and make a new environment with it", must=True)
    return Finding("Python", f"{version}, {sys.executable}")


def installed(name: str) -> str | None:
    """The version of a distribution, or ``None``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(requirements: Iterable[Requirement], version: Callable[[str], str | None]) -> Finding:
    """What the package cannot do without, against its lower bounds.

    Args:
      requirements: of the package, those of extras among them.
      version: of a distribution, ``None`` where it is not installed.
    """
    needed = [one for one in requirements if not _extra(one) and (one.marker is None or one.marker.evaluate())]
    wrong = [one for one in needed if not _fits(one, version)]
    if wrong:
        found = ", ".join(f"{one.name} {version(one.name) or 'missing'}" for one in wrong)
        wanted = " ".join(f"'{one.name}{one.specifier}'" for one in wrong)
        return Finding("packages", found, f"pip install {wanted}", must=True)
    jax, jaxlib = version("jax"), version("jaxlib")
    if jax != jaxlib:
        return Finding("packages", f"jax {jax}, jaxlib {jaxlib}", f"pip install jax=={jax} jaxlib=={jax}", must=True)
    return Finding("packages", f"all {len(needed)}; jax {jax}, flax {version('flax')}, numpy {version('numpy')}")


def pins(constraints: Path, version: Callable[[str], str | None]) -> Finding:
    """What is installed against the versions that are known to work, where there is a checkout that names them."""
    if not constraints.is_file():
        return Finding("known-good versions", "constraints.txt is in the checkout only")
    lines = [line for line in constraints.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    pinned = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate()]
    others = [f"{one.name} {version(one.name)}" for one in pinned if version(one.name) and not _fits(one, version)]
    if others:
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        advice = "if something fails: pip install -c constraints.txt -e ."
        return Finding("known-good versions", f"others of {shown}", advice)
    return Finding("known-good versions", "all as in constraints.txt")


def devices(present: Sequence[tuple[str, str]], version: Callable[[str], str | None]) -> Finding:
    """What jax computes on, and whether it overlooks an accelerator.

    Args:
      present: backend and name of accelerators that the operating system shows.
      version: as for :func:`packages`.
    """
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        return Finding(
            "devices", first, "see docs.jax.dev for the installation; JAX_PLATFORMS=cpu goes without", must=True
        )
    kinds = {f"{one.platform}: {one.device_kind}" for one in found}
    told = f"{len(found)} x {', '.join(sorted(kinds))}"
    if found[0].platform != "cpu" or not present:
        return Finding("devices", told)
    backend, name = present[0]
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return Finding("devices", f"{told}; an {name} is there", f"JAX_PLATFORMS={chosen} hides it: unset it")
    plugins = {"cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin"), "rocm": ("jax-rocm7-plugin",), "tpu": ("libtpu",)}
    if any(version(plugin) for plugin in plugins[backend]):
        advice = "jax has its plugin but cannot use it: compare driver and plugin (nvidia-smi; docs.jax.dev)"
    else:
        extra = {"cuda": "cuda13", "rocm": "rocm7-local", "tpu": "tpu"}[backend]
        advice = f"its jax plugin is missing: pip install 'jax[{extra}]'"
    return Finding("devices", f"{told}; an {name} is there", advice, must=True)


def present_accelerators() -> list[tuple[str, str]]:
    """Backend and name of the accelerators that the operating system shows."""
    return [told for place, told in _ACCELERATORS.items() if Path(place).exists()]


def cores(count: int) -> Finding:
    """How many cores this process may use."""
    return Finding("cores", str(count))


def available_memory() -> int | None:
    """Bytes that can be had without swapping, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def memory(available: int | None) -> Finding:
    """Whether the default model fits."""
    if available is None:
        return Finding("memory", "not told by this system")
    advice = "" if available >= _LEAST_MEMORY else "close other programs: a run of the default model holds 1.6 GB"
    return Finding("memory", f"{byte_size(available)} available", advice)


def disk(what: str, folder: Path) -> Finding:
    """Room for checkpoints or downloads."""
    free = shutil.disk_usage(_existing(folder)).free
    found = f"{byte_size(free)} free in {folder}"
    if free < _SOME_DISK:
        return Finding(what, found, "free some, or choose another folder", must=free < _LEAST_DISK)
    return Finding(what, found)


def writable(what: str, folder: Path) -> Finding:
    """Whether files can be made in a folder, or the folder itself."""
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding(what, str(folder))
    except OSError as error:
        way = "set FEDJAX_LLM_CACHE to" if "cache" in what else "choose with --out"
        return Finding(what, f"{place}: {error.strerror}", f"{way} a folder that you may write", must=True)


def compiled(folder: Path) -> Finding:
    """What compiled programs are kept, which save the first minute of every run."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    if not sizes:
        return Finding("compiled programs", f"none yet in {folder}")
    return Finding("compiled programs", f"{byte_size(sum(sizes))} in {folder}; it may be deleted at any time")


def downloaded(asset: WheelAsset, cache: Path) -> Finding:
    """Whether a pinned download is there and is what it should be; its content is hashed."""
    path = cache / "assets" / asset.requirement.replace("==", "-") / Path(asset.member).name
    what = f"download, {asset.requirement}"
    if not path.is_file():
        return Finding(what, "not there yet", "python -m experiments.fetch (a run does it by itself)")
    if assets.sha256_of(path) != asset.sha256:
        return Finding(what, f"{path} was changed", "python -m experiments.fetch --rehash", must=True)
    return Finding(what, f"{byte_size(path.stat().st_size)}, its hash is right")


def ask_hub() -> Answer:
    """Asks the hub for its time."""
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Answer(None, "HF_HUB_OFFLINE is set")
    try:
        answer = requests.head(constants.ENDPOINT, timeout=_SECONDS, allow_redirects=False)
    except requests.RequestException as error:
        return Answer(None, type(error).__name__)
    date = answer.headers.get("Date")
    return Answer(parsedate_to_datetime(date) if date else datetime.now(UTC))


def hub(answer: Answer | None) -> Finding:
    """Whether models and data sets can be loaded by their names at the hub."""
    if answer is None:
        return Finding("Hugging Face hub", "not asked")
    if answer.time is None:
        advice = "names at the hub cannot be loaded unless they are cached; built-in names, folders and files can"
        return Finding("Hugging Face hub", f"out of reach ({answer.error})", advice)
    return Finding("Hugging Face hub", "within reach")


def clock(now: datetime, answer: Answer | None, written: float) -> Finding:
    """Whether the time can be right: certificates, tokens and the dates of runs go by it.

    Args:
      now: by this computer.
      answer: the network's, or ``None``.
      written: when a file of this package was, in seconds since 1970; it cannot be later.
    """
    told, advice = now.isoformat(timespec="seconds"), "set the clock (timedatectl set-ntp true)"
    if answer is not None and answer.time is not None:
        off = abs((now - answer.time).total_seconds())
        if off > _CLOCK:
            return Finding("clock", f"{told}, {off:,.0f} seconds off", advice, must=True)
    if now.timestamp() < written - _CLOCK:
        return Finding("clock", f"{told}, earlier than this package was written", advice, must=True)
    return Finding("clock", f"{told}, {time.tzname[0]}")


def extras(requirements: Iterable[Requirement], version: Callable[[str], str | None]) -> Finding:
    """Which optional parts can be used."""
    by_extra: dict[str, list[Requirement]] = {}
    for one in requirements:
        if extra := _extra(one):
            by_extra.setdefault(extra, []).append(one)
    there = [name for name, needed in by_extra.items() if all(_fits(one, version) for one in needed)]
    absent = sorted(by_extra.keys() - set(there))
    return Finding("extras", f"there: {', '.join(sorted(there)) or 'none'}; not there: {', '.join(absent) or 'none'}")


def table(findings: Sequence[Finding]) -> Table:
    """The findings for a terminal; what must be fixed stands out."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for one in findings:
        mark, style = ("fix", "bold red") if one.must else ("hint", "yellow") if one.advice else ("ok", "green")
        told = Text(one.found)
        if one.advice:
            told.append(f"\n-> {one.advice}", style=style)
        shown.add_row(Text(mark, style=style), Text(one.what), told)
    return shown


def _fits(wanted: Requirement, version: Callable[[str], str | None]) -> bool:
    """Whether what is installed satisfies a requirement."""
    found = version(wanted.name)
    return found is not None and wanted.specifier.contains(found, prereleases=True)


def _extra(wanted: Requirement) -> str | None:
    """The extra that a requirement belongs to."""
    told = str(wanted.marker or "")
    return told.partition('extra == "')[2].partition('"')[0] or None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
