"use strict";
// The conversation, and everything a person does on the page.

const at = (id) => document.getElementById(id);
const fields = [...at("settings").querySelectorAll("[name]")];
const field = (name) => fields.find((one) => one.name === name);
let messages = []; // {role: user, content, media} | {role: assistant, content, reasoning, calls, note, error} | {role: tool, id, content}
let attached = [];
let running = null; // the AbortController of the answer that comes
let model = "";
let drawn = null; // pictures and a question for the demo model; null where another one answers

const MEDIA_OPTIONS = ["max_slice_nums", "downsample_mode", "max_num_frames", "stack_frames"];
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "thinking_token_budget"];

function headers() {
  const key = field("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

// The settings of these names that are filled in.
function given(names) {
  return Object.fromEntries(
    names.filter((name) => field(name).value !== "").map((name) => [name, name === "downsample_mode" ? field(name).value : Number(field(name).value)]),
  );
}

// The request that the settings make, without its messages. Throws where the tools are not JSON.
function settings() {
  const tools = toolsGiven();
  return {
    model,
    ...given(SAMPLING),
    mm_processor_kwargs: given(MEDIA_OPTIONS),
    chat_template_kwargs: field("thinking").checked ? { enable_thinking: true } : {},
    ...(field("restore_newlines").checked && { restore_newlines: true }),  // else as the server has it
    ...(tools && { tools }),
  };
}

function toolsGiven() {
  const written = field("tools").value.trim();
  try {
    return written && JSON.parse(written);
  } catch (error) {
    throw new Error(`Tools: ${error.message}`);
  }
}

function request(said) {
  const system = field("system").value.trim();
  const told = said.filter((message) => !(message.role === "assistant" && message.error && !message.content));
  return { ...settings(), messages: [...(system ? [{ role: "system", content: system }] : []), ...told.map(apiMessage)] };
}

// ---- showing

function render(index) {
  const message = messages[index];
  const made = element("li", { className: message.role });
  if (message.role === "user") made.append(...userParts(message));
  else if (message.role === "tool") made.append(element("div", { className: "call" }, "Result", element("pre", { textContent: message.content })));
  else made.append(...assistantParts(message, index));
  const list = at("messages");
  if (list.children[index]) list.children[index].replaceWith(made);
  else list.append(made);
}

function renderAll() {
  at("messages").replaceChildren();
  messages.forEach((_, index) => render(index));
  at("empty").hidden = messages.length > 0;
}

function userParts(message) {
  const media = element("div", { className: "media" }, ...message.media.map((medium) => figure(medium)));
  return [...(message.media.length ? [media] : []), message.content];
}

function assistantParts(message, index) {
  const last = index === messages.length - 1;
  const parts = [];
  if (message.reasoning) {
    const open = Boolean(at("messages").children[index]?.querySelector("details")?.open);
    const title = last && running && !message.content ? "Thinking…" : "Thought";
    parts.push(element("details", { open }, element("summary", { textContent: title }), element("div", { textContent: message.reasoning })));
  }
  parts.push(element("div", { className: "text" }, markdown(message.content)));
  parts.push(...message.calls.map((call) => callCard(call, index)));
  if (message.error) parts.push(element("p", { className: "error", textContent: message.error }));
  if (!(last && running)) parts.push(underline(message, index));
  return parts;
}

function callCard(call, index) {
  const card = element("div", { className: "call" }, "Calls ", element("code", { textContent: call.name }), element("pre", { textContent: pretty(call.arguments) }));
  const answered = messages.slice(index + 1).some((message) => message.role === "tool" && message.id === call.id);
  if (!answered && !running) {
    const result = element("input", { placeholder: "Its result", ariaLabel: `Result of ${call.name}` });
    const form = element("form", {}, result, element("button", { type: "submit", textContent: "Give" }));
    form.onsubmit = (event) => { event.preventDefault(); giveResult(call, index, result.value); };
    card.append(form);
  }
  return card;
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

function underline(message, index) {
  const copy = element("button", { type: "button", textContent: "Copy", onclick: () => copyText(message.content, copy) });
  const retry = element("button", { type: "button", textContent: "Retry", onclick: () => again(index) });
  return element("div", { className: "under" }, copy, retry, element("span", { textContent: message.note ?? "" }));
}

function renderAttached() {
  at("attached").replaceChildren(...attached.map((medium) => element("li", {}, figure(medium, () => {
    attached = attached.filter((other) => other !== medium);
    renderAttached();
  }))));
}

function scrollDown(force) {
  const chat = at("chat");
  if (force || chat.scrollHeight - chat.scrollTop - chat.clientHeight < 160) chat.scrollTop = chat.scrollHeight;
}

function busy(controller) {
  running = controller;
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  at("state").textContent = running ? "answering…" : "";
}

// ---- doing

async function attach(files) {
  add(await readMedia(files));
}

function add(media) {
  attached.push(...media);
  media.forEach(price);
  renderAttached();
}

async function price(medium) {
  medium.cost = await costOf(medium, given(MEDIA_OPTIONS), headers()).catch(() => null);
  renderAttached();
}

async function drawNext() {
  const answered = await fetch("scene", { headers: headers() }).catch(() => null);
  drawn = answered?.status === 200 ? await answered.json() : null;
  at("draw").hidden = drawn === null;
}

function startOver() {
  stop();
  messages = [];
  renderAll();
  keepChat(messages);
  at("words").focus();
}

function takeDrawn() { // into a chat of its own: the demo model has been taught one scene at a time
  if (!drawn) return;
  startOver();
  attached = [];
  add(drawn.pictures.map((url, i) => ({ kind: "image", name: `drawn ${i + 1}`, url })));
  at("words").value = drawn.question;
  drawn = null;
  grow();
  drawNext();
}

async function send() {
  await begun;
  const words = at("words").value.trim();
  if (running || (!words && !attached.length)) return;
  messages.push({ role: "user", content: words, media: attached });
  attached = [];
  at("words").value = "";
  grow();
  renderAttached();
  renderAll();
  await answer();
}

async function again(index) {
  if (running) return;
  messages = messages.slice(0, index);
  await answer();
}

async function giveResult(call, index, content) {
  messages.splice(index + 1 + messages[index].calls.indexOf(call), 0, { role: "tool", id: call.id, content });
  const waiting = messages[index].calls.filter((other) => !messages.some((message) => message.role === "tool" && message.id === other.id));
  renderAll();
  if (!waiting.length) await answer();
}

async function answer() {
  const message = { role: "assistant", content: "", reasoning: "", calls: [], note: "", error: "" };
  const said = [...messages];
  messages.push(message);
  busy(new AbortController());
  renderAll();
  scrollDown(true);
  await receive(message, said);
  busy(null);
  renderAll();
  scrollDown();
  await keepChat(messages);
}

async function receive(message, said) {
  const index = messages.length - 1;
  const start = performance.now();
  let first = 0;
  try {
    if (!model) await connect(running.signal);
    for await (const chunk of stream(request(said), headers(), running.signal)) {
      first ||= performance.now();
      const choice = chunk.choices[0];
      if (choice) addDelta(message, choice.delta);
      if (choice?.finish_reason === "length") message.note = "cut off; ";
      if (chunk.usage) message.note += numbers(chunk.usage, first - start, performance.now() - first);
      paint(index);
    }
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else message.error = error.message;
    if (error.status === 401) openSettings(true, "key");
  }
}

function numbers(usage, waited, took) {
  const rate = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / (took / 1000)).toFixed(1)} a second` : "";
  return `${usage.prompt_tokens} + ${usage.completion_tokens} tokens, first after ${(waited / 1000).toFixed(2)} s${rate}`;
}

let painting = false;
function paint(index) { // at most once a frame, however fast the tokens come
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => {
    painting = false;
    if (messages[index] && running) render(index);
    scrollDown();
  });
}

function stop() {
  running?.abort();
}

function openSettings(open, focus) {
  at("settings").hidden = !open;
  at("open-settings").ariaExpanded = String(open);
  if (open) field(focus ?? "system").focus();
  else at("open-settings").focus();
}

function grow() {
  const words = at("words");
  words.style.height = "auto";
  words.style.height = `${words.scrollHeight + 2}px`;
}

function theme(chosen) {
  if (chosen) document.documentElement.dataset.theme = chosen;
}

function otherTheme() {
  const dark = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const chosen = dark === "dark" ? "light" : "dark";
  theme(chosen);
  localStorage.setItem("theme", chosen);
}

// ---- events

at("composer").onsubmit = (event) => { event.preventDefault(); send(); };
at("stop").onclick = stop;
at("attach").onclick = () => at("files").click();
at("draw").onclick = takeDrawn;
at("files").onchange = async (event) => { await attach(event.target.files); event.target.value = ""; };
at("open-settings").onclick = () => openSettings(at("settings").hidden);
at("close-settings").onclick = () => openSettings(false);
at("theme").onclick = otherTheme;
at("fresh").onclick = startOver;
at("words").oninput = grow;
at("words").onkeydown = (event) => {
  const phone = matchMedia("(pointer: coarse)").matches; // where Enter is the only way to a new line
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !phone) {
    event.preventDefault();
    send();
  }
};
at("settings").onchange = (event) => {
  keepSettings(fields);
  if (MEDIA_OPTIONS.includes(event.target.name)) attached.forEach(price);
  if (event.target.name === "key") connect();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else if (!at("settings").hidden) openSettings(false);
};
document.onpaste = (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    attach(event.clipboardData.files);
  }
};
document.ondragover = (event) => { event.preventDefault(); at("drop").hidden = false; };
document.ondragleave = (event) => { if (!event.relatedTarget) at("drop").hidden = true; };
document.ondrop = (event) => { event.preventDefault(); at("drop").hidden = true; attach(event.dataTransfer.files); };

async function connect(signal) {
  const answered = await fetch("v1/models", { headers: headers(), signal }).catch(() => null);
  if (answered?.ok) {
    model = (await answered.json()).data[0].id;
    at("model").textContent = document.title = model;
    if (!running) at("state").textContent = "";
    drawNext();
  } else {
    at("state").textContent = answered?.status === 401 ? "this server asks for an API key" : "no connection";
    if (answered?.status === 401) openSettings(true, "key");
  }
}

async function begin() {
  theme(localStorage.getItem("theme"));
  restoreSettings(fields);
  messages = (await keptChat()) ?? [];
  renderAll();
  scrollDown(true);
}

const begun = begin(); // nothing is sent before the kept chat stands
begun.then(() => connect());
