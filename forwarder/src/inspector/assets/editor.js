// Edit and replay: a request with changes, to the tunnel's target or another.

import { h, openDialog, post, toast } from "./dom.js";
import { rawBytes } from "./bodies.js";
import { asText } from "./snippets.js";

const METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"];

const headerLines = (headers) => Object.entries(headers).flatMap(([name, values]) => values.map((value) => `${name}: ${value}`)).join("\n");

function readHeaders(text) {
  return text.split("\n").map((line) => line.trim()).filter(Boolean).map((line) => {
    const colon = line.indexOf(":");
    if (colon < 1) throw new Error(`"${line}" is no header: write Name: value`);
    return [line.slice(0, colon).trim(), line.slice(colon + 1).trim()];
  });
}

/** The id of the exchange that a replay made. */
const made = (response) => response.headers.get("location")?.split("/").pop() ?? null;

export async function replay(id, target) {
  const response = await post("/api/requests/http", target ? { id, target } : { id });
  toast("Replayed");
  return made(response);
}

/** Opens the editor, and calls `then` with the id of the new exchange. */
export async function edit(exchange, tunnels, then) {
  const { request } = exchange;
  const body = await rawBytes(exchange, "request");
  const text = asText(body);
  const isText = text !== null && !text.includes("\0");
  const method = h("input", { id: "edit-method", list: "methods", value: request.method, required: true, autocomplete: "off", spellcheck: "false" });
  const path = h("input", { id: "edit-path", value: request.uri, required: true, autocomplete: "off", spellcheck: "false" });
  const headers = h("textarea", { id: "edit-headers", class: "code", rows: 8, spellcheck: "false", wrap: "off", value: headerLines(request.headers) });
  const target = h("input", { id: "edit-target", placeholder: tunnelTarget(exchange, tunnels), autocomplete: "off", spellcheck: "false" });
  const content = h("textarea", { id: "edit-body", class: "code", rows: 10, spellcheck: "false", value: isText ? text : "", placeholder: isText ? "No body" : "The body is binary and stays as it is, unless something is written here." });
  const fault = h("p", { class: "fault", role: "alert", hidden: true });
  const send = h("button", { type: "submit", class: "primary" }, "Send");
  const form = h(
    "form",
    { class: "editor" },
    h("datalist", { id: "methods" }, METHODS.map((name) => h("option", { value: name }))),
    h("div", { class: "editor-line" }, h("label", { for: "edit-method" }, "Method", method), h("label", { for: "edit-path" }, "Path and query", path)),
    h("label", { for: "edit-headers" }, "Headers", headers),
    exchange.masked.length ? h("p", { class: "note" }, exchange.secrets_kept ? "A value that stays [masked] is sent as it was recorded." : "A value that stays [masked] is not sent: the history does not have it.") : null,
    h("label", { for: "edit-body" }, request.truncated ? "Body (only its beginning was kept)" : "Body", content),
    h("label", { for: "edit-target" }, "Send to", target),
    fault,
    h("div", { class: "editor-end" }, send),
  );
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    fault.hidden = true;
    try {
      const wanted = { id: exchange.id };
      if (method.value !== request.method) wanted.method = method.value.trim();
      if (path.value !== request.uri) wanted.uri = path.value.trim();
      if (headers.value !== headerLines(request.headers)) wanted.headers = readHeaders(headers.value);
      // A field shows other line ends than it was given.
      const before = isText ? text.replaceAll("\r\n", "\n").replaceAll("\r", "\n") : "";
      if (content.value !== before) wanted.body = content.value;
      else if (isText && request.truncated) wanted.body = text;
      if (target.value.trim()) wanted.target = target.value.trim();
      const response = await post("/api/requests/http", wanted);
      dialog.close();
      toast("Sent");
      then(made(response));
    } catch (error) {
      fault.textContent = error.message;
      fault.hidden = false;
    }
  });
  const dialog = openDialog("Edit and replay", form);
  path.focus();
}

const tunnelTarget = (exchange, tunnels) => tunnels.find((tunnel) => tunnel.name === exchange.tunnel_name)?.config.addr ?? "";
