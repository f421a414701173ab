// The playground: the conversation, its requests, and the panels beside it.

import { ServerError, firstModel, hasKey, setKey, stream } from "./client.js";
import { showCode } from "./code.js";
import { announce, button, byId, count, element } from "./dom.js";
import { ExpertMap } from "./experts.js";
import { requestOptions, showOptions, showTheme } from "./options.js";
import { TokenCard } from "./tokens.js";
import { AnswerTurn, UserTurn } from "./turns.js";

const EXAMPLES = {
  chat: ["Tell me a short story about a lighthouse.", "Explain why the sky is blue.", "Write three tips for better sleep."],
  completion: ["Once upon a time, in a village by the sea,", "The three most important facts about water are", "def fibonacci(n):"],
};
const thread = byId("thread"), message = byId("message"), composer = byId("composer");
let model = null;
let turns = []; // UserTurn and AnswerTurn, from top to bottom
let running = null; // the AbortController of the request that is running
let follows = true; // whether the page scrolls with the text
let frame = 0;

const answers = () => turns.filter((turn) => turn instanceof AnswerTurn);
const lists = () => answers().flatMap(({ prompt, tokens }) => [prompt, tokens]);
const map = new ExpertMap((scope) => {
  if (scope === "answer") return answers().at(-1)?.tokens ?? [];
  return answers().flatMap(({ prompt, tokens }) => (scope === "prompt" ? prompt : [...prompt, ...tokens]));
});
const card = new TokenCard(thread, { lists, onShow: (token) => map.show(token), onReplace: replace });
const mode = () => document.querySelector("[name=mode]:checked").value;

// --- the model, and the page without a text ---

async function connect() {
  try {
    model = await firstModel();
  } catch (error) {
    if (error.status === 401) return askKey(connect);
    byId("model").replaceChildren(element("strong", {}, "No connection"));
    return showWelcome("The server does not answer", `${error.message}. Start it with smolseek serve MODEL, then reload this page.`);
  }
  const facts = model.smolseek ?? {};
  const layers = facts.moe_layers ?? [];
  map.configure({ layers, experts: facts.n_routed_experts ?? 0, perToken: facts.num_experts_per_tok ?? 1 });
  const name = model.id.split("/").filter(Boolean).at(-1);
  const about = [facts.number_format, facts.context && `context ${count(facts.context)}`, layers.length && `${layers.length} × ${facts.n_routed_experts} experts`];
  byId("model").replaceChildren(element("strong", { title: model.id }, name), element("span", {}, about.filter(Boolean).join(" · ")));
  document.title = `${name} - smolseek playground`;
  showOptions(facts.context);
  const chat = document.querySelector("[value=chat]");
  chat.disabled = facts.chat_template === false;
  byId("no-chat").hidden = !chat.disabled;
  byId("no-chat").textContent = "Chat is off: this model has no chat template. Completion works with every model.";
  if (chat.disabled) {
    chat.setAttribute("aria-describedby", "no-chat");
    document.querySelector("[value=completion]").checked = true;
  }
  setMode();
}

function askKey(then) {
  const dialog = byId("key-dialog");
  dialog.querySelector(".wrong").textContent = byId("key").value ? "The server refuses this key." : "";
  dialog.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    setKey(byId("key").value);
    dialog.close();
    then();
  };
  if (!dialog.open) dialog.showModal();
}

function setMode() {
  const chat = mode() === "chat";
  message.placeholder = chat ? "Write a message" : "Write the beginning of a text";
  composer.querySelector("label").textContent = chat ? "Message" : "Text to continue";
  byId("system-box").hidden = !chat;
  clear();
}

function showWelcome(title, text, examples = []) {
  const items = examples.map((example) => element("li", {}, button(example, () => {
    message.value = example;
    message.focus();
  })));
  thread.replaceChildren(element("div", { id: "welcome" }, element("h2", {}, title), element("p", {}, text), element("ul", {}, ...items)));
}

function clear() {
  running?.abort();
  turns = [];
  const experts = map.layers.length ? " and which experts it used" : "";
  const title = mode() === "chat" ? "Chat with the model" : "Let the model continue a text";
  showWelcome(title, `Point at a token of the answer to see how likely it was${experts}.`, EXAMPLES[mode()]);
  changed();
}

/** Update what depends on `turns`, after turns were removed. */
function changed() {
  card.choose(null);
  if (map.layers.length) map.recount();
  byId("clear").disabled = !turns.length;
  setRunning(running);
}

function setRunning(controller) {
  running = controller;
  const verb = mode() === "chat" ? "Send" : "Continue";
  byId("send").textContent = running ? "Stop" : verb;
  byId("send").classList.toggle("stop", Boolean(running));
  byId("hint").textContent = mode() === "chat" ? "Enter sends, Shift+Enter starts a new line, Escape stops." : "Ctrl+Enter continues the text, Escape stops.";
  if (!running) map.setLatest(null);
}

// --- requests ---

function addTurn(turn) {
  byId("welcome")?.remove();
  turns.push(turn);
  thread.append(turn.node);
  byId("clear").disabled = false;
}

function removeFrom(turn) {
  running?.abort();
  for (const { node } of turns.splice(turns.indexOf(turn))) node.remove();
  changed();
}

function edit(turn) {
  removeFrom(turn);
  message.value = turn.text;
  message.focus();
}

