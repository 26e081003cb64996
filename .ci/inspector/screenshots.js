// Pictures for the documentation, of the running thing: BIN=target/release node .ci/inspector/screenshots.js DIRECTORY

import { join } from "node:path";
import { endAll, openInspector, startAll } from "./stack.js";

const directory = process.argv[2];
const stack = await startAll();
const visit = (path, options) => fetch(stack.url + path, { redirect: "manual", ...options }).then((response) => response.arrayBuffer()).catch(() => {});
const order = (quantity) => JSON.stringify({ customer: "c-1042", sku: "tea-042", quantity, note: "Gift wrapped, please" });
const hook = (quantity, more) =>
  visit("/webhooks/orders?source=shop", { method: "POST", body: order(quantity), headers: { "content-type": "application/json", authorization: "Bearer s3cret", "user-agent": "Shop-Webhooks/2.1", ...more } });

await visit("/page");
await visit("/picture.png");
await visit("/feed.xml");
await visit("/missing");
await hook(2);
await visit("/error", { method: "DELETE" });
await visit("/login", { method: "POST", body: "user=me&remember=on", headers: { "content-type": "application/x-www-form-urlencoded" } });
await visit("/break");
await hook(3, { "x-retry": "1" });
await visit("/gzip?page=2");

for (const [scheme, name] of [["light", "inspector"], ["dark", "inspector-dark"]]) {
  const { page, context } = await openInspector(stack, { colorScheme: scheme, viewport: { width: 1360, height: 820 } });
  await page.locator(".row", { hasText: "/gzip" }).click();
  await page.getByText('"tea-042"').first().waitFor();
  await page.screenshot({ path: join(directory, `${name}.png`) });
  await context.close();
}
{
  const { page, context } = await openInspector(stack, { viewport: { width: 1360, height: 820 } });
  await page.locator(".row", { hasText: "/webhooks" }).first().click();
  await page.keyboard.press("m");
  await page.locator(".diff .added").first().waitFor();
  await page.screenshot({ path: join(directory, "inspector-compare.png") });
  await page.keyboard.press("Escape");
  await page.keyboard.press("e");
  await page.locator("#edit-path:focus").waitFor();
  await page.screenshot({ path: join(directory, "inspector-edit.png") });
  await context.close();
}
{
  const { page, context } = await openInspector(stack, { viewport: { width: 380, height: 760 } });
  await page.screenshot({ path: join(directory, "inspector-narrow.png") });
  await page.locator(".row", { hasText: "/login" }).click();
  await page.getByText("session=[masked]").waitFor();
  await page.screenshot({ path: join(directory, "inspector-narrow-details.png") });
  await context.close();
}
await endAll();
