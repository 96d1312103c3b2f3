"""From what a user calls a model to a checkpoint: a built-in name, a GGUF file, a folder, a Hugging Face hub id."""

import re
from pathlib import Path

from fedjax_llm import assets
from fedjax_llm.errors import UserError, nearest
from fedjax_llm.models import gguf_format, safetensors_format
from fedjax_llm.models.checkpoint import Checkpoint

#: Names that work everywhere a package index is reachable.
BUILT_IN = {"smollm2-135m-instruct": assets.SMOLLM2}

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]


def open_checkpoint(name: str) -> Checkpoint:
    """Opens a model; downloads it on first use.

    Args:
      name: one of :data:`BUILT_IN`; a path to a ``.gguf`` file; a folder with ``config.json`` and safetensors; else a
        Hugging Face hub id, ``org/name`` or ``org/name@revision``.

    Raises:
      UserError: nothing of that name, no way to download it, or a file that is not served.
    """
    if name in BUILT_IN:
        asset = BUILT_IN[name]
        return gguf_format.read_gguf(assets.fetch(asset), source=name, fingerprint=asset.sha256)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(
                f"There is no file {path}{nearest(path.name, [p.name for p in path.parent.glob('*.gguf')])}"
            )
        return gguf_format.read_gguf(path)
    if path.is_dir():
        return safetensors_format.read_folder(path)
    if match := _HUB_ID.fullmatch(name):
        return _from_hub(match["repo"], match["revision"])
    raise UserError(
        f"There is no model {name!r}: it is no built-in name{nearest(name, BUILT_IN)}\n"
        "A model can also be the path of a .gguf file or of a folder, or a hub id such as org/name."
    )


def _from_hub(repo: str, revision: str | None) -> Checkpoint:
    """Downloads the weights, config and tokenizer of a hub repository; uses the hub's own cache when offline."""
    import huggingface_hub
    from huggingface_hub import errors

    what = f"{repo}@{revision}" if revision else repo
    absent = f"There is also no file or folder {repo!r} here."
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=_HUB_PATTERNS, ignore_patterns=["*/*", "consolidated*"]
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"The model {what} is gated: accept its terms on its page on the hub, then set HF_TOKEN to your token "
            "(or run `hf auth login`)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"The hub has no model {repo!r}, or it is private: check the name; for a private one set HF_TOKEN. {absent}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"The model {repo!r} has no revision {revision!r} on the hub.") from error
    except Exception as error:  # no network, offline mode, a full disk: some of the HTTP library's own kinds
        raise UserError(
            f"Cannot download {what} from the hub ({_first_line(error)}), and it is not in the hub's cache. {absent}\n"
            "Without the hub: download the repository elsewhere and give its folder, set HF_HOME to a cache that holds "
            f"it, or take a built-in model: {', '.join(BUILT_IN)}."
        ) from error
    return safetensors_format.read_folder(Path(folder), source=f"{repo}@{Path(folder).name}")


def _first_line(error: Exception) -> str:
    """The kind of an error and the start of its message, which may be long."""
    first = (str(error).splitlines() or [""])[0].removeprefix("Got: ")
    return f"{type(error).__name__}: {first[:200]}"
