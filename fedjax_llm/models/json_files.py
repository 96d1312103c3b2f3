"""The JSON files that stand beside weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedjax_llm.errors import UserError


def read_object(path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> dict[str, Any]:
    """A JSON object from a file, whose content ``read`` gives.

    Raises:
      UserError: the file is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(read(path).decode("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, and holds a {type(content).__name__}.")
    return content
