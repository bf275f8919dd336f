"use strict";
// Talks to the service that served this page and to nothing else. Everything that comes from it is set as text.

const $ = (id) => document.getElementById(id);
const PARTS = { preprocess: "preprocess", embed: "embed", search: "search", rerank: "re-rank" };
const MOVES = 250; // ms that a result takes to its new place
let info = null;
let picture = null; // the File that is searched with
let running = null; // AbortController of the search under way
let last = null; // what the shown results answer, so that a switch asks the same again
let token = sessionStorage.getItem("token") || "";
let made = []; // object URLs of shown pictures

class Refused extends Error {
  constructor(status, words) { super(words); this.status = status; }
}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers || {});
  if (token) headers.set("Authorization", `Bearer ${token}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The service does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  let words = `The service answered ${answer.status}.`;
  try { words = (await answer.json()).error || words; } catch { /* no words came with it */ }
  throw new Refused(answer.status, words);
}

// --- start, and the token ---------------------------------------------------------------------------------------

async function start() {
  try {
    info = await (await ask("info")).json();
  } catch (error) {
    if (error.status === 401) return askForToken(token ? "That token is not right." : "");
    return fail(error);
  }
  if (token) sessionStorage.setItem("token", token);
  $("token-form").hidden = true;
  $("main").hidden = false;
  describe();
  restore();
}

function askForToken(words) {
  $("main").hidden = true;
  $("token-form").hidden = false;
  $("token-error").textContent = words;
  $("token").focus();
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  start();
});

function describe() {
  const { student, teacher, items } = info;
  const precision = [...new Set(Object.values(student.precision))].join(" and ");
  const facts = [
    items ? `${items.images.toLocaleString("en")} pictures and ${items.texts.toLocaleString("en")} captions of ${info.corpus}, ${info.split}` : "no index",
    `student ${student.run} / ${student.arm} (${student.class}, ${precision})`,
  ];
  if (teacher) facts.push(`teacher gives ${teacher.score_kind.replaceAll("_", " ")}, reads ${teacher.rerank} hits`);
  $("facts").textContent = facts.join(" · ");
  if (info.corpus) document.title = `Search ${info.corpus}`;
  if (!items) fail(new Refused(409, "This student was exported without an index, so there is nothing to search."));
  adapt();
}

// What the form offers depends on what is searched with.
function adapt() {
  const pairs = (picture ? "texts" : "images") === $("find").value;
  const why = !info || !info.teacher ? "(the service has no teacher)" : pairs ? "" : "(only pictures with sentences)";
  $("rerank").disabled = Boolean(why);
  $("rerank-why").textContent = why;
}

// --- the query --------------------------------------------------------------------------------------------------

function setPicture(file) {
  const before = picture, byKeyboard = document.activeElement === $("picture");
  picture = file;
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  $("preview").hidden = $("picture-words").hidden = !file;
  $("drop-words").hidden = Boolean(file);
  if (file) {
    $("preview").src = URL.createObjectURL(file);
    $("picture-name").textContent = file.name || "pasted picture";
    $("text").value = "";
    if (byKeyboard) $("remove").focus(); // what had the focus is hidden now
  } else {
    $("preview").removeAttribute("src");
    $("picture").value = "";
  }
  if (Boolean(before) !== Boolean(file)) $("find").value = file ? "texts" : "images";
  adapt();
}

function take(file) {
  if (!file) return;
  setPicture(file);
  submit();
}

$("preview").addEventListener("error", () => { $("preview").hidden = true; });
$("picture").addEventListener("change", () => take($("picture").files[0]));
$("remove").addEventListener("click", () => { setPicture(null); $("text").focus(); });
$("text").addEventListener("input", () => { if (picture && $("text").value) setPicture(null); });
$("search").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
for (const id of ["find", "count", "rerank"]) $(id).addEventListener("change", () => { adapt(); if (last) submit(); });

document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files || [])].find((one) => one.type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  take(file);
});
let inside = 0; // dragenter and dragleave come from every element on the way
for (const [name, step] of [["dragenter", 1], ["dragleave", -1]]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    inside = Math.max(0, inside + step);
    $("drop").classList.toggle("over", inside > 0);
  });
}
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { // anywhere, so that a near miss does not leave the page
  event.preventDefault();
  inside = 0;
  $("drop").classList.remove("over");
  if (event.dataTransfer?.files.length) take(event.dataTransfer.files[0]);
});

// --- asking -----------------------------------------------------------------------------------------------------

function requestOf(asked) {
  const options = { k: asked.k, rerank: asked.rerank, find: asked.find };
  if (!asked.picture) {
    const body = JSON.stringify({ text: asked.text, ...options });
    return { method: "POST", headers: { "Content-Type": "application/json" }, body };
  }
  const body = new FormData();
  body.append("picture", asked.picture);
  for (const [name, value] of Object.entries(options)) body.append(name, String(value));
  return { method: "POST", body };
}

async function submit() {
  const text = $("text").value.trim();
  if (!picture && !text) { $("text").focus(); return fail(new Refused(422, "Type a sentence, or give a picture.")); }
  if (picture && info && picture.size > info.limits.body_bytes - 4096) {
    return fail(new Refused(413, `This file has ${mib(picture.size)} MiB; a picture may have ${mib(info.limits.body_bytes)}.`));
  }
  const rerank = $("rerank").checked && !$("rerank").disabled;
  const asked = { text, picture, find: $("find").value, k: Number($("count").value), rerank };
  running?.abort();
  const own = running = new AbortController();
  $("error").textContent = "";
  $("status").textContent = rerank ? "Searching, and the teacher reads…" : "Searching…";
  document.body.classList.add("waiting");
  try {
    const answer = await (await ask("search", { ...requestOf(asked), signal: own.signal })).json();
    last = asked;
    remember(asked);
    show(answer, asked);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.status === 401) return askForToken("The token is no longer right.");
    fail(error);
  } finally {
    if (running === own) document.body.classList.remove("waiting");
  }
}

function fail(error) {
  last = null;
  $("status").textContent = "";
  $("times").hidden = $("answer").hidden = true; // of an earlier query
  $("error").textContent = error.message;
  if (!(error instanceof Refused)) console.error(error);
}

const mib = (bytes) => (bytes / 2 ** 20).toFixed(bytes % 2 ** 20 ? 1 : 0);

// The query after the # stays in the browser: a reload or a bookmark asks it again.
function remember(asked) {
  const kept = new URLSearchParams(asked.picture ? {} : { q: asked.text, find: asked.find, n: asked.k, ...(asked.rerank && { rerank: 1 }) });
  history.replaceState(null, "", asked.picture ? location.pathname : `#${kept}`);
}

