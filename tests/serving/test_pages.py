"""The page of a run: its figures, its statement, its leaks, and nothing that its data could smuggle in."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import small_run
from starlette.testclient import TestClient
from tiny import tiny_adapters, tiny_base

from fedjax_llm import config
from fedjax_llm.runs import directory
from fedjax_llm.serving.app import create
from fedjax_llm.serving.pages import run_page
from fedjax_llm.serving.voices import Voices

SMUGGLED = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>"


def voices(system="Be brief."):
    base = tiny_base()
    return Voices(base, tiny_adapters(base.model), system)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    status, seen = small_run.go(config.load(small_run.write_small(folder)), folder / "run")
    assert status == 0, seen
    return folder / "run"


@pytest.fixture(scope="module")
def page(run):
    return run_page(run, voices())


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def words(html):
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_the_page_says_what_the_run_found(run, page):
    summary = json.loads((run / "summary.json").read_text())
    told = words(page.html)
    assert f"{summary['base']['nll']:.3f}" in told
    assert f"{summary['final']['nll']:.3f}" in told
    assert "There is no differential privacy in this run." in told
    assert f"python -m experiments.attack {run}" in told
    assert all(site in told for site in small_run.SITES)


def test_held_out_questions_stand_there_with_their_references(run, page):
    generations = json.loads((run / "evaluation.json").read_text())["generations"]
    buttons = [attributes for tag, attributes in Tags(page.html).found if "data-prompt" in attributes]
    assert [one["data-prompt"] for one in buttons] == [one["prompt"] for one in generations]
    assert [one["data-reference"] for one in buttons] == [one["reference"] for one in generations]
    assert buttons


def test_every_figure_is_there_and_is_xml_without_script(page):
    shown = [attributes["src"] for tag, attributes in Tags(page.html).found if tag == "img"]
    assert shown == [f"/figures/{name}.svg" for name in page.figures]
    assert len(shown) >= 4
    for svg in page.figures.values():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "script" not in {element.tag.rpartition("}")[2] for element in root.iter()}
        assert set(re.findall(r"var\((--\w+)\)", svg)) <= set(re.findall(r"(--\w+):", svg))


def test_the_page_loads_nothing_from_elsewhere_and_holds_no_code(page):
    for tag, attributes in Tags(page.html).found:
        for name in ("src", "href", "action", "srcset"):
            assert re.match(r"/(figures|files)/|#", attributes.get(name, "#")), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
    assert "<style" not in page.html
    assert re.findall(r"<script[^>]*>(.*?)</script>", page.html, re.DOTALL) == [""]


def test_every_control_has_a_label(page):
    tags = Tags(page.html).found
    labelled = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    for tag, attributes in tags:
        if tag in ("textarea", "input") and attributes.get("type") != "radio":
            assert attributes["id"] in labelled
    identities = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert sum(attributes.get("aria-live") == "polite" for _, attributes in tags) == 2


def test_what_data_says_stays_text(tmp_path):
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"generations": [{"site": SMUGGLED, "record": SMUGGLED, "prompt": SMUGGLED, "reference": SMUGGLED}]})
    )
    html = run_page(tmp_path, voices(SMUGGLED)).html
    tags = Tags(html).found
    assert [attributes for tag, attributes in tags if tag == "img"] == []
    assert [attributes.get("src") for tag, attributes in tags if tag == "script"] == ["/files/app.js"]
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert [a["data-prompt"] for _, a in tags if "data-prompt" in a] == [SMUGGLED]


def test_a_run_without_a_report_can_be_asked_all_the_same(tmp_path):
    page = run_page(tmp_path, voices())
    assert "config.json is missing" in words(page.html)
    assert page.figures == {}
    assert 'id="question"' in page.html


def test_an_encrypted_run_is_read_with_its_key(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_KEY", "ab" * 32)
    run = directory.create(tmp_path / "run", {"output": {"encryption": {"key_file": None, "key_variable": "RUN_KEY"}}})
    one = {"site": "hill", "record": "hill-1", "prompt": "Who keeps it?", "reference": "Ada."}
    directory.write_json(run / "evaluation.json", {"generations": [one]})
    assert b"Ada." not in (run / "evaluation.json").read_bytes()
    assert 'data-reference="Ada."' in run_page(run, voices()).html
    monkeypatch.delenv("RUN_KEY")
    assert "Ada." not in run_page(run, voices()).html


def test_leaks_are_shown_with_their_figures(run, page, monkeypatch):
    from fedjax_llm.runs.leak_page import Picture, Section
    from fedjax_llm.serving import pages

    section = Section(
        "Membership", ("Of many.",), ("attack", "AUC"), ((SMUGGLED, "0.61"),), (Picture("roc", "<svg/>", "Curves"),)
    )
    monkeypatch.setattr(pages, "run_sections", lambda found: (f"It leaks {found['much']}.", [section]))
    (run / "leakage.json").write_text('{"much": "a little"}')
    try:
        shown = run_page(run, voices())
    finally:
        (run / "leakage.json").unlink()
    assert "It leaks a little." in words(shown.html)
    assert shown.figures == page.figures | {"leak-0": "<svg/>"}
    assert '<img class="printed" src="/figures/leak-0.svg" alt="Curves"' in shown.html
    assert "&lt;img src=x" in shown.html
    assert "experiments.attack" not in shown.html


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read"), ("{}", "of another version")])
def test_leaks_that_cannot_be_read_are_told(tmp_path, content, message):
    (tmp_path / "leakage.json").write_text(content)
    assert message in words(run_page(tmp_path, voices()).html)


def test_the_server_gives_out_page_files_and_figures_alone(page):
    client = TestClient(create(page, voices()), base_url="http://localhost")
    assert client.get("/").text == page.html
    for tag, attributes in Tags(page.html).found:
        place = attributes.get("src") or (attributes.get("href") if tag == "link" else None)
        if place is not None:
            assert client.get(place).status_code == 200, place
    assert client.get("/files/app.css").headers["content-type"].startswith("text/css")
    assert "sandbox" in client.get("/figures/run-0.svg").headers["content-security-policy"]
    for place in ("/files/app.py", "/files/..%2f..%2fsetup.py", "/files/index.html", "/figures/nothing.svg", "/docs"):
        assert client.get(place).status_code == 404
