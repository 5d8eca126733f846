"use strict";
// What outlasts a reload: settings in local storage, the conversation (pictures make it large) in a database. Neither leaves the browser.

function database() {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("minicpmv", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("kept");
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
}

async function inStore(mode, act) {
  const kept = await database();
  try {
    return await new Promise((resolve, reject) => {
      const asked = act(kept.transaction("kept", mode).objectStore("kept"));
      asked.onsuccess = () => resolve(asked.result);
      asked.onerror = () => reject(asked.error);
    });
  } finally {
    kept.close();
  }
}

const keepChat = (messages) => inStore("readwrite", (store) => store.put(messages, "chat")).catch(() => {}); // private windows may keep nothing
const keptChat = () => inStore("readonly", (store) => store.get("chat")).catch(() => undefined);

function keepSettings(fields) {
  const values = {};
  for (const field of fields) values[field.name] = field.type === "checkbox" ? field.checked : field.value;
  localStorage.setItem("settings", JSON.stringify(values));
}

function restoreSettings(fields) {
  const values = JSON.parse(localStorage.getItem("settings") ?? "{}");
  for (const field of fields) {
    if (!(field.name in values)) continue;
    if (field.type === "checkbox") field.checked = values[field.name];
    else field.value = values[field.name];
  }
}
