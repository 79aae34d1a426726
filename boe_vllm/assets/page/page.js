"use strict";

const recording = JSON.parse(document.getElementById("recording").textContent);
const LINES = ["", "8 5", "2 4", "12 4 2 4"];
const last = Math.max(...recording.trajectories.map((t) => t.steps.length));
const slider = document.getElementById("step");
let selected = null; // a position of the canvas, the same in every panel
let timer = null;

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function draw(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const number = (value, digits = 3) => value.toFixed(digits).replace("-", "−");
const glyph = (token) => recording.glyphs[token];
const sum = (values) => values.reduce((a, b) => a + b, 0);

function shade(entropy) {
  const share = Math.min(1, entropy / recording.highest);
  return Math.round(share * (recording.scale.length - 1));
}

// ---- one policy --------------------------------------------------------------------------------

class Panel {
  constructor(trajectory) {
    this.trajectory = trajectory;
    this.root = make("section", "policy");
    this.root.setAttribute("aria-label", trajectory.label);
    this.facts = make("p", "facts");
    this.canvas = make("div", recording.width ? "canvas grid" : "canvas");
    this.canvas.setAttribute("role", "group");
    this.canvas.setAttribute("aria-label", `canvas of ${trajectory.label}`);
    if (recording.width) {
      this.canvas.style.gridTemplateColumns = `repeat(${recording.width}, minmax(0, 1fr))`;
      this.canvas.style.maxWidth = `${recording.width * 60}px`;
    }
    this.cells = trajectory.tokens.map((_, position) => this.cell(position));
    this.details = make("div", "details");
    this.root.append(make("h2", "", trajectory.label), this.facts, this.canvas, this.details);
    this.orders = new Map(); // "step position" -> number in the order of writing
    let order = 0;
    trajectory.steps.forEach((step, n) =>
      step.committed.forEach((position) => this.orders.set(`${n} ${position}`, ++order)));
  }

  cell(position) {
    const made = make("button", "cell");
    made.type = "button";
    made.tabIndex = position ? -1 : 0;
    made.dataset.position = position;
    made.append(make("span", "order"), make("span", "token"), make("span", "change"));
    made.addEventListener("mouseenter", () => select(position));
    made.addEventListener("focus", () => select(position));
    made.addEventListener("keydown", (event) => this.move(event, position));
    this.canvas.append(made);
    return made;
  }

  move(event, position) {
    const row = recording.width || 1;
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -row, ArrowDown: row }[event.key];
    const to = this.cells[position + by];
    if (by === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    if (to) to.focus();
  }

  show(frame) {
    const steps = this.trajectory.steps;
    this.frame = Math.min(frame, steps.length);
    this.step = steps[this.frame] || null;
    this.tokens = this.step ? this.step.tokens : this.trajectory.tokens;
    this.rows = new Map((this.step ? this.step.positions : []).map((p, row) => [p, row]));
    this.facts.textContent = this.summary();
    this.cells.forEach((cell, position) => this.paint(cell, position));
    this.point();
  }

  summary() {
    const before = this.frame ? this.trajectory.steps[this.frame - 1] : null;
    const left = this.step ? sum(this.step.entropy) : 0;
    const parts = [
      `${this.frame} of ${this.trajectory.steps.length} steps done`,
      `forwards ${before ? before.forwards : 0}`,
      `backwards ${before ? before.backwards : 0}`,
      `remaining entropy ${number(left, 2)} nats`,
    ];
    if (!this.step) {
      const verdict = { true: "valid", false: "not valid", null: "not judged" };
      parts.push(`answer ${verdict[this.trajectory.valid]}`);
    }
    return parts.join(" · ");
  }

  paint(cell, position) {
    const token = this.tokens[position];
    const masked = token === recording.mask_token;
    const row = this.rows.get(position);
    const [order, text] = cell.children;
    const colour = row === undefined ? null : shade(this.step.entropy[row]);
    const likely = row === undefined ? null : this.step.top_tokens[row][0];
    const written = this.step && this.orders.get(`${this.frame} ${position}`);
    const again = Boolean(this.step && this.step.remasked.includes(position));
    cell.classList.toggle("written", !masked);
    cell.classList.toggle("remasked", again);
    cell.style.background = colour === null ? (masked ? "#d1d1d1" : "") : recording.scale[colour];
    cell.style.color = colour === null ? "" : recording.inks[colour];
    order.textContent = again ? "×" : written || "";
    order.hidden = !order.textContent;
    text.textContent = masked ? (likely === null ? " " : glyph(likely)) : glyph(token);
    cell.setAttribute("aria-label", this.name(position, masked, row, likely, written));
  }

  name(position, masked, row, likely, written) {
    const parts = [`position ${position}`];
    if (!masked) parts.push(`written: ${glyph(this.tokens[position])}`);
    else if (row === undefined) parts.push("masked, in a later block");
    else parts.push(`masked, entropy ${number(this.step.entropy[row])}, likely ${glyph(likely)}`);
    if (written) parts.push(`written by this step, number ${written}`);
    return parts.join(", ");
  }

  // Shows the selected position: its predictions, and its influence on the others.
  point() {
    this.cells.forEach((cell, position) => {
      cell.classList.toggle("selected", position === selected);
      cell.children[2].textContent = "";
      cell.style.boxShadow = "";
    });
    this.details.replaceChildren();
    if (selected === null) {
      this.details.append(make("p", "", "Point at a cell for its predictions."));
      return;
    }
    const row = this.rows.get(selected);
    const masked = this.tokens[selected] === recording.mask_token;
    const state = masked ? "masked" : `written: ${glyph(this.tokens[selected])}`;
    this.details.append(make("h3", "", `Position ${selected}, ${state}`));
    if (row === undefined) {
      const why = masked ? "Its block comes later: no prediction yet." : this.history();
      this.details.append(make("p", "", why));
      return;
    }
    this.details.append(this.numbers(row), this.likely(row));
    if (this.step.influence) this.highlight(this.step.influence[row]);
  }

  history() {
    for (let n = this.frame - 1; n >= 0; n--) {
      const order = this.orders.get(`${n} ${selected}`);
      if (order) {
        const step = this.trajectory.steps[n];
        const entropy = step.entropy[step.positions.indexOf(selected)];
        return `Written by step ${n} as number ${order}, at an entropy of ${number(entropy)} nats.`;
      }
    }
    return "It came with the request.";
  }

  numbers(row) {
    const list = make("dl");
    const scores = this.step.scores;
    const score = scores === null ? "none" : scores[row] ?? "not a candidate";
    const facts = [
      ["entropy", `${number(this.step.entropy[row])} nats`],
      ["score", typeof score === "number" ? number(score) : score],
      ["confidence", number(this.step.confidence[row])],
    ];
    if (this.step.influence) facts.push(["influence", this.influence(this.step.influence[row])]);
    for (const [name, value] of facts) list.append(make("dt", "", name), make("dd", "", value));
    return list;
  }

  influence(changes) {
    const most = changes
      .map((change, row) => [change, this.step.positions[row]])
      .sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]))
      .slice(0, 2)
      .filter(([change]) => change)
      .map(([change, position]) => `${number(change)} at ${position}`);
    return `${number(sum(changes))} nats on all others` + (most.length ? `; ${most.join(", ")}` : "");
  }

  likely(row) {
    const table = make("table");
    table.append(make("caption", "", "most likely tokens"));
    this.step.top_tokens[row].forEach((token, place) => {
      const probability = this.step.top_probabilities[row][place];
      const line = make("tr");
      const bar = make("span", "bar");
      bar.style.width = `${100 * probability}%`;
      const cell = make("td");
      cell.append(bar);
      line.append(make("td", "", glyph(token)), make("td", "", number(probability)), cell);
      table.append(line);
    });
    return table;
  }

  highlight(changes) {
    const most = Math.max(...changes.map(Math.abs));
    changes.forEach((change, row) => {
      if (Math.abs(change) < 0.0005) return;
      const cell = this.cells[this.step.positions[row]];
      cell.children[2].textContent = (change < 0 ? "▼" : "▲") + Math.abs(change).toFixed(2);
      const wide = 1 + Math.round((4 * Math.abs(change)) / most);
      const colour = change < 0 ? "#56b4e9" : "#e69f00";
      cell.style.boxShadow = `inset 0 0 0 1px #000, inset 0 0 0 ${wide + 1}px ${colour}`;
    });
  }
}

