// Elements, texts and numbers. Nothing here or elsewhere makes HTML of a text.

/** An element with properties and children. Children may be nodes, texts, or null for none. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

export function replace(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
}

export function bytes(count) {
  if (count < 1024) return `${count} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let value = count;
  let unit = -1;
  do {
    value /= 1024;
    unit += 1;
  } while (value >= 1024 && unit < units.length - 1);
  return `${value.toFixed(value < 10 ? 1 : 0)} ${units[unit]}`;
}

/** A duration in nanoseconds. */
export function duration(nanos) {
  const millis = nanos / 1e6;
  if (millis < 1) return `${millis.toFixed(2)} ms`;
  if (millis < 10) return `${millis.toFixed(1)} ms`;
  if (millis < 1000) return `${Math.round(millis)} ms`;
  if (millis < 60_000) return `${(millis / 1000).toFixed(1)} s`;
  return `${Math.floor(millis / 60_000)} min ${Math.round((millis % 60_000) / 1000)} s`;
}

export function clock(start) {
  return new Date(start).toLocaleTimeString([], { hour12: false });
}

let toastTimer;
export function toast(text, isError = false) {
  const element = byId("toast");
  element.textContent = text;
  element.classList.toggle("is-error", isError);
  element.classList.add("is-shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => element.classList.remove("is-shown"), isError ? 6000 : 2500);
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    toast(`${what} copied`);
  } catch {
    const area = h("textarea", { class: "code", rows: 12, readonly: true, "aria-label": what }, text);
    openDialog(what, h("p", {}, "Select and copy:"), area);
    area.select();
  }
}

/** Shows a dialog. It closes with Escape or its button. */
export function openDialog(title, ...content) {
  const dialog = byId("dialog");
  const close = h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close");
  replace(dialog, h("div", { class: "dialog-head" }, h("h2", {}, title), close), h("div", { class: "dialog-body" }, ...content));
  if (!dialog.open) dialog.showModal();
  return dialog;
}

/** Asks the API. Refusals become errors with the API's sentence. */
export async function ask(path, options = {}) {
  const response = await fetch(path, options);
  if (!response.ok) {
    let message = `the inspector answered ${response.status}`;
    try {
      message = (await response.json()).msg ?? message;
    } catch {
      // The status says what there is to say.
    }
    throw new Error(message);
  }
  return response;
}

export function post(path, value) {
  return ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(value),
  });
}

/** The class of a status, for its colour. */
export function tone(exchange) {
  if (exchange.state === "open" && !exchange.status_code) return "open";
  if (!exchange.status_code || exchange.state === "failed") return "failed";
  return `s${Math.floor(exchange.status_code / 100)}`;
}

export function statusText(exchange) {
  if (exchange.status_code) return String(exchange.status_code);
  return { open: "···", cancelled: "left", refused: "busy", failed: "failed" }[exchange.state] ?? "–";
}
