// The list of samples, its filters, and the pages of samples, which go through the list as it is filtered. SAMPLES is
// in samples.js. Texts come from data sets: they are only ever put into textContent.
"use strict";
const get = id => document.getElementById(id);
const make = (name, parent, text = "", kind = "") => {
  const node = document.createElement(name);
  node.textContent = text;
  if (kind) node.className = kind;
  parent.append(node);
  return node;
};

const FIELDS = ["text", "source", "task", "state", "least", "most", "sort"];
const SHOWN = 300;  // at once
const ORDERS = {
  "": ["in their order", (a, b) => a.number - b.number],
  source: ["by source", (a, b) => a.source < b.source ? -1 : a.source > b.source ? 1 : 0],
  long: ["longest first", (a, b) => b.tokens - a.tokens],
  short: ["shortest first", (a, b) => a.tokens - b.tokens],
  crops: ["most crops first", (a, b) => b.crops - a.crops],
  points: ["most points first", (a, b) => b.points - a.points],
  weight: ["heaviest loss first", (a, b) => b.weight - a.weight],
  targets: ["most targets first", (a, b) => b.targets - a.targets],
};

const wishes = () => new URLSearchParams(location.hash.slice(1));

function chosen(wish) {
  const plain = text => text.toLowerCase().replace(/\s+/g, " ");
  const phrase = plain(wish.get("text") || "").trim();
  const least = wish.get("least") || 0, most = wish.get("most") || Infinity;
  return SAMPLES.filter(sample => {
    if (wish.get("source") && sample.source !== wish.get("source")) return false;
    if (wish.get("task") && !sample.tasks.includes(wish.get("task"))) return false;
    if (wish.get("state") && sample.state !== wish.get("state")) return false;
    if (sample.tokens < least || sample.tokens > most) return false;
    const text = [sample.key, sample.source, sample.where, sample.question, sample.answer, ...sample.changes];
    return text.some(part => plain(part).includes(phrase));
  }).sort((ORDERS[wish.get("sort")] || ORDERS[""])[1]);
}

function row(sample, parent) {
  const box = make(sample.page ? "a" : "div", parent, "", "sample");
  if (sample.page) box.href = sample.page + location.hash;
  const thumbnail = make("div", box, "", "thumbnail");
  if (sample.thumbnail) {
    const image = make("img", thumbnail);
    image.loading = "lazy";
    image.src = sample.thumbnail;
  } else thumbnail.textContent = sample.page ? "text" : "dropped";
  const about = make("div", box);
  make("div", about, `${sample.source} / ${sample.key}`, "name");
  if (sample.where) make("div", about, sample.where, "small quiet");
  for (const task of sample.tasks) make("span", about, task, "tag");
  for (const change of sample.changes) make("span", about, change, sample.page ? "tag changed" : "tag dropped");
  const talk = make("div", box);
  make("div", talk, sample.question, "text");
  if (sample.answer) make("div", talk, sample.answer, "text answer-text");
  const numbers = make("div", box, "", "numbers");
  if (sample.page) {
    const crops = sample.crops ? `, ${sample.crops} crops` : "";
    make("div", numbers, `${sample.tokens.toLocaleString("en")} tokens${crops}`);
    make("div", numbers, `${sample.targets} targets, weight ${sample.weight.toPrecision(3)}`);
    if (sample.points) make("div", numbers, `${sample.points} points`);
    make("div", numbers, `no. ${sample.number}, row ${sample.row}`);
  }
}

function list(most = SHOWN) {
  const found = chosen(wishes());
  get("count").textContent = `${found.length} of ${SAMPLES.length}`;
  get("samples").replaceChildren();
  found.slice(0, most).forEach(sample => row(sample, get("samples")));
  if (found.length > most) {
    const more = make("button", get("samples"), `show ${Math.min(SHOWN, found.length - most)} more`);
    more.id = "more";
    more.onclick = () => list(most + SHOWN);
  }
  if (!found.length) make("p", get("samples"), "No sample is like that.", "quiet");
}

function startList() {
  const fill = (id, all, values) => {
    make("option", get(id), all).value = "";
    for (const value of [...new Set(values)].sort()) make("option", get(id), value).value = value;
  };
  fill("source", "all sources", SAMPLES.map(sample => sample.source));
  fill("task", "all tasks", SAMPLES.flatMap(sample => sample.tasks));
  for (const [name, [text]] of Object.entries(ORDERS)) make("option", get("sort"), text).value = name;
  const read = () => { for (const id of FIELDS) get(id).value = wishes().get(id) || ""; list(); };
  for (const id of FIELDS) {
    get(id).oninput = () => {
      const wish = new URLSearchParams(FIELDS.filter(id => get(id).value).map(id => [id, get(id).value]));
      history.replaceState(null, "", `#${wish}`);
      list();
    };
  }
  window.onhashchange = read;
  read();
}

