// Bodies: decoded, and shown as what they are.

import { ask, bytes as size, h } from "./dom.js";
import { asText } from "./snippets.js";

const MAX_SHOWN = 256 * 1024; // characters, until the reader asks for more
const MAX_HEX = 16 * 1024; // bytes, likewise
const IMAGES = /^image\/(png|jpeg|gif|webp|avif|bmp|x-icon|vnd\.microsoft\.icon|svg\+xml)$/;

/** The value of a header field, or "". */
export function field(message, name) {
  const found = Object.keys(message.headers).find((known) => known.toLowerCase() === name);
  return found ? message.headers[found].join(", ") : "";
}

const mediaType = (message) => field(message, "content-type").split(";")[0].trim().toLowerCase();

const pathOf = (exchange, part) => `/api/requests/http/${exchange.id}/${part}/body`;

/** The bytes as they were sent. */
export async function rawBytes(exchange, part) {
  const message = exchange[part];
  if (!message || !message.kept) return new Uint8Array();
  return new Uint8Array(await (await ask(pathOf(exchange, part))).arrayBuffer());
}

/** The bytes without their content codings, and why some are missing. */
export async function decodedBytes(exchange, part) {
  const response = await ask(`${pathOf(exchange, part)}?decoded=true`);
  return { data: new Uint8Array(await response.arrayBuffer()), fault: response.headers.get("x-decode-error") };
}

// ---- JSON, read by hand: numbers stay as they are, and a fault has a place.

class SyntaxFault extends Error {
  constructor(message, at) {
    super(message);
    this.at = at;
  }
}

const TOKEN = /[ \t\r\n]+|"(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null|[{}[\],:]/y;

function tokens(text) {
  const found = [];
  TOKEN.lastIndex = 0;
  let at = 0;
  while (at < text.length) {
    TOKEN.lastIndex = at;
    const match = TOKEN.exec(text);
    if (!match) throw new SyntaxFault(`unexpected ${JSON.stringify(text[at])}`, at);
    if (!/^[ \t\r\n]/.test(match[0])) found.push({ text: match[0], at });
    at = TOKEN.lastIndex;
  }
  return found;
}

/** Checks JSON without recursion, so that no depth is too deep. */
function checkJson(found, end) {
  const open = [];
  let expected = "value";
  const fault = (token, what) => {
    throw new SyntaxFault(token ? `unexpected ${token.text.slice(0, 20)}, ${what} expected` : `unexpected end, ${what} expected`, token ? token.at : end);
  };
  for (const token of found) {
    const c = token.text[0];
    const isValue = !"{}[],:".includes(c);
    if (expected === "end") fault(token, "the end");
    if (expected === "value" || expected === "value or ]") {
      if (c === "{") {
        open.push("{");
        expected = "name or }";
        continue;
      }
      if (c === "[") {
        open.push("[");
        expected = "value or ]";
        continue;
      }
      if (c === "]" && expected === "value or ]") open.pop();
      else if (!isValue) fault(token, expected);
    } else if (expected === "name" || expected === "name or }") {
      if (c === "}" && expected === "name or }") open.pop();
      else if (c === '"') {
        expected = ":";
        continue;
      } else fault(token, expected);
    } else if (expected === ":") {
      if (c !== ":") fault(token, expected);
      expected = "value";
      continue;
    } else if (c === ",") {
      expected = open.at(-1) === "{" ? "name" : "value";
      continue;
    } else if ((c === "}" && open.at(-1) === "{") || (c === "]" && open.at(-1) === "[")) open.pop();
    else fault(token, expected);
    expected = open.length ? `, or ${open.at(-1) === "{" ? "}" : "]"}` : "end";
  }
  if (expected !== "end") fault(null, expected);
}

