"use strict";
// Images and videos: read from files, and shown with their slice grid and their number of tokens.

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
  const preview = medium.kind === "image"
    ? element("img", { src: medium.url, alt: medium.name })
    : element("video", { src: medium.url, muted: true, controls: true, preload: "metadata" });
  const sliced = element("div", { className: "sliced" }, preview);
  const caption = element("figcaption", { textContent: medium.cost ? costText(medium.cost) : medium.name });
  const made = element("figure", {}, sliced, caption);
  if (medium.cost && medium.kind === "image") drawSliceGrid(sliced, medium.cost.grid);
  if (onRemove) {
    const label = `Remove ${medium.name}`;
    made.append(element("button", { type: "button", textContent: "✕", title: label, ariaLabel: label, onclick: onRemove }));
  }
  return made;
}

function drawSliceGrid(over, [rows, columns]) {
  for (let i = 1; i < rows; i++) over.append(gridLine("across", "top", i / rows));
  for (let i = 1; i < columns; i++) over.append(gridLine("down", "left", i / columns));
}

function gridLine(direction, side, share) {
  const made = element("i", { className: direction });
  made.style[side] = `${100 * share}%`;
  return made;
}

function costText(cost) {
  const tokens = `${cost.tokens.toLocaleString("en")} tokens`;
  if (cost.type === "video") return `${cost.pictures} images, ${tokens}`;
  const [rows, columns] = cost.grid;
  return rows ? `${rows} × ${columns} slices, ${tokens}` : `not sliced, ${tokens}`;
}

// Returns the slices and tokens of one image or video under the present settings.
// Returns null if the server refuses it, because sending will show the reason.
async function fetchCost(medium, options, headers) {
  const messages = [{ role: "user", content: [mediaPart(medium)] }];
  const body = JSON.stringify({ messages, mm_processor_kwargs: options });
  const response = await fetch("tokenize", { method: "POST", headers, body });
  return response.ok ? (await response.json()).media[0] : null;
}
