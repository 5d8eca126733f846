"use strict";
// State that outlasts a reload: settings in local storage, messages in a database, because images make them large.
// Neither leaves the browser.

function openDatabase() {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("minicpmv", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("kept");
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
}

async function withStore(mode, action) {
  const database = await openDatabase();
  try {
    return await new Promise((resolve, reject) => {
      const pending = action(database.transaction("kept", mode).objectStore("kept"));
      pending.onsuccess = () => resolve(pending.result);
      pending.onerror = () => reject(pending.error);
    });
  } finally {
    database.close();
  }
}

// Private windows may have no storage; the page works without it.
const saveChat = (messages) => withStore("readwrite", (store) => store.put(messages, "chat")).catch(() => {});
const loadChat = () => withStore("readonly", (store) => store.get("chat")).catch(() => undefined);

function saveSettings(fields) {
  const values = {};
  for (const field of fields) values[field.name] = field.type === "checkbox" ? field.checked : field.value;
  localStorage.setItem("settings", JSON.stringify(values));
}

function loadSettings(fields) {
  const values = JSON.parse(localStorage.getItem("settings") ?? "{}");
  for (const field of fields) {
    if (!(field.name in values)) continue;
    if (field.type === "checkbox") field.checked = values[field.name];
    else field.value = values[field.name];
  }
}
