"""Completes commands and their options in a shell: prints what bash or zsh is to read.

    source <(python -m experiments.completion bash)
    python -m experiments.completion zsh > ~/.fedjax_llm.zsh      (and in ~/.zshrc: source ~/.fedjax_llm.zsh)

Then python -m experiments.<Tab> shows the commands, and python -m experiments.run --lora.<Tab> the options.
"""

import sys
from typing import Annotated, Literal

import tyro

from experiments import command_line


def show(shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]) -> None:
    """Prints the completion of all commands.

    Args:
      shell: that is to read it.
    """
    print(command_line.completion({name: command_line.options(name) for name in command_line.commands()}, shell))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    description = command_line.told(__doc__)
    tyro.cli(show, args=arguments, prog="python -m experiments.completion", description=description)
    return 0


if __name__ == "__main__":
    sys.exit(main())
