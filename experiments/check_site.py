"""Looks at a site of a deployment before it takes part.

    python -m experiments.check_site --site=site.py

Reads the site's settings and its text, and says how much there is (no text is shown), what is left of its privacy
budget, the hashes of job and model, until when certificates are valid, and whether the server answers. Nothing is
trained, charged or sent. The exit status is 1 if the site cannot take part like this.
"""

import sys
from pathlib import Path

import tyro
from rich.console import Console

from experiments.command_line import told
from fedjax_llm.errors import UserError, tell


def look(site: Path, patience: float = 10.0) -> bool:
    """Looks at everything that a site needs, and prints it with what to do. Whether the site can take part.

    Args:
      site: the site's settings, a Python file with ``get_site() -> Site``.
      patience: seconds that the server has to answer.
    """
    from fedjax_llm.deployment.check import check_site, render
    from fedjax_llm.deployment.site import read_site

    console = Console()
    settings = read_site(site)
    with console.status(f"Looking at site {settings.name!r}"):
        findings = list(check_site(settings, patience=patience))
    render(console, findings)
    wrong = sum(found.state == "wrong" for found in findings)
    console.print(f"{wrong} of {len(findings)} to be put right." if wrong else "The site can take part.")
    return wrong == 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        return (
            0
            if tyro.cli(look, args=arguments, prog="python -m experiments.check_site", description=told(__doc__))
            else 1
        )
    except UserError as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
