// The page: search pictures by text or by picture, and zero-shot labels.

import * as ort from "./ort.wasm.min.mjs";
import { cosines, largest, openBundle } from "./clip.mjs";
import { addFolder, openGallery } from "./gallery.mjs";
import { selfTest } from "./selftest.mjs";

const SHOWN = 24;
const LABELS = ["red apple", "dog", "car", "house", "a smiling face", "musical instrument"];
const byId = id => document.getElementById(id);

const state = { clip: null, sources: [], picture: null, search: 0, labelling: 0, busy: 0 };

/** Settles when the model answers; tests wait for it. */
globalThis.ready = start().catch(error => {
  say("status", `This page cannot run: ${error.message}`, true);
  byId("model").textContent = "The model could not be loaded.";
  throw error;
});

async function start() {
  ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.logLevel = "error";
  const base = new URL("../", import.meta.url);
  const started = performance.now();
  state.clip = await openBundle(ort, base);
  const loaded = performance.now() - started;
  const test = await selfTest(state.clip, base);
  state.sources = await openGallery(base);
  describe(loaded, test);
  showSources();
  for (const field of document.querySelectorAll(":disabled")) field.disabled = false;
  byId("label-list").value = LABELS.join("\n");
  const first = state.sources[0]?.find(LABELS[0]);
  await setPicture(first ?? (await (await fetch(new URL("golden/wide.png", base))).blob()), false);
  browse();
  byId("query").focus();
}

function describe(loaded, test) {
  const { model, precision } = state.clip.bundle;
  byId("model").textContent = `${model.name}, ${precision}, embeddings of ${model.embed_dim} numbers`;
  const threads = ort.env.wasm.numThreads;
  const why = crossOriginIsolated ? "" : " (the server sends no COOP and COEP headers)";
  byId("runtime").innerHTML =
    `onnxruntime-web ${ort.env.versions.web}, WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}${why}, ` +
    `loaded in ${loaded.toFixed(0)} ms. Self-test against the original model: ` +
    `<span class="${test.passed ? "good" : "bad"}">${test.passed ? "passed" : "FAILED"}</span> ` +
    `(worst cosine ${test.image.toFixed(4)} image, ${test.text.toFixed(4)} text).`;
}

// Search

const search = (embed, what) => working(async () => {
  const turn = ++state.search;
  const source = state.sources.find(s => s.chosen);
  if (!source) return say("status", "Add a folder of pictures to search in.");
  const start = performance.now();
  const embedding = await embed();
  const encoded = performance.now();
  const scores = cosines(source.embeddings, embedding);
  const best = largest(scores, SHOWN);
  const end = performance.now();
  if (turn !== state.search) return; // a later query was faster
  showResults(source, best, scores);
  const ms = value => `${value.toFixed(1)} ms`;
  say("status", `<b>${ms(end - start)}</b> for ${what}: encoder ${ms(encoded - start)}, ` +
    `${source.size.toLocaleString("en")} pictures ${ms(end - encoded)}`);
  state.lastMs = end - start;
});

function searchText() {
  const text = byId("query").value;
  if (!text.trim()) return browse();
  return search(() => state.clip.encodeText(text), "this text");
}

function searchPicture(blob, what) {
  byId("query").value = "";
  return search(() => state.clip.encodeImage(blob), what);
}

/** Before any query: a few pictures from all over the source. */
function browse() {
  state.search++;
  const source = state.sources.find(s => s.chosen);
  if (!source) return say("status", "Add a folder of pictures to search in.");
  const step = Math.max(1, Math.floor(source.size / SHOWN));
  showResults(source, Array.from({ length: Math.min(SHOWN, source.size) }, (_, index) => index * step));
  say("status", "Type what to look for.");
}

function showResults(source, best, scores) {
  byId("results").replaceChildren(...best.map(index => {
    const button = element("button", { type: "button", title: "Find similar pictures" });
    const picture = element("img", { src: source.address(index), alt: "" });
    button.append(picture, element("b", {}, source.name(index)), element("small", {}, scores?.[index].toFixed(3)));
    button.onclick = () => search(async () => source.embedding(index), `pictures like “${escape(source.name(index))}”`);
    const item = element("li");
    item.append(button);
    return item;
  }));
}

function showSources() {
  byId("sources").replaceChildren(byId("sources").firstElementChild, ...state.sources.map(source => {
    const label = element("label");
    const radio = element("input", { type: "radio", name: "source" });
    radio.checked = source.chosen;
    radio.onchange = () => {
      for (const other of state.sources) other.chosen = other === source;
      searchText();
    };
    label.append(radio, `${source.title} (${source.size.toLocaleString("en")})`);
    return label;
  }));
  byId("credits").textContent = state.sources.flatMap(s => s.credits).join(" · ");
}

