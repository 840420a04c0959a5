// The conversation: questions, answers as they come, parameters, alternatives of tokens.

import { byId, element } from "./dom.js";
import { Refused, ask, events } from "./server.js";
import { word } from "./words.js";

const FIELDS = [
  { name: "system", word: "system", kind: "text" },
  { name: "temperature", word: "temperature", kind: "number", min: 0, max: 2, step: 0.1, value: 0.7 },
  { name: "top_p", word: "topP", kind: "number", min: 0.01, max: 1, step: 0.01, value: 1 },
  { name: "max_tokens", word: "maxTokens", kind: "number", min: 1, step: 1, value: 512 },
  { name: "seed", word: "seed", kind: "number", min: 0, step: 1 },
  { name: "stop", word: "stopStrings", kind: "lines" },
  { name: "alternatives", word: "alternatives", kind: "check" },
];
const MOST_ALTERNATIVES = 5;

/** The conversation with `model`, an object whose `id` is filled in once the server has told it. */
export class Talk {
  constructor(model) {
    this.model = model;
    this.turns = [];      // messages of the chat, as the server takes them
    this.mode = "chat";
    this.running = null;  // aborts the answer under way
    this.inputs = {};
    this.makeParameters();
    byId("ask").addEventListener("submit", (event) => { event.preventDefault(); this.submit(); });
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("clear").addEventListener("click", () => this.clear());
    byId("question").addEventListener("keydown", (event) => this.onKey(event));
    byId("question").addEventListener("input", () => this.countSoon());
    const tabs = [byId("mode-chat"), byId("mode-text")];
    for (const tab of tabs) {
      tab.addEventListener("click", () => this.choose(tab));
      tab.addEventListener("keydown", (event) => {
        if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
        const other = tabs[1 - tabs.indexOf(tab)];
        this.choose(other);
        other.focus();
      });
    }
  }

  makeParameters() {
    for (const field of FIELDS) {
      const id = `parameter-${field.name}`;
      const input = field.kind === "text" || field.kind === "lines"
        ? element("textarea", { id, rows: 2 })
        : element("input", { id, type: field.kind === "check" ? "checkbox" : "number" });
      for (const key of ["min", "max", "step", "value"]) if (field[key] !== undefined) input[key] = field[key];
      this.inputs[field.name] = input;
      byId("parameters").append(element("label", { for: id, "data-word": field.word }), input);
    }
  }

  onKey(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.submit();
    } else if (event.key === "Escape") this.running?.abort();
  }

  choose(tab) {
    if (this.running) return;
    this.mode = tab.id === "mode-chat" ? "chat" : "text";
    for (const one of [byId("mode-chat"), byId("mode-text")]) {
      one.setAttribute("aria-selected", String(one === tab));
      one.tabIndex = one === tab ? 0 : -1;
    }
    this.inputs.system.disabled = this.mode === "text";
    this.clear();
  }

  clear() {
    this.running?.abort();
    this.turns = [];
    byId("answers").replaceChildren();
    byId("question").focus();
  }

  /** What a request says beside its prompt. */
  parameters() {
    const given = {};
    for (const { name, kind } of FIELDS) {
      const input = this.inputs[name];
      if (kind === "number" && input.value !== "") given[name] = Number(input.value);
      if (kind === "lines" && input.value) given[name] = input.value.split("\n").filter(Boolean);
    }
    if (this.inputs.alternatives.checked)
      Object.assign(given, this.mode === "chat" ? { logprobs: true, top_logprobs: MOST_ALTERNATIVES } : { logprobs: MOST_ALTERNATIVES });
    return given;
  }

  messages(question) {
    const system = this.inputs.system.value.trim();
    return [...(system ? [{ role: "system", content: system }] : []), ...this.turns, { role: "user", content: question }];
  }

  submit() {
    const box = byId("question");
    if (this.running || !box.value.trim()) return;
    const question = box.value;
    box.value = "";
    byId("count").value = "";
    this.answer(question);
  }

  async answer(question) {
    const shown = new Answer(question, this.mode, () => this.retry(shown));
    byId("answers").append(...shown.elements);
    shown.reveal();
    this.running = new AbortController();
    this.showRunning();
    try {
      await this.receive(question, shown);
      byId("spoken").textContent = word("finished");
    } catch (error) {
      shown.fail(this.running.signal.aborted ? word("stopped") : this.reason(error));
    }
    this.running = null;
    this.showRunning();
    shown.end();
    if (this.mode === "chat" && shown.text) {
      shown.before = this.turns;
      this.turns = [...this.turns, { role: "user", content: question }, { role: "assistant", content: shown.text.trim() }];
    }
  }

  async receive(question, shown) {
    const isChat = this.mode === "chat";
    const body = {
      model: this.model.id, stream: true, stream_options: { include_usage: true }, ...this.parameters(),
      ...(isChat ? { messages: this.messages(question) } : { prompt: question }),
    };
    for await (const event of events(isChat ? "v1/chat/completions" : "v1/completions", body, this.running.signal)) {
      if (event.usage) shown.tokens = event.usage.completion_tokens;
      for (const choice of event.choices) {
        const text = isChat ? choice.delta.content ?? "" : choice.text;
        shown.add(text, isChat ? chatTokens(choice, shown.decoder) : textTokens(choice), choice.finish_reason);
      }
    }
  }

  reason(error) {
    if (error instanceof Refused && error.message) return `${word("failed")}: ${error.message}`;
    return word("lost");
  }

  /** Ask the question of `shown` once more, if it is the last one. */
  retry(shown) {
    if (this.running) return;
    if (shown.before) this.turns = shown.before;
    shown.elements.forEach((one) => one.remove());
    this.answer(shown.question);
  }

  showRunning() {
    byId("stop").hidden = !this.running;
    byId("send").disabled = Boolean(this.running);
    byId("answers").setAttribute("aria-busy", String(Boolean(this.running)));
  }

  countSoon() {
    clearTimeout(this.counting);
    this.counting = setTimeout(() => this.count(), 400);
  }

  async count() {
    const text = byId("question").value;
    if (!text) { byId("count").value = ""; return; }
    const body = this.mode === "chat" ? { messages: this.messages(text) } : { prompt: text };
    try {
      const { count } = await ask("tokenize", { model: this.model.id, ...body });
      if (text === byId("question").value) byId("count").value = word("tokensOfPrompt", count);
    } catch { byId("count").value = ""; }
  }
}