/** JSON with one member a line, as pieces of text with the class of each. */
export function prettyJson(text) {
  const found = tokens(text);
  checkJson(found, text.length);
  const pieces = [];
  let depth = 0;
  const line = () => pieces.push(["", `\n${"  ".repeat(depth)}`]);
  found.forEach((token, index) => {
    const c = token.text[0];
    const next = found[index + 1]?.text;
    const isEmpty = (c === "{" && next === "}") || (c === "[" && next === "]");
    if (c === "}" || c === "]") {
      const before = found[index - 1]?.text;
      if (before !== "{" && before !== "[") {
        depth -= 1;
        line();
      }
      pieces.push(["p", c]);
    } else if (c === "{" || c === "[") {
      pieces.push(["p", c]);
      if (!isEmpty) {
        depth += 1;
        line();
      }
    } else if (c === ",") {
      pieces.push(["p", c]);
      line();
    } else if (c === ":") pieces.push(["p", ": "]);
    else if (c === '"') pieces.push([next === ":" ? "k" : "s", token.text]);
    else pieces.push(["n", token.text]);
  });
  return pieces;
}

const asPlain = (pieces) => pieces.map(([, text]) => text).join("");

function place(text, at) {
  const before = text.slice(0, at).split("\n");
  return { line: before.length, column: before.at(-1).length + 1 };
}

function faultBox(text, fault) {
  const { line, column } = place(text, fault.at);
  const shown = text.split("\n")[line - 1] ?? "";
  const start = Math.max(0, column - 41);
  return h(
    "div",
    { class: "fault", role: "note" },
    h("strong", {}, `Not valid JSON: line ${line}, column ${column}: ${fault.message}`),
    h("pre", { class: "code" }, shown.slice(start, column - 1), h("mark", {}, shown[column - 1] ?? "⏎"), shown.slice(column, column + 40)),
  );
}

// ---- XML

const XML_TOKEN = /<!--[\s\S]*?-->|<!\[CDATA\[[\s\S]*?\]\]>|<\?[\s\S]*?\?>|<![^>]*>|<[^>]*>|[^<]+/g;

function prettyXml(text) {
  const pieces = [];
  let depth = 0;
  const found = (text.match(XML_TOKEN) ?? []).filter((token) => token.trim());
  found.forEach((token, index) => {
    const isTag = token.startsWith("<");
    const isEnd = token.startsWith("</");
    if (isEnd) depth = Math.max(0, depth - 1);
    const before = found[index - 1] ?? "";
    const isInline = index === 0 || !isTag || (isEnd && !before.startsWith("<")) || (isEnd && /^<[^/!?]/.test(before) && !before.endsWith("/>"));
    if (!isInline) pieces.push(["", `\n${"  ".repeat(depth)}`]);
    pieces.push([isTag ? (/^<[!?]/.test(token) ? "c" : "k") : "", isTag ? token : token.trim()]);
    if (/^<[^/!?]/.test(token) && !token.endsWith("/>")) depth += 1;
  });
  return pieces;
}

function xmlFault(text) {
  const parsed = new DOMParser().parseFromString(text, "application/xml");
  const fault = parsed.querySelector("parsererror");
  return fault ? fault.textContent.replace(/\s+/g, " ").slice(0, 300) : null;
}

// ---- Views

function code(pieces) {
  const pre = h("pre", { class: "code", tabindex: "0" });
  let shown = 0;
  let at = 0;
  const more = () => {
    const limit = shown + MAX_SHOWN;
    while (at < pieces.length && shown < limit) {
      const [kind, text] = pieces[at];
      const part = text.slice(0, limit - shown);
      pre.append(kind ? h("span", { class: `t-${kind}` }, part) : part);
      shown += part.length;
      if (part.length < text.length) pieces[at] = [kind, text.slice(part.length)];
      else at += 1;
    }
  };
  more();
  if (at >= pieces.length) return pre;
  const button = h("button", { type: "button", onclick: () => (more(), at >= pieces.length && button.remove()) }, "Show more");
  return h("div", {}, pre, button);
}

