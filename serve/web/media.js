"use strict";
// Pictures and videos: read from files, shown with the lines along which they are cut, and with what they cost.

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function readMedia(files) {
  const media = [...files].filter((file) => /^(image|video)\//.test(file.type));
  return Promise.all(media.map(async (file) => ({ kind: file.type.split("/")[0], name: file.name, url: await readFile(file) })));
}

function mediaPart(medium) {
  const type = `${medium.kind}_url`;
  return { type, [type]: { url: medium.url } };
}

function figure(medium, onRemove) {
  const shown = medium.kind === "image"
    ? element("img", { src: medium.url, alt: medium.name })
    : element("video", { src: medium.url, muted: true, controls: true, preload: "metadata" });
  const cut = element("div", { className: "cut" }, shown);
  const caption = element("figcaption", { textContent: medium.cost ? costText(medium.cost) : medium.name });
  const made = element("figure", {}, cut, caption);
  if (medium.cost && medium.kind === "image") drawCut(cut, medium.cost.grid);
  if (onRemove) {
    const label = `Remove ${medium.name}`;
    made.append(element("button", { type: "button", textContent: "✕", title: label, ariaLabel: label, onclick: onRemove }));
  }
  return made;
}

function drawCut(over, [rows, columns]) {
  for (let i = 1; i < rows; i++) over.append(line("across", "top", i / rows));
  for (let i = 1; i < columns; i++) over.append(line("down", "left", i / columns));
}

function line(kind, side, share) {
  const made = element("i", { className: kind });
  made.style[side] = `${100 * share}%`;
  return made;
}

function costText(cost) {
  const tokens = `${cost.tokens.toLocaleString("en")} tokens`;
  if (cost.type === "video") return `${cost.pictures} pictures, ${tokens}`;
  const [rows, columns] = cost.grid;
  return rows ? `${rows} × ${columns} slices, ${tokens}` : `whole, ${tokens}`;
}

// What the server makes of one medium with the present settings; null where it refuses (sending will say why).
async function costOf(medium, options, headers) {
  const messages = [{ role: "user", content: [mediaPart(medium)] }];
  const body = JSON.stringify({ messages, mm_processor_kwargs: options });
  const answer = await fetch("tokenize", { method: "POST", headers, body });
  return answer.ok ? (await answer.json()).media[0] : null;
}