const shares = (pairs) => pairs.map(([text, logprob]) => [text, Math.exp(logprob)]);

/** Tokens of a piece of a chat: text, and pairs of an alternative and its probability. A token may hold a part of a character. */
const chatTokens = (choice, decoder) => choice.logprobs?.content?.map((one) => ({
  text: decoder.decode(new Uint8Array(one.bytes ?? []), { stream: true }),
  own: one.token, best: shares(one.top_logprobs.map((other) => [other.token, other.logprob])),
}));

/** The same for a completion. A token that ends the answer brings no text. */
const textTokens = (choice) => choice.text === "" ? [] : choice.logprobs?.tokens.map((own, index) => ({
  text: choice.logprobs.tokens.length === 1 ? choice.text : own,
  own, best: shares(Object.entries(choice.logprobs.top_logprobs[index] ?? {})),
}));

/** One question with its answer. */
class Answer {
  constructor(question, mode, retry) {
    this.question = question;
    this.text = mode === "chat" ? "" : question;
    this.mode = mode;
    this.tokens = 0;
    this.began = performance.now();
    this.decoder = new TextDecoder();
    this.body = element("div", { class: "text" });
    this.note = element("p", { class: "quiet" });
    this.tools = element("p", { class: "tools", hidden: true },
      element("button", { type: "button", class: "plain", textContent: word("retry"), onclick: retry }),
      element("button", { type: "button", class: "plain", textContent: word("copy"), onclick: (event) => this.copy(event.target) }));
    const said = element("article", { class: "answer" }, element("h3", { textContent: word("model") }), this.body, this.note, this.tools);
    const asked = element("article", { class: "question" }, element("h3", { textContent: word(mode === "chat" ? "you" : "prompt") }), element("div", { class: "text", textContent: question }));
    this.elements = [asked, said];
  }

  reveal() {
    this.elements[1].scrollIntoView({ block: "end" });
  }

  add(text, tokens, finishReason) {
    if (text && !this.first) this.first = performance.now();
    this.text += text;
    this.finishReason = finishReason ?? this.finishReason;
    const log = byId("answers");
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    if (tokens) this.body.append(...tokens.filter((token) => token.text).map(tokenElement));
    else this.body.append(text);
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }

  fail(reason) {
    this.failure = reason;
  }

  end() {
    const now = performance.now();
    const parts = [];
    if (this.tokens && this.first) {
      const seconds = Math.max((now - this.first) / 1000, 1e-3);
      const rate = this.tokens > 1 ? (this.tokens - 1) / seconds : 0;
      parts.push(word("done", this.tokens, ((this.first - this.began) / 1000).toFixed(2), rate.toFixed(1)));
    }
    if (this.finishReason === "length") parts.push(word("cut"));
    if (this.failure) parts.push(this.failure);
    this.note.textContent = parts.join(" · ");
    this.note.classList.toggle("failed", Boolean(this.failure));
    this.tools.hidden = false;
    for (const other of document.querySelectorAll(".answer .tools")) other.firstChild.hidden = other !== this.tools;
    this.reveal();
  }

  async copy(button) {
    await navigator.clipboard?.writeText(this.text.trim());
    button.textContent = word("copied");
  }
}

/** White space at the ends of a text and its newlines, made visible. */
const visible = (text) => text.replaceAll("\n", "⏎").replace(/^ | $/g, "␣");

/** A token whose alternatives show on hover and on focus. Arrow keys go from token to token. */
function tokenElement(token) {
  const tip = byId("tip");
  const show = (event) => {
    tip.replaceChildren(...token.best.map(([text, share]) => element("div", {},
      element("code", { textContent: visible(text) }), share < 0.001 ? " < 0.1 %" : ` ${(100 * share).toFixed(1)} %`)));
    tip.hidden = false;
    const place = event.target.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(place.left, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${place.bottom + 4 + tip.offsetHeight > innerHeight ? place.top - tip.offsetHeight - 4 : place.bottom + 4}px`;
  };
  const hide = () => { tip.hidden = true; };
  const likely = token.best.find(([text]) => text === token.own)?.[1] ?? 0;
  return element("span", {
    class: `token ${likely < 0.3 ? "unsure" : ""}`, tabIndex: 0, textContent: token.text, "aria-describedby": "tip",
    onmouseenter: show, onmouseleave: hide, onfocus: show, onblur: hide,
    onkeydown: (event) => {
      const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
      if (next) { event.preventDefault(); event.target[next]?.focus(); }
      if (event.key === "Escape") hide();
    },
  });
}