/** Write the answer again, with the fields `more` in the request; later turns are removed. */
function rewrite(turn, more = {}) {
  removeFrom(turn);
  if (turn.source === undefined) answerChat(more);
  else complete(turn.source, more);
}

/** Write on from `text` in place of `token`. */
function replace(token, text) {
  const turn = answers().find(({ tokens }) => tokens.includes(token));
  const before = turn.tokens.slice(0, turn.tokens.indexOf(token));
  const prefix = before.map((each) => each.element.textContent).join("") + text;
  const most = requestOptions()?.max_tokens; // the tokens of the prefix count, too
  if (most) rewrite(turn, { prefix, max_tokens: most + before.length + 1 });
}

function newAnswer(source) {
  const actions = [["Try again", (turn) => rewrite(turn)]];
  if (source !== undefined) actions.push(["Continue", (turn) => write(turn, "v1/completions", completion(turn.source + turn.text))]);
  const turn = new AnswerTurn(source, map.layers, actions);
  turn.body.classList.toggle("surprising", byId("surprise").checked);
  addTurn(turn);
  return turn;
}

/** Return the messages so far. */
function conversation() {
  const system = byId("system").value.trim();
  const messages = turns.filter(({ text }) => text).map(({ role, text }) => ({ role, content: text }));
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

function answerChat(more) {
  const messages = conversation(); // without the new answer
  write(newAnswer(), "v1/chat/completions", { messages, logprobs: true, top_logprobs: 5, ...more });
}

const completion = (prompt) => ({ prompt, logprobs: 5 });

function complete(source, more) {
  write(newAnswer(source), "v1/completions", { ...completion(source), ...more });
}

/** Scroll to the end with the next frame, unless the user has scrolled up. */
function follow() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (follows) thread.scrollTop = thread.scrollHeight;
  });
}

/** Send a request and add the parts of its answer to `turn`. */
async function write(turn, path, body) {
  const options = requestOptions();
  if (!options) return;
  const controller = new AbortController();
  turn.begin();
  setRunning(controller);
  follows = true;
  follow();
  announce("Writing.");
  let error = "";
  try {
    const request = { model: model.id, ...options, ...body, ...(map.layers.length && { experts: true }) };
    for await (const part of stream(path, request, controller.signal)) {
      for (const token of turn.add(part)) map.add(token);
      follow();
    }
  } catch (reason) {
    if (controller.signal.aborted) turn.finish = "stopped";
    else error = reason instanceof ServerError ? reason.message : `no connection to the server (${reason.message})`;
    if (reason.status === 401) askKey(() => rewrite(turn));
  }
  turn.end(error && `Error: ${error}`);
  follow();
  if (running !== controller) return;
  setRunning(null);
  if (!error) announce(`${turn.finish === "stopped" ? "Stopped" : "Answer"}: ${turn.text.slice(0, 2000)}`);
}

// --- events ---

composer.onsubmit = (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const chat = mode() === "chat", text = chat ? message.value.trim() : message.value;
  if (!text || !model || !requestOptions()) return message.focus();
  message.value = "";
  if (!chat) return complete(text);
  addTurn(new UserTurn(text, edit));
  answerChat();
};

message.onkeydown = (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  if (mode() === "chat" ? event.shiftKey : !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  if (!running) composer.requestSubmit();
};

/** Open a panel that has no space beside the text, or close it. */
function openPanel(name) {
  const before = document.body.dataset.panel;
  if (name) document.body.dataset.panel = name;
  else delete document.body.dataset.panel;
  for (const panel of ["settings", "inspector"]) byId(`open-${panel}`).setAttribute("aria-expanded", String(panel === name));
  if (name) byId(name).focus();
  else if (before) byId(`open-${before}`).focus();
}

for (const name of ["settings", "inspector"]) byId(`open-${name}`).onclick = () => openPanel(document.body.dataset.panel === name ? null : name);
for (const close of document.querySelectorAll(".close")) close.onclick = () => openPanel(null);
for (const input of document.querySelectorAll("[name=mode]")) input.onchange = setMode;
thread.onscroll = () => (follows = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 120);
byId("show-code").onclick = () => {
  const options = requestOptions(), text = message.value || EXAMPLES[mode()][0];
  if (!options || !model) return;
  if (mode() === "chat") showCode("v1/chat/completions", { model: model.id, messages: [...conversation(), { role: "user", content: text }], ...options }, hasKey());
  else showCode("v1/completions", { model: model.id, prompt: text, ...options }, hasKey());
};
byId("clear").onclick = () => {
  clear();
  message.focus();
};
byId("surprise").onchange = ({ target }) => {
  byId("legend").hidden = !target.checked;
  for (const { body } of answers()) body.classList.toggle("surprising", target.checked);
};
document.addEventListener("keydown", ({ key }) => {
  if (key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (running) running.abort();
  else if (document.body.dataset.panel) openPanel(null);
  else card.choose(null);
});
// Where the panel has no space beside the text, choosing a token opens it.
thread.addEventListener("click", () => {
  const narrow = getComputedStyle(byId("open-inspector")).display !== "none";
  if (!card.chosen || !narrow || document.body.dataset.panel === "inspector") return;
  openPanel("inspector");
  card.chosen.element.scrollIntoView({ block: "nearest" });
});
showTheme(() => map.redraw());
connect();
