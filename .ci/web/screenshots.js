// Pictures for the documentation, of the running thing: BIN=target/release node .ci/web/screenshots.js docs/images
// That of the console needs tmux.

import { join } from "node:path";
import { WebSocket } from "ws";
import { openInspector, startAll } from "./inspector.js";
import { BIN, endAll } from "./servers.js";
import { startTerminal } from "./terminal.js";

const directory = process.argv[2];
const stack = await startAll();
const visit = (path, options, url = stack.url) => fetch(url + path, { redirect: "manual", ...options }).then((response) => response.arrayBuffer()).catch(() => {});
const order = (quantity) => JSON.stringify({ customer: "c-1042", sku: "tea-042", quantity, note: "Gift wrapped, please" });
const json = { "content-type": "application/json", authorization: "Bearer s3cret", "user-agent": "Shop-Webhooks/2.1" };
const form = { "content-type": "application/x-www-form-urlencoded" };

/** What a shop's visitors ask for. */
async function beBusy(url) {
  const hook = (quantity, more) => visit("/webhooks/orders?source=shop", { method: "POST", body: order(quantity), headers: { ...json, ...more } }, url);
  for (const path of ["/page", "/picture.png", "/feed.xml", "/missing"]) await visit(path, {}, url);
  await hook(2);
  await visit("/error", { method: "DELETE" }, url);
  await visit("/login", { method: "POST", body: "user=me&remember=on", headers: form }, url);
  await visit("/break", {}, url);
  await hook(3, { "x-retry": "1" });
  await visit("/gzip?page=2", {}, url);
}

async function drawInspector() {
  await beBusy(stack.url);
  for (const [scheme, name] of [["light", "inspector"], ["dark", "inspector-dark"]]) {
    const { page, context } = await openInspector(stack, { colorScheme: scheme, viewport: { width: 1360, height: 820 } });
    await page.locator(".row", { hasText: "/gzip" }).click();
    await page.getByText('"tea-042"').first().waitFor();
    await page.screenshot({ path: join(directory, `${name}.png`) });
    await context.close();
  }
  const wide = await openInspector(stack, { viewport: { width: 1360, height: 820 } });
  await wide.page.locator(".row", { hasText: "/webhooks" }).first().click();
  await wide.page.keyboard.press("m");
  await wide.page.locator(".diff .added").first().waitFor();
  await wide.page.screenshot({ path: join(directory, "inspector-compare.png") });
  await wide.page.keyboard.press("Escape");
  await wide.page.keyboard.press("e");
  await wide.page.locator("#edit-path:focus").waitFor();
  await wide.page.screenshot({ path: join(directory, "inspector-edit.png") });
  await wide.context.close();
  const narrow = await openInspector(stack, { viewport: { width: 380, height: 760 } });
  await narrow.page.screenshot({ path: join(directory, "inspector-narrow.png") });
  await narrow.page.locator(".row", { hasText: "/login" }).click();
  await narrow.page.getByText("session=[masked]").waitFor();
  await narrow.page.screenshot({ path: join(directory, "inspector-narrow-details.png") });
  await narrow.context.close();
}

async function drawConsole() {
  const target = String(stack.origin.port);
  const terminal = await startTerminal(join(BIN, "ttf"), ["http", target, "--endpoint", stack.endpoint, "--tunnel-id", "shop", "--remember", "false"]);
  await terminal.until("online for");
  const url = stack.url.replace("/demo", "/shop");
  const socket = new WebSocket(`${url.replace("http", "ws")}/chat`);
  await new Promise((resolve) => socket.once("open", resolve));
  await beBusy(url);
  await terminal.until("round trip");
  const context = await stack.browser.newContext({ deviceScaleFactor: 2 });
  const page = await context.newPage();
  await page.setContent(await terminal.html());
  await page.locator("pre").screenshot({ path: join(directory, "console.png") });
  await context.close();
  socket.terminate();
}

try {
  await drawInspector();
  await drawConsole();
} finally {
  await endAll();
}
