"""What the mains share: the help's text, and the completion of their options in a shell."""

import contextlib
import inspect
import io
import re
import runpy
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent


def told(doc: str | None) -> str:
    """A main's docstring as the description in its help: what it does, and examples.

    Args:
      doc: of the module.
    """
    return re.sub(r"\n{2,}(?=    )", "\n", inspect.cleandoc(doc or "")).replace("``", "")


def commands() -> list[str]:
    """The names of all commands, as in ``python -m experiments.NAME``."""
    return sorted(path.stem for path in HERE.glob("*.py") if "\nif __name__ ==" in path.read_text("utf-8"))


def options(name: str) -> list[str]:
    """All options of a command, as its help names them.

    Args:
      name: of the command.
    """
    before, out = sys.argv, io.StringIO()
    sys.argv = [name, "--help"]
    try:
        quiet = contextlib.redirect_stderr(io.StringIO())  # of a command whose extra is not installed
        with contextlib.redirect_stdout(out), quiet, contextlib.suppress(SystemExit), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of modules that are imported already
            runpy.run_module(f"experiments.{name}", run_name="__main__")
    finally:
        sys.argv = before
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", _boxes(out.getvalue()))))


def completion(known: Mapping[str, Sequence[str]], shell: str) -> str:
    """A script that makes a shell complete commands and options.

    Args:
      known: options by command.
      shell: ``bash``, or ``zsh``, which reads the same after a line of its own.
    """
    cases = "\n".join(
        f'    experiments.{name}) COMPREPLY=($(compgen -W "{" ".join(found)}" -- "$word")) ;;'
        for name, found in known.items()
    )
    names = " ".join(f"experiments.{name}" for name in known)
    return f"""{"autoload -U +X bashcompinit && bashcompinit" if shell == "zsh" else "# bash"}
_fedjax_llm() {{
  local word=${{COMP_WORDS[COMP_CWORD]}}
  COMPREPLY=()
  [[ ${{COMP_WORDS[1]}} == -m ]] || return 0
  if (( COMP_CWORD == 2 )); then
    COMPREPLY=($(compgen -W "{names}" -- "$word"))
    return 0
  fi
  [[ $word == -* ]] || return 0
  case ${{COMP_WORDS[2]}} in
{cases}
  esac
}}
complete -o default -F _fedjax_llm python python3"""


def _boxes(text: str) -> str:
    """The part of a help that lists options: examples above it may name those of other commands."""
    found = re.search(r"^(?:╭|\+-| (?:positional arguments|options) +$)", text, re.MULTILINE)  # as the output can draw
    return text[found.start() :] if found else text
