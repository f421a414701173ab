// The expert map: a row for each layer with experts, a column for each expert, coloured by the share of tokens.

import { announce, byId, chip, count, element, plural } from "./dom.js";

const LEFT = 30, BOTTOM = 18, HEIGHT = 264;

export class ExpertMap {
  #canvas = byId("map").firstElementChild;
  #counts = new Uint32Array(0);
  #tokens = [];
  #token = null;
  #latest = null;
  #hovered = null;
  #chosen = null;
  #timer = null;
  #size = null;

  /** `tokens(scope)` returns the tokens to count: "all", "answer" or "prompt". */
  constructor(tokens) {
    this.tokens = tokens;
    this.layers = [];
    const map = byId("map");
    map.addEventListener("pointermove", (event) => this.#point(this.#cell(event)));
    map.addEventListener("pointerleave", () => this.#point(null));
    map.addEventListener("click", (event) => this.#choose(this.#cell(event)));
    map.addEventListener("keydown", (event) => this.#key(event));
    byId("scope").onchange = () => this.recount();
    new ResizeObserver(() => this.redraw()).observe(map);
  }

  /** Set the size of the map: `layers` are the numbers of the layers that have experts. */
  configure({ layers, experts, perToken }) {
    Object.assign(this, { layers, experts, perToken });
    byId("experts").hidden = !layers.length;
    this.recount();
  }

  /** Count a new token. */
  add(token) {
    const scope = byId("scope").value;
    if (!token.experts || (scope !== "all" && (scope === "prompt") !== token.isPrompt)) return;
    this.#count(token);
    this.setLatest(token);
  }

  /** Count all tokens again, after some of them were removed. */
  recount() {
    this.#counts = new Uint32Array(this.layers.length * this.experts);
    this.#tokens = [];
    for (const token of this.tokens(byId("scope").value)) if (token.experts) this.#count(token);
    this.redraw();
  }

  #count(token) {
    this.#tokens.push(token);
    token.experts.forEach((experts, layer) => {
      for (const expert of experts) this.#counts[layer * this.experts + expert]++;
    });
  }

  /** Dot the experts of the newest token, which is null when nothing is being written. */
  setLatest(token) {
    this.#latest = matchMedia("(prefers-reduced-motion: reduce)").matches ? null : token;
    this.redraw(100); // the model computes on the same machine, which has better things to do than to draw
  }

  /** Mark the experts of `token`; null marks none. */
  show(token) {
    this.#token = token?.experts ? token : null;
    this.redraw();
  }

  /** Draw the map after `delay` milliseconds. */
  redraw(delay = 0) {
    if (!this.layers.length || (delay && this.#timer)) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => requestAnimationFrame(() => {
      this.#timer = null;
      this.#draw();
      this.#describe();
    }), delay);
  }

  get #cellShown() {
    return this.#hovered ?? this.#chosen;
  }

  /** Return the layer and the expert at the pointer, or null. */
  #cell({ clientX, clientY }) {
    if (!this.#size) return null;
    const box = this.#canvas.getBoundingClientRect();
    const expert = Math.floor((clientX - box.left - LEFT) / this.#size.width);
    const layer = Math.floor((clientY - box.top) / this.#size.height);
    return expert >= 0 && expert < this.experts && layer >= 0 && layer < this.layers.length ? { layer, expert } : null;
  }

  #point(cell) {
    if (cell?.layer === this.#hovered?.layer && cell?.expert === this.#hovered?.expert) return;
    this.#hovered = cell;
    this.redraw();
  }

  #choose(cell) {
    const again = cell && cell.layer === this.#chosen?.layer && cell.expert === this.#chosen?.expert;
    this.#chosen = again ? null : cell;
    if (again) this.#hovered = null;
    this.#describe();
    this.redraw();
  }

  #key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key in moves) {
      const [down, right] = moves[event.key];
      const { layer, expert } = this.#chosen ?? { layer: 0, expert: 0 };
      const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
      const first = this.#chosen ? 1 : 0; // the first key press goes to the first expert
      this.#hovered = null;
      this.#choose({ layer: clamp(layer + first * down, this.layers.length), expert: clamp(expert + first * right, this.experts) });
      announce(byId("expert").textContent);
    } else if (event.key === "Escape" && this.#chosen) this.#choose(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Write about the expert under the pointer, and mark its tokens in the text; without one, about the text. */
  #describe() {
    for (const node of document.querySelectorAll(".of-expert")) node.classList.remove("of-expert");
    const cell = this.#cellShown;
    byId("expert").replaceChildren(...(cell ? this.#expert(cell) : this.#summary()));
  }

  #expert({ layer, expert }) {
    const uses = this.#tokens.filter((token) => token.experts[layer].includes(expert));
    const texts = new Map();
    for (const token of uses) {
      token.element?.classList.add("of-expert");
      texts.set(token.text, (texts.get(token.text) ?? 0) + 1);
    }
    const share = this.#tokens.length ? uses.length / this.#tokens.length : 0;
    const load = (share * this.experts) / this.perToken;
    const line = element("p", {}, element("b", {}, `Layer ${this.layers[layer]}, expert ${expert}`),
      `: ${plural(uses.length, "token")} of ${count(this.#tokens.length)} (${(100 * share).toFixed(1)}%), ${load.toFixed(1)} times an equal share.`);
    const often = [...texts].sort((a, b) => b[1] - a[1]).slice(0, 12);
    const chips = often.map(([text, n]) => element("span", {}, chip(text), n > 1 ? ` ×${n} ` : " "));
    return [line, element("div", { class: "uses" }, ...chips)];
  }

  #summary() {
    if (!this.#tokens.length) return [element("p", {}, `${plural(this.layers.length, "layer")} with ${this.experts} experts, ${this.perToken} for each token. The map fills while the model writes.`)];
    const most = this.#counts.reduce((best, n, i) => (n > this.#counts[best] ? i : best), 0);
    const unused = this.#counts.reduce((sum, n) => sum + (n === 0), 0);
    const busiest = `layer ${this.layers[Math.floor(most / this.experts)]}, expert ${most % this.experts}`;
    const load = this.#load(this.#counts[most]).toFixed(1);
    return [
      element("p", {}, element("b", {}, plural(this.#tokens.length, "token")), `. Busiest: ${busiest}, ${load} times an equal share. Unused: ${count(unused)} of ${count(this.#counts.length)} experts.`),
      element("p", { class: "fine" }, "Point at an expert to see its tokens in the text."),
    ];
  }

  /** Return the load of an expert with `n` tokens; 1 is the equal share of all experts of its layer. */
  #load(n) {
    return (n * this.experts) / (this.perToken * Math.max(1, this.#tokens.length));
  }

  #draw() {
    const canvas = this.#canvas, context = canvas.getContext("2d");
    const space = byId("map").clientWidth, rows = this.layers.length;
    const width = Math.max(3, Math.min(34, (space - LEFT - 1) / this.experts));
    const height = Math.max(4, Math.min(26, HEIGHT / rows));
    this.#size = { width, height };
    const scale = devicePixelRatio, across = Math.max(LEFT + width * this.experts + 1, 1), down = height * rows + BOTTOM;
    canvas.width = across * scale;
    canvas.height = down * scale;
    canvas.style.width = `${across}px`;
    canvas.style.height = `${down}px`;
    context.scale(scale, scale);
    const colour = (name) => {
      canvas.style.color = `var(${name})`;
      return getComputedStyle(canvas).color;
    };
    const [empty, full, ink, soft] = ["--sunk", "--accent", "--ink", "--soft"].map(colour);
    const most = Math.max(1, ...this.#counts), gap = width > 6 ? 1 : 0;
    const rectangle = (layer, expert, inset) =>
      [LEFT + expert * width + inset, layer * height + inset, width - gap - 2 * inset, height - Math.min(gap, 1) - 2 * inset];
    for (let layer = 0; layer < rows; layer++) {
      for (let expert = 0; expert < this.experts; expert++) {
        context.globalAlpha = 1;
        context.fillStyle = empty;
        context.fillRect(...rectangle(layer, expert, 0));
        context.globalAlpha = (this.#counts[layer * this.experts + expert] / most) ** 0.7 * (this.#token ? 0.3 : 1);
        context.fillStyle = full;
        context.fillRect(...rectangle(layer, expert, 0));
      }
    }
    context.globalAlpha = 1;
    this.#token?.experts.forEach((experts, layer) => {
      for (const expert of experts) {
        context.fillStyle = full;
        context.fillRect(...rectangle(layer, expert, 0));
        if (Math.min(width, height) < 12) continue;
        context.strokeStyle = ink;
        context.lineWidth = 1.5;
        context.strokeRect(...rectangle(layer, expert, 0.75));
      }
    });
    this.#latest?.experts.forEach((experts, layer) => {
      context.fillStyle = ink;
      for (const expert of experts) {
        const size = Math.max(2, Math.min(width, height) / 3);
        context.fillRect(LEFT + (expert + 0.5) * width - size / 2, (layer + 0.5) * height - size / 2, size, size);
      }
    });
    const cell = this.#cellShown;
    if (cell) {
      context.strokeStyle = ink;
      context.lineWidth = 2.5;
      context.strokeRect(...rectangle(cell.layer, cell.expert, -0.5));
    }
    this.#labels(context, soft, ink, cell);
    this.#scale(most);
  }

  #labels(context, soft, ink, cell) {
    const { width, height } = this.#size, bottom = height * this.layers.length;
    context.font = "11px system-ui, sans-serif";
    const every = (size, space) => [1, 2, 4, 5, 8, 10, 16, 32, 64].find((n) => n * size >= space) ?? 64;
    const label = (text, x, y, marked) => {
      context.fillStyle = marked ? ink : soft;
      context.fillText(text, x, y);
    };
    context.textAlign = "right";
    context.textBaseline = "middle";
    const layers = every(height, 13), experts = every(width, 22);
    this.layers.forEach((number, i) => {
      if (cell ? i === cell.layer : i % layers === 0) label(number, LEFT - 7, Math.max(6, (i + 0.5) * height), cell);
    });
    context.textAlign = "center";
    for (let i = 0; i < this.experts; i++) {
      if (cell ? i === cell.expert : i % experts === 0) label(i, LEFT + (i + 0.5) * width, bottom + 10, cell);
    }
  }

  #scale(most) {
    const load = this.#tokens.length ? this.#load(most).toFixed(1) : "";
    byId("map-scale").replaceChildren("0 ", element("i"), load ? ` ${load} times an equal share` : " most used");
  }
}