function restore() {
  const kept = new URLSearchParams(location.hash.slice(1));
  if (!kept.get("q") || !info.items) return;
  $("text").value = kept.get("q");
  for (const [id, key] of [["find", "find"], ["count", "n"]]) {
    if ([...$(id).options].some((one) => one.value === kept.get(key))) $(id).value = kept.get(key);
  }
  adapt();
  $("rerank").checked = kept.has("rerank") && !$("rerank").disabled;
  submit();
}

// --- showing ----------------------------------------------------------------------------------------------------

function show(answer, asked) {
  const { hits, searched, milliseconds } = answer;
  const what = searched.find === "images" ? "pictures" : "captions";
  const moved = hits.filter((hit) => hit.rank !== hit.rank_before).length;
  const words = [`${hits.length} of ${searched.items.toLocaleString("en")} ${what} for ${asked.picture ? "the picture" : `“${asked.text}”`}`, `${ms(milliseconds.total)} ms`];
  if (searched.reranked) words.push(`the teacher read the first ${searched.reranked} and moved ${moved} of those shown`);
  $("status").textContent = words.join(" · ");
  showTimes(milliseconds);
  showHits(hits, searched.reranked > 0);
  $("times").hidden = $("answer").hidden = false;
}

const ms = (value) => value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : Math.round(value).toLocaleString("en");

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function showTimes(times) {
  const without = times.total - (times.rerank || 0);
  const rows = [["student alone", without, ["preprocess", "embed", "search"]]];
  if (times.rerank !== null) rows.push(["with re-ranking", times.total, Object.keys(PARTS)]);
  $("bars").replaceChildren(...rows.map(([label, sum, parts]) => {
    const track = element("span", { className: "track", ariaHidden: "true" });
    for (const part of parts) {
      const piece = element("i", { className: part });
      piece.style.width = `${100 * times[part] / times.total}%`;
      track.append(piece);
    }
    const words = parts.map((part) => `${PARTS[part]} ${ms(times[part])}`).join(" · ");
    return element("div", { className: "bar" }, element("span", { textContent: label }), track,
      element("span", { className: "sum", textContent: `${ms(sum)} ms` }), element("span", { className: "parts", textContent: words }));
  }));
}

