// The settings: sampling options, the system message and the theme. The browser remembers them, but no text or key.

import { announce, byId, element, storage } from "./dom.js";

// [field of the request, label, smallest, largest, step, default, explanation]; a default of "" leaves the field out.
const OPTIONS = [
  ["temperature", "Temperature", 0, 2, 0.05, 0.8, "0 always takes the likeliest token."],
  ["top_p", "Top p", 0.01, 1, 0.01, 1, "The likeliest tokens, up to this sum."],
  ["min_p", "Min p", 0, 1, 0.01, 0.05, "Least share of the top probability."],
  ["top_k", "Top k", 0, 200, 1, 0, "The k likeliest tokens; 0: no limit."],
  ["repetition_penalty", "Repetition penalty", 1, 2, 0.01, 1, "1 is no penalty."],
  ["max_tokens", "Max tokens", 1, 4096, 1, 256, ""],
  ["seed", "Seed", 0, 4294967295, 1, "", "Empty: another text each time."],
];
const NO_RANGE = new Set(["seed"]);
const SAVED = "smolseek.options", THEME = "smolseek.theme";
const local = storage("localStorage");

/** Build the controls, with the values of the last visit. `context` limits the number of new tokens. */
export function showOptions(context) {
  let saved = {};
  try {
    saved = JSON.parse(local.getItem(SAVED)) ?? {};
  } catch {
    local.removeItem(SAVED); // not written by this page
  }
  byId("options").replaceChildren(...OPTIONS.map((option) => control(option, saved, context)), stopControl(saved));
  byId("system").value = saved.system ?? "";
  byId("settings").oninput = save;
  byId("defaults").onclick = () => {
    local.removeItem(SAVED);
    showOptions(context);
    announce("The settings have their defaults again.");
  };
}

function control([name, label, least, most, step, standard, explanation], saved, context) {
  const max = name === "max_tokens" && context ? Math.min(most, context) : most;
  const limits = { min: least, max, step };
  const number = element("input", { type: "number", id: name, ...limits, required: standard !== "", placeholder: "random" });
  number.value = saved[name] ?? standard;
  const box = element("div", { class: "option" }, element("label", { htmlFor: name }, label), number);
  if (!NO_RANGE.has(name)) {
    const range = element("input", { type: "range", ...limits, "aria-label": label, "data-for": name });
    range.value = number.value;
    range.oninput = () => (number.value = range.value);
    number.oninput = () => (range.value = number.value);
    box.append(range);
  }
  if (explanation) {
    number.setAttribute("aria-describedby", `${name}-help`);
    box.append(element("p", { id: `${name}-help` }, explanation));
  }
  return box;
}

function stopControl(saved) {
  const input = element("input", { type: "text", id: "stop", "aria-describedby": "stop-help", placeholder: "nothing", value: saved.stop ?? "" });
  const help = element("p", { id: "stop-help" }, "Ends the answer; \\n is a line break.");
  return element("div", { class: "option" }, element("label", { htmlFor: "stop" }, "Stop at"), input, help);
}

function save() {
  const names = [...OPTIONS.map(([name]) => name), "stop", "system"];
  local.setItem(SAVED, JSON.stringify(Object.fromEntries(names.map((name) => [name, byId(name).value]))));
}

/** Return the fields of a request; null if a value is out of range, after the browser has said which. */
export function requestOptions() {
  const fields = {};
  for (const [name] of OPTIONS) {
    const input = byId(name);
    if (!input.checkValidity()) {
      document.body.dataset.panel = "settings";
      input.reportValidity();
      return null;
    }
    if (input.value !== "" && !(name === "top_k" && input.value === "0")) fields[name] = Number(input.value);
  }
  const stop = byId("stop").value.replaceAll("\\n", "\n");
  return stop ? { ...fields, stop: [stop] } : fields;
}

/** Make the button switch between light and dark; `changed` is called after a change. */
export function showTheme(changed) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const apply = () => {
    const theme = local.getItem(THEME);
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
    byId("theme").setAttribute("aria-pressed", String(theme ? theme === "dark" : system.matches));
    changed();
  };
  byId("theme").onclick = () => {
    const dark = byId("theme").getAttribute("aria-pressed") === "true";
    // Back at the system's theme, the page follows the system again.
    if (dark === system.matches) local.setItem(THEME, dark ? "light" : "dark");
    else local.removeItem(THEME);
    apply();
  };
  system.addEventListener("change", apply);
  apply();
}
