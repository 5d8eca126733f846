"use strict";
// The conversation: requests, rendering and all events of the page.

const byId = (id) => document.getElementById(id);
const fields = [...byId("settings").querySelectorAll("[name]")];
const field = (name) => fields.find((one) => one.name === name);
let messages = []; // {role: user, content, media} | {role: assistant, content, reasoning, calls, note, error} | {role: tool, id, content}
let attachments = [];
let running = null; // AbortController of the running request, or null
let model = "";
let scene = null; // images and a question for the demo model; null if the server has another model

const MEDIA_OPTIONS = ["max_slice_nums", "downsample_mode", "max_num_frames", "stack_frames"];
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "thinking_token_budget"];

function headers() {
  const key = field("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

// Returns the values of the named settings that are not empty.
function filledIn(names) {
  return Object.fromEntries(
    names.filter((name) => field(name).value !== "").map((name) => [name, name === "downsample_mode" ? field(name).value : Number(field(name).value)]),
  );
}

// Returns a request's fields except its messages. Throws if the tools are not JSON.
function requestFields() {
  const tools = parseTools();
  return {
    model,
    ...filledIn(SAMPLING),
    mm_processor_kwargs: filledIn(MEDIA_OPTIONS),
    chat_template_kwargs: field("thinking").checked ? { enable_thinking: true } : {},
    ...(field("restore_newlines").checked && { restore_newlines: true }), // left out, the server's default applies
    ...(tools && { tools }),
  };
}

function parseTools() {
  const text = field("tools").value.trim();
  try {
    return text && JSON.parse(text);
  } catch (error) {
    throw new Error(`Tools: ${error.message}`);
  }
}

function makeRequest(history) {
  const system = field("system").value.trim();
  const sent = history.filter((message) => !(message.role === "assistant" && message.error && !message.content));
  return { ...requestFields(), messages: [...(system ? [{ role: "system", content: system }] : []), ...sent.map(apiMessage)] };
}

// ---- rendering

function render(index) {
  const message = messages[index];
  const made = element("li", { className: message.role });
  if (message.role === "user") made.append(...userParts(message));
  else if (message.role === "tool") made.append(element("div", { className: "call" }, "Result", element("pre", { textContent: message.content })));
  else made.append(...assistantParts(message, index));
  const list = byId("messages");
  if (list.children[index]) list.children[index].replaceWith(made);
  else list.append(made);
}

function renderAll() {
  byId("messages").replaceChildren();
  messages.forEach((_, index) => render(index));
  byId("empty").hidden = messages.length > 0;
}

function userParts(message) {
  const media = element("div", { className: "media" }, ...message.media.map((medium) => figure(medium)));
  return [...(message.media.length ? [media] : []), message.content];
}

function assistantParts(message, index) {
  const last = index === messages.length - 1;
  const parts = [];
  if (message.reasoning) {
    const open = Boolean(byId("messages").children[index]?.querySelector("details")?.open);
    const title = last && running && !message.content ? "Thinking…" : "Thought";
    parts.push(element("details", { open }, element("summary", { textContent: title }), element("div", { textContent: message.reasoning })));
  }
  parts.push(element("div", { className: "text" }, markdown(message.content)));
  parts.push(...message.calls.map((call) => toolCallCard(call, index)));
  if (message.error) parts.push(element("p", { className: "error", textContent: message.error }));
  if (!(last && running)) parts.push(messageFooter(message, index));
  return parts;
}

function toolCallCard(call, index) {
  const card = element("div", { className: "call" }, "Calls ", element("code", { textContent: call.name }), element("pre", { textContent: pretty(call.arguments) }));
  const hasResult = messages.slice(index + 1).some((message) => message.role === "tool" && message.id === call.id);
  if (!hasResult && !running) {
    const result = element("input", { placeholder: "Result", ariaLabel: `Result of ${call.name}` });
    const form = element("form", {}, result, element("button", { type: "submit", textContent: "Send result" }));
    form.onsubmit = (event) => { event.preventDefault(); sendToolResult(call, index, result.value); };
    card.append(form);
  }
  return card;
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

function messageFooter(message, index) {
  const copyButton = element("button", { type: "button", textContent: "Copy", onclick: () => copyText(message.content, copyButton) });
  const retryButton = element("button", { type: "button", textContent: "Retry", onclick: () => retry(index) });
  return element("div", { className: "message-footer" }, copyButton, retryButton, element("span", { textContent: message.note ?? "" }));
}

function renderAttached() {
  byId("attached").replaceChildren(...attachments.map((medium) => element("li", {}, figure(medium, () => {
    attachments = attachments.filter((other) => other !== medium);
    renderAttached();
  }))));
}

function scrollDown(force) {
  const chat = byId("chat");
  if (force || chat.scrollHeight - chat.scrollTop - chat.clientHeight < 160) chat.scrollTop = chat.scrollHeight;
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  byId("status").textContent = running ? "answering…" : "";
}

// ---- actions

async function attach(files) {
  addMedia(await readMedia(files));
}

function addMedia(media) {
  attachments.push(...media);
  media.forEach(updateCost);
  renderAttached();
}

async function updateCost(medium) {
  medium.cost = await fetchCost(medium, filledIn(MEDIA_OPTIONS), headers()).catch(() => null);
  renderAttached();
}

async function fetchScene() {
  const response = await fetch("scene", { headers: headers() }).catch(() => null);
  scene = response?.status === 200 ? await response.json() : null;
  byId("draw").hidden = scene === null;
}

function newChat() {
  stop();
  messages = [];
  renderAll();
  saveChat(messages);
  byId("input").focus();
}

function useScene() { // in a new chat, because the demo model was trained on one scene at a time
  if (!scene) return;
  newChat();
  attachments = [];
  addMedia(scene.pictures.map((url, i) => ({ kind: "image", name: `drawn image ${i + 1}`, url })));
  byId("input").value = scene.question;
  scene = null;
  resizeInput();
  fetchScene();
}

async function send() {
  await pageLoaded;
  const text = byId("input").value.trim();
  if (running || (!text && !attachments.length)) return;
  messages.push({ role: "user", content: text, media: attachments });
  attachments = [];
  byId("input").value = "";
  resizeInput();
  renderAttached();
  renderAll();
  await generateAnswer();
}

async function retry(index) {
  if (running) return;
  messages = messages.slice(0, index);
  await generateAnswer();
}

async function sendToolResult(call, index, content) {
  messages.splice(index + 1 + messages[index].calls.indexOf(call), 0, { role: "tool", id: call.id, content });
  const waiting = messages[index].calls.filter((other) => !messages.some((message) => message.role === "tool" && message.id === other.id));
  renderAll();
  if (!waiting.length) await generateAnswer();
}

async function generateAnswer() {
  const message = { role: "assistant", content: "", reasoning: "", calls: [], note: "", error: "" };
  const history = [...messages];
  messages.push(message);
  setRunning(new AbortController());
  renderAll();
  scrollDown(true);
  await receiveAnswer(message, history);
  setRunning(null);
  renderAll();
  scrollDown();
  await saveChat(messages);
}

async function receiveAnswer(message, history) {
  const index = messages.length - 1;
  const start = performance.now();
  let first = 0;
  try {
    if (!model) await connect(running.signal);
    for await (const chunk of streamChat(makeRequest(history), headers(), running.signal)) {
      first ||= performance.now();
      const choice = chunk.choices[0];
      if (choice) addDelta(message, choice.delta);
      if (choice?.finish_reason === "length") message.note = "token limit reached; ";
      if (chunk.usage) message.note += usageText(chunk.usage, first - start, performance.now() - first);
      scheduleRender(index);
    }
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else message.error = error.message;
    if (error.status === 401) openSettings(true, "key");
  }
}

function usageText(usage, firstTokenMs, decodeMs) {
  const rate = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / (decodeMs / 1000)).toFixed(1)} tokens/s` : "";
  return `${usage.prompt_tokens} + ${usage.completion_tokens} tokens, first token after ${(firstTokenMs / 1000).toFixed(2)} s${rate}`;
}

let renderScheduled = false;
function scheduleRender(index) { // at most once a frame, because tokens may arrive faster
  if (renderScheduled) return;
  renderScheduled = true;
  requestAnimationFrame(() => {
    renderScheduled = false;
    if (messages[index] && running) render(index);
    scrollDown();
  });
}

function stop() {
  running?.abort();
}

function openSettings(open, focus) {
  byId("settings").hidden = !open;
  byId("open-settings").ariaExpanded = String(open);
  if (open) field(focus ?? "system").focus();
  else byId("open-settings").focus();
}

function resizeInput() {
  const input = byId("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function setTheme(chosen) {
  if (chosen) document.documentElement.dataset.theme = chosen;
}

function toggleTheme() {
  const dark = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const chosen = dark === "dark" ? "light" : "dark";
  setTheme(chosen);
  localStorage.setItem("theme", chosen);
}

// ---- events

byId("composer").onsubmit = (event) => { event.preventDefault(); send(); };
byId("stop").onclick = stop;
byId("attach").onclick = () => byId("files").click();
byId("draw").onclick = useScene;
byId("files").onchange = async (event) => { await attach(event.target.files); event.target.value = ""; };
byId("open-settings").onclick = () => openSettings(byId("settings").hidden);
byId("close-settings").onclick = () => openSettings(false);
byId("theme").onclick = toggleTheme;
byId("new-chat").onclick = newChat;
byId("input").oninput = resizeInput;
byId("input").onkeydown = (event) => {
  const phone = matchMedia("(pointer: coarse)").matches; // there Enter must insert a line break
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !phone) {
    event.preventDefault();
    send();
  }
};
byId("settings").onchange = (event) => {
  saveSettings(fields);
  if (MEDIA_OPTIONS.includes(event.target.name)) attachments.forEach(updateCost);
  if (event.target.name === "key") connect();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else if (!byId("settings").hidden) openSettings(false);
};
document.onpaste = (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    attach(event.clipboardData.files);
  }
};
document.ondragover = (event) => { event.preventDefault(); byId("drop").hidden = false; };
document.ondragleave = (event) => { if (!event.relatedTarget) byId("drop").hidden = true; };
document.ondrop = (event) => { event.preventDefault(); byId("drop").hidden = true; attach(event.dataTransfer.files); };

async function connect(signal) {
  const response = await fetch("v1/models", { headers: headers(), signal }).catch(() => null);
  if (response?.ok) {
    model = (await response.json()).data[0].id;
    byId("model").textContent = document.title = model;
    if (!running) byId("status").textContent = "";
    fetchScene();
  } else {
    byId("status").textContent = response?.status === 401 ? "this server needs an API key" : "no connection";
    if (response?.status === 401) openSettings(true, "key");
  }
}

async function loadPage() {
  setTheme(localStorage.getItem("theme"));
  loadSettings(fields);
  messages = (await loadChat()) ?? [];
  renderAll();
  scrollDown(true);
}

const pageLoaded = loadPage(); // `send` waits for it, so that the stored chat is loaded first
pageLoaded.then(() => connect());