// ---- the page ----------------------------------------------------------------------------------

function select(position) {
  selected = position;
  panels.forEach((panel) => panel.point());
}

function go(frame) {
  slider.value = Math.max(0, Math.min(last, frame));
  const at = Number(slider.value);
  const where = at === last ? "the end" : `step ${at} of ${last}`;
  document.getElementById("where").textContent = where;
  slider.setAttribute("aria-valuetext", where);
  const cursor = document.getElementById("cursor");
  for (const end of ["x1", "x2"]) cursor.setAttribute(end, (1000 * at) / last);
  panels.forEach((panel) => panel.show(at));
}

function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(forward, 600) : null;
  const button = document.getElementById("play");
  button.textContent = on ? "Pause" : "Play";
  button.setAttribute("aria-pressed", String(on));
}

function forward() {
  go(Number(slider.value) + 1);
  if (Number(slider.value) === last) play(false);
}

function curves() {
  const left = recording.trajectories.map((t) => [...t.steps.map((s) => sum(s.entropy)), 0]);
  const most = Math.max(...left.flat()) || 1;
  const chart = document.getElementById("curves");
  document.getElementById("most").textContent = `(0 to ${number(most, 1)} nats, over the steps)`;
  chart.setAttribute("aria-label", "remaining entropy over the steps, one line per policy");
  recording.trajectories.forEach((trajectory, n) => {
    const look = {
      stroke: recording.palette[n % recording.palette.length],
      "stroke-dasharray": LINES[n % LINES.length],
    };
    const points = left[n].map((value, k) => `${(1000 * k) / last},${97 - (94 * value) / most}`);
    chart.append(draw("polyline", { points: points.join(" "), ...look }));
    const sample = draw("svg", { viewBox: "0 0 36 10", "aria-hidden": "true" });
    sample.append(draw("line", { x1: 0, x2: 36, y1: 5, y2: 5, "stroke-width": 3, ...look }));
    const item = make("li");
    item.append(sample, trajectory.label);
    document.getElementById("lines").append(item);
  });
  chart.append(draw("line", { id: "cursor", x1: 0, x2: 0, y1: 0, y2: 100 }));
}

recording.scale.forEach((colour) => {
  const piece = make("span");
  piece.style.background = colour;
  document.getElementById("scale").append(piece);
});
document.getElementById("highest").textContent = `${number(recording.highest, 2)} nats`;
const panels = recording.trajectories.map((trajectory) => new Panel(trajectory));
document.getElementById("policies").append(...panels.map((panel) => panel.root));
slider.max = last;
slider.addEventListener("input", () => go(Number(slider.value)));
document.getElementById("previous").addEventListener("click", () => go(Number(slider.value) - 1));
document.getElementById("next").addEventListener("click", forward);
document.getElementById("play").addEventListener("click", () => {
  if (timer === null && Number(slider.value) === last) go(0);
  play(timer === null);
});
document.addEventListener("keydown", (event) => {
  if (event.target === slider || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "ArrowLeft") go(Number(slider.value) - 1);
  if (event.key === "ArrowRight") forward();
});
curves();
go(0);
