"use strict";

const byId = (id) => document.getElementById(id);
let running = null; // aborts what is being watched

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

const visible = (text) => /^<\|.*\|>$/.test(text) ? "∎" :
  text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "·";

// ---- one policy --------------------------------------------------------------------------------

class Panel {
  constructor(policy) {
    this.root = make("section", "policy");
    this.root.setAttribute("aria-label", policy);
    this.facts = make("p", "facts", "waiting");
    this.canvas = make("div", "canvas");
    this.details = make("p", "details", "");
    this.root.append(make("h2", "", policy), this.facts, this.canvas, this.details);
    this.cells = [];
  }

  show(canvas) {
    const rows = new Map((canvas.positions || []).map((position, row) => [position, row]));
    while (this.cells.length < canvas.tokens.length) this.cells.push(this.cell(this.cells.length));
    this.last = { canvas, rows };
    this.cells.forEach((cell, position) => this.paint(cell, position));
    const left = canvas.masked.filter(Boolean).length;
    this.facts.textContent = `${canvas.step} steps · forwards ${canvas.forwards} · ` +
      `backwards ${canvas.backwards} · ${left} of ${canvas.tokens.length} masked`;
    if (this.pointed !== undefined) this.point(this.pointed);
  }

  cell(position) {
    const made = make("button", "cell");
    made.type = "button";
    made.append(make("span", "token"));
    made.addEventListener("mouseenter", () => this.point(position));
    made.addEventListener("focus", () => this.point(position));
    this.canvas.append(made);
    return made;
  }

  paint(cell, position) {
    const { canvas, rows } = this.last;
    const masked = canvas.masked[position];
    const row = rows.get(position);
    cell.classList.toggle("written", !masked);
    const token = masked ? (row === undefined ? "" : canvas.proposals[row]) : canvas.texts[position];
    cell.firstChild.textContent = token === "" ? "" : visible(token);
    if (!masked) cell.style.background = "";
    else if (row === undefined) cell.style.background = "#d1d1d1";
    else {
      const share = Math.min(1, canvas.entropy[row] / 3);
      cell.style.background = `hsl(205 80% ${Math.round(96 - 46 * share)}%)`;
    }
  }

  point(position) {
    this.pointed = position;
    const { canvas, rows } = this.last;
    const row = rows.get(position);
    const what = canvas.masked[position] ? "masked" : `written ${visible(canvas.texts[position])}`;
    const numbers = row === undefined ? "" :
      `; proposed ${visible(canvas.proposals[row])} with probability ` +
      `${canvas.confidence[row].toFixed(3)}, entropy ${canvas.entropy[row].toFixed(3)} nats`;
    const score = row === undefined ? undefined : (canvas.scores || [])[row];
    const chosenBy = typeof score === "number" ? `, score ${score.toFixed(3)}` : "";
    this.details.textContent = `position ${position}: ${what}${numbers}${chosenBy}`;
  }

  end(report) {
    this.root.dataset.done = "true";
    this.facts.textContent += ` · done: ${report.denoising_steps} steps, forwards ` +
      `${report.forwards}, backwards ${report.backwards}, rows ` +
      `${report.rows_forward + report.rows_backward}`;
  }
}

// ---- the server --------------------------------------------------------------------------------

async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// Asks with the key that was typed, which is kept nowhere else.
async function ask(path, signal, body) {
  const key = byId("key").value;
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, body ?
    { method: "POST", headers, body: JSON.stringify(body), signal } : { headers, signal });
  if (answer.status === 401) throw new Error("This server has a key; type it above.");
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}

async function watch(policy, panel, model, signal) {
  const body = {
    model,
    prompt: byId("prompt").value,
    max_tokens: Number(byId("tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
    vllm_xargs: { policy, tokens_per_step: Number(byId("rate").value), stream_canvas: true },
  };
  const answer = await ask("v1/completions", signal, body);
  for await (const event of eventsOf(answer)) {
    if (event.error) throw new Error(event.error.message);
    if (event.canvas) panel.show(event.canvas);
    for (const choice of event.choices || []) if (choice.boe) panel.end(choice.boe);
  }
}

async function start(event) {
  event.preventDefault();
  if (running) running.abort();
  const mine = running = new AbortController();
  byId("problem").textContent = "";
  const names = byId("policies").value.split(",").map((name) => name.trim()).filter(Boolean);
  const panels = names.map((name) => new Panel(name));
  byId("panels").replaceChildren(...panels.map((panel) => panel.root));
  try {
    const models = await (await ask("v1/models", mine.signal)).json();
    const model = models.data[0].id;
    await Promise.all(names.map((name, n) => watch(name, panels[n], model, mine.signal)));
  } catch (error) {
    if (!mine.signal.aborted) byId("problem").textContent = error.message;
  }
}

byId("ask").addEventListener("submit", start);
