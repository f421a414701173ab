// Turns: the messages and answers on the page, with the figures of each answer.

import { button, copyText, count, element, plural } from "./dom.js";
import { TokenText, appendToken, bits } from "./tokens.js";

const FINISH = { stop: "finish: stop", length: "finish: max tokens", time: "finish: time limit", stopped: "stopped by you" };

/** A message of the user; `onEdit(turn)` is called to write it again. */
export class UserTurn {
  role = "user";

  constructor(text, onEdit) {
    this.text = text;
    const actions = element("div", { class: "actions" }, button("Edit", () => onEdit(this), { "aria-label": "Edit this message" }));
    this.node = element("article", { class: "turn user", "aria-label": "You" }, element("div", { class: "body" }, text), actions);
  }
}

/** An answer of the model; a completion has a `source`, the text that it continues. */
export class AnswerTurn {
  role = "assistant";
  text = "";
  prompt = [];
  tokens = [];
  #decoder = new TokenText();
  #promptDecoder = new TokenText();
  #prompts = element("details", { class: "prompt", hidden: true }, element("summary"),
    element("div", { class: "tokens", tabIndex: 0, role: "group", "aria-label": "Tokens of the prompt. The arrow keys choose a token." }));
  #figures = element("div", { class: "figures" });
  #error = element("p", { class: "error", role: "alert" });

  /** `actions` are pairs of a label and a function that takes the turn; they appear at the end of the answer. */
  constructor(source, layers, actions) {
    this.source = source;
    this.layers = layers;
    this.actions = [["Copy", (turn, node) => copyText((turn.source ?? "") + turn.text, node)], ...actions];
    this.body = element("div", { class: "tokens", tabIndex: 0, role: "group" });
    this.body.append(element("div", { class: "paragraph" }, ...(source ? [element("span", { class: "source" }, source)] : [])));
    this.node = element("article", { class: "turn answer", "aria-label": "Answer" }, this.#prompts, this.body, this.#error, this.#figures);
    this.begin();
  }

  /** Prepare for the parts of a new answer, which continues the tokens that are there. */
  begin() {
    Object.assign(this, { begun: performance.now(), first: null, ended: null, finish: null, usage: null });
    this.before = this.tokens.length;
    this.#error.textContent = "";
    this.body.hidden = false;
    this.show();
  }

  /** Add a part of the answer, as `stream` yields it. Return the tokens whose experts are new. */
  add(part) {
    // The prompt of a continued answer is the text that is shown already.
    const prompt = this.before ? [] : part.prompt.map((token) => Object.assign(token, { isPrompt: true, layers: this.layers }));
    const tokens = part.tokens.map((token) => Object.assign(token, { isPrompt: false, layers: this.layers }));
    const read = [...prompt];
    for (const token of tokens) {
      // The server reports with a token the experts that predicted it. They are those that read the token before, and the
      // page shows these with the token that was read: for the first token, the prompt has them already.
      const last = this.tokens.at(-1);
      if (last && token.experts) read.push(Object.assign(last, { experts: token.experts }));
      token.experts = null;
      this.tokens.push(token);
    }
    this.prompt.push(...prompt);
    for (const token of prompt) appendToken(this.#prompts.lastChild, token, this.#promptDecoder.next(token));
    for (const token of tokens) appendToken(this.body, token, this.#decoder.next(token));
    // A server that reports no tokens still sends text.
    if (part.text && !tokens.length && this.tokens.length === this.before) this.body.lastElementChild.append(part.text);
    if (part.text || tokens.length) this.first ??= performance.now();
    this.text += part.text;
    this.finish = part.finish ?? this.finish;
    this.usage = part.usage ?? this.usage;
    this.show();
    return read;
  }

  /** End the answer; `error` is the reason if it failed. */
  end(error = "") {
    this.ended = performance.now();
    this.#error.textContent = error;
    this.tokens.at(-1)?.element.lastChild.append(this.#decoder.rest());
    this.body.hidden = !this.body.textContent;
    this.#markCut();
    this.show();
  }

  /** Strike out tokens that the text leaves out, for example those of a stop string. */
  #markCut() {
    const texts = this.tokens.map(({ element }) => element.textContent);
    if (this.finish === "stopped" || !texts.join("").startsWith(this.text)) return;
    let length = 0;
    texts.forEach((text, i) => {
      length += text.length;
      this.tokens[i].element.classList.toggle("cut", text.length > 0 && length > this.text.length);
    });
  }

  /** Show the figures of the answer so far. */
  show() {
    const { tokens, usage, first, ended } = this;
    const n = usage?.completion_tokens ?? tokens.length - this.before;
    const seconds = ((ended ?? performance.now()) - first) / 1000;
    const figure = (value, text) => element("span", {}, element("b", {}, value), ` ${text}`);
    const figures = n ? [figure(count(n), n === 1 ? "token" : "tokens")] : ended ? [] : ["Reading the prompt …"];
    if (n > 1 && seconds > 0) figures.push(figure(((n - 1) / seconds).toFixed(1), "tokens/s"));
    if (first) figures.push(figure(`${count(Math.round(first - this.begun))} ms`, "to the first"));
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      figures.push(figure(count(usage.prompt_tokens), `prompt tokens, ${count(cached)} cached`));
    }
    const scored = ended ? tokens.filter(({ logprob }) => logprob !== null) : [];
    if (scored.length) figures.push(figure((scored.reduce((sum, token) => sum + bits(token), 0) / scored.length).toFixed(2), "bits/token"));
    if (this.finish) figures.push(element("span", {}, FINISH[this.finish] ?? `finish: ${this.finish}`));
    if (ended) figures.push(this.#buttons());
    this.#figures.replaceChildren(...figures);
    this.#prompts.hidden = !this.prompt.length;
    this.#prompts.firstChild.textContent = `Prompt, as the model reads it: ${plural(this.prompt.length, "token")}`;
    this.body.setAttribute("aria-label", `Answer of ${plural(tokens.length, "token")}. The arrow keys choose a token.`);
    this.node.setAttribute("aria-busy", String(!ended));
  }

  #buttons() {
    const buttons = this.actions.map(([label, act]) => button(label, ({ target }) => act(this, target)));
    return element("div", { class: "actions" }, ...buttons);
  }
}
