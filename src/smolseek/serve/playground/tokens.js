// Tokens as elements of the text, and the card that shows one token: its probability, its rivals and its experts.

import { announce, button, byId, chip, element, percent, plural } from "./dom.js";

const MOST_BITS = 8;

/** Return the surprise of a token in bits. */
export const bits = (token) => -token.logprob / Math.LN2;

/** Turns tokens into the text that they add. A character of several tokens appears with the last of them. */
export class TokenText {
  #decoder = new TextDecoder();

  /** Return the text that `token` adds. */
  next(token) {
    const bytes = token.bytes ? new Uint8Array(token.bytes) : new TextEncoder().encode(token.text);
    return this.#decoder.decode(bytes, { stream: true });
  }

  /** Return what is left of an incomplete character at the end of the text. */
  rest() {
    return this.#decoder.decode();
  }
}

/**
 * Append `token` to the text in `container`; `shown` is its text there.
 *
 * A line break ends the element of a paragraph. In one element, the browser would arrange all the text again for each token.
 */
export function appendToken(container, token, shown) {
  // The mark of a token leaves out the space before a word, where lines break.
  const word = shown.trimStart() || shown;
  const node = element("span", { class: "t" }, shown.slice(0, shown.length - word.length), element("span", { class: "mark" }, word));
  if (token.logprob !== null) {
    node.lastChild.dataset.p = percent(Math.exp(token.logprob));
    node.style.setProperty("--bits", Math.min(MOST_BITS, bits(token)).toFixed(2));
  }
  if (word.startsWith("\n")) node.classList.add("line");
  if (!shown) node.classList.add("byte");
  token.element = node;
  node.token = token;
  const paragraph = container.lastElementChild;
  if (paragraph && !paragraph.textContent.endsWith("\n")) paragraph.append(node);
  else container.append(element("div", { class: "paragraph" }, node));
}

/** The card of the token under the pointer, or of the chosen token. */
export class TokenCard {
  #chosen = null;

