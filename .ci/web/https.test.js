// A page over HTTP/2 and its WebSockets, which stay on HTTP/1.1, on one port of a tunnel-local with a certificate of its own.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createServer } from "node:http";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { WebSocketServer } from "ws";
import { BIN, DOMAIN, atEnd, endAll, freePort, openBrowser, openPage, startProcess, temporaryDirectory } from "./servers.js";

const MESSAGES = 20;
const DOWNLOAD_BYTES = 8 * 1024 * 1024;

let origin, browser;
before(async () => {
  const [directory, port] = [temporaryDirectory(), await freePort()];
  const { certificate, key } = makeCertificate(directory);
  const service = ["--listen", `127.0.0.1:${port}`, "--public-url", `https://${DOMAIN}:${port}`, "--routing", "subdomain"];
  const tls = ["--tls-cert", certificate, "--tls-key", key];
  const [token, local, opened] = await Promise.all([
    startProcess(join(BIN, "tunnel-local"), [...service, ...tls], /TTF_TOKEN=(\S+)/),
    startLocalService(),
    openBrowser(),
  ]);
  browser = opened;
  const agent = ["http", String(local), "--endpoint", `wss://localhost:${port}/_ws`, "--endpoint-ca", certificate, "--tunnel-id", "my-app"];
  origin = await startProcess(join(BIN, "ttf"), agent, /^(https:\S+?)\/?$/m, { env: { TTF_TOKEN: token } });
});
after(endAll);

function makeCertificate(directory) {
  const [certificate, key] = ["cert.pem", "key.pem"].map((name) => join(directory, name));
  const kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=test"];
  const names = ["-addext", `subjectAltName=DNS:localhost,DNS:${DOMAIN},DNS:*.${DOMAIN}`, "-addext", "basicConstraints=critical,CA:FALSE"];
  execFileSync("openssl", ["req", "-x509", "-config", "/dev/null", ...kind, ...names, "-keyout", key, "-out", certificate], { stdio: "ignore" });
  return { certificate, key };
}

/** A page, something large, events that come now and then, and an echo. */
async function startLocalService() {
  const server = createServer((request, response) => {
    if (request.url === "/download") return response.end(Buffer.alloc(DOWNLOAD_BYTES, "x"));
    if (request.url !== "/events") return response.setHeader("Content-Type", "text/html").end("<title>page</title>");
    response.setHeader("Content-Type", "text/event-stream");
    const timer = setInterval(() => response.write("data: tick\n\n"), 50);
    response.on("close", () => clearInterval(timer));
  });
  new WebSocketServer({ server }).on("connection", (socket, request) => {
    socket.on("message", (message) => socket.send(`${request.headers["x-forwarded-proto"]} ${message}`));
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  atEnd(() => {
    server.close();
    server.closeAllConnections();
  });
  return server.address().port;
}

/** What the page sees: its own protocol and those of what it fetches, while events come and a socket is used. */
async function use({ messages }) {
  const events = new EventSource("/events");
  const ticks = new Promise((resolve, reject) => {
    let count = 0;
    events.onmessage = () => ++count === 3 && resolve(count);
    events.onerror = () => reject(new Error("the events broke off"));
  });
  const socket = new WebSocket(`wss://${location.host}/socket`);
  const answers = new Promise((resolve, reject) => {
    const heard = [];
    socket.onopen = () => socket.send("0");
    socket.onmessage = ({ data }) => {
      heard.push(data);
      if (heard.length === messages) return resolve(heard);
      socket.send(String(heard.length));
    };
    socket.onclose = ({ code }) => reject(new Error(`the socket closed with ${code}`));
  });
  const download = fetch("/download").then((response) => response.arrayBuffer());
  const [bytes, heard, ticked] = await Promise.all([download, answers, ticks]);
  events.close();
  const [page] = performance.getEntriesByType("navigation");
  const [fetched] = performance.getEntriesByName(new URL("/download", location.href).href);
  return { page: page.nextHopProtocol, fetched: fetched.nextHopProtocol, bytes: bytes.byteLength, heard, ticked };
}

test("a page comes over HTTP/2, and its WebSocket works beside it", async () => {
  const { page, failures, close } = await openPage(browser, { ignoreHTTPSErrors: true });
  await page.goto(`${origin}/`);
  const seen = await page.evaluate(use, { messages: MESSAGES });
  const heard = Array.from({ length: MESSAGES }, (_, number) => `https ${number}`);
  assert.deepEqual(seen, { page: "h2", fetched: "h2", bytes: DOWNLOAD_BYTES, heard, ticked: 3 });
  assert.deepEqual(failures, []);
  await close();
});
