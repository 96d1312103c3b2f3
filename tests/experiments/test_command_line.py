"""Help and completion of the commands."""

import re
import shutil
import subprocess

import pytest

from experiments import command_line
from experiments.completion import main


def test_all_mains_are_commands_and_nothing_else_is():
    found = command_line.commands()
    assert {"run", "sweep", "compare", "doctor", "completion"} <= set(found)
    assert not {"command_line", "peer_cases", "pod_plan", "__init__"} & set(found)


def test_options_are_those_of_the_help_but_not_of_its_examples():
    assert {"--federation.rounds", "--lora.no-rslora", "--resume", "--help"} <= set(command_line.options("run"))
    assert command_line.options("completion") == ["--help"]
    assert "--table" in command_line.options("compare")


@pytest.mark.parametrize("name", command_line.commands())
def test_every_command_says_what_it_does_and_shows_how(name):
    head = (command_line.HERE / f"{name}.py").read_text("utf-8").split('"""')[1]
    first = head.splitlines()[0]
    assert first.endswith((".", ":", "``")), f"{name}: one sentence first"
    assert f"experiments.{name}" in head, f"{name}: no example"


def test_every_command_has_its_place_in_the_documentation():
    page = (command_line.HERE.parent / "docs/commands.md").read_text("utf-8")
    assert [name for name in command_line.commands() if f"## {name}\n" not in page] == []
    shown = {name: set(command_line.options(name)) for name in ("run", "compare", "doctor", "fetch", "sweep")}
    for name, known in shown.items():
        section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
        used = set(re.findall(rf"(?<=experiments\.){name} .*", section))
        words = {word.partition("=")[0] for line in used for word in line.split() if word.startswith("--")}
        assert words <= known, f"{name}: {words - known}"


def test_a_description_has_no_markup():
    assert command_line.told("Does ``it``.\n\n    python -m it\n\nSo.\n") == "Does it.\n    python -m it\n\nSo."
    assert command_line.told(None) == ""


def completed(script, *words):
    """What bash would offer after these words."""
    line = " ".join(f"'{word}'" for word in words)
    asked = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _fedjax_llm; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    ran = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True)
    return ran.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_options():
    script = command_line.completion({"run": ["--lora.rank", "--lora.alpha", "--seed"], "ask": ["--base"]}, "bash")
    assert completed(script, "python", "-m", "experiments.") == ["experiments.run", "experiments.ask"]
    assert completed(script, "python", "-m", "experiments.r") == ["experiments.run"]
    assert completed(script, "python", "-m", "experiments.run", "--lora.") == ["--lora.rank", "--lora.alpha"]
    assert completed(script, "python", "-m", "experiments.ask", "runs/x", "--") == ["--base"]
    assert completed(script, "python", "-m", "experiments.ask", "ru") == []  # files, by bash itself
    assert completed(script, "python", "other.py", "--") == []


def test_the_command_prints_every_command(capsys, monkeypatch):
    monkeypatch.setattr(command_line, "options", lambda name: [f"--of-{name}"])
    assert main(["zsh"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("autoload -U +X bashcompinit && bashcompinit\n")
    assert all(f"--of-{name}" in said for name in command_line.commands())
