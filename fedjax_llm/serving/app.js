"use strict";

const byId = (id) => document.getElementById(id);
const form = byId("form"), question = byId("question"), temperature = byId("temperature"), length = byId("length");
const submit = byId("submit"), stop = byId("stop"), problem = byId("problem"), reference = byId("reference");
const examples = [...document.querySelectorAll(".example")];
const cards = Object.fromEntries(["base", "tuned"].map((voice) => [voice, {
  text: document.querySelector(`#${voice} .text`),
  meta: document.querySelector(`#${voice} .meta`),
}]));
let running = null;  // the AbortController of the question that is being answered

// ---- Parts of the page as tabs; without this script they stand one after the other.

const tabs = [...document.querySelectorAll(".tabs a")];

function show(name, focus) {
  const chosen = tabs.find((tab) => tab.hash === `#${name}`) || tabs[0];
  for (const tab of tabs) {
    const selected = tab === chosen;
    tab.setAttribute("aria-selected", selected);
    tab.tabIndex = selected ? 0 : -1;
    byId(tab.hash.slice(1)).hidden = !selected;
  }
  if (focus) chosen.focus();
}

function setUpTabs() {
  document.querySelector(".tabs").setAttribute("role", "tablist");
  for (const [place, tab] of tabs.entries()) {
    const panel = byId(tab.hash.slice(1));
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.removeAttribute("aria-label");
    panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", (event) => {
      event.preventDefault();
      open(tab);
    });
    tab.addEventListener("keydown", (event) => {
      const last = tabs.length - 1;
      const to = { ArrowRight: place === last ? 0 : place + 1, ArrowLeft: place === 0 ? last : place - 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      open(tabs[to], true);
    });
  }
  const open = (tab, focus = false) => {
    history.replaceState(null, "", tab.hash);  // so that a reload comes back here
    show(tab.hash.slice(1), focus);
  };
  addEventListener("hashchange", () => tabs.some((tab) => tab.hash === location.hash) && show(location.hash.slice(1)));
  show(location.hash.slice(1));
}

// ---- Asking.

function complain(text) {
  problem.textContent = text;
  problem.hidden = !text;
}

function busy(on) {
  submit.disabled = on;
  stop.disabled = !on;
  for (const { text } of Object.values(cards)) text.setAttribute("aria-busy", on);
}

function told(event) {
  if (event.error) return complain(event.error);
  if (event.waiting) return tellAll("Waiting for other questions ...");
  if (event.started) return tellAll("Reading the question ...");
  const card = cards[event.voice];
  if (event.text !== undefined) {
    card.text.append(event.text);  // a text node: what a model says is never markup
    card.meta.textContent = "Answering ...";
    return;
  }
  card.text.setAttribute("aria-busy", false);
  card.done = true;
  card.meta.textContent = summary(event);
}

function summary({ tokens, seconds, first_seconds: first, full }) {
  if (!tokens) return "An empty answer.";
  const parts = [`${tokens} token${tokens === 1 ? "" : "s"}${full ? " (cut at the limit)" : ""}`];
  if (tokens > 1 && seconds > first) parts.push(`${((tokens - 1) / (seconds - first)).toFixed(1)} tokens/s`);
  parts.push(`first after ${first.toFixed(2)} s`);
  return parts.join(" · ");
}

function tellAll(text) {
  for (const { meta } of Object.values(cards)) meta.textContent = text;
  byId("state").textContent = text;
}

function ended(text) {
  for (const card of Object.values(cards)) if (!card.done) card.meta.textContent = text;
  byId("state").textContent = text;
}

function asked() {
  const sampling = form.elements.decoding.value === "sampling";
  return {
    question: question.value,
    max_new_tokens: length.valueAsNumber,
    temperature: sampling ? temperature.valueAsNumber : 0,
    seed: sampling ? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 : 0,
  };
}

async function lines(response, take) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) take(JSON.parse(part));
  }
}

async function ask() {
  if (running || !form.reportValidity()) return;
  running = new AbortController();
  complain("");
  busy(true);
  for (const card of Object.values(cards)) {
    card.text.textContent = "";
    card.done = false;
  }
  tellAll("Sending ...");
  document.querySelector(".pair").scrollIntoView({ block: "nearest" });
  try {
    const response = await fetch("/ask", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error);
    await lines(response, told);
    ended(problem.hidden ? "Both answers are there." : "The answer ended early.");
  } catch (error) {
    if (error.name === "AbortError") {
      ended("Stopped.");
    } else {
      ended("No answer.");
      complain(error instanceof TypeError ? "The server does not answer; was it ended?" : error.message);
    }
  } finally {
    running = null;
    busy(false);
  }
}

function showReference(example) {
  for (const one of examples) one.setAttribute("aria-pressed", one === example);
  reference.hidden = !example;
  if (!example) return;
  reference.querySelector(".text").textContent = example.dataset.reference;
  reference.querySelector(".where").textContent = example.dataset.where;
}

setUpTabs();
showReference(null);
form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
form.addEventListener("change", () => {
  temperature.disabled = form.elements.decoding.value !== "sampling";
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  ask();
});
question.addEventListener("input", () => {
  showReference(examples.find((one) => one.dataset.prompt === question.value) || null);
});
stop.addEventListener("click", () => running && running.abort());
for (const example of examples) {
  example.addEventListener("click", () => {
    question.value = example.dataset.prompt;
    showReference(example);
    question.focus();
  });
}
