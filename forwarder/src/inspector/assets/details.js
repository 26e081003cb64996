// The details of the selected exchange, and what can be done with it.

import { ask, byId, bytes, clock, copy, duration, h, openDialog, post, replace, statusText, toast, tone } from "./dom.js";
import { bodyOf, rawBytes } from "./bodies.js";
import { comparison } from "./compare.js";
import { edit, replay } from "./editor.js";
import * as list from "./list.js";
import { check, providers, recognise } from "./signatures.js";
import * as snippets from "./snippets.js";

const TABS = ["Exchange", "Messages", "Timings", "Raw"];

let tunnels = [];
let shown = null; // the exchange that is shown, as the API has it
let tab = "Exchange";
let order = 0; // of requests to the API: a late answer is not shown
let host = { close() {}, select() {} };

export const setTunnels = (all) => (tunnels = all);
export const setup = (page) => (host = page);

const origin = (exchange) => tunnels.find((tunnel) => tunnel.name === exchange.tunnel_name)?.public_url ?? "http://localhost";

async function load(id) {
  return (await ask(`/api/requests/http/${id}`)).json();
}

export async function show(id) {
  const mine = ++order;
  try {
    const exchange = await load(id);
    if (mine !== order) return;
    const isSame = shown?.id === id && JSON.stringify(sizes(shown)) === JSON.stringify(sizes(exchange));
    shown = exchange;
    if (!isSame) await draw(mine);
    // Bytes that pass are no events: there may be very many.
    if (exchange.state === "open") refresh({ id }, LOOK_AGAIN_MS);
  } catch (error) {
    if (mine !== order) return;
    shown = null;
    replace(byId("details"), backButton(), h("div", { class: "empty" }, h("p", { class: "empty-title" }, "Gone"), h("p", {}, error.message)));
  }
}

export function hide() {
  order += 1;
  shown = null;
  replace(byId("details"), h("div", { class: "empty" }, h("p", { class: "empty-title" }, "Nothing selected"), h("p", {}, "Choose a request to see its headers, bodies and timings.")));
}

/** What tells whether an exchange has to be drawn again. */
const sizes = ({ state, request, response, message_count }) => [state, request.size, response?.size, message_count];

/** How long after it has changed an exchange is loaded again. */
const REFRESH_MS = 200;
/** How often one that goes on is loaded. */
const LOOK_AGAIN_MS = 1000;

let refreshTimer = null;
let refreshDue = 0;

/** The selected exchange has changed, or may have. */
export function refresh({ id }, after = REFRESH_MS) {
  const due = performance.now() + after;
  if (refreshTimer && refreshDue <= due) return;
  clearTimeout(refreshTimer);
  refreshDue = due;
  refreshTimer = setTimeout(() => {
    refreshTimer = null;
    if (list.state.selected === id) show(id);
  }, after);
}

const backButton = () => h("button", { type: "button", class: "back quiet", onclick: () => host.close() }, "← All requests");

function head(exchange) {
  const facts = [
    clock(exchange.start),
    exchange.state === "open" ? "in progress" : duration(exchange.duration),
    exchange.remote_addr ? `from ${exchange.remote_addr}` : null,
    `tunnel ${exchange.tunnel_name}`,
  ];
  return h(
    "div",
    { class: "details-head" },
    h("h2", {}, h("span", { class: `badge ${tone(exchange)}` }, statusText(exchange)), h("span", { class: "details-method" }, exchange.request.method), h("span", { class: "details-path" }, exchange.request.uri)),
    h("p", { class: "facts" }, facts.filter(Boolean).join(" · ")),
    exchange.error ? h("p", { class: "fault", role: "note" }, `${{ cancelled: "Ended early", refused: "Refused" }[exchange.state] ?? "Failed"}: ${exchange.error}`) : null,
    exchange.replay_of ? h("p", { class: "note" }, exchange.replay_edited ? "An edited replay of " : "A replay of ", h("a", { href: `#${exchange.replay_of}` }, exchange.replay_of), exchange.replay_target ? ` to ${exchange.replay_target}` : "") : null,
  );
}