function hex(data) {
  const lines = [];
  const end = Math.min(data.length, MAX_HEX);
  for (let at = 0; at < end; at += 16) {
    const row = [...data.slice(at, Math.min(at + 16, end))];
    const numbers = row.map((byte) => byte.toString(16).padStart(2, "0")).join(" ").padEnd(47);
    const letters = row.map((byte) => (byte >= 32 && byte < 127 ? String.fromCharCode(byte) : "·")).join("");
    lines.push(`${at.toString(16).padStart(8, "0")}  ${numbers}  ${letters}`);
  }
  if (end < data.length) lines.push(`… ${size(data.length - end)} more: download the body to see them`);
  return h("pre", { class: "code hex", tabindex: "0" }, lines.join("\n"));
}

function form(text) {
  const pairs = [...new URLSearchParams(text)];
  const rows = pairs.map(([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value)));
  return h("table", { class: "fields" }, h("tbody", {}, rows));
}

function image(data, type) {
  const url = URL.createObjectURL(new Blob([data], { type }));
  const note = h("span", { class: "note" });
  const element = h("img", { src: url, class: "picture", alt: "The image in this body" });
  element.addEventListener("load", () => {
    note.textContent = `${element.naturalWidth} × ${element.naturalHeight}`;
    URL.revokeObjectURL(url);
  });
  element.addEventListener("error", () => {
    note.textContent = "The browser cannot show it.";
    URL.revokeObjectURL(url);
  });
  return h("div", { class: "picture-frame" }, element, note);
}

function indexOf(data, wanted, from) {
  outer: for (let at = from; at <= data.length - wanted.length; at += 1) {
    for (let i = 0; i < wanted.length; i += 1) if (data[at + i] !== wanted[i]) continue outer;
    return at;
  }
  return -1;
}

/** The parts of a multipart body (RFC 2046, 5.1). */
export function parts(data, contentType) {
  const match = /boundary=(?:"([^"]+)"|([^;\s]+))/i.exec(contentType);
  if (!match) return [];
  const encode = (text) => new TextEncoder().encode(text);
  const delimiter = encode(`--${match[1] ?? match[2]}`);
  const found = [];
  let at = indexOf(data, delimiter, 0);
  while (at >= 0) {
    const start = indexOf(data, encode("\n"), at + delimiter.length) + 1;
    if (!start || (data[at + delimiter.length] === 45 && data[at + delimiter.length + 1] === 45)) break;
    const next = indexOf(data, delimiter, start);
    let end = next < 0 ? data.length : next;
    if (next >= 0 && data[end - 1] === 10) end -= 1;
    if (next >= 0 && data[end - 1] === 13) end -= 1;
    const blank = indexOf(data, encode("\r\n\r\n"), start - 2);
    const headEnd = blank < 0 || blank > end ? end : blank;
    const head = new TextDecoder().decode(data.slice(start, Math.max(start, headEnd)));
    const headers = {};
    for (const line of head.split(/\r?\n/)) {
      const colon = line.indexOf(":");
      if (colon > 0) headers[line.slice(0, colon).trim()] = [line.slice(colon + 1).trim()];
    }
    found.push({ headers, data: data.slice(Math.min(end, headEnd + 4), end) });
    at = next;
  }
  return found;
}

function multipart(data, contentType) {
  const found = parts(data, contentType);
  if (!found.length) return h("p", { class: "note" }, "No parts were found.");
  return h("ol", { class: "parts" }, found.map((part) => {
    const disposition = field(part, "content-disposition");
    const name = /name="([^"]*)"/.exec(disposition)?.[1] ?? "part";
    const file = /filename="([^"]*)"/.exec(disposition)?.[1];
    const type = field(part, "content-type");
    return h(
      "li",
      {},
      h("div", { class: "part-head" }, h("strong", {}, name), file ? h("span", {}, file) : null, h("span", { class: "note" }, [type, size(part.data.length)].filter(Boolean).join(" · "))),
      content(part, part.data, {}),
    );
  }));
}

