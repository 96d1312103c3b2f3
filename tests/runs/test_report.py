"""The report page: complete, escaped, self-contained, and without a complaint from a real browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.runs import report, summary
from fedjax_llm.runs.metrics import MetricsLog

SITES = {
    "Abnormality of the nervous system": 900, "Abnormality of the skeletal system": 700, "Abnormality of the eye": 310,
    "Abnormality of the skin": 240, "Growth <abnormality> & \"more\" $x^2$": 60, "Neoplasm": 35,
}  # fmt: skip
ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>{{ 7*7 }}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def evaluate(gain, sites):
    results = {}
    for place, (site, size) in enumerate(sites.items()):
        rng = np.random.default_rng(place)
        count = max(3, size // 12)
        tokens = rng.integers(8, 40, count)
        nll = rng.gamma(20, 0.17, count) - gain * (0.6 + 0.1 * place) * rng.normal(1, 0.4, count)
        results[site] = {
            "records": [f"HP:{place}{row:04d}" for row in range(count)],
            "nll": [float(value) for value in nll * tokens],
            "tokens": [int(value) for value in tokens],
            "correct": [int(value) for value in rng.binomial(tokens, 0.4 + 0.1 * gain)],
            "choice_records": [f"HP:{place}{row:04d}" for row in range(count // 2)],
            "choice_correct": [int(value) for value in rng.binomial(1, 0.35 + 0.1 * gain, count // 2)],
        }
    return {"sites": results, "guessers": {"overlap": 0.27, "longest": 0.18}}


def metrics_line(number, sites, rng, exchanged):
    loss = 3.4 - 0.7 * (1 - np.exp(-number / 8))
    cohort = [site for site in sites if rng.random() < 0.7] or list(sites)[:1]
    return {
        "round": number, "loss": loss, "cohort": cohort, "excluded": [],
        "sites": {
            site: {"loss": loss + 0.12 * place - 0.3 + 0.05 * rng.normal(), "tokens": 800}
            for place, site in enumerate(cohort)
        },
        "tokens": 6400, "padded_tokens": 8192, "upload_bytes": 1_843_200 * len(cohort) * exchanged,
        "download_bytes": 1_843_200 * len(cohort) * exchanged, "update_norm": 0.02, "epsilon": None,
        "validation": {"nll": loss + 0.1, "sites": {site: loss + 0.1 * k for k, site in enumerate(sites)}}
        if number % 5 == 0 else None,
        "timing": {"seconds": 31.2, "tokens_per_second": 205.0, "compile_seconds": 0.0},
    }  # fmt: skip


def make_run(folder, sites=None, rounds=30, tuned=True, exchanged=1):
    """A made-up run's files, as a training run leaves them."""
    sites = SITES if sites is None else sites
    folder.mkdir()
    base, final = evaluate(0, sites), evaluate(1, sites) if tuned else None
    rng = np.random.default_rng(0)
    log = MetricsLog(folder / "metrics.jsonl")
    for number in range(1, rounds + 1):
        log.append(metrics_line(number, sites, rng, exchanged))
    answer = (
        "A disease of the nerves that begins in the feet and slowly rises; it is found in adults more than children."
    )
    generations = [
        {"site": site, "record": "HP:0001", "prompt": f"What is item {place}?", "reference": answer,
         "base": ATTACK if place == 0 else answer[:60] * 3, "final": answer if tuned else None}
        for place, site in enumerate(list(sites)[:4])
    ]  # fmt: skip
    files = {
        "config": {"seed": 7, "lora": {"rank": 8, "targets": ["q_proj", "v_proj"]}, "model": {"name": "made-up"}},
        "environment": {
            "python": "3.11.7", "packages": {"jax": "0.10.2", "flax": None}, "cpu": "A Processor", "cores": 2,
            "memory_bytes": 25769803776, "devices": ["cpu: cpu"], "git": {"commit": "0123456789abcdef", "dirty": True},
            "command": "python -m experiments.run --config=configs/quickstart.py", "started": "2026-01-01T00:00:00",
        },
        "evaluation": {"base": base, "final": final, "generations": generations},
        "summary": {
            "setting": "federated" if exchanged else "base", "rounds": rounds, "seed": 7, "parameters": 134_515_008,
            "trainable_parameters": 460_800, "trainable_fraction": 460_800 / 134_515_008, "tokens_trained": 192_000,
            "train_seconds": 936.0, "tokens_per_second": 205.0, "compile_seconds": 21.0, "peak_rss_bytes": 3 * 10**9,
            "sites": {name: {"train_records": n, "held_out_records": max(3, n // 12)} for name, n in sites.items()},
            "upload_bytes": 250_000_000 * exchanged, "download_bytes": 250_000_000 * exchanged,
            "full_model_bytes": 146_000_000_000, "base": summary.summarise_evaluation(base, 7),
            "final": summary.summarise_evaluation(final, 7) if tuned else None,
            "data": {"version": "hp/releases/2025-01-16", "citation": "Human Phenotype Ontology, <https://hpo.example>"},
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


class Page(HTMLParser):
    """Tags with attributes, ids, and the text outside of styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._style = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        self.text += "" if self._style else data


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    return report.write_report(make_run(tmp_path_factory.mktemp("reports") / "quickstart"))


@pytest.fixture(scope="module")
def page(page_path):
    return Page(page_path.read_text("utf-8"))


def test_the_page_loads_nothing_from_anywhere(page, page_path):
    text = page_path.read_text("utf-8")
    assert page_path.stat().st_size < 2_000_000
    loading = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "source", "base", "image"}
    assert not loading & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background"):
                assert value.startswith("#"), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    assert not re.findall(r"@import|url\((?!#)", text)


def test_the_page_escapes_what_comes_from_data(page, page_path):
    text = page_path.read_text("utf-8")
    assert "<script" not in text.lower()
    assert ATTACK in page.text, "shown as it is, never run"
    assert html.escape("<abnormality>") in text


def test_the_page_holds_sites_figures_generations_and_how_it_was_made(page):
    words = " ".join(page.text.split())
    for site in SITES:
        assert site in words
    for part in (
        "no differential privacy in this run", "hp/releases/2025-01-16", "0123456789ab with uncommitted changes",
        "python -m experiments.run", "overlap", "A Processor", "What is item 3?", '"rank": 8', "192,000 tokens",
        "an improvement beyond chance at 6 of 6 sites", "The sites sent 250 MB", "292 times as much",
    ):  # fmt: skip
        assert part in words, part


def test_the_headline_figures_are_those_of_the_summary(page, page_path):
    figures = json.loads((page_path.parent / "summary.json").read_text())
    for model in ("base", "final"):
        assert f"{figures[model]['nll']:.3f}" in page.text
        assert f"[{figures[model]['nll_low']:.3f}, {figures[model]['nll_high']:.3f}]" in page.text
        assert f"{100 * figures[model]['choice_accuracy']:.1f}%" in page.text


def test_every_figure_has_a_caption_and_a_description_and_ids_are_unique(page):
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == 6
    assert all(drawing["role"] == "img" and len(drawing["aria-label"]) > 20 for drawing in drawings)
    assert sum(tag == "figcaption" for tag, _ in page.tags) == 6
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [value[1:] for _, attributes in page.tags for name, value in attributes.items() if name == "xlink:href"]
    assert used
    assert set(used) <= set(ids), "markers refer to what is there"


def test_writing_twice_gives_the_same_bytes(page_path):
    before = page_path.read_bytes()
    assert report.write_report(page_path.parent).read_bytes() == before


def test_a_private_run_states_its_epsilon(tmp_path):
    run = make_run(tmp_path / "run", rounds=2)
    MetricsLog(run / "metrics.jsonl").append(metrics_line(3, SITES, np.random.default_rng(0), 1) | {"epsilon": 2.5})
    text = report.write_report(run).read_text("utf-8")
    assert "ε = 2.5" in text
    assert "no differential privacy" not in text


def test_the_base_model_alone_has_a_report(tmp_path):
    run = make_run(tmp_path / "run", rounds=0, tuned=False, exchanged=0)
    (run / "metrics.jsonl").unlink(missing_ok=True)
    text = report.write_report(run).read_text("utf-8")
    assert "the base model&#39;s loss" in text or "the base model's loss" in text
    assert "Tuned" not in text
    assert "Nothing was exchanged" in text


def test_many_sites_and_rounds_stay_small(tmp_path):
    sites = {f"clinic {place}": 1000 - place for place in range(60)}
    path = report.write_report(make_run(tmp_path / "run", sites=sites, rounds=320))
    text = path.read_text("utf-8")
    assert path.stat().st_size < 2_000_000
    assert "The 40 largest of 60 sites" in text
    assert "clinic 59" in text, "the table has all"


def test_a_missing_file_is_named(tmp_path):
    run = make_run(tmp_path / "run", rounds=1)
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"summary\.json is missing"):
        report.write_report(run)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to open the page with")
def test_a_real_browser_opens_the_page_without_complaint(page_path, tmp_path):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}", "--dump-dom", page_path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    seen = Page(done.stdout)
    assert seen.text.strip().startswith("quickstart")
    assert "no differential privacy in this run" in " ".join(seen.text.split())
    assert "script" not in {tag for tag, _ in seen.tags}
    assert sum(tag == "svg" for tag, _ in seen.tags) == 6