async function chooseFolder(files) {
  const bar = byId("indexing");
  bar.classList.remove("hidden");
  const start = performance.now();
  const source = await addFolder(state.clip, files, (done, all) => {
    bar.max = all;
    bar.value = done;
    say("status", `Reading picture ${done} of ${all}…`);
  });
  bar.classList.add("hidden");
  if (!source.size) return say("status", "That folder holds no pictures that this browser can read.", true);
  for (const other of state.sources) other.chosen = false;
  state.sources.push(source);
  showSources();
  const seconds = (performance.now() - start) / 1000;
  const bad = source.unreadable ? `, ${source.unreadable} unreadable` : "";
  say("status", `Read ${source.size} pictures in ${seconds.toFixed(1)} s${bad}. Type what to look for.`);
  byId("query").focus();
}

// Zero-shot labels

async function setPicture(blob, run = true) {
  state.picture = blob;
  const image = byId("picture");
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  if (run) await label();
}

const label = () => working(async () => {
  const turn = ++state.labelling;
  const names = byId("label-list").value.split("\n").map(l => l.trim()).filter(Boolean);
  if (!names.length || !state.picture) return byId("bars").replaceChildren();
  const { model } = state.clip.bundle;
  const template = byId("template").value.includes("{}") ? byId("template").value : "{}";
  const start = performance.now();
  const image = await state.clip.encodeImage(state.picture);
  const seen = performance.now();
  const logits = [];
  for (const name of names) {
    const text = await state.clip.encodeText(template.replaceAll("{}", name));
    logits.push(cosines(text, image)[0] * model.logit_scale + (model.logit_bias ?? 0));
  }
  const end = performance.now();
  if (turn !== state.labelling) return;
  // A model with a bias was trained to judge each label alone.
  showBars(names, model.logit_bias === null ? softmax(logits) : logits.map(x => 1 / (1 + Math.exp(-x))));
  say("label-status", `<b>${(end - start).toFixed(1)} ms</b>: picture ${(seen - start).toFixed(1)} ms, ` +
    `${names.length} labels ${(end - seen).toFixed(1)} ms`);
});

function showBars(names, shares) {
  const order = largest(shares, names.length);
  byId("bars").replaceChildren(...order.map(index => {
    const item = element("li");
    const bar = element("i", { "aria-hidden": "true" });
    const fill = element("span");
    fill.style.width = `${100 * shares[index]}%`;
    bar.append(fill);
    item.append(element("span", {}, names[index]), bar, element("em", {}, `${(100 * shares[index]).toFixed(1)} %`));
    return item;
  }));
}

function softmax(logits) {
  const top = Math.max(...logits);
  const powers = logits.map(x => Math.exp(x - top));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map(x => x / sum);
}

// Page

function element(name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

function escape(text) {
  return element("i", {}, text).innerHTML;
}

function say(id, html, bad = false) {
  byId(id).innerHTML = html;
  byId(id).classList.toggle("bad", bad);
}

function selectTab(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  if (tab.id === "tab-labels") label();
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").textContent = dark ? "Light" : "Dark";
}

/** Run an action, counted in `state.busy` until it has ended; so are actions that wait their turn. */
async function working(action) {
  state.busy++;
  try {
    return await action();
  } finally {
    state.busy--;
  }
}

const firstPicture = files => [...files].find(file => file.type.startsWith("image/"));
const soon = (action, ms) => {
  let cancel = () => {};
  return () => {
    cancel();
    working(() => new Promise(done => {
      const timer = setTimeout(() => done(action()), ms);
      cancel = () => { clearTimeout(timer); done(); };
    }));
  };
};

function takePicture(blob) {
  if (!blob || !state.clip) return;
  if (!byId("labels").hidden) setPicture(blob);
  else searchPicture(blob, "this picture");
}

byId("query-form").onsubmit = event => { event.preventDefault(); searchText(); };
byId("query").oninput = soon(searchText, 120);
byId("query-file").onchange = event => takePicture(event.target.files[0]);
byId("label-file").onchange = event => takePicture(event.target.files[0]);
byId("folder").onchange = event => chooseFolder([...event.target.files]);
byId("label-list").oninput = byId("template").oninput = soon(label, 300);
addEventListener("paste", event => takePicture(firstPicture(event.clipboardData.files)));
addEventListener("dragover", event => { event.preventDefault(); byId("drop").classList.add("over"); });
addEventListener("dragleave", () => byId("drop").classList.remove("over"));
addEventListener("drop", event => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  takePicture(firstPicture(event.dataTransfer.files));
});
const tabs = [...document.querySelectorAll("[role=tab]")];
for (const tab of tabs) {
  tab.onclick = () => selectTab(tab);
  tab.onkeydown = event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    next.focus();
    selectTab(next);
  };
}
setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
matchMedia("(prefers-color-scheme: dark)").onchange = event => setTheme(event.matches);
byId("theme").onclick = () => setTheme(document.documentElement.dataset.theme !== "dark");
globalThis.pocketclip = { state, searchText, takePicture, chooseFolder };