function actions(exchange) {
  const button = (name, label, title) => h("button", { type: "button", class: name === "replay" ? "primary" : "", title, onclick: () => act(name) }, label);
  const copies = h(
    "select",
    { "aria-label": "Copy as", onchange: (event) => {
      const name = event.target.value;
      event.target.value = "";
      act(name);
    } },
    h("option", { value: "" }, "Copy as…"),
    h("option", { value: "curl" }, "curl"),
    h("option", { value: "fetch" }, "fetch"),
    h("option", { value: "httpie" }, "HTTPie"),
    h("option", { value: "url" }, "URL"),
  );
  const isReplayable = !exchange.upgrade;
  return h(
    "div",
    { class: "actions" },
    isReplayable ? button("replay", "Replay", "Send it again (r)") : null,
    isReplayable ? button("edit", "Edit and replay", "Change it and send it (e)") : null,
    isReplayable ? button("elsewhere", "Replay to…", "Send it to another target") : null,
    button("compare", "Compare", "Compare with another (m)"),
    copies,
    button("signature", "Check signature", "Check a webhook's signature"),
    h("a", { class: "button", href: `/api/requests/har?id=${exchange.id}`, download: true }, "HAR"),
  );
}

function reveal(part, name, cell) {
  const button = h("button", { type: "button", class: "quiet reveal", onclick: async () => {
    try {
      const response = await post(`/api/requests/http/${shown.id}/reveal`, { part, header: name });
      cell.replaceChildren((await response.json()).values.join("\n"));
    } catch (error) {
      toast(error.message, true);
    }
  } }, "Show");
  return button;
}

function headers(exchange, part) {
  const rows = Object.entries(exchange[part].headers).map(([name, values]) => {
    const cell = h("td", {}, values.join("\n"));
    if (exchange.secrets_kept && exchange.masked.includes(name)) cell.append(" ", reveal(part, name, cell));
    return h("tr", {}, h("th", { scope: "row" }, name), cell);
  });
  return h("table", { class: "fields" }, h("tbody", {}, rows));
}

function query(uri) {
  const at = uri.indexOf("?");
  if (at < 0 || at === uri.length - 1) return null;
  const rows = [...new URLSearchParams(uri.slice(at + 1))].map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value)));
  return h("details", { open: true }, h("summary", {}, `Query (${rows.length})`), h("table", { class: "fields" }, h("tbody", {}, rows)));
}

async function messageOf(exchange, part) {
  const message = exchange[part];
  const title = part === "request" ? "Request" : "Response";
  if (!message) return h("section", { class: "message" }, h("h3", {}, title), h("p", { class: "note" }, exchange.state === "open" ? "None yet." : "None."));
  const count = Object.values(message.headers).flat().length;
  return h(
    "section",
    { class: "message" },
    h("h3", {}, title, h("span", { class: "note" }, part === "response" ? `${message.status} · ${bytes(message.size)}` : bytes(message.size))),
    part === "request" ? query(message.uri) : null,
    h("details", { open: true }, h("summary", {}, `Headers (${count})`), headers(exchange, part)),
    exchange.messages && message.size ? h("p", { class: "note" }, `${bytes(message.size)} of frames: see Messages.`) : await bodyOf(exchange, part),
  );
}

const exchangeTab = async (exchange) => h("div", { class: "sides" }, await messageOf(exchange, "request"), await messageOf(exchange, "response"));

/** The beginning of a binary message. */
function hexLine(base64) {
  const shown = [...atob(base64.slice(0, 344))].map((char) => char.charCodeAt(0).toString(16).padStart(2, "0"));
  return `${shown.join(" ")}${base64.length > 344 ? " …" : ""}`;
}

function messagesTab(exchange) {
  if (!exchange.messages.length) return h("p", { class: "note" }, "No messages yet.");
  const missing = exchange.messages[0].number;
  return h(
    "div",
    {},
    missing ? h("p", { class: "note is-cut" }, `${missing} earlier messages are not kept.`) : null,
    h("ol", { class: "frames" }, exchange.messages.map((message) => {
      const isVisitor = message.from === "visitor";
      const text = message.text ?? hexLine(message.base64);
      return h(
        "li",
        { class: `frame ${message.from} ${message.kind}` },
        h("span", { class: "frame-side", title: isVisitor ? "From the visitor" : "From the local service", "aria-label": isVisitor ? "from the visitor" : "from the local service" }, isVisitor ? "↑" : "↓"),
        h("pre", { class: "frame-text" }, text || "(empty)"),
        h("span", { class: "note" }, [message.kind === "text" ? null : message.kind, bytes(message.size), message.truncated ? "cut" : null, duration(message.at)].filter(Boolean).join(" · ")),
      );
    })),
  );
}

