// The next request as code: for curl, and for Python with the openai package.

import { button, byId, copyText, element } from "./dom.js";

const OPENAI = new Set(["model", "messages", "prompt", "temperature", "top_p", "max_tokens", "seed", "stop"]);

/** Open the dialog with the code of a request to `path`; `hasKey` says whether the server asks for an API key. */
export function showCode(path, body, hasKey) {
  const base = new URL("v1", location.href).href;
  const dialog = byId("code-dialog");
  const listing = (title, text) => {
    const copy = button("Copy", () => copyText(text, copy), { "aria-label": `Copy the code for ${title}` });
    const code = element("pre", { tabIndex: 0, role: "region", "aria-label": `Code for ${title}` }, text);
    return [element("div", { class: "title" }, element("h3", {}, title), copy), code];
  };
  byId("code").replaceChildren(...listing("curl", curl(base, path, body, hasKey)), ...listing("Python", python(base, path, body, hasKey)));
  dialog.querySelector(".done").onclick = () => dialog.close();
  dialog.showModal();
}

function curl(base, path, body, hasKey) {
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = hasKey ? '  -H "Authorization: Bearer $SMOLSEEK_API_KEY" \\\n' : "";
  return `curl ${base}${path.slice(2)} -H 'Content-Type: application/json' \\\n${key}  -d '${data}'`;
}

function python(base, path, body, hasKey) {
  const chat = path.includes("chat");
  const indented = (value) => JSON.stringify(value, null, 4).replaceAll("\n", "\n    ");
  const line = ([name, value]) => `    ${name}=${indented(value)},\n`;
  const [known, others] = [true, false].map((is) => Object.entries(body).filter(([name]) => OPENAI.has(name) === is));
  const extra = others.length ? line(["extra_body", Object.fromEntries(others)]) : "";
  const key = hasKey ? 'os.environ["SMOLSEEK_API_KEY"]' : '"none"';
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${base}", api_key=${key})
answer = client.${chat ? "chat.completions" : "completions"}.create(
${known.map(line).join("")}${extra})
print(answer.choices[0].${chat ? "message.content" : "text"})`;
}
