// Starts what the tests need, and ends it with them: processes that say when they are ready, tunnels, and a browser.

import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

/** Where the executables are. */
export const BIN = process.env.BIN ?? join(import.meta.dirname, "../../target/release");
/** With the packages of requirements.txt. */
export const PYTHON = process.env.PYTHON ?? join(import.meta.dirname, "../../.tools/web/bin/python");
/** Longer than anything takes here; only a test that is about to fail waits for it. */
export const PATIENCE_MS = 60_000;
/** The domain that the browser is told to find on this machine. */
export const DOMAIN = "tunnel.test";

const endings = [];

/** Ends everything that was started, the last first. */
export async function endAll() {
  for (const end of endings.splice(0).reverse()) await end();
}

/** Lets `end` be called with the tests' end. */
export function atEnd(end) {
  endings.push(end);
}

export async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/**
 * Starts a process, and returns the groups of `pattern` once its output has that: an object if they have names, else the first.
 * `spawned` gets the process at once.
 */
export function startProcess(command, args, pattern, { cwd, env, spawned } = {}) {
  // A group of its own: dev servers have children.
  const child = spawn(command, args, { cwd, env: { ...process.env, ...env }, detached: true, stdio: ["ignore", "pipe", "pipe"] });
  spawned?.(child);
  let said = "";
  // One that cannot be started is not closed either.
  const gone = new Promise((resolve) => child.once("close", resolve).once("error", resolve));
  atEnd(async () => {
    try {
      process.kill(-child.pid, "SIGKILL");
    } catch {
      // It has ended already.
    }
    await gone;
  });
  return new Promise((resolve, reject) => {
    const fail = (why) => reject(new Error(`${command} ${args.join(" ")} ${why}:\n${said}`));
    const timer = setTimeout(() => fail(`did not say ${pattern}`), PATIENCE_MS);
    const listen = (bytes) => {
      said += bytes;
      const found = said.match(pattern);
      if (!found) return;
      clearTimeout(timer);
      resolve(found.groups ?? found[1]);
    };
    child.stdout.on("data", listen);
    child.stderr.on("data", listen);
    child.once("error", (error) => fail(error.message));
    child.once("close", (code) => fail(`ended with ${code}`));
  });
}

/** Two services: one on a loopback address, and one under a domain whose subdomains are its tunnels. */
export async function startServices() {
  const port = await freePort();
  const byDomain = ["--listen", `127.0.0.1:${port}`, "--public-url", `http://${DOMAIN}:${port}`, "--routing", "subdomain"];
  const tunnelLocal = join(BIN, "tunnel-local");
  const [local, token] = await Promise.all([
    startProcess(tunnelLocal, ["--listen", "127.0.0.1:0"], /agents at (ws:\S+)/),
    startProcess(tunnelLocal, byDomain, /TTF_TOKEN=(\S+)/),
  ]);
  return { local, domain: `ws://127.0.0.1:${port}/_ws`, token };
}

/** Opens a tunnel on both services, and returns its three addresses. */
export async function openTunnels({ local, domain, token }, id, port) {
  const open = (endpoint, env) =>
    startProcess(join(BIN, "ttf"), ["http", String(port), "--endpoint", endpoint, "--tunnel-id", id], /^(http:\S+?)\/?$/m, { env });
  const [byPath, bySubdomain] = await Promise.all([open(local, {}), open(domain, { TTF_TOKEN: token })]);
  const byLocalhost = new URL(byPath);
  byLocalhost.hostname = `${id}.localhost`;
  byLocalhost.pathname = "/";
  return { path: `${byPath}/`, localhost: String(byLocalhost), subdomain: `${bySubdomain}/` };
}

/** A browser for which the made-up domain is on this machine. */
export async function openBrowser() {
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox", `--host-resolver-rules=MAP *.${DOMAIN} 127.0.0.1`],
  });
  atEnd(() => browser.close());
  return browser;
}

/** A page in a profile of its own, a list of everything that fails in it, and what waits until it has fetched what it needs. */
export async function openPage(browser, options = {}) {
  const context = await browser.newContext(options);
  context.setDefaultTimeout(PATIENCE_MS);
  const page = await context.newPage();
  const failures = [];
  const fail = (what, url = "") => {
    // Some projects have no icon, and the browser asks for one all the same.
    if (!url.endsWith("/favicon.ico")) failures.push(`${url}: ${what}`);
  };
  page.on("requestfailed", (request) => {
    const { errorText } = request.failure();
    // Pages cancel requests that they need no more, without a tunnel too.
    if (errorText !== "net::ERR_ABORTED") fail(errorText, request.url());
  });
  // A dev server on the same machine could be reached without the tunnel.
  page.on("websocket", (socket) => {
    const { host } = new URL(socket.url());
    if (host !== new URL(page.url()).host) fail("a socket that is not the tunnel's", socket.url());
  });
  page.on("response", (response) => response.status() >= 400 && fail(response.status(), response.url()));
  page.on("pageerror", (error) => fail(String(error)));
  page.on("console", (message) => message.type() === "error" && fail(message.text(), message.location().url));
  const open = new Set();
  page.on("request", (request) => open.add(request));
  page.on("requestfinished", (request) => open.delete(request));
  page.on("requestfailed", (request) => open.delete(request));
  const settle = async () => {
    try {
      await page.waitForLoadState("networkidle");
    } catch {
      // One that only asks again and again, as some dev servers' do while they compile, is missing nothing.
      if (open.size > 0) throw new Error(`not answered: ${[...open].map((request) => request.url()).join(", ")}`);
    }
  };
  return { page, failures, settle, close: () => context.close() };
}

export function temporaryDirectory() {
  const directory = mkdtempSync(join(tmpdir(), "web-"));
  atEnd(() => rmSync(directory, { recursive: true, force: true }));
  return directory;
}