function timingsTab(exchange) {
  const { transit, sent, head: toHead, end } = exchange.timings;
  const isOpen = exchange.state === "open";
  const sofar = (Date.now() - Date.parse(exchange.start)) * 1e6;
  const total = end ?? Math.max(isOpen ? sofar : 0, toHead ?? 0, sent ?? 0);
  const bars = [
    ["Request passed on", 0, sent ?? toHead ?? total],
    ["Waiting for the response", Math.min(sent ?? 0, toHead ?? total), toHead ?? total],
    ["Response", toHead ?? total, total],
  ];
  const rows = bars.map(([name, from, to]) => {
    const bar = h("span", { class: "bar" });
    bar.style.left = `${total ? (100 * from) / total : 0}%`;
    bar.style.width = `${total ? Math.max(0.5, (100 * (to - from)) / total) : 0}%`;
    return h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "bar-cell" }, bar), h("td", { class: "number" }, duration(Math.max(0, to - from))));
  });
  return h(
    "div",
    {},
    h("table", { class: "timings" }, h("tbody", {}, rows)),
    h("p", { class: "note" }, `Total ${duration(total)} at the agent${isOpen ? " so far" : ""}.`, transit === null ? "" : ` Before that, the request took ${duration(transit)} from the service to the agent, if both clocks agree.`),
  );
}

function rawTab(exchange) {
  const side = (part, title) => {
    if (!exchange[part]) return null;
    const data = Uint8Array.from(atob(exchange[part].raw), (c) => c.charCodeAt(0));
    const text = new TextDecoder().decode(data.slice(0, 64 * 1024));
    return h("section", { class: "message" }, h("h3", {}, title, h("button", { type: "button", class: "quiet", onclick: () => copy(text, title) }, "Copy")), h("pre", { class: "code", tabindex: "0" }, text), data.length > 64 * 1024 ? h("p", { class: "note is-cut" }, "Only the beginning is shown.") : null);
  };
  return h("div", { class: "sides" }, side("request", "Request"), side("response", "Response"));
}

const CONTENT = { Exchange: exchangeTab, Messages: messagesTab, Timings: timingsTab, Raw: rawTab };

function chooseTab(name, mine) {
  tab = name;
  draw(mine ?? ++order).then(() => byId(`tab-${name}`)?.focus());
}

function tabBar(names) {
  return h("div", { class: "tabs", role: "tablist", onkeydown: (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) chooseTab(names[(names.indexOf(tab) + step + names.length) % names.length]);
  } }, names.map((name) => h("button", { type: "button", role: "tab", id: `tab-${name}`, class: "tab", tabindex: name === tab ? "0" : "-1", "aria-selected": String(name === tab), "aria-controls": "tab-content", onclick: () => chooseTab(name) }, name === "Messages" ? `Messages (${shown.message_count})` : name)));
}

async function draw(mine) {
  const exchange = shown;
  if (!exchange) return;
  const names = TABS.filter((name) => name !== "Messages" || exchange.messages);
  if (!names.includes(tab)) tab = "Exchange";
  let content;
  try {
    content = await CONTENT[tab](exchange);
  } catch (error) {
    content = h("p", { class: "fault" }, error.message);
  }
  if (mine !== order) return;
  const pane = byId("details");
  const isSame = pane.dataset.id === exchange.id && pane.dataset.tab === tab;
  const top = isSame ? pane.scrollTop : 0;
  pane.dataset.id = exchange.id;
  pane.dataset.tab = tab;
  replace(pane, backButton(), head(exchange), actions(exchange), tabBar(names), h("div", { id: "tab-content", class: "tab-content", role: "tabpanel" }, content));
  pane.scrollTop = top;
}

// ---- Actions

