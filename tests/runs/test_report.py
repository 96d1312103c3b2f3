"""The report page: complete, escaped, self-contained, and without a complaint from a real browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from private_runs import privacy, spent

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


def metrics_line(number, sites, rng, exchanged, epsilon=None):
    loss = 3.4 - 0.7 * (1 - np.exp(-number / 8))
    cohort = [site for site in sites if rng.random() < 0.7] or list(sites)[:1]
    return {
        "round": number, "loss": loss, "cohort": cohort, "excluded": [],
        "sites": {
            site: {"loss": loss + 0.12 * place - 0.3 + 0.05 * rng.normal(), "tokens": 800}
            for place, site in enumerate(cohort)
        },
        "tokens": 6400, "padded_tokens": 8192, "upload_bytes": 1_843_200 * len(cohort) * exchanged,
        "download_bytes": 1_843_200 * len(cohort) * exchanged, "update_norm": 0.02, "epsilon": epsilon,
        "validation": {"nll": loss + 0.1, "sites": {site: loss + 0.1 * k for k, site in enumerate(sites)}}
        if number % 5 == 0 else None,
        "timing": {"seconds": 31.2, "tokens_per_second": 205.0, "compile_seconds": 0.0},
    }  # fmt: skip


def make_run(folder, sites=None, rounds=30, tuned=True, exchanged=1, epsilon=lambda _: None, **changes):
    """A made-up run's files, as a training run leaves them; ``changes`` are to its summary."""
    sites = SITES if sites is None else sites
    folder.mkdir()
    base, final = evaluate(0, sites), evaluate(1, sites) if tuned else None
    rng = np.random.default_rng(0)
    log = MetricsLog(folder / "metrics.jsonl")
    for number in range(1, rounds + 1):
        log.append(metrics_line(number, sites, rng, exchanged, epsilon(number)))
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
            "privacy": None,
        } | changes,
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


def grown(sites, rounds):
    """Epsilon of every account after a number of rounds, as sampled Gaussians about grow; 8 at most at the end."""
    return {site: 8 * (1 - 0.004 * place) * (rounds / 30) ** 0.5 for place, site in enumerate(sites)}


@pytest.fixture(scope="module")
def private_path(tmp_path_factory):
    run = make_run(
        tmp_path_factory.mktemp("private") / "private",
        epsilon=lambda number: spent(grown(SITES, number)),
        privacy=privacy(grown(SITES, 30), budget=8.0, warning="The noise can be <b>repeated</b>.", target=8.0),
    )
    return report.write_report(run)


@pytest.fixture(scope="module")
def private(private_path):
    return Page(private_path.read_text("utf-8"))


def test_a_private_run_states_its_guarantee_in_full(private):
    words = " ".join(private.text.split())
    for part in (
        "Epsilon <= 8.0 at delta 1e-05 for one record (add or remove one record), the worst of 6 sites.",
        "adding or removing one record changes the odds of anything that the run released by a factor of at most "
        "2,980.96 (e^epsilon), but for a chance of about delta 1e-05", "Whoever sees the sums.", "Sums are secret.",
        "What this does not cover", "Held-out figures have no noise.", "The noise can be <b>repeated</b>.",
        "whoever publishes them reveals more than the guarantee says",
        "epsilon 8 (+/-1 record, delta 1e-05)", "sampling probability", "0.0625", "reproducible",
    ):  # fmt: skip
        assert part in words, part
    assert "Private: epsilon 8.00 (+/-1 record, delta 1e-05)." in words
    assert "no differential privacy" not in words.lower()


def test_figures_on_private_text_are_labelled_as_not_covered(private_path, page_path):
    figures = re.findall(r"<figcaption>(.*?)</figcaption>", private_path.read_text("utf-8"))
    label = "Computed on private text without noise: the guarantee does not cover it."
    assert [label in caption for caption in figures] == [False, True, True, True, True, True, False, False]
    assert "Epsilon spent so far, at delta 1e-05, add or remove one record" in figures[0]
    assert "against the epsilon spent until then, at delta 1e-05, add or remove one record" in figures[1]
    assert "does not cover" not in page_path.read_text("utf-8"), "there is no guarantee to leave anything out of"


def test_a_run_that_the_budget_stopped_says_so(tmp_path):
    path = make_run(
        tmp_path / "run", rounds=20, rounds_done=9,
        epsilon=lambda number: spent({"every site": 1.0}, "site", 1e-3), # all of it at once
        privacy=privacy({"every site": 1.0}, "site", 1e-3, stopped="round 10 would exceed the budget"),
    )  # fmt: skip
    page = Page(report.write_report(path).read_text("utf-8"))
    words = " ".join(page.text.split())
    assert "9 of 20 rounds (stopped by the privacy budget), 6 sites" in words
    assert "The run ended early: round 10 would exceed the budget." in words
    assert "Loss after each round" not in words, "there is no curve where epsilon does not grow"
    assert sum(tag == "svg" for tag, _ in page.tags) == 7


def test_a_run_without_a_finite_epsilon_has_a_report(tmp_path):
    run = make_run(
        tmp_path / "run", rounds=2, epsilon=lambda _: spent(dict.fromkeys(SITES)), privacy=privacy(dict.fromkeys(SITES))
    )
    text = report.write_report(run).read_text("utf-8")
    assert "unbounded" in text
    assert "That promises nothing" in text
    assert text.count("<svg") == 5


def test_the_base_model_alone_has_a_report(tmp_path):
    run = make_run(tmp_path / "run", rounds=0, tuned=False, exchanged=0)
    (run / "metrics.jsonl").unlink(missing_ok=True)
    text = report.write_report(run).read_text("utf-8")
    assert "the base model&#39;s loss" in text or "the base model's loss" in text
    assert "Tuned" not in text
    assert "Nothing was exchanged" in text


def test_many_sites_and_rounds_stay_small(tmp_path):
    sites = {f"clinic {place}": 1000 - place for place in range(60)}
    run = make_run(
        tmp_path / "run", sites=sites, rounds=320, epsilon=lambda number: spent(grown(sites, number)),
        privacy=privacy(grown(sites, 320)),
    )  # fmt: skip
    path = report.write_report(run)
    words = " ".join(Page(path.read_text("utf-8")).text.split())
    assert path.stat().st_size < 2_000_000
    assert words.count("The 40 largest of 60 sites") == 6
    assert "60 sites," in words
    assert "... and 20 more, none of a larger epsilon (summary.json has all)" in words
    assert "clinic 39" in words
    assert "clinic 40" not in words


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
