// Whoever is killed without a word: sockets that went through it end soon at the others.

import assert from "node:assert/strict";
import { join } from "node:path";
import { after, test } from "node:test";
import { WebSocket, WebSocketServer } from "ws";
import { BIN, PYTHON, atEnd, endAll, startProcess } from "./servers.js";

const PEER = join(import.meta.dirname, "websockets_peer.py");
const SOON_MS = 5000;

after(endAll);

/** A local service that passes on each end of its sockets. */
async function startLocalService() {
  const server = new WebSocketServer({ host: "127.0.0.1", port: 0 });
  await new Promise((resolve) => server.once("listening", resolve));
  atEnd(() => server.close());
  const closed = new Promise((resolve) => server.once("connection", (socket) => socket.once("close", resolve)));
  return { port: server.address().port, closed };
}

for (const killed of ["the agent", "the service", "the local service"]) {
  test(`when ${killed} is killed`, async (t) => {
    const processes = {};
    const keep = (name) => ({ spawned: (child) => (processes[name] = child) });
    // Which is killed has to be a process of its own.
    const local =
      killed === "the local service"
        ? { port: await startProcess(PYTHON, [PEER, "serve", "plain"], /port (\d+)/, keep("the local service")) }
        : await startLocalService();
    const endpoint = await startProcess(join(BIN, "tunnel-local"), ["--listen", "127.0.0.1:0"], /agents at (ws:\S+)/, keep("the service"));
    const args = ["http", String(local.port), "--endpoint", endpoint, "--tunnel-id", "mortal", "--inspect", "false"];
    const url = await startProcess(join(BIN, "ttf"), args, /^(http:\S+?)\/?$/m, keep("the agent"));
    const socket = new WebSocket(`${url.replace("http", "ws")}/`, "chat");
    await new Promise((resolve, reject) => socket.once("open", resolve).once("error", reject));
    const closed = new Promise((resolve) => socket.once("close", resolve));
    socket.on("error", () => {});
    const since = performance.now();
    processes[killed].kill("SIGKILL");
    await Promise.all([closed, local.closed]);
    const took = Math.round(performance.now() - since);
    t.diagnostic(`closed after ${took} ms`);
    assert.ok(took < SOON_MS, `${took} ms`);
  });
}
