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