function textViews(message, data, text, views) {
  const type = mediaType(message);
  const start = text.trimStart()[0];
  if (/[/+]json$/.test(type) || (!type && "{[".includes(start))) {
    try {
      const pieces = prettyJson(text);
      views.Pretty = () => code(pieces);
    } catch (fault) {
      if (!(fault instanceof SyntaxFault)) throw fault;
      views.Text = () => h("div", {}, faultBox(text, fault), code([["", text]]));
    }
  } else if (/ndjson|jsonl|json-seq/.test(type)) {
    views.Pretty = () => code(text.split("\n").flatMap((line) => {
      try {
        return [...(line.trim() ? prettyJson(line) : []), ["", "\n"]];
      } catch {
        return [["", `${line}\n`]];
      }
    }));
  } else if (/[/+]xml$/.test(type) && type !== "image/svg+xml") {
    const fault = xmlFault(text);
    views.Pretty = () => h("div", {}, fault ? h("div", { class: "fault", role: "note" }, h("strong", {}, `Not valid XML: ${fault}`)) : null, code(fault ? [["", text]] : prettyXml(text)));
  } else if (type === "application/x-www-form-urlencoded") {
    views.Form = () => form(text);
  }
  views.Text ??= () => code([["", text]]);
}

function viewsOf(message, data, { previewUrl }) {
  const views = {};
  const type = mediaType(message);
  if (type.startsWith("multipart/")) views.Parts = () => multipart(data, field(message, "content-type"));
  if (IMAGES.test(type)) views.Image = () => image(data, type);
  const text = asText(data);
  if (text !== null && !text.includes("\0")) textViews(message, data, text, views);
  if (previewUrl && type === "text/html") {
    views.Preview = () => h("iframe", { class: "preview", src: previewUrl, sandbox: true, title: "The page in this body, without its scripts", referrerpolicy: "no-referrer" });
  }
  views.Hex = () => hex(data);
  return views;
}

/** How the reader wants to see the bodies of an exchange, which are drawn again while it goes on. */
let chosen = { id: null };

function content(message, data, options) {
  const views = viewsOf(message, data, options);
  const names = Object.keys(views);
  const shown = h("div", { class: "body-view" });
  const buttons = names.map((name) => h("button", { type: "button", class: "tab", "aria-pressed": "false", onclick: () => show(name) }, name));
  const show = (name) => {
    if (options.part) chosen[options.part] = name;
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === name)));
    shown.replaceChildren(views[name]());
  };
  show(names.includes(chosen[options.part]) ? chosen[options.part] : names[0]);
  return h("div", { class: "body" }, h("div", { class: "body-tabs", role: "group", "aria-label": "Show the body as" }, buttons, options.tools ?? null), shown);
}

/** The body of a request or response, as an element. */
export async function bodyOf(exchange, part) {
  const message = exchange[part];
  if (!message || !message.size) return h("p", { class: "note" }, "No body.");
  if (!message.kept) return h("p", { class: "note" }, `${size(message.size)} passed; nothing of it was kept.`);
  const { data, fault } = await decodedBytes(exchange, part);
  const coding = field(message, "content-encoding");
  const notes = [
    coding ? h("p", { class: "note" }, `${size(message.kept)} ${coding}, ${size(data.length)} decoded`) : null,
    message.truncated ? h("p", { class: "note is-cut" }, `Cut: the first ${size(message.kept)} of ${size(message.size)} were kept.`) : null,
    fault ? h("p", { class: "note is-cut" }, fault) : null,
  ];
  const download = h("a", { class: "button quiet", href: pathOf(exchange, part), download: `${exchange.id}-${part}.bin`, title: "The bytes as they were sent" }, "Download");
  if (chosen.id !== exchange.id) chosen = { id: exchange.id };
  const previewUrl = part === "response" ? `/api/requests/http/${exchange.id}/response/preview` : null;
  return h("div", {}, notes, content(message, data, { part, previewUrl, tools: download }));
}

/** The body as text that can be compared line by line; null if it is none. */
export async function comparable(exchange, part) {
  const message = exchange[part];
  if (!message || !message.kept) return "";
  const { data } = await decodedBytes(exchange, part);
  const text = asText(data);
  if (text === null) return null;
  try {
    return /json/.test(mediaType(message)) ? asPlain(prettyJson(text)) : text;
  } catch {
    return text;
  }
}
