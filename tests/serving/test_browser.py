"""The page in a real browser: asking, stopping, keyboard, narrow screens, and markup that must stay text."""

import json
import shutil
import threading
from contextlib import contextmanager

import pytest
import uvicorn
from tiny import tiny_adapters, tiny_base

from fedjax_llm.serving import listening
from fedjax_llm.serving.app import create
from fedjax_llm.serving.pages import RunPage, run_page
from fedjax_llm.serving.voices import Limits, Voices

playwright = pytest.importorskip("playwright.sync_api", reason="wants playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="wants Chromium: apt-get install chromium"),
]
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
MARKUP = "<img src=x onerror=\"document.title='broken in'\"><b>bold</b>"
FIGURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10"><script>alert(1)</script></svg>'


@pytest.fixture(scope="module")
def browser():
    flags = [*FLAGS.split(), "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
        yield opened
        opened.close()


@contextmanager
def served(folder):
    """The address of a server in a thread of this process."""
    base = tiny_base()
    voices = Voices(base, tiny_adapters(base.model), None, Limits(128, 64))
    page = run_page(folder, voices)
    html = page.html.replace("</footer>", '<img id="figure" src="/figures/one.svg" alt="one"></footer>')
    with listening.bound("127.0.0.1", 0) as socket:
        app = create(RunPage(html, {"one": FIGURE}), voices)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield listening.url_of("127.0.0.1", socket)
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    one = {"site": "hill", "record": "hill-1", "prompt": f"What is {MARKUP}?", "reference": MARKUP}
    (folder / "evaluation.json").write_text(json.dumps({"generations": [one]}))
    with served(folder) as address:
        yield address


@pytest.fixture
def page(browser, url):
    """The page, freshly opened; what its console and the network say is kept in ``page.said`` and ``page.asked``."""
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.said, opened.asked = [], []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda request: opened.asked.append(request.url))
    opened.goto(url)
    yield opened
    opened.close()


def ask(page, question, *, tokens=8):
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_label("Tokens at most").fill(str(tokens))
    page.get_by_role("button", name="Ask", exact=True).click()


def wait_for_the_end(page):
    page.locator("#submit:enabled").wait_for(timeout=60_000)


def speak(monkeypatch, *texts, endless=False):
    """Both models say these texts, piece by piece; or the last of them for ever."""

    def answer(self, question):
        for text in texts:
            for voice in ("base", "tuned"):
                yield {"voice": voice, "text": text}
        while endless:
            yield {"voice": "base", "text": texts[-1]}
        for voice in ("base", "tuned"):
            yield {"voice": voice, "tokens": 11, "first_seconds": 0.5, "seconds": 1.5, "full": True}

    monkeypatch.setattr(Voices, "answer", answer)


def test_both_models_answer_with_their_speed(page, url):
    ask(page, "Why?")
    wait_for_the_end(page)
    base, tuned = page.locator("#base .text").text_content(), page.locator("#tuned .text").text_content()
    assert base
    assert tuned
    assert base != tuned
    assert "token" in page.locator("#base .meta").text_content()
    assert page.locator("#base .text").get_attribute("aria-busy") == "false"
    assert page.locator("#state").text_content() == "Both answers are there."
    assert page.said == []
    assert all(address.startswith(url) for address in page.asked)


def test_what_models_and_data_say_is_never_markup(page, monkeypatch):
    speak(monkeypatch, MARKUP, " &amp; done")
    page.locator(".example").click()
    assert page.locator("#reference .text").text_content() == MARKUP
    ask(page, f"What is {MARKUP}?")
    wait_for_the_end(page)
    for voice in ("base", "tuned"):
        assert page.locator(f"#{voice} .text").text_content() == MARKUP + " &amp; done"
    assert page.locator(".card img, .card b, form img").count() == 0
    assert "broken in" not in page.title()
    told = "11 tokens (cut at the limit) · 10.0 tokens/s · first after 0.50 s"
    assert page.locator("#base .meta").text_content() == told


def test_stop_ends_both_answers_and_the_next_question_is_answered(page, monkeypatch):
    speak(monkeypatch, "more ", endless=True)
    ask(page, "Why?")
    page.locator("#base .text", has_text="more more more").wait_for()
    assert page.get_by_role("button", name="Ask", exact=True).is_disabled()
    page.get_by_role("button", name="Stop").click()
    wait_for_the_end(page)
    assert page.locator("#tuned .meta").text_content() == "Stopped."
    speak(monkeypatch, "fine")
    ask(page, "And now?")
    page.locator("#tuned .text", has_text="fine").wait_for()
    wait_for_the_end(page)
    assert page.locator("#base .text").text_content() == "fine"


def test_what_the_server_refuses_is_told_on_the_page(page):
    ask(page, "Why? " * 100)
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "shorten it" in alert.text_content()
    ask(page, "Why?", tokens=4)
    wait_for_the_end(page)
    assert alert.is_hidden()


def test_a_server_that_has_gone_is_told(browser, tmp_path):
    with served(tmp_path) as address:
        page = browser.new_page()
        page.goto(address)
    ask(page, "Why?")
    page.get_by_role("alert").wait_for()
    assert page.get_by_role("alert").text_content() == "The server does not answer; was it ended?"
    page.close()


def test_the_keyboard_reaches_everything(page, monkeypatch):
    speak(monkeypatch, "fine")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the link that skips to the question
    page.keyboard.type("Why?")
    page.keyboard.press("Control+Enter")
    page.locator("#tuned .text", has_text="fine").wait_for()
    page.get_by_role("tab", name="Ask").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", name="Training").get_attribute("aria-selected") == "true"
    assert page.get_by_role("tabpanel", name="Training").is_visible()
    page.keyboard.press("End")
    assert page.get_by_role("tabpanel", name="Run").is_visible()
    assert page.get_by_role("tabpanel").count() == 1
    page.reload()
    assert page.get_by_role("tabpanel", name="Run").is_visible()


def test_sampling_asks_for_a_temperature(page, monkeypatch):
    asked = []

    def answer(self, question):
        asked.append(question)
        yield {"voice": "base", "text": "fine"}

    monkeypatch.setattr(Voices, "answer", answer)
    temperature = page.get_by_label("Temperature")
    assert temperature.is_disabled()
    ask(page, "Why?")
    wait_for_the_end(page)
    page.get_by_label("Sampling").check()
    temperature.fill("1.2")
    ask(page, "Why?")
    wait_for_the_end(page)
    assert [question.temperature for question in asked] == [0, 1.2]
    assert asked[0].seed == 0


@pytest.mark.parametrize("width", [360, 768, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(browser, url, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(url)
    for tab in page.get_by_role("tab").all():
        tab.click()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    for tab in page.get_by_role("tab").all():
        box = tab.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    page.close()


def test_a_figure_runs_no_script_and_the_policy_holds(page, url):
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    assert page.locator("#figure").evaluate("image => image.complete && image.naturalWidth > 0")
    page.goto(url + "figures/one.svg")
    page.goto(url)
    found = page.evaluate(
        """() => new Promise((resolve) => {
          document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
          document.body.append(Object.assign(document.createElement("img"), {src: "http://127.0.0.2:9/x.png"}));
        })"""
    )
    assert found == "img-src"
