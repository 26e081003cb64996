// Two exchanges side by side, with the differences marked.

import { duration, h, statusText } from "./dom.js";
import { comparable } from "./bodies.js";

const MAX_LINES = 3000;

/** The lines of two texts as [mark, line]: " " in both, "-" in the first, "+" in the second. */
export function difference(before, after) {
  let a = before.split("\n");
  let b = after.split("\n");
  const head = [];
  const tail = [];
  while (a.length && b.length && a[0] === b[0]) {
    head.push([" ", a[0]]);
    a = a.slice(1);
    b = b.slice(1);
  }
  while (a.length && b.length && a.at(-1) === b.at(-1)) {
    tail.unshift([" ", a.at(-1)]);
    a = a.slice(0, -1);
    b = b.slice(0, -1);
  }
  return [...head, ...middle(a, b), ...tail];
}

function middle(a, b) {
  if (a.length * b.length > MAX_LINES * MAX_LINES) return [...a.map((line) => ["-", line]), ...b.map((line) => ["+", line])];
  // The longest common subsequence, from the end.
  const width = b.length + 1;
  const lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      lengths[i * width + j] = a[i] === b[j] ? lengths[(i + 1) * width + j + 1] + 1 : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const lines = [];
  let i = 0;
  let j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      lines.push([" ", a[i]]);
      i += 1;
      j += 1;
    } else if (j >= b.length || (i < a.length && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])) {
      lines.push(["-", a[i]]);
      i += 1;
    } else {
      lines.push(["+", b[j]]);
      j += 1;
    }
  }
  return lines;
}

const KINDS = { " ": "same", "-": "removed", "+": "added" };

function shownLines(lines) {
  const spoken = { "-": "only in the first: ", "+": "only in the second: " };
  return h("pre", { class: "code diff", tabindex: "0" }, lines.map(([mark, line]) => h("span", { class: KINDS[mark] }, h("span", { class: "diff-mark", "aria-label": spoken[mark] }, mark), `${line}\n`)));
}

function pairs(first, second) {
  const names = [...new Set([...Object.keys(first), ...Object.keys(second)])].sort();
  return names.map((name) => [name, (first[name] ?? []).join("\n"), (second[name] ?? []).join("\n")]);
}

function table(rows, isAll) {
  const shown = rows.filter(([, before, after]) => isAll || before !== after);
  if (!shown.length) return h("p", { class: "note" }, "No differences.");
  return h(
    "table",
    { class: "fields compare" },
    h("tbody", {}, shown.map(([name, before, after]) => {
      const isSame = before === after;
      return h("tr", { class: isSame ? "same" : "changed" }, h("th", { scope: "row" }, name), h("td", { class: isSame ? "" : "removed" }, before || "—"), h("td", { class: isSame ? "" : "added" }, after || "—"));
    })),
  );
}

const lines = (exchange) => [
  ["Method", exchange.request.method],
  ["Path", exchange.request.uri],
  ["Status", statusText(exchange)],
  ["Visitor", exchange.remote_addr],
  ["Tunnel", exchange.tunnel_name],
  ["Duration", duration(exchange.duration)],
];

async function bodies(first, second, part) {
  const [before, after] = await Promise.all([comparable(first, part), comparable(second, part)]);
  if (before === null || after === null) return h("p", { class: "note" }, "Binary bodies are not compared line by line.");
  if (before === after) return h("p", { class: "note" }, before ? "The bodies are the same." : "No bodies.");
  return shownLines(difference(before, after));
}

/** The comparison of two exchanges as an element. */
export async function comparison(first, second) {
  const head = lines(first).map(([name, before], index) => [name, before, lines(second)[index][1]]);
  const section = (title, ...content) => h("section", { class: "message" }, h("h3", {}, title), ...content);
  return h(
    "div",
    { class: "comparison" },
    table(head, true),
    section("Request headers", table(pairs(first.request.headers, second.request.headers), false)),
    section("Request body", await bodies(first, second, "request")),
    section("Response headers", table(pairs(first.response?.headers ?? {}, second.response?.headers ?? {}), false)),
    section("Response body", await bodies(first, second, "response")),
  );
}
