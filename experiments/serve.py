"""A page on this computer that asks the models of a run and shows its report.

    python -m experiments.serve runs/quickstart-federated
    python -m experiments.serve runs/quickstart-federated --port=9000

Only browsers of this computer reach it, unless told otherwise (docs/serve.md).
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from experiments.command_line import told
from fedjax_llm.errors import UserError, tell
from fedjax_llm.experiment.compilation import use_compilation_cache
from fedjax_llm.experiment.tuned import open_run
from fedjax_llm.runs import keys


def serve(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    port: int = 8080,
    host: str = "127.0.0.1",
    open_to_network: bool = False,
    names: tuple[str, ...] = (),
    max_prompt_tokens: int = 512,
    max_new_tokens: int = 256,
    waiting: int = 3,
    key_file: Path | None = None,
) -> None:
    """Opens the page of a run; Ctrl-C ends it.

    Args:
      run: the folder of a run with an adapter.
      port: of the page; 0 takes a free one.
      host: the address to listen on.
      open_to_network: needed for a host that other computers can reach. There is no password: whoever reaches the page
        can ask the models and read what the run's report says.
      names: by which browsers call this computer, beside the host; others are refused.
      max_prompt_tokens: of a question with all that the model is told around it.
      max_new_tokens: of an answer.
      waiting: how many questions may wait while one is answered.
      key_file: of an encrypted run, if the key is not where the run says.
    """
    try:
        from fedjax_llm.serving import listening
    except ModuleNotFoundError as missing:
        if missing.name not in ("anyio", "starlette", "uvicorn"):
            raise
        raise UserError(f"the page needs {missing.name}: pip install 'fedjax_llm[serve]'") from None
    from fedjax_llm.serving.app import create
    from fedjax_llm.serving.pages import run_page
    from fedjax_llm.serving.voices import Limits, Voices

    known = listening.names_of(host, names, open_to_network)
    limits = Limits(max_prompt_tokens, max_new_tokens)
    use_compilation_cache()
    with listening.bound(host, port) as socket:
        url = listening.url_of(host, socket)
        print(f"The page will be at {url}. Loading the model ...", file=sys.stderr, flush=True)
        with keys.using(key_file):
            tuned = open_run(run)
            voices = Voices(tuned.base, tuned.scaled, tuned.system, limits)
            page = run_page(run, voices)
        print("Compiling ...", file=sys.stderr, flush=True)
        voices.warm_up()
        if open_to_network:
            print(listening.WARNING, file=sys.stderr)
        socket.listen()  # whoever comes from now on waits for the server's first look
        print(f"Ready: {url}   (Ctrl-C ends it)", file=sys.stderr, flush=True)
        listening.listen(create(page, voices, names=known, waiting=waiting), socket)
    print("Ended.", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        tyro.cli(serve, args=arguments, prog="python -m experiments.serve", description=told(__doc__))
    except UserError as error:
        return tell(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
