// The page: what it shows follows the events of the API and the fragment of its address.

import { ask, byId, h, openDialog, replace, toast } from "./dom.js";
import * as list from "./list.js";
import * as details from "./details.js";

function showTunnels(tunnels) {
  const items = tunnels.map((tunnel) => {
    const url = tunnel.browser_url ? `${tunnel.browser_url}/` : tunnel.public_url;
    const isSafe = /^https?:\/\//.test(url);
    const state = tunnel.online ? "online" : "reconnecting";
    return h(
      "li",
      { class: `tunnel ${state}`, title: `${tunnel.name}: ${state}, to ${tunnel.config.addr}` },
      h("span", { class: "dot", role: "img", "aria-label": state }),
      isSafe ? h("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, url) : h("span", {}, url),
      h("span", { class: "target" }, `→ ${tunnel.config.addr}`),
    );
  });
  replace(byId("tunnels"), items);
  list.setTunnels(tunnels.map((tunnel) => tunnel.name));
  details.setTunnels(tunnels);
}

function follow() {
  const events = new EventSource("/api/events");
  let shown = "";
  events.addEventListener("exchanges", (message) => {
    const event = JSON.parse(message.data);
    list.take(event);
    const tunnels = JSON.stringify(event.tunnels.map(({ metrics, ...rest }) => rest));
    if (tunnels !== shown) {
      shown = tunnels;
      showTunnels(event.tunnels);
    }
    if (event.cleared && list.state.selected && !list.get(list.state.selected)) showSelected(null);
    const changed = event.exchanges.find(({ id }) => id === list.state.selected);
    if (changed) details.refresh(changed);
    document.body.classList.remove("is-offline");
  });
  events.addEventListener("error", () => document.body.classList.add("is-offline"));
}

function showSelected(id) {
  document.body.classList.toggle("has-details", Boolean(id));
  const fragment = id ? `#${id}` : "";
  if (location.hash !== fragment) history.replaceState(null, "", fragment || location.pathname);
  if (id) details.show(id);
  else details.hide();
}

function selectFragment() {
  const id = location.hash.slice(1);
  if (/^[0-9a-f]+$/.test(id)) {
    list.select(id, true);
    showSelected(id);
  }
}

function close() {
  list.select(null, true);
  showSelected(null);
  byId("list").focus();
}

function togglePause() {
  list.setPaused(!list.isPaused());
  const button = byId("pause");
  button.setAttribute("aria-pressed", String(list.isPaused()));
  button.textContent = list.isPaused() ? "Resume" : "Pause";
}

async function clear() {
  try {
    await ask("/api/requests/http", { method: "DELETE" });
    showSelected(null);
    list.select(null, true);
  } catch (error) {
    toast(error.message, true);
  }
}

const KEYS = [
  ["/", "filter"],
  ["↓ or j, ↑ or k", "next and previous request"],
  ["Enter", "go to the details"],
  ["Esc", "back to the list"],
  ["r", "replay"],
  ["e", "edit and replay"],
  ["m", "compare"],
  ["c", "copy as curl"],
  ["p", "pause or resume"],
  ["?", "this list"],
];

function help() {
  const rows = KEYS.map(([key, what]) => h("tr", {}, h("td", {}, h("kbd", {}, key)), h("td", {}, what)));
  openDialog("Keyboard", h("table", { class: "keys" }, h("tbody", {}, rows)));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("dialog").open) return;
  const isTyping = event.target.matches("input, textarea, select");
  if (isTyping) {
    if (event.key === "Escape") {
      event.target.blur();
      byId("list").focus();
    } else if (event.key === "ArrowDown" && event.target.id === "filter-text") {
      byId("list").focus();
      list.move(list.state.selected ? 0 : 1);
    } else {
      return;
    }
    event.preventDefault();
    return;
  }
  const inDetails = byId("details").contains(event.target);
  const acts = {
    "/": () => byId("filter-text").focus(),
    j: () => list.move(1),
    k: () => list.move(-1),
    ArrowDown: inDetails ? null : () => list.move(1),
    ArrowUp: inDetails ? null : () => list.move(-1),
    Home: inDetails ? null : () => list.move(-Infinity),
    End: inDetails ? null : () => list.move(Infinity),
    Enter: inDetails || event.target.closest("button, a") ? null : () => list.state.selected && byId("details").focus(),
    Escape: close,
    r: () => details.act("replay"),
    e: () => details.act("edit"),
    m: () => details.act("compare"),
    c: () => details.act("curl"),
    p: togglePause,
    "?": help,
  };
  const act = acts[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

list.whenSelected(showSelected);
details.setup({ close, select: (id) => list.select(id) });
byId("filter").addEventListener("input", list.refilter);
byId("filter").addEventListener("submit", (event) => event.preventDefault());
byId("pause").addEventListener("click", togglePause);
byId("clear").addEventListener("click", clear);
byId("help").addEventListener("click", help);
window.addEventListener("hashchange", selectFragment);
document.addEventListener("keydown", onKey);
follow();
selectFragment();