  /**
   * `lists` returns the lists of tokens in the order of the page. `onShow(token)` is called with the token that the card
   * shows, or null. `onReplace(token, text)` is called to write on from `text` in place of the token.
   */
  constructor(thread, { lists, onShow, onReplace }) {
    this.lists = lists;
    this.onShow = onShow;
    this.onReplace = onReplace;
    thread.addEventListener("pointerover", (event) => this.#hover(event));
    thread.addEventListener("pointerleave", () => this.#show(this.#chosen));
    thread.addEventListener("click", (event) => this.#click(event));
    thread.addEventListener("keydown", (event) => this.#key(event));
    byId("previous").onclick = () => this.#step(-1);
    byId("next").onclick = () => this.#step(1);
    this.#show(null);
  }

  get chosen() {
    return this.#chosen;
  }

  /** Choose `token`, or none; the card shows it until another one is under the pointer. */
  choose(token) {
    this.#chosen?.element.classList.remove("chosen");
    this.#chosen = token;
    token?.element.classList.add("chosen");
    this.#show(token);
  }

  #hover(event) {
    if (event.pointerType === "touch") return;
    this.#show(tokenAt(event) ?? this.#chosen);
  }

  #click(event) {
    if (String(getSelection())) return;
    const token = tokenAt(event);
    if (token) this.choose(token === this.#chosen ? null : token);
    else if (!event.target.closest("button, summary")) this.choose(null);
  }

  #key(event) {
    const container = event.target.closest(".tokens");
    if (!container || event.ctrlKey || event.metaKey || event.altKey) return;
    const list = this.lists().find((tokens) => tokens[0]?.element.closest(".tokens") === container);
    const position = list?.indexOf(this.#chosen) ?? -1;
    const goal = { ArrowRight: position + 1, ArrowLeft: position - 1, Home: 0, End: list?.length - 1 }[event.key];
    if (event.key === "Escape" && this.#chosen) this.choose(null);
    else if (goal === undefined || !list) return;
    else this.#go(list[Math.min(Math.max(goal, 0), list.length - 1)]);
    event.preventDefault();
    event.stopPropagation();
  }

  #step(by) {
    const list = this.lists().find((tokens) => tokens.includes(this.#chosen));
    this.#go(list?.[list.indexOf(this.#chosen) + by] ?? this.#chosen);
  }

  #go(token) {
    if (!token) return;
    this.choose(token);
    token.element.scrollIntoView({ block: "nearest" });
    announce(spoken(token));
  }

  #show(token) {
    byId("previous").disabled = byId("next").disabled = !this.#chosen;
    byId("token").replaceChildren(...(token ? this.#content(token) : [hint()]));
    this.onShow(token);
  }

  #content(token) {
    const list = this.lists().find((tokens) => tokens.includes(token)) ?? [token];
    const position = `${list.indexOf(token) + 1} of ${list.length}${token.id === null ? "" : `, id ${token.id}`}`;
    const head = element("div", { class: "head" }, chip(token.text), element("span", {}, position));
    if (token.logprob === null) {
      const what = token.isPrompt ? "A token of the prompt." : "The server reports no probability for this token.";
      return [head, element("p", { class: "fine" }, what), expertList(token)];
    }
    const chance = element("div", { class: "chance" }, element("b", {}, percent(Math.exp(token.logprob))),
      element("span", {}, `${bits(token).toFixed(2)} bits of surprise`, element("br"), `log-probability ${token.logprob.toFixed(3).replace("-", "−")}`));
    const note = token === this.#chosen ? "Press another token to write on from it." : "Before temperature, filters and penalties.";
    return [head, chance, this.#bars(token), element("p", { class: "fine source" }, note), expertList(token)];
  }

  #bars(token) {
    const top = token.top.slice(0, 5);
    const place = top.findIndex(({ text, logprob }) => text === token.text && Math.abs(logprob - token.logprob) < 1e-3);
    const entries = place < 0 ? [...top, token] : top;
    const mine = place < 0 ? top.length : place;
    const items = entries.map((entry, i) => {
      const p = Math.exp(entry.logprob);
      const fill = element("i");
      fill.style.setProperty("--p", p);
      const inside = [chip(entry.text), element("span", { class: "track" }, fill), element("span", { class: "number" }, percent(p))];
      const replaces = token === this.#chosen && i !== mine;
      const bar = replaces
        ? button("", () => this.onReplace(token, entry.text), { class: "bar", "aria-label": `Write on from ${JSON.stringify(entry.text)}, ${percent(p)}` })
        : element("div", { class: "bar" });
      bar.append(...inside);
      return element("li", i === mine ? { class: "is-token", "aria-current": "true" } : {}, bar);
    });
    return element("ol", { class: "bars", "aria-label": "Likeliest tokens" }, ...items);
  }
}

const tokenAt = ({ target }) => target.closest(".t")?.token ?? null;

function hint() {
  return element("p", {}, "Point at a token to see its probability and the five likeliest tokens in its place; press it to keep it here. With the keyboard, go to an answer with Tab and use the arrow keys.");
}

/** Return a list of the experts of `token`, layer by layer. */
function expertList(token) {
  if (!token.experts) return token.layers.length ? element("p", { class: "fine source" }, "No experts: the model has not read this token.") : "";
  const rows = token.experts.map((experts, layer) =>
    element("tr", {}, element("th", { scope: "row" }, `Layer ${token.layers[layer]}`), element("td", {}, experts.join(", "))),
  );
  const caption = `Experts as a list: ${plural(rows.length, "layer")}`;
  return element("details", { class: "list" }, element("summary", {}, caption), element("table", {}, element("tbody", {}, ...rows)));
}

function spoken(token) {
  if (token.logprob === null) return `Token ${JSON.stringify(token.text)}`;
  const others = token.top.filter(({ text }) => text !== token.text).slice(0, 5);
  const named = others.map(({ text, logprob }) => `${JSON.stringify(text)} ${percent(Math.exp(logprob))}`).join(", ");
  return `Token ${JSON.stringify(token.text)}, ${percent(Math.exp(token.logprob))}. Others: ${named || "not reported"}.`;
}