function startSteps(header) {
  const found = chosen(wishes()).filter(sample => sample.page);
  const place = found.findIndex(sample => sample.number === +header.dataset.number);
  const link = (id, sample) => { if (sample) get(id).href = `../${sample.page}${location.hash}`; };
  link("previous", found[place - 1]);
  link("next", place < 0 ? undefined : found[place + 1]);
  get("all").href = `../index.html${location.hash}`;
  get("where").textContent = place < 0 ? "" : `${place + 1} of ${found.length}` + (location.hash.length > 1 ? " chosen" : "");
  document.addEventListener("keydown", event => {
    if (event.target.closest("input, select, textarea, video") || event.ctrlKey || event.metaKey || event.altKey) return;
    const id = { ArrowLeft: "previous", ArrowRight: "next" }[event.key];
    if (id && get(id).href) location.href = get(id).href;
  });
}

// data-marks of a film: its objects, and for each of its frames [object, x, y] of what is there. The controls are our
// own, and below the picture: a browser's would lie upon the points.
function startFilm(film) {
  const video = film.querySelector("video"), stage = film.querySelector(".stage"), fps = +film.dataset.fps;
  const play = film.querySelector(".play"), range = film.querySelector("input"), time = film.querySelector(".time");
  const { objects, frames } = JSON.parse(film.dataset.marks || '{"objects": [], "frames": []}');
  let drawn = -1;
  const draw = () => {
    const now = Math.min(+range.max, Math.floor(video.currentTime * fps + 0.01));
    time.textContent = `${video.currentTime.toFixed(1)} s`;
    if (now === drawn) return;
    drawn = range.value = now;
    for (const old of stage.querySelectorAll(".mark")) old.remove();
    for (const [object, x, y] of frames[now] || []) {
      const dot = make("span", stage, "", "mark");
      dot.style.left = `${100 * x}%`;
      dot.style.top = `${100 * y}%`;
      dot.style.background = objects[object].colour;
      make("b", dot, String(objects[object].number));
    }
  };
  const loop = () => { draw(); if (!video.paused) requestAnimationFrame(loop); };
  const toggle = () => { if (video.paused) video.play(); else video.pause(); };
  video.onplay = () => { play.textContent = "pause"; loop(); };
  video.onpause = () => { play.textContent = "play"; draw(); };
  video.onseeked = video.onloadeddata = draw;
  video.onerror = () => { time.textContent = "this browser cannot play it"; };
  play.onclick = stage.onclick = toggle;
  range.oninput = () => { video.pause(); video.currentTime = (+range.value + 0.1) / fps; };
  draw();
}

function startUnits() {
  const scales = { fraction: () => 1, percent: () => 100, pixels: side => side, thousandths: () => 1000 };
  const digits = { fraction: 3, percent: 1, pixels: 1, thousandths: 0 };
  const boxes = [...document.querySelectorAll(".units")];
  const use = unit => {
    for (const radio of document.querySelectorAll(".units input")) radio.checked = radio.value === unit;
    for (const cell of document.querySelectorAll("td[data-value]")) {
      cell.textContent = (cell.dataset.value * scales[unit](+cell.dataset.side)).toFixed(digits[unit]);
    }
  };
  for (const radio of document.querySelectorAll(".units input")) radio.onchange = () => use(radio.value);
  if (boxes.length) use(boxes[0].dataset.unit);
}

function startPictures() {
  for (const button of document.querySelectorAll("[data-toggle]")) {
    button.onclick = () => button.closest("figure").classList.toggle(button.dataset.toggle);
  }
  for (const stage of document.querySelectorAll(".picture .stage")) {
    const side = Math.max(...["--width", "--height"].map(name => +stage.style.getPropertyValue(name)));
    stage.classList.toggle("crisp", side < 300);  // enlarged, its pixels are to be seen
  }
  for (const part of document.querySelectorAll(".pointed")) {
    const video = part.querySelector("video");
    for (const node of part.querySelectorAll("[data-seconds]")) {
      if (video) node.onclick = () => { video.pause(); video.currentTime = +node.dataset.seconds; };
    }
    for (const node of part.querySelectorAll("tr[data-mark], .mark[data-mark]")) {
      const same = part.querySelectorAll(`[data-mark="${node.dataset.mark}"]`);
      node.onmouseenter = () => same.forEach(other => other.classList.add("chosen"));
      node.onmouseleave = () => same.forEach(other => other.classList.remove("chosen"));
    }
  }
}

const steps = document.querySelector("header.steps");
if (steps) {
  startSteps(steps);
  document.querySelectorAll(".film").forEach(startFilm);
  startUnits();
  startPictures();
} else startList();
