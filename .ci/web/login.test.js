// Logging in to a tunnel with a password, in a browser that is not asked for it: some fronts drop WWW-Authenticate.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { createServer, request as send } from "node:http";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { promisify } from "node:util";
import { BIN, atEnd, endAll, openBrowser, openPage, startProcess } from "./servers.js";

const run = promisify(execFile);
const CREDENTIALS = "ann:correct horse";

let endpoint, local, front, browser;
before(async () => {
  [endpoint, local, browser] = await Promise.all([
    startProcess(join(BIN, "tunnel-local"), ["--listen", "127.0.0.1:0"], /agents at (ws:\S+)/),
    startLocalService(),
    openBrowser(),
  ]);
  front = await startFront(new URL(endpoint).port);
  await openTunnel();
});
after(endAll);

async function listen(server) {
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  atEnd(() => {
    server.close();
    server.closeAllConnections();
  });
  return server.address().port;
}

/** Says which cookies it was sent: the login is none of its business. */
function startLocalService() {
  return listen(createServer((request, response) => response.end(`private ${request.url} cookies: ${request.headers.cookie ?? "none"}`)));
}

/** Passes everything on except one field. */
function startFront(port) {
  const server = createServer((request, response) => {
    const { method, url: path, headers } = request;
    const passed = send({ port, host: "127.0.0.1", method, path, headers }, (answer) => {
      const { "www-authenticate": _, ...fields } = answer.headers;
      response.writeHead(answer.statusCode, fields);
      answer.pipe(response);
    });
    request.pipe(passed);
  });
  return listen(server);
}

/** Opens the tunnel, or takes it over from the agent that has it. */
async function openTunnel() {
  const args = ["http", String(local), "--endpoint", endpoint, "--tunnel-id", "private", "--inspect", "false", "--basic-auth", CREDENTIALS];
  await startProcess(join(BIN, "ttf"), args, /^(http:\S+?)\/?$/m);
}

/** Cookies with which the page is logged in. */
async function logins(page) {
  const cookies = await page.context().cookies();
  return cookies.filter(({ name }) => name === "ttf_login");
}

async function fill(page, user, password) {
  await page.getByLabel("User name").fill(user);
  await page.getByLabel("Password").fill(password);
  await page.getByRole("button", { name: "Log in" }).click();
}

test("a form lets a browser in, for as long as the password is right, and the local service does not see it", async () => {
  const address = `http://127.0.0.1:${front}/private/page?a=1`;
  const { page, failures, close } = await openPage(browser);
  assert.equal((await page.goto(address)).status(), 401);
  await fill(page, "ann", "battery staple");
  await page.getByLabel("User name").waitFor();
  assert.deepEqual(await logins(page), []);
  await fill(page, ...CREDENTIALS.split(":"));
  await page.getByText("private /page?a=1 cookies: none").waitFor();
  assert.equal(page.url(), address);
  const [{ path, httpOnly, sameSite, value }] = await logins(page);
  assert.deepEqual({ path, httpOnly, sameSite }, { path: "/private/", httpOnly: true, sameSite: "Lax" });
  assert.ok(!value.includes("ann") && !value.includes("horse"));

  await openTunnel();
  await page.reload();
  await page.getByText("private /page?a=1 cookies: none").waitFor();
  assert.ok(failures.every((failure) => failure.includes("401")), String(failures));
  await close();
});

test("curl -u needs no form", async () => {
  const address = `http://127.0.0.1:${front}/private/curl`;
  const curl = async (...args) => (await run("curl", ["--silent", "--max-time", "20", "--write-out", " %{http_code}", ...args, address])).stdout;
  assert.equal(await curl("-u", CREDENTIALS), "private /curl cookies: none 200");
  assert.match(await curl("-u", "ann:wrong"), / 401$/);
  assert.match(await curl(), / 401$/);
});
