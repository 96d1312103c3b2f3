"""Flower's ServerApp of a job: the run that its settings name, over Flower's nodes."""

import json
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedjax_llm.deployment.desk import Rules
from fedjax_llm.deployment.flower import FlowerSites
from fedjax_llm.deployment.job import load_job
from fedjax_llm.deployment.serve import serve
from fedjax_llm.errors import UserError

app = ServerApp()
_GRACE = 5.0  # seconds in which Flower may end the process itself


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the job; how it ended is in the file that the settings name.

    Args:
      grid: Flower's way to the sites.
      context: its run configuration names a JSON file with ``job``, ``out``, ``resume``, ``nodes`` (numbers by site),
        ``rules``, ``resend``, ``log``, ``outcome``, and ``directory`` where aggregation is secure.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    settings = json.loads(Path(str(context.run_config["settings"])).read_text("utf-8"))
    outcome: dict[str, Any] = {"status": 1, "message": "the run ended before it was done"}
    with open(settings["log"], "a", encoding="utf-8", buffering=1) as file:
        try:
            _serve(grid, settings, Console(file=file, width=140))
            outcome = {"status": 0, "message": ""}
        except UserError as error:
            outcome = {"status": 2, "message": str(error)}
        except Exception as error:
            traceback.print_exc(file=file)
            outcome = {"status": 1, "message": f"{type(error).__name__}: {error}"}
        finally:
            temporary = Path(settings["outcome"] + ".new")
            temporary.write_text(json.dumps(outcome), "utf-8")
            temporary.replace(settings["outcome"])


def _end_with(parent: int) -> None:
    """Ends the process when Flower's SuperExec is gone: a request that waits for the SuperLink hears no signal."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(_GRACE)
    os._exit(1)


def _serve(grid: Any, settings: dict[str, Any], console: Console) -> None:
    """The run."""
    directory = settings.get("directory")
    signing = None
    if directory is not None:
        keys = json.loads(Path(directory).read_text("utf-8"))
        signing = {name: bytes.fromhex(key) for name, key in keys.items()}
    serve(
        load_job(settings["job"]),
        Path(settings["out"]),
        FlowerSites(grid, {name: int(node) for name, node in settings["nodes"].items()}, settings.get("resend", 300.0)),
        Rules(**settings.get("rules", {})),
        resume=bool(settings["resume"]),
        console=console,
        signing=signing,
    )
