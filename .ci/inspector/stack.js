// A tunnel on this machine with its inspector, and a browser that looks at it.

import { spawn } from "node:child_process";
import { chromium } from "playwright-core";
import { startOrigin } from "./origin.js";

const BIN = process.env.BIN;
const CHROMIUM = process.env.CHROMIUM ?? "/usr/bin/chromium";
/** Longer than anything takes here; only a test that is about to fail waits for it. */
const PATIENCE_MS = 60_000;

const endings = [];

/** Ends everything that was started, the last first. */
export async function endAll() {
  for (const end of endings.splice(0).reverse()) await end();
}

/** Starts an executable, and returns what the groups of each pattern match in its output, once all have. */
function start(name, args, patterns) {
  const child = spawn(`${BIN}/${name}`, args, { stdio: ["ignore", "pipe", "pipe"] });
  const gone = new Promise((resolve) => child.once("close", resolve));
  endings.push(async () => {
    child.kill("SIGTERM");
    const timer = setTimeout(() => child.kill("SIGKILL"), 5000);
    await gone;
    clearTimeout(timer);
  });
  let said = "";
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => reject(new Error(`${name} did not say ${patterns}:\n${said}`)), PATIENCE_MS);
    const listen = (text) => {
      said += text;
      const found = patterns.map((pattern) => said.match(pattern)?.[1]);
      if (found.includes(undefined)) return;
      clearTimeout(timer);
      resolve(found);
    };
    child.stdout.on("data", listen);
    child.stderr.on("data", listen);
  });
}

/** A service, a tunnel to `port` and its inspector: their addresses. */
export async function startTunnel(port, more = []) {
  const [endpoint] = await start("tunnel-local", ["--listen", "127.0.0.1:0"], [/agents at (ws:\S+)/]);
  const args = ["http", String(port), "--endpoint", endpoint, "--tunnel-id", "demo", "--inspect", "127.0.0.1:0", ...more];
  const [inspector, url] = await start("ttf", args, [/inspector: (\S+)/, /online: (\S+)/]);
  return { inspector, url };
}

/** All of it: a local service with a tunnel and a browser. */
export async function startAll() {
  const origin = await startOrigin();
  endings.push(origin.end);
  const other = await startOrigin();
  endings.push(other.end);
  const tunnel = await startTunnel(origin.port);
  const browser = await chromium.launch({ executablePath: CHROMIUM, args: ["--no-sandbox"] });
  endings.push(() => browser.close());
  return { origin, other, browser, ...tunnel };
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
