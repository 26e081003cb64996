// A local service with a body of every kind, which also says what it was sent.

import { createServer } from "node:http";
import { brotliCompressSync, gzipSync } from "node:zlib";
import { WebSocketServer } from "ws";

/** A red and a blue pixel. */
const PNG = Buffer.from(
  "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAIAAAB7QOjdAAAADUlEQVR4nGP4zwAE/wEHAAH/4iOeWQAAAABJRU5ErkJggg==",
  "base64",
);

const ORDER = {
  order: { id: 1, currency: "EUR", total: 1299.5, paid: true, note: null },
  items: [
    { sku: "tea-042", name: "Sencha, 100 g", quantity: 2 },
    { sku: "pot-007", name: "Kyūsu", quantity: 1 },
  ],
};

/** As JSON, with an id that is no number of JavaScript. */
const json = (value) => JSON.stringify(value).replace('"id":1,', '"id":90071992547409931,');

/** A text of less than 256 bytes as Zstandard (RFC 8878) that is one raw block: not every Node can compress it. */
function zstd(text) {
  const content = Buffer.from(text);
  const block = (content.length << 3) | 1;
  const head = [0x28, 0xb5, 0x2f, 0xfd, 0x20, content.length, block & 0xff, block >> 8, 0];
  return Buffer.concat([Buffer.from(head), content]);
}

/** Status, header fields and body for a path. */
const ANSWERS = {
  "/orders": () => [200, { "content-type": "application/json" }, json(ORDER)],
  "/gzip": () => [200, { "content-type": "application/json", "content-encoding": "gzip" }, gzipSync(json(ORDER))],
  "/br": () => [200, { "content-type": "application/json", "content-encoding": "br" }, brotliCompressSync(json(ORDER))],
  "/zstd": () => [200, { "content-type": "application/json", "content-encoding": "zstd" }, zstd(json(ORDER))],
  "/broken.json": () => [200, { "content-type": "application/json" }, '{\n  "name": "tea",\n  "price": 12.,\n  "stock": 3\n}\n'],
  "/feed.xml": () => [200, { "content-type": "application/xml" }, '<?xml version="1.0"?><feed><entry id="1"><title>Tea &amp; pots</title></entry></feed>'],
  "/picture.png": () => [200, { "content-type": "image/png" }, PNG],
  "/bytes": () => [200, { "content-type": "application/octet-stream" }, Buffer.from([...Array(256).keys()])],
  "/page": () => [200, { "content-type": "text/html" }, "<h1>A page</h1><script>parent.stolen = 1; document.title = 'stolen'; fetch('/api/requests/http')</script><img src=x onerror='parent.stolen = 1'>"],
  "/login": () => [303, { location: "/account", "set-cookie": ["session=s3cret; Path=/; HttpOnly", "theme=dark; Path=/"] }, ""],
  "/missing": () => [404, { "content-type": "text/plain" }, "There is no such thing.\n"],
  "/error": () => [500, { "content-type": "application/problem+json" }, json({ title: "The database is away", status: 500 })],
  "/large": () => [200, { "content-type": "application/octet-stream" }, Buffer.alloc(12 * 1024 * 1024, "x")],
};

/** Starts the service, and returns its port and what it has been sent. */
export async function startOrigin() {
  const seen = [];
  const server = createServer(async (request, response) => {
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    seen.push({ method: request.method, url: request.url, headers: request.headers, body: Buffer.concat(chunks) });
    const path = request.url.split("?")[0];
    if (path === "/break") {
      response.writeHead(200, { "content-length": "100" });
      response.write("only this");
      setImmediate(() => response.destroy());
      return;
    }
    if (path === "/events") {
      response.writeHead(200, { "content-type": "text/event-stream" });
      let count = 0;
      const timer = setInterval(() => response.write(`data: ${(count += 1)}\n\n`), 100);
      response.on("close", () => clearInterval(timer));
      return;
    }
    const [status, headers, body] = (ANSWERS[path] ?? (() => [200, { "content-type": "text/plain" }, `${request.method} ${request.url}\n`]))();
    response.writeHead(status, headers);
    response.end(request.method === "HEAD" ? "" : body);
  });
  const sockets = new WebSocketServer({ server, perMessageDeflate: { threshold: 0 } });
  sockets.on("connection", (socket) => {
    socket.on("message", (data, isBinary) => socket.send(isBinary ? data : `you said ${data}`, { binary: isBinary }));
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    port: server.address().port,
    seen,
    end: () => {
      for (const socket of sockets.clients) socket.terminate();
      server.closeAllConnections();
      return new Promise((resolve) => server.close(resolve));
    },
  };
}
