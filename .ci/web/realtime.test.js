// What pages do with sockets and streams, behind the tunnel and in a browser: Socket.IO, GraphQL subscriptions, a terminal, binary
// traffic as of a remote desktop, and server-sent events.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { buildSchema } from "graphql";
import { useServer } from "graphql-ws/use/ws";
import { Server as SocketIo } from "socket.io";
import { WebSocketServer } from "ws";
import { PYTHON, atEnd, endAll, freePort, openBrowser, openPage, openTunnels, startProcess, startServices, temporaryDirectory } from "./servers.js";

const MODULES = join(import.meta.dirname, "node_modules");
const CHUNK_BYTES = 64 * 1024;
const CHUNKS = 256;
const JUPYTER_TOKEN = "jupyter-token";

let services, browser;
before(async () => {
  [services, browser] = await Promise.all([startServices(), openBrowser()]);
});
after(endAll);

/** Serves these files, and what `answer` adds to them. */
async function listen(files, answer = () => false) {
  const server = createServer((request, response) => {
    const file = files[new URL(request.url, "http://localhost").pathname];
    if (file !== undefined) {
      response.setHeader("Content-Type", request.url.endsWith(".js") ? "text/javascript" : "text/html");
      return response.end(file);
    }
    if (!answer(request, response)) response.writeHead(404).end();
  }).listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  atEnd(() => {
    server.close();
    server.closeAllConnections();
  });
  return server;
}

/** Opens a service's page by its addresses, and expects what the page finds out. */
function byEachAddress(name, start, find, expected, { prepare = () => {} } = {}) {
  describe(name, () => {
    let addresses;
    before(async () => {
      addresses = await openTunnels(services, `the-${name.toLowerCase().replaceAll(/[^a-z]+/g, "-")}`, await start());
    });
    for (const kind of ["path", "localhost", "subdomain"]) {
      test(`by ${kind}`, async () => {
        const { page, failures, close } = await openPage(browser);
        await page.goto(addresses[kind]);
        await prepare(page);
        assert.deepEqual(await page.evaluate(find), expected);
        assert.deepEqual(failures, []);
        await close();
      });
    }
  });
}

async function startSocketIo() {
  const server = await listen({ "/": '<script src="/socket.io/socket.io.js"></script>' });
  const io = new SocketIo(server, { transports: ["websocket"] });
  io.on("connection", (socket) => socket.on("ask", (question, answer) => answer([...question].reverse().join(""))));
  return server.address().port;
}

byEachAddress(
  "Socket.IO",
  startSocketIo,
  async () => {
    const socket = io({ transports: ["websocket"], reconnection: false });
    const answer = await socket.timeout(20_000).emitWithAck("ask", "olleh");
    socket.close();
    return answer;
  },
  "hello",
);

async function startGraphQl() {
  const bundle = readFileSync(join(MODULES, "graphql-ws/umd/graphql-ws.js"));
  const server = await listen({ "/": '<script src="/graphql-ws.js"></script>', "/graphql-ws.js": bundle });
  const schema = buildSchema("type Query { hello: String } type Subscription { count(to: Int!): Int }");
  const count = async function* ({ to }) {
    for (let number = 1; number <= to; number++) yield { count: number };
  };
  useServer({ schema, roots: { subscription: { count } } }, new WebSocketServer({ server, path: "/graphql" }));
  return server.address().port;
}

byEachAddress(
  "GraphQL",
  startGraphQl,
  async () => {
    const url = new URL("/graphql", location.href.replace("http", "ws"));
    const client = graphqlWs.createClient({ url: String(url), retryAttempts: 0 });
    const counted = [];
    for await (const { data } of client.iterate({ query: "subscription { count(to: 3) }" })) counted.push(data.count);
    await client.dispose();
    return counted;
  },
  [1, 2, 3],
);

