"""The JSON files that stand beside weights."""

import json
from pathlib import Path
from typing import Any

from fedjax_llm.errors import UserError


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      UserError: the file is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, and holds a {type(content).__name__}.")
    return content