function showHits(hits, reranked) {
  const before = new Map([...$("hits").children].map((one) => [one.dataset.key, one.getBoundingClientRect()]));
  made.forEach((url) => URL.revokeObjectURL(url));
  made = [];
  $("hits").replaceChildren(...hits.map((hit) => tile(hit, reranked)));
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const one of $("hits").children) {
    const from = before.get(one.dataset.key), to = one.getBoundingClientRect();
    if (!from || (from.x === to.x && from.y === to.y)) continue;
    const start = `translate(${from.x - to.x}px, ${from.y - to.y}px)`;
    one.animate([{ transform: start }, { transform: "none" }], { duration: MOVES, easing: "ease-out" });
  }
}

function tile(hit, reranked) {
  const label = hit.text ?? hit.captions[0] ?? hit.name;
  const open = element("button", { type: "button", ariaLabel: `Result ${hit.rank}: ${label}. Enlarge` });
  if (info.pictures && hit.picture !== null) fill(open, hit, label);
  else open.append(element("span", { className: "tile", textContent: hit.name ?? "no picture" }));
  open.addEventListener("click", () => enlarge(hit, label));
  const place = element("div", { className: "place" }, element("b", { textContent: `${hit.rank}` }));
  if (reranked) place.append(movement(hit));
  const about = element("div", { className: "about" }, place, element("div", { className: "words", textContent: label }));
  if (hit.name && hit.name !== label) about.append(element("div", { className: "picture-name", textContent: hit.name }));
  const scores = element("dl", { className: "scores" }, element("dt", { textContent: "student" }), element("dd", { textContent: hit.score.toFixed(3) }));
  if (reranked) {
    const score = hit.teacher_score === null ? "not asked" : hit.teacher_score.toFixed(3);
    scores.append(element("dt", { className: "teacher", textContent: "teacher" }), element("dd", { textContent: score }));
  }
  about.append(scores);
  const made = element("li", { className: "hit" }, open, about);
  made.dataset.key = `${hit.kind}-${hit.id}`;
  return made;
}

function movement(hit) {
  const by = hit.rank_before - hit.rank;
  if (!by) return element("span", { className: "move same", textContent: "= same place" });
  return element("span", { className: `move ${by > 0 ? "up" : "down"}`, textContent: `${by > 0 ? "▲" : "▼"} was ${hit.rank_before}` });
}

async function address(id, size) {
  const path = `picture/${id}?size=${size}`;
  if (!token) return path;
  const url = URL.createObjectURL(await (await ask(path)).blob()); // an <img> cannot send the token
  made.push(url);
  return url;
}

async function fill(button, hit, label) {
  const image = element("img", { alt: label, loading: "lazy", decoding: "async" });
  const instead = () => button.replaceChildren(element("span", { className: "tile", textContent: hit.name ?? "no picture" }));
  image.addEventListener("error", instead);
  button.append(image);
  try { image.src = await address(hit.picture, 512); } catch { instead(); }
}

async function enlarge(hit, label) {
  $("large-title").textContent = label;
  $("large-captions").replaceChildren(...hit.captions.slice(1).map((one) => element("li", { textContent: one })));
  $("large-picture").alt = label;
  $("large-picture").removeAttribute("src");
  $("large-picture").hidden = $("similar").hidden = !info.pictures || hit.picture === null;
  $("similar").onclick = () => searchWith(hit);
  $("large").showModal();
  if ($("large-picture").hidden) return;
  try { $("large-picture").src = await address(hit.picture, 1024); } catch (error) { $("large-title").textContent = error.message; }
}

async function searchWith(hit) {
  $("large").close();
  try {
    const blob = await (await ask(`picture/${hit.picture}?size=1024`)).blob();
    setPicture(new File([blob], hit.name ?? `picture ${hit.picture}`, { type: blob.type }));
    $("find").value = "images";
    adapt();
    submit();
  } catch (error) { fail(error); }
}
$("large").addEventListener("click", (event) => { if (event.target === $("large")) $("large").close(); });

start();