async function startJupyter() {
  const [port, directory] = [await freePort(), temporaryDirectory()];
  const flags = [`--port=${port}`, "--no-browser", "--allow-root", `--IdentityProvider.token=${JUPYTER_TOKEN}`, `--ServerApp.root_dir=${directory}`];
  const env = { HOME: directory, SHELL: "/bin/sh" };
  await startProcess(PYTHON, ["-m", "jupyter_server", ...flags], /Jupyter Server .* is (running) at/, { env });
  return port;
}

byEachAddress(
  "Jupyter",
  startJupyter,
  async () => {
    const token = document.cookie.match(/_xsrf=([^;]*)/)[1];
    const made = await fetch("/api/terminals", { method: "POST", headers: { "X-XSRFToken": token } });
    const { name } = await made.json();
    // By path, cookies have the tunnel's prefix, and this address has not: it has the token itself.
    const search = location.pathname === "/" ? "" : "?token=jupyter-token";
    const socket = new WebSocket(new URL(`/terminals/websocket/${name}${search}`, location.href.replace("http", "ws")));
    let shown = "";
    await new Promise((resolve, reject) => {
      socket.onopen = () => socket.send(JSON.stringify(["stdin", "echo $((6 * 7))-answers\r"]));
      socket.onclose = (event) => reject(new Error(`closed: ${event.code}`));
      socket.onmessage = ({ data }) => {
        const [kind, text] = JSON.parse(data);
        if (kind === "stdout") shown += text;
        if (shown.includes("42-answers")) resolve();
      };
    });
    socket.onclose = null;
    socket.close();
    return made.status;
  },
  200,
  {
    async prepare(page) {
      await page.goto(new URL("login", page.url()).href);
      await page.locator("#password_input").fill(JUPYTER_TOKEN);
      await page.locator("#password_input").press("Enter");
      await page.getByText("Jupyter Server is running").waitFor();
    },
  },
);

/** Sends a picture in pieces, as fast as its viewer takes them, and counts what the viewer sends at the same time. */
async function startDesktop() {
  const server = await listen({ "/": "<canvas></canvas>" });
  const sockets = new WebSocketServer({ server, path: "/websockify", handleProtocols: () => "binary", perMessageDeflate: false });
  sockets.on("connection", (socket) => {
    let received = 0;
    socket.on("message", (bytes) => {
      received += bytes.length;
      if (received === CHUNKS * 16) socket.close(4000, `${received} bytes`);
    });
    for (let number = 0; number < CHUNKS; number++) socket.send(Buffer.alloc(CHUNK_BYTES, number));
  });
  return server.address().port;
}

byEachAddress(
  "desktop",
  startDesktop,
  async () => {
    const socket = new WebSocket(new URL("/websockify", location.href.replace("http", "ws")), ["base64", "binary"]);
    socket.binaryType = "arraybuffer";
    let [received, isInOrder] = [0, true];
    return new Promise((resolve) => {
      socket.onmessage = ({ data }) => {
        const bytes = new Uint8Array(data);
        isInOrder &&= bytes.every((byte) => byte === received % 256);
        received++;
        socket.send(new Uint8Array(16));
      };
      socket.onclose = ({ code, reason }) => resolve([socket.protocol, received, isInOrder, code, reason]);
    });
  },
  ["binary", CHUNKS, true, 4000, `${CHUNKS * 16} bytes`],
);

async function startEvents() {
  const server = await listen({ "/": "<p></p>" }, (request, response) => {
    if (request.url !== "/events") return false;
    const next = Number(request.headers["last-event-id"] ?? 0) + 1;
    response.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-cache" });
    response.write(`retry: 10\nid: ${next}\ndata: event ${next}\n\n`);
    // The first one stays open until the browser has shown that it arrived.
    if (next > 1) response.end();
    else setTimeout(() => response.end(), 200);
    return true;
  });
  return server.address().port;
}

byEachAddress(
  "EventSource",
  startEvents,
  () =>
    new Promise((resolve) => {
      const [events, heard] = [new EventSource("/events"), []];
      events.onmessage = ({ data }) => {
        heard.push(data);
        if (heard.length < 3) return;
        events.close();
        resolve(heard);
      };
    }),
  ["event 1", "event 2", "event 3"],
);