async function copyAs(name) {
  const make = { curl: snippets.curl, fetch: snippets.fetchCall, httpie: snippets.httpie }[name];
  if (shown.request.truncated) throw new Error("Only a part of the request's body was kept.");
  const text = make(shown, await rawBytes(shown, "request"), origin(shown));
  await copy(text, name === "httpie" ? "HTTPie command" : name === "curl" ? "curl command" : "fetch call");
}

function chooseOther() {
  const others = list.all().filter(({ id }) => id !== shown.id);
  const path = (uri) => uri.split("?")[0];
  const isAlike = (other) => other.method === shown.request.method && path(other.path) === path(shown.request.uri);
  const sorted = [...others.filter((other) => other.id === shown.replay_of), ...others.filter((other) => other.id !== shown.replay_of && isAlike(other)), ...others.filter((other) => other.id !== shown.replay_of && !isAlike(other))];
  if (!sorted.length) throw new Error("There is no other request to compare with.");
  const select = h("select", { "aria-label": "Compare with" }, sorted.slice(0, 200).map((other) => h("option", { value: other.id }, `${clock(other.start)}  ${statusText(other)}  ${other.method} ${other.path.slice(0, 80)}${other.replay_of ? " (replay)" : ""}`)));
  const result = h("div", {});
  const first = shown;
  const compare = async () => {
    try {
      const second = await load(select.value);
      // The earlier one first.
      const [before, after] = first.start <= second.start ? [first, second] : [second, first];
      result.replaceChildren(await comparison(before, after));
    } catch (error) {
      result.replaceChildren(h("p", { class: "fault" }, error.message));
    }
  };
  select.addEventListener("change", compare);
  openDialog("Compare", h("label", {}, `${shown.request.method} ${shown.request.uri.slice(0, 80)} with`, select), result).classList.add("is-wide");
  byId("dialog").addEventListener("close", () => byId("dialog").classList.remove("is-wide"), { once: true });
  compare();
}

async function checkSignature() {
  if (shown.request.truncated) throw new Error("Only a part of the request's body was kept, so that its signature cannot be checked.");
  const exchange = shown;
  const body = await rawBytes(exchange, "request");
  const provider = h("select", { "aria-label": "Provider" }, providers().map(([id, name]) => h("option", { value: id }, name)));
  provider.value = recognise(exchange.request.headers) ?? "github";
  const secret = h("input", { type: "password", "aria-label": "Secret", autocomplete: "off", placeholder: "Secret" });
  const result = h("p", { class: "verdict", role: "status" });
  const run = async (event) => {
    event?.preventDefault();
    const { isRight, text } = await check(provider.value, secret.value, exchange.request.headers, body);
    result.textContent = text;
    result.className = `verdict ${isRight ? "is-right" : "is-wrong"}`;
  };
  openDialog("Check a webhook's signature", h("form", { class: "signature", onsubmit: run }, provider, secret, h("button", { type: "submit", class: "primary" }, "Check")), result, h("p", { class: "note" }, "The secret stays in this page: it is neither sent nor kept."));
  secret.focus();
}

function replayElsewhere() {
  const target = h("input", { "aria-label": "Target", required: true, placeholder: "3001 or http://host:port", autocomplete: "off", spellcheck: "false" });
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const { id } = shown;
  const send = async (event) => {
    event.preventDefault();
    try {
      const made = await replay(id, target.value.trim());
      byId("dialog").close();
      if (made) host.select(made);
    } catch (error) {
      fault.textContent = error.message;
      fault.hidden = false;
    }
  };
  openDialog("Replay to another target", h("form", { class: "signature", onsubmit: send }, target, h("button", { type: "submit", class: "primary" }, "Send")), fault);
  target.focus();
}

/** Does something with the exchange that is shown. */
export async function act(name) {
  if (!shown || !name) return;
  try {
    if (name === "replay") {
      const made = await replay(shown.id);
      if (made) host.select(made);
    } else if (name === "edit") await edit(shown, tunnels, (id) => id && host.select(id));
    else if (name === "elsewhere") replayElsewhere();
    else if (name === "compare") chooseOther();
    else if (name === "signature") await checkSignature();
    else if (name === "url") await copy(origin(shown).replace(/\/$/, "") + shown.request.uri, "URL");
    else await copyAs(name);
  } catch (error) {
    toast(error.message, true);
  }
}
