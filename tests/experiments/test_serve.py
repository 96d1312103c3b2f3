"""The command, as a process of its own: from the run's folder to an answer, and its end by Ctrl-C."""

import http.client
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_adapters, tiny_folder

from experiments import serve
from fedjax_llm import peft
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import load

KIND = Lora(rank=3, alpha=6.0, targets=("q_proj", "v_proj"))


@pytest.fixture
def run(tmp_path):
    """A run folder as a finished run leaves it, without its report."""
    model = tiny_folder(tmp_path / "model", num_hidden_layers=1)
    config = {"model": {"name": str(model), "dtype": "float32"}, "data": {"system": "Be brief."}}
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    base = load(str(model))
    adapters = tiny_adapters(base.model, targets=KIND.targets)
    peft.write_adapter(folder / "adapter", adapters, KIND, base.name, base.model)
    return folder


def test_from_the_folder_to_an_answer_and_ctrl_c(run):
    command = [sys.executable, "-m", "experiments.serve", str(run), "--port=0", "--max-new-tokens=400"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True) as server:
        try:
            told = []
            while not (told and told[-1].startswith("Ready: ")):
                told.append(next(server.stderr))
            assert [line.split(".")[0].split(":")[0] for line in told] == [
                "The page will be at http",
                "Compiling ",
                "Ready",
            ]
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", told[-1])[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/")
            assert b'id="question"' in connection.getresponse().read()
            body = json.dumps({"question": "Why?", "max_new_tokens": 400})
            connection.request("POST", "/ask", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert [json.loads(answer.readline()) for _ in range(2)] == [{"waiting": True}, {"started": True}]
            server.send_signal(signal.SIGINT)  # in the middle of an answer
            rest = server.stderr.read()
            assert server.wait(timeout=60) == 0
            assert rest.endswith("Ended.\n")
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host=0.0.0.0"], "add --open-to-network"),
        (["--max-new-tokens=0"], "new_tokens is 0"),
        (["--port=70000"], "--port 70000 is no port"),
        (["--port=0"], "is not the folder of a run"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(serve, "use_compilation_cache", lambda: None)
    assert serve.main([str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
