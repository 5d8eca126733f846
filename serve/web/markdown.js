"use strict";
// Renders answers as elements. Generated text becomes text nodes only, never markup, so nothing in it can run.

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function markdown(text) {
  const out = document.createDocumentFragment();
  const fence = /^[ \t]*```([^\n`]*)\n([\s\S]*?)(?:^[ \t]*```[ \t]*$|$(?![\s\S]))/gm;
  let at = 0;
  for (const match of text.matchAll(fence)) {
    out.append(...blocks(text.slice(at, match.index)), codeBlock(match[2].replace(/\n$/, "")));
    at = match.index + match[0].length;
  }
  out.append(...blocks(text.slice(at)));
  return out;
}

function codeBlock(code) {
  const copy = element("button", { type: "button", textContent: "Copy", onclick: () => copyText(code, copy) });
  return element("pre", {}, element("code", { textContent: code }), copy);
}

function blocks(text) {
  return text.split(/\n{2,}/).map((part) => part.replace(/^\n+|\s+$/g, "")).filter(Boolean).map(block);
}

function block(text) {
  const lines = text.split("\n");
  if (lines.every((line) => /^\s*[-*•] /.test(line))) return list("ul", lines, /^\s*[-*•] /);
  if (lines.every((line) => /^\s*\d+[.)] /.test(line))) {
    return Object.assign(list("ol", lines, /^\s*\d+[.)] /), { start: parseInt(lines[0], 10) });
  }
  const heading = /^(#{1,6}) (.*)$/.exec(lines[0]);
  if (!heading) return element("p", {}, ...inline(text));
  const title = element(heading[1].length < 3 ? "h3" : "h4", {}, ...inline(heading[2]));
  return lines.length === 1 ? title : element("div", {}, title, block(lines.slice(1).join("\n")));
}

function list(kind, lines, mark) {
  return element(kind, {}, ...lines.map((line) => element("li", {}, ...inline(line.replace(mark, "")))));
}

function inline(text) {
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(/`([^`\n]+)`|\*\*([^*\n]+)\*\*/g)) {
    parts.push(text.slice(at, match.index), element(match[1] ? "code" : "strong", { textContent: match[1] || match[2] }));
    at = match.index + match[0].length;
  }
  return [...parts, text.slice(at)].filter((part) => part !== "");
}

async function copyText(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch { // browsers allow the clipboard only to pages served over https or from this machine
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = before; }, 1200);
}
