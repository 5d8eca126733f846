"use strict";
// Requests to the server: the stream of an answer, and messages in the API's form.

class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function* streamChat(request, headers, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await fetch("v1/chat/completions", { method: "POST", headers, body, signal });
  if (!response.ok) {
    const refusal = await response.json().catch(() => null);
    throw new ApiError(response.status, refusal?.error?.message ?? `HTTP status ${response.status}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(500, chunk.error.message);
      yield chunk;
    }
  }
}

function addDelta(message, delta) {
  message.content += delta.content ?? "";
  message.reasoning += delta.reasoning_content ?? "";
  for (const part of delta.tool_calls ?? []) {
    const call = (message.calls[part.index] ??= { id: part.id, name: part.function.name, arguments: "" });
    call.arguments += part.function.arguments;
  }
}

// Returns a message of the page in the API's form.
function apiMessage(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.id, content: message.content };
  if (message.role === "user") {
    const media = message.media.map(mediaPart);
    return { role: "user", content: media.length ? [...media, { type: "text", text: message.content }] : message.content };
  }
  const calls = message.calls.map(({ id, name, arguments: args }) => ({ id, type: "function", function: { name, arguments: args } }));
  return {
    role: "assistant",
    content: message.content,
    ...(message.reasoning && { reasoning_content: message.reasoning }),
    ...(calls.length && { tool_calls: calls }),
  };
}
