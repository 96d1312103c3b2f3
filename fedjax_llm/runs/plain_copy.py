"""A copy in clear of an encrypted run that has ended, for programs that know nothing of its encryption."""

import shutil
from pathlib import Path

from fedjax_llm.errors import UserError
from fedjax_llm.runs import directory, encryption, metrics

_LEFT_OUT = ("checkpoints", "tensorboard", encryption.IDENTITY)
_UNFINISHED = (".tmp", ".partial")


def plain_copy(run: Path, out: Path) -> Path:
    """Decrypts a finished run's files into another folder, which only its owner may enter.

    The copy's ``config.json`` says that it is not encrypted. Checkpoints are left out: they are for going on.

    Args:
      run: the folder of an encrypted run.
      out: absent, or an empty folder, and not in the run's.

    Returns:
      The copy's folder, absolute.

    Raises:
      UserError: the run is not encrypted or has not ended, its key is missing or another, a file was changed (nothing
        is left of the copy then), or the copy cannot be written.
    """
    run, out = run.absolute(), out.absolute()
    vault = encryption.vault_of(run)
    if vault is None or vault.folder != run:
        raise UserError(f"{run} is not the folder of an encrypted run; its files are in clear, if it has any")
    if not (run / "summary.json").exists():
        raise UserError(f"the run in {run} has not ended; let it end, or go on with --resume")
    if out.resolve().is_relative_to(run.resolve()):
        raise UserError(f"{out} is in the folder of the encrypted run; choose another, outside of it")
    try:
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        out.chmod(0o700)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}; choose another") from error
    if any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder")
    try:
        for path in _files(run):
            target = out / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            directory.write_bytes(target, _content(path))
        config = directory.read_json(run / directory.CONFIG)
        config["output"]["encryption"] = None
        directory.write_json(out / directory.CONFIG, config)  # last: until then it is no run
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out


def _files(run: Path) -> list[Path]:
    """What is copied, but for ``config.json``."""
    files = []
    for path in sorted(run.rglob("*")):
        first = path.relative_to(run).parts[0]
        kept = first not in (*_LEFT_OUT, directory.CONFIG) and not first.startswith(".")
        if kept and path.is_file() and path.suffix not in _UNFINISHED:
            files.append(path)
    return files


def _content(path: Path) -> bytes:
    """A file in clear."""
    return (
        metrics.plain_text(path).encode("utf-8")
        if path.suffix == ".jsonl" and path.name not in encryption.CLEAR
        else encryption.read(path)
    )
