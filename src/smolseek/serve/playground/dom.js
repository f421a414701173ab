// Elements and numbers for the page. Text becomes text nodes only, so nothing that a model writes is read as HTML.

export const byId = (id) => document.getElementById(id);

/** Return a new element; `values` are properties, except for names with a hyphen, `class` and `role`: attributes. */
export function element(tag, values = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(values)) {
    if (name === "class" || name === "role" || name.includes("-")) node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** Return a button that does not submit a form. */
export const button = (text, onclick, values = {}) => element("button", { type: "button", class: "plain", onclick, ...values }, text);

/** Say a text to screen readers, after the current speech. */
export function announce(text) {
  byId("announcer").textContent = text;
}

/** Copy a text, and say so on the button. Pages of other machines without HTTPS have no clipboard. */
export async function copyText(text, node) {
  const done = await navigator.clipboard?.writeText(text).then(() => "Copied", () => "Not allowed");
  node.textContent = done ?? "Not allowed";
  announce(`${node.textContent}.`);
  setTimeout(() => (node.textContent = "Copy"), 1500);
}

/** Return the browser's localStorage or sessionStorage; where it is forbidden, one that ends with the page. */
export function storage(kind) {
  try {
    return window[kind];
  } catch {
    const values = new Map();
    return { getItem: (name) => values.get(name) ?? null, setItem: (name, value) => values.set(name, value), removeItem: (name) => values.delete(name) };
  }
}

/** Return a probability as a percentage with two or three digits. */
export function percent(p) {
  const value = 100 * p;
  if (value > 0 && value < 0.01) return "<0.01%";
  return `${value.toFixed(value >= 99.95 || value === 0 ? 0 : value >= 10 ? 1 : 2)}%`;
}

export const count = (n) => n.toLocaleString("en");
export const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

const SIGNS = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };

/** Return a token's text as an element in which spaces and line breaks are visible. */
export function chip(text) {
  const node = element("span", { class: "chip" });
  for (const part of text.split(/([ \n\t\r])/)) {
    if (part) node.append(part in SIGNS ? element("i", {}, SIGNS[part]) : part);
  }
  return node;
}
