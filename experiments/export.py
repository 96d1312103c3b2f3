"""Writes the tuned model of a run for other programs.

    python -m experiments.export runs/mine merged/                   # a folder that transformers and vLLM load
    python -m experiments.export runs/mine mine.gguf --format=gguf   # one file for llama.cpp, Ollama, LM Studio
    python -m experiments.export runs/mine adapter/ --format=peft    # the adapter alone, in clear

What is written is in clear, whatever the run: of an encrypted run the key is needed, and what is exported is no longer
protected by it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from experiments.command_line import told
from fedjax_llm.errors import UserError, tell
from fedjax_llm.experiment.export import Format, export, has_codes
from fedjax_llm.experiment.tuned import open_run
from fedjax_llm.models.gguf_writer import GgufType
from fedjax_llm.runs import encryption, keys
from fedjax_llm.runs.progress import RunProgress, byte_size


@dataclass(frozen=True)
class Command:
    """Writes the tuned model of a run for other programs.

    Attributes:
      run: the folder of a run.
      out: where to: a folder, or a .gguf file.
      format: merged into the base as a folder of safetensors, or as one GGUF file; or the adapter alone.
      gguf_type: of the matrices of a GGUF file.
      base: export the base model alone, without the adapter.
      key_file: of an encrypted run, if the key is not where the run says.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    format: Format = "merged"
    gguf_type: GgufType = "f16"
    base: bool = False
    key_file: Path | None = None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    console = Console()
    try:
        command = tyro.cli(Command, args=arguments, prog="python -m experiments.export", description=told(__doc__))
        with keys.using(command.key_file), RunProgress(1, console) as progress:
            with progress.phase("Loading the model"):
                tuned = open_run(command.run, command.base)
            with progress.phase(f"Writing {command.out}"):
                written = export(tuned, command.out, command.format, command.gguf_type)
            sealed = encryption.vault_of(command.run) is not None
        files = [written] if written.is_file() else [path for path in written.iterdir() if path.is_file()]
        console.print(f"{written}: {byte_size(sum(path.stat().st_size for path in files))}", soft_wrap=True)
        if command.format != "peft" and has_codes(tuned):
            console.print("The base is quantised; it was dequantised before the merge.", soft_wrap=True)
        if sealed:
            console.print("The run is encrypted; what was exported is in clear: keep it as safe.", soft_wrap=True)
        return 0
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        console.print("Stopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
