// A tunnel on this machine with its inspector, and a browser that looks at it.

import { join } from "node:path";
import { startOrigin } from "./inspector_origin.js";
import { BIN, PATIENCE_MS, atEnd, openBrowser, startProcess } from "./servers.js";

/** A service, a tunnel to `port` and its inspector: their addresses. */
async function startTunnel(port) {
  const endpoint = await startProcess(join(BIN, "tunnel-local"), ["--listen", "127.0.0.1:0"], /agents at (ws:\S+)/);
  const args = ["http", String(port), "--endpoint", endpoint, "--tunnel-id", "demo", "--inspect", "127.0.0.1:0"];
  return { endpoint, ...(await startProcess(join(BIN, "ttf"), args, /inspector: (?<inspector>\S+)[^]*online: (?<url>\S+)/)) };
}

/** All of it: a local service with a tunnel and a browser. */
export async function startAll() {
  const [origin, other, browser] = await Promise.all([startOrigin(), startOrigin(), openBrowser()]);
  atEnd(origin.end);
  atEnd(other.end);
  return { origin, other, browser, ...(await startTunnel(origin.port)) };
}

/** A page with the inspector. Whatever goes wrong in it is in `failures`. */
export async function openInspector(stack, options = {}) {
  const context = await stack.browser.newContext({ viewport: { width: 1400, height: 900 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE_MS);
  const failures = [];
  page.on("pageerror", (error) => failures.push(error.message));
  page.on("console", (message) => {
    if (message.type() === "error") failures.push(message.text());
  });
  await page.goto(stack.inspector);
  await page.locator(".tunnel.online").waitFor();
  return { page, context, failures };
}
