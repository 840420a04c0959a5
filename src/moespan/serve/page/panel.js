// The live view: load, ranks in their layout, experts. Asks the server only while somebody looks.

import { byId, element, shape } from "./dom.js";
import { Refused, ask } from "./server.js";
import { word } from "./words.js";

const EVERY_MS = 1000;
const MOST_POINTS = 120;
const MOST_MOMENTS = 120;
const BEHIND_S = 3;   // a rank that is silent for longer is marked
const EXPERTS_EVERY = 5;

const HEALTHY = new Set(["ready", "overloaded"]);

export class Panel {
  constructor(model) {
    this.model = model;
    this.rates = [];
    this.moments = [];
    this.turn = 0;
    this.isShown = true;
    document.addEventListener("visibilitychange", () => this.look());
    byId("show-panel").addEventListener("click", () => this.toggle());
    byId("moment").addEventListener("input", () => this.drawHeat());
    if (matchMedia("(max-width: 60rem)").matches) this.toggle();
    this.look();
  }

  toggle() {
    this.isShown = !this.isShown;
    byId("panel").hidden = !this.isShown;
    byId("show-panel").setAttribute("aria-expanded", String(this.isShown));
    if (this.isShown && this.timer) this.look().then(() => byId("panel").scrollIntoView());
  }

  /** Ask once, and again after a while, as long as the page is visible. */
  async look() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    try {
      await this.update();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.showHealth(error.status === 401 ? "unauthorised" : "unreachable");
    } finally {
      // A hidden panel only needs the health.
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.look(), this.isShown ? EVERY_MS : 5 * EVERY_MS);
    }
  }

  async update() {
    const state = await ask("ui/state");
    this.state = state;
    this.model.id = state.model;
    byId("model").textContent = state.model;
    this.showHealth(state.state, state.trouble);
    this.measureRate(state);
    if (!this.isShown) return;
    this.draw();
    if (state.has_experts && this.turn++ % EXPERTS_EVERY === 0) await this.takeMoment();
  }

  /** Draw everything anew, as after a change of the language. */
  draw() {
    if (!this.state) return;
    this.showHealth(this.state.state, this.state.trouble);
    this.drawFigures();
    this.drawCurve();
    this.drawRanks();
    this.drawHeat();
  }

  showHealth(state, trouble = "") {
    const text = trouble ? word("trouble", trouble) : word(state) ?? state;
    const health = byId("health");
    if (health.textContent !== text) health.textContent = text;
    health.className = `health ${HEALTHY.has(state) && !trouble ? "good" : "bad"}`;
  }

  measureRate(state) {
    const now = state.generated_tokens, at = performance.now();
    if (this.last && now >= this.last.tokens) {
      this.rates.push((now - this.last.tokens) / ((at - this.last.at) / 1000));
      this.rates = this.rates.slice(-MOST_POINTS);
    }
    this.last = { tokens: now, at };
  }

  get rate() {
    return Math.round(this.rates.at(-1) ?? 0);
  }

  drawFigures() {
    const { state } = this;
    const asked = state.prefix_queried_tokens;
    const rows = [
      ["running", state.running], ["waiting", state.waiting], ["live", state.live_requests],
      ["rate", this.rate], ["kv", `${(100 * state.kv_usage).toFixed(1)} %`],
      ["prefix", asked ? `${(100 * state.prefix_hit_tokens / asked).toFixed(0)} %` : "–"],
      ["restarts", state.restarts], ["uptime", duration(state.uptime_s)],
    ];
    byId("figures").replaceChildren(...rows.map(([name, value]) =>
      element("div", {}, element("dt", { textContent: word(name) }), element("dd", { textContent: value }))));
  }

  drawCurve() {
    const most = Math.max(1, ...this.rates);
    const points = this.rates.map((rate, index) => `${240 - 2 * (this.rates.length - 1 - index)},${58 - 54 * rate / most}`);
    const curve = byId("curve");
    curve.setAttribute("aria-label", word("curve", this.rate));
    curve.replaceChildren(shape("polyline", { points: points.join(" "), fill: "none", stroke: "currentColor", "stroke-width": 1.5 }));
  }

  /** Nodes hold stages, stages hold replicas, replicas hold ranks. */
  drawRanks() {
    const { ranks, layout } = this.state;
    byId("layout-name").textContent = `${layout}${this.state.about ? ` · ${this.state.about}` : ""}`;
    const nodes = grouped(ranks, (rank) => rank.node).map(([node, ofNode]) => group(word("node", node),
      grouped(ofNode, (rank) => rank.stage).map(([stage, ofStage]) => group(word("stage", stage),
        grouped(ofStage, (rank) => rank.replica).map(([replica, own]) => group(word("replica", replica),
          [element("div", { class: "cells" }, ...own.map(rankElement))]))))));
    byId("ranks").replaceChildren(...nodes);
  }

  async takeMoment() {
    const { counts } = await ask("ui/experts");
    const slider = byId("moment"), isLast = slider.value === slider.max;
    this.moments = [...this.moments, counts].slice(-MOST_MOMENTS);
    slider.max = this.moments.length - 1;
    if (isLast) slider.value = slider.max;
    byId("experts").hidden = false;
    this.drawHeat();
  }

  /** Tokens of each layer and expert between a moment and the one before. */
  drawHeat() {
    const at = Number(byId("moment").value), now = this.moments[at], before = this.moments[at - 1];
    if (!now) return;
    const rows = now.map((row, layer) => row.map((count, expert) => Math.max(0, count - (before?.[layer]?.[expert] ?? 0))));
    const most = Math.max(1, ...rows.flat());
    const canvas = byId("heat");
    canvas.width = rows[0].length;
    canvas.height = rows.length;
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    rows.flat().forEach((count, index) => image.data.set(colour(count / most), 4 * index));
    context.putImageData(image, 0, 0);
    const about = word("heat", rows.length, rows[0].length);
    canvas.setAttribute("aria-label", about);
    byId("heat-about").textContent = about;
  }
}

/** [key, members] for each key, in the order in which keys first appear. */
function grouped(items, keyOf) {
  const groups = new Map();
  for (const item of items) groups.set(keyOf(item), [...(groups.get(keyOf(item)) ?? []), item]);
  return [...groups];
}

/** A frame with a title around `members`. A single frame inside would say nothing, so it goes. */
function group(title, members) {
  const [first, ...others] = members;
  const inside = others.length || !first.classList.contains("group") ? members : [...first.children].slice(1);
  return element("div", { class: "group" }, element("h3", { textContent: title }), ...inside);
}

function rankElement(rank) {
  const isBehind = rank.silent_s > BEHIND_S;
  const place = isBehind ? `${rank.place}; ${word("silent", Math.round(rank.silent_s))}` : rank.place;
  return element("span", {
    class: `rank ${isBehind ? "behind" : rank.is_busy ? "busy" : "idle"}`, title: word("rank", rank.rank, place), role: "img",
    "aria-label": word("rank", rank.rank, place), textContent: `${rank.rank}${isBehind ? "!" : ""}`,
  });
}

const duration = (seconds) => {
  const [days, hours, minutes] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
};

/** Dark blue over magenta to yellow, for a share within 0..1. */
function colour(share) {
  const stops = [[13, 8, 70], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];
  const at = Math.sqrt(share) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2), part = at - low;
  return [...stops[low].map((value, index) => value + part * (stops[low + 1][index] - value)), 255];
}
