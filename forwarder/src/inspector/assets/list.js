// The list of requests: rows, filters and what is selected.

import { bytes, byId, clock, duration, h, replace, statusText, tone } from "./dom.js";

const exchanges = new Map(); // id -> summary, oldest first
const rows = new Map(); // id -> element
let held = null; // changes that wait while the list is paused
let onSelect = () => {};

export const state = { selected: null };

/** Ids are hexadecimal numbers of one length, so that their order is that of texts. */
const isOlder = (id, other) => id.length < other.length || (id.length === other.length && id < other);

const filters = () => ({
  text: byId("filter-text").value.trim().toLowerCase(),
  method: byId("filter-method").value,
  status: byId("filter-status").value,
  tunnel: byId("filter-tunnel").value,
});

function isShown(exchange, { text, method, status, tunnel }) {
  if (method && exchange.method !== method) return false;
  if (tunnel && exchange.tunnel_name !== tunnel) return false;
  if (status === "open" && exchange.state !== "open") return false;
  if (status === "failed" && (exchange.state === "open" || exchange.state === "complete")) return false;
  if (/^\d$/.test(status) && Math.floor((exchange.status_code ?? 0) / 100) !== Number(status)) return false;
  if (!text) return true;
  const searched = [
    exchange.method, exchange.path, exchange.status_code, exchange.tunnel_name, exchange.remote_addr,
    exchange.content_type, exchange.error, exchange.state,
  ].join(" ").toLowerCase();
  return text.split(/\s+/).every((word) => searched.includes(word));
}

function timeOf(exchange) {
  if (exchange.state !== "open") return duration(exchange.duration);
  return exchange.upgrade && exchange.status_code === 101 ? "open" : "…";
}

function fill(row, exchange) {
  const [path, query] = splitOnce(exchange.path, "?");
  const marks = [
    exchange.replay_of ? h("span", { class: "mark", title: "A replay" }, exchange.replay_edited ? "edited" : "replay") : null,
    exchange.upgrade ? h("span", { class: "mark", title: "An upgraded connection" }, `${exchange.upgrade} ${exchange.message_count ?? ""}`.trim()) : null,
  ];
  row.className = `row ${tone(exchange)}`;
  replace(
    row,
    h("span", { class: "status" }, statusText(exchange)),
    h("span", { class: "method" }, exchange.method),
    h("span", { class: "path", title: exchange.path }, path, query === null ? null : h("span", { class: "query" }, `?${query}`)),
    h("span", { class: "marks" }, ...marks),
    h("span", { class: "size" }, bytes(exchange.response_bytes)),
    h("span", { class: "time" }, timeOf(exchange)),
    h("time", { class: "clock", datetime: exchange.start }, clock(exchange.start)),
  );
}

function splitOnce(text, separator) {
  const at = text.indexOf(separator);
  return at < 0 ? [text, null] : [text.slice(0, at), text.slice(at + 1)];
}

function rowOf(exchange) {
  let row = rows.get(exchange.id);
  if (!row) {
    row = h("li", { role: "option", id: `row-${exchange.id}`, "aria-selected": "false", onclick: () => select(exchange.id) });
    row.dataset.id = exchange.id;
    rows.set(exchange.id, row);
  }
  fill(row, exchange);
  return row;
}

/** Takes an event of /api/events. */
export function take(event) {
  if (held) {
    if (event.cleared) held.length = 0;
    held.push(event);
    summarise();
    return;
  }
  if (event.cleared) {
    exchanges.clear();
    rows.clear();
    byId("list").replaceChildren();
  }
  const wanted = filters();
  const list = byId("list");
  for (const exchange of event.exchanges) {
    const isNew = !exchanges.has(exchange.id);
    exchanges.set(exchange.id, exchange);
    const row = rowOf(exchange);
    row.hidden = !isShown(exchange, wanted);
    if (isNew) list.prepend(row);
    if (exchange.id === state.selected) row.setAttribute("aria-selected", "true");
  }
  for (const id of exchanges.keys()) {
    if (event.oldest && !isOlder(id, event.oldest)) break;
    exchanges.delete(id);
    rows.get(id)?.remove();
    rows.delete(id);
  }
  addMethods(event.exchanges);
  summarise();
}

function addMethods(changed) {
  const select = byId("filter-method");
  const known = new Set([...select.options].map((option) => option.value));
  for (const { method } of changed) {
    if (known.has(method)) continue;
    known.add(method);
    select.append(h("option", { value: method }, method));
  }
}

export function setTunnels(names) {
  const select = byId("filter-tunnel");
  const value = select.value;
  replace(select, h("option", { value: "" }, "Any tunnel"), names.map((name) => h("option", { value: name }, name)));
  select.value = names.includes(value) ? value : "";
  select.hidden = names.length < 2;
}

export function refilter() {
  const wanted = filters();
  for (const [id, row] of rows) row.hidden = !isShown(exchanges.get(id), wanted);
  summarise();
}

function summarise() {
  const shown = [...rows.values()].filter((row) => !row.hidden).length;
  const waiting = held?.reduce((ids, event) => (event.exchanges.forEach(({ id }) => exchanges.has(id) || ids.add(id)), ids), new Set()).size;
  const count = shown === exchanges.size ? `${shown}` : `${shown} of ${exchanges.size}`;
  byId("count").textContent = waiting ? `${count} · ${waiting} new` : count;
  byId("empty").hidden = shown > 0;
  byId("list").hidden = shown === 0;
  byId("empty").firstElementChild.textContent = exchanges.size ? "No request matches" : "No requests yet";
  byId("empty-hint").textContent = exchanges.size
    ? "Change the filter to see the others."
    : "Send one to your tunnel and it appears here at once.";
}

export function isPaused() {
  return held !== null;
}

export function setPaused(isPausedNow) {
  if (isPausedNow) {
    held = [];
    return;
  }
  const events = held ?? [];
  held = null;
  events.forEach(take);
}

export const all = () => [...exchanges.values()].reverse();
export const get = (id) => exchanges.get(id);
export const whenSelected = (act) => (onSelect = act);

export function select(id, isQuiet = false) {
  rows.get(state.selected)?.setAttribute("aria-selected", "false");
  state.selected = id;
  const row = rows.get(id);
  const list = byId("list");
  if (row) {
    row.setAttribute("aria-selected", "true");
    row.scrollIntoView({ block: "nearest" });
    list.setAttribute("aria-activedescendant", row.id);
  } else {
    list.removeAttribute("aria-activedescendant");
  }
  if (!isQuiet) onSelect(id);
}

/** Selects the next row that is shown, downwards or upwards. */
export function move(step) {
  const shown = [...byId("list").children].filter((row) => !row.hidden);
  if (!shown.length) return;
  const at = shown.findIndex((row) => row.dataset.id === state.selected);
  const next = at < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, at + step));
  select(shown[next].dataset.id);
}
