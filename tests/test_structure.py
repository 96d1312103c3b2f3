"""The layout that docs/design.md promises, read from the source: what imports what, and how large things are.

Each rule is a function from a checkout to complaints. It is run on this checkout, and on a small one that breaks it.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST_FILE, LARGEST_FUNCTION = 400, 60  # lines
FOLDERS = ("fedjax_llm", "experiments", "configs", "benchmarks")


def rooms(root: Path) -> list[str]:
    """The rooms of fedjax_llm in the order of docs/design.md section 2: each may import those before it."""
    section = (root / "docs/design.md").read_text("utf-8").partition("## 2. Rooms")[2]
    block = re.search(r"^    fedjax_llm/\n((?:      .*\n)+)", section, re.MULTILINE)
    assert block, "docs/design.md section 2 no longer holds the list of rooms below 'fedjax_llm/'"
    return re.findall(r"^ {6}(\w+)(?:/|\.py) ", block[1], re.MULTILINE)


def sources(root: Path, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    """Path relative to the checkout, and syntax tree, of every Python file below the folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text("utf-8"), str(path))


def imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a file imports, within functions and TYPE_CHECKING too."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def room_of(dotted: str) -> str:
    """``fedjax_llm.models.llama`` -> ``models``; the package itself is the empty room."""
    return [*dotted.split("."), ""][1]


def upward_imports(root: Path) -> Iterator[str]:
    """Imports from a room that stands further down the list."""
    order = rooms(root)
    for path, tree in sources(root, "fedjax_llm"):
        here = room_of(path.removesuffix(".py").replace("/", "."))
        for line, name in imports(path, tree):
            there = room_of(name)
            known = name.startswith("fedjax_llm.") and there in order and here in order
            if known and order.index(there) > order.index(here):
                yield f"{path}:{line}: {here} imports {name}, but {there} stands below {here} in docs/design.md"


def unlisted_rooms(root: Path) -> Iterator[str]:
    """Files and folders of the package that docs/design.md does not name."""
    present = {room_of(path.removesuffix(".py").replace("/", ".")) for path, _ in sources(root, "fedjax_llm")}
    for name in sorted(present - set(rooms(root)) - {"__init__"}):
        yield f"fedjax_llm/{name}: give it a place in the list of rooms in docs/design.md section 2"


def foreign_imports(root: Path) -> Iterator[str]:
    """Flax outside models/, torch and its kin anywhere, and mains or configs imported by the package."""
    for path, tree in sources(root, "fedjax_llm", "experiments", "configs"):
        for line, name in imports(path, tree):
            top = name.split(".")[0]
            if top == "flax" and not path.startswith("fedjax_llm/models/"):
                yield f"{path}:{line}: imports {name}, but only fedjax_llm/models/ knows Flax"
            if top in {"torch", "peft"}:
                yield f"{path}:{line}: imports {name}; torch and peft are for tests/ and benchmarks/"
            if top in {"experiments", "configs", "tests"} and not path.startswith(("experiments/", "configs/")):
                yield f"{path}:{line}: imports {name}, but nothing in fedjax_llm imports mains, configs or tests"


def undocumented(root: Path) -> Iterator[str]:
    """Modules, and public classes, functions and methods at their top levels, without a docstring."""
    for path, tree in sources(root, "fedjax_llm", "experiments", "benchmarks"):
        if tree.body and not ast.get_docstring(tree):
            yield f"{path}:1: the module has no docstring"
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        for body in (tree.body, *(node.body for node in classes)):
            for node in body:
                named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                if named and not node.name.startswith("_") and not ast.get_docstring(node):
                    yield f"{path}:{node.lineno}: {node.name} has no docstring"


def oversized(root: Path) -> Iterator[str]:
    """Files and functions that are too long to be read in one go."""
    for path, tree in sources(root, *FOLDERS, "tests"):
        length = len((root / path).read_text("utf-8").splitlines())
        if length > LARGEST_FILE:
            yield f"{path}: {length} lines, at most {LARGEST_FILE}; is it one thing?"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > LARGEST_FUNCTION:
                    yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {LARGEST_FUNCTION}"


def drawers(root: Path) -> Iterator[str]:
    """Files named for nothing in particular."""
    for path, _ in sources(root, *FOLDERS, "tests"):
        if Path(path).stem in {"utils", "util", "helpers", "misc", "common"}:
            yield f"{path}: name it for what it holds"


RULES = (upward_imports, unlisted_rooms, foreign_imports, undocumented, oversized, drawers)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_checkout_keeps_the_rule(rule: Callable[[Path], Iterator[str]]):
    complaints = list(rule(ROOT))
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_rooms_are_read_in_order():
    order = rooms(ROOT)
    assert order[0] == "errors"
    assert order[-2:] == ["deployment", "serving"]
    assert order.index("models") < order.index("training") < order.index("federation") < order.index("runs")


BREACHES = {
    "import fedjax_llm.runs": (upward_imports, "models imports fedjax_llm.runs"),
    "from fedjax_llm import runs": (upward_imports, "models imports fedjax_llm.runs"),
    "from ..runs.report import page": (upward_imports, "models imports fedjax_llm.runs.report.page"),
    "def f():\n    from fedjax_llm.runs import report": (upward_imports, "a.py:2: models imports"),
    "import torch.nn": (foreign_imports, "imports torch.nn"),
    "from experiments import run": (foreign_imports, "imports experiments.run"),
    '"A."\ndef f(): pass': (undocumented, "f has no docstring"),
    "'A.'\nclass A:\n    'A.'\n    def f(self): pass": (undocumented, "a.py:4: f has no docstring"),
    "x = 1": (undocumented, "the module has no docstring"),
    "def f():\n" + "    x = 1\n" * 60: (oversized, "f has 61 lines"),
    "#\n" * 401: (oversized, "401 lines"),
}


@pytest.mark.parametrize(("source", "expected"), BREACHES.items(), ids=[repr(key[:24]) for key in BREACHES])
def test_a_breach_is_named_with_its_place(source: str, expected: tuple, tmp_path: Path):
    rule, message = expected
    write_checkout(tmp_path, "fedjax_llm/models/a.py", source)
    (complaint,) = rule(tmp_path)
    assert "fedjax_llm/models/a.py" in complaint
    assert message in complaint


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("fedjax_llm/runs/a.py", '"""A."""\nimport flax.linen', foreign_imports),
        ("fedjax_llm/models/utils.py", "", drawers),
        ("fedjax_llm/attic/a.py", "", unlisted_rooms),
        ("tests/test_a.py", "#\n" * 401, oversized),
    ],
)
def test_a_breach_elsewhere_is_found(path: str, source: str, rule: Callable, tmp_path: Path):
    write_checkout(tmp_path, path, source)
    assert len(list(rule(tmp_path))) == 1


def test_what_is_allowed_passes(tmp_path: Path):
    write_checkout(tmp_path, "fedjax_llm/models/a.py", '"""A."""\nimport flax\nfrom . import b\nfrom ..errors import E')
    write_checkout(tmp_path, "experiments/run.py", '"""Run."""\nfrom configs import quickstart\nimport fedjax_llm.runs')
    assert [complaint for rule in RULES for complaint in rule(tmp_path)] == []


def write_checkout(root: Path, path: str, source: str) -> None:
    """A checkout with three rooms and one file."""
    for name, text in {
        "docs/design.md": "## 2. Rooms\n\n    fedjax_llm/\n      errors.py   e\n      models/   m\n      runs/   r\n",
        path: source,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
