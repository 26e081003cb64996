// A request as something to run elsewhere: curl, fetch, HTTPie.

const encoder = new TextEncoder();

/** Fields that the client makes itself, or that the tunnel has added. */
const isOwn = (name) => !/^(host|content-length|connection|transfer-encoding|via|x-forwarded-.*)$/i.test(name);

function fields(exchange) {
  return Object.entries(exchange.request.headers)
    .filter(([name]) => isOwn(name))
    .flatMap(([name, values]) => values.map((value) => [name, value]));
}

const url = (exchange, origin) => origin.replace(/\/$/, "") + exchange.request.uri;

/** A word of a POSIX shell. */
export function quote(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function base64(bytes) {
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
}

/** The text of a body, or null if it is no UTF-8. */
export function asText(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return null;
  }
}

const isPlain = (text) => text !== null && !text.includes("\0");

export function curl(exchange, body, origin) {
  const { method } = exchange.request;
  const words = ["curl"];
  if (method === "HEAD") words.push("--head");
  else if (method !== (body.length ? "POST" : "GET")) words.push(`--request ${quote(method)}`);
  words.push(quote(url(exchange, origin)));
  for (const [name, value] of fields(exchange)) {
    if (/^accept-encoding$/i.test(name)) words.push("--compressed");
    words.push(`--header ${quote(value === "" ? `${name};` : `${name}: ${value}`)}`);
  }
  if (!body.length) return words.join(" \\\n  ");
  const text = asText(body);
  // curl reads a file where data begins with @, except for --data-raw.
  if (isPlain(text)) return [...words, `--data-raw ${quote(text)}`].join(" \\\n  ");
  return `printf %s ${quote(base64(body))} | base64 --decode | ${[...words, "--data-binary @-"].join(" \\\n  ")}`;
}

export function fetchCall(exchange, body, origin) {
  const options = { method: exchange.request.method, headers: fields(exchange) };
  const lines = JSON.stringify(options, null, 2).split("\n");
  if (body.length) {
    const text = asText(body);
    const value = isPlain(text)
      ? JSON.stringify(text)
      : `Uint8Array.from(atob(${JSON.stringify(base64(body))}), (c) => c.charCodeAt(0))`;
    lines[lines.length - 2] += ",";
    lines.splice(-1, 0, `  "body": ${value}`);
  }
  return `await fetch(${JSON.stringify(url(exchange, origin))}, ${lines.join("\n")});`;
}

export function httpie(exchange, body, origin) {
  const words = ["http", "--ignore-stdin", quote(exchange.request.method), quote(url(exchange, origin))];
  // An item is cut at its first separator, and a backslash before one takes it as it is.
  for (const [name, value] of fields(exchange)) words.push(quote(value === "" ? `${name};` : `${name}:${value}`));
  if (!body.length) return words.join(" \\\n  ");
  const text = asText(body);
  if (isPlain(text)) {
    words.splice(1, 0, `--raw ${quote(text)}`);
    return words.join(" \\\n  ");
  }
  return `printf %s ${quote(base64(body))} | base64 --decode | ${words.filter((word) => word !== "--ignore-stdin").join(" \\\n  ")}`;
}

export const length = (text) => encoder.encode(text).length;
