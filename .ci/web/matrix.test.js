// Each WebSocket client with each server, with and without compression: through the tunnel they say the same as directly.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { promisify } from "node:util";
import { WebSocket, WebSocketServer } from "ws";
import { BIN, PYTHON, atEnd, endAll, openBrowser, openPage, openTunnels, startProcess, startServices } from "./servers.js";

const run = promisify(execFile);
const PEER = join(import.meta.dirname, "websockets_peer.py");
const LARGE_BYTES = 1_000_000;

let services, browser;
before(async () => {
  [services, browser] = await Promise.all([startServices(), openBrowser()]);
});
after(endAll);

function described(data, isBinary) {
  return [isBinary ? "binary" : "text", data.length, createHash("sha256").update(data).digest("hex").slice(0, 16)];
}

const servers = {
  async ws(compression) {
    const handleProtocols = (offered) => (offered.has("chat") ? "chat" : false);
    const server = new WebSocketServer({ host: "127.0.0.1", port: 0, perMessageDeflate: compression === "deflate", handleProtocols });
    let lastClose = null;
    server.on("connection", (socket) => {
      socket.on("close", (code, reason) => {
        lastClose = [code, String(reason)];
      });
      socket.on("message", (data, isBinary) => {
        if (String(data) === "fragments") {
          ["one", "two"].forEach((part) => socket.send(part, { fin: false }));
          socket.send("three", { fin: true });
        } else if (String(data) === "close") socket.close(4001, "as asked");
        else if (String(data) === "last close") socket.send(JSON.stringify(lastClose));
        else socket.send(data, { binary: isBinary });
      });
    });
    await new Promise((resolve) => server.once("listening", resolve));
    atEnd(() => {
      server.clients.forEach((client) => client.terminate());
      server.close();
    });
    return server.address().port;
  },
  websockets: (compression) => startProcess(PYTHON, [PEER, "serve", compression], /port (\d+)/),
};

/** Each plays the same script, and returns what it saw: echoes, a message in fragments, a pong, both sides' close codes. */
const clients = {
  async ws(url, compression) {
    const saw = [];
    const options = { perMessageDeflate: compression === "deflate" };
    const open = async (protocols) => {
      const socket = new WebSocket(url, protocols, options);
      const [arrived, waiting] = [[], []];
      socket.on("message", (data, isBinary) => (waiting.shift() ?? ((message) => arrived.push(message)))(described(data, isBinary), data));
      await new Promise((resolve, reject) => socket.once("open", resolve).once("error", reject));
      const next = () => (arrived.length ? arrived.shift() : new Promise((resolve) => waiting.push((message, data) => resolve([message, data]))));
      return [socket, next];
    };
    const closed = (socket) => new Promise((resolve) => socket.once("close", (code, reason) => resolve([code, String(reason)])));
    const [socket, next] = await open(["chat", "other"]);
    saw.push([socket.protocol, socket.extensions]);
    for (const message of ["hello", "", "x".repeat(LARGE_BYTES), Buffer.from(Array.from({ length: 70_000 }, (_, i) => i % 256)), "größer"]) {
      socket.send(message);
      saw.push((await next())[0]);
    }
    ["in ", "three "].forEach((part) => socket.send(part, { fin: false }));
    socket.send("parts", { fin: true });
    saw.push((await next())[0]);
    socket.send("fragments");
    saw.push((await next())[0]);
    socket.ping("are you there");
    saw.push(await new Promise((resolve) => socket.once("pong", (data) => resolve(String(data)))));
    socket.close(4321, "that was it");
    saw.push(await closed(socket));
    const [second, nextOfSecond] = await open(["chat"]);
    second.send("last close");
    saw.push(String((await nextOfSecond())[1]));
    second.send("close");
    saw.push(await closed(second));
    return saw;
  },
  websockets: async (url, compression) => JSON.parse((await run(PYTHON, [PEER, "visit", url, compression])).stdout),
  // Knows no compression.
  tungstenite: async (url) => JSON.parse((await run(join(BIN, "examples/websocket_client"), [url], { maxBuffer: 8 * LARGE_BYTES })).stdout),
  async Chromium(url) {
    const { page, close } = await openPage(browser);
    const saw = await page.evaluate(playInBrowser, [url, LARGE_BYTES]);
    await close();
    return saw;
  },
};

/** Runs in the page. */
async function playInBrowser([url, largeBytes]) {
  const saw = [];
  const open = (protocols) =>
    new Promise((resolve, reject) => {
      const socket = new WebSocket(url, protocols);
      socket.binaryType = "arraybuffer";
      socket.onopen = () => resolve(socket);
      socket.onerror = () => reject(new Error("not opened"));
    });
  const next = (socket) => new Promise((resolve) => (socket.onmessage = ({ data }) => resolve(data)));
  const closed = (socket) => new Promise((resolve) => (socket.onclose = ({ code, reason, wasClean }) => resolve([code, reason, wasClean])));
  const socket = await open(["chat", "other"]);
  saw.push([socket.protocol, socket.extensions]);
  for (const message of ["hello", "", "x".repeat(largeBytes), Uint8Array.from({ length: 70_000 }, (_, i) => i % 256), "größer", "fragments"]) {
    socket.send(message);
    const data = await next(socket);
    const isSame = typeof data === "string" ? data === message : new Uint8Array(data).every((byte, i) => byte === message[i]);
    saw.push([typeof data, data.length ?? data.byteLength, isSame]);
  }
  socket.close(4321, "that was it");
  saw.push(await closed(socket));
  const second = await open(["chat"]);
  second.send("last close");
  saw.push(await next(second));
  second.send("close");
  saw.push(await closed(second));
  return saw;
}

for (const server of Object.keys(servers)) {
  for (const compression of ["deflate", "plain"]) {
    test(`server ${server}, ${compression}`, async (t) => {
      const port = await servers[server](compression);
      const { path } = await openTunnels(services, `${server}-${compression}`, port);
      for (const [client, play] of Object.entries(clients)) {
        await t.test(client, async () => {
          const direct = await play(`ws://127.0.0.1:${port}/`, compression);
          assert.ok(direct.length > 8, "the script was played to its end");
          assert.deepEqual(await play(path.replace("http", "ws"), compression), direct);
        });
      }
    });
  }
}
