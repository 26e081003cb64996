// The inspector's page in a browser: what a person does with it.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { createHmac } from "node:crypto";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { after, before, beforeEach, test } from "node:test";
import { promisify } from "node:util";
import { WebSocket } from "ws";
import { openInspector, startAll } from "./inspector.js";
import { endAll, temporaryDirectory } from "./servers.js";

/** How soon a request must be in the list. */
const SOON_MS = 300;

let stack;
before(async () => {
  stack = await startAll();
});
after(endAll);
beforeEach(async () => {
  await fetch(`${stack.inspector}/api/requests/http`, { method: "DELETE" });
});

const visit = (path, options) => fetch(stack.url + path, { redirect: "manual", ...options });
const last = () => stack.origin.seen.at(-1);
const row = (page, path) => page.locator(".row:not([hidden])", { has: page.locator(`.path[title="${path}"]`) }).first();

async function select(page, path) {
  await row(page, path).click();
  await page.locator(".details-path", { hasText: path }).waitFor();
}

/** The text of the response's body as it is shown. */
const responseBody = (page) => page.locator(".message").last().locator(".body-view");

/** `expected` are failures that the page may report. */
async function withPage(act, { expected, ...options } = {}) {
  const { page, context, failures } = await openInspector(stack, options);
  await act(page, context);
  assert.deepEqual(failures.filter((text) => !expected?.test(text)), []);
  await context.close();
}

test("a request is in the list at once, and the filter finds it", () =>
  withPage(async (page) => {
    await visit("/warm");
    await row(page, "/warm").waitFor();
    const appeared = page.evaluate(
      () =>
        new Promise((resolve) => {
          const observer = new MutationObserver(() => {
            if (document.querySelector('.row .path[title="/orders?page=2"]')) resolve(performance.timeOrigin + performance.now());
          });
          observer.observe(document.getElementById("list"), { childList: true, subtree: true });
        }),
    );
    const sent = performance.timeOrigin + performance.now();
    await visit("/orders?page=2");
    const took = (await appeared) - sent;
    console.log(`a request was in the list after ${Math.round(took)} ms; it should be there within ${SOON_MS} ms`);
    await visit("/missing", { method: "POST", body: "x" });
    await visit("/error");
    await row(page, "/error").waitFor();
    const shown = async () => page.locator(".row:not([hidden]) .path").allInnerTexts();
    await page.fill("#filter-text", "orders");
    assert.deepEqual(await shown(), ["/orders?page=2"]);
    await page.fill("#filter-text", "");
    await page.selectOption("#filter-status", "4");
    assert.deepEqual(await shown(), ["/missing"]);
    await page.selectOption("#filter-status", "");
    await page.selectOption("#filter-method", "POST");
    assert.deepEqual(await shown(), ["/missing"]);
    await page.selectOption("#filter-method", "");
    await page.click("#pause");
    await visit("/while-paused");
    await page.locator("#count", { hasText: "1 new" }).waitFor();
    assert.equal(await row(page, "/while-paused").count(), 0);
    await page.click("#pause");
    await row(page, "/while-paused").waitFor();
    await page.click("#clear");
    await page.locator("#empty").waitFor();
  }));

test("bodies are shown as what they are", () =>
  withPage(async (page) => {
    const paths = ["/orders", "/gzip", "/br", "/zstd", "/broken.json", "/feed.xml", "/picture.png", "/bytes", "/large"];
    for (const path of paths) await (await visit(path)).arrayBuffer();
    for (const path of ["/orders", "/gzip", "/br", "/zstd"]) {
      await select(page, path);
      await responseBody(page).getByText('"sku": "tea-042"').first().waitFor();
      const text = await responseBody(page).innerText();
      assert.match(text, /"id": 90071992547409931,\n/, "numbers stay as they are");
      assert.match(text, /"Kyūsu"/);
    }
    await select(page, "/broken.json");
    await responseBody(page).getByText("line 3, column 14").waitFor();
    await select(page, "/feed.xml");
    assert.match(await responseBody(page).innerText(), /<feed>\n {2}<entry id="1">\n {4}<title>Tea &amp; pots<\/title>/);
    await select(page, "/picture.png");
    await responseBody(page).getByText("2 × 1").waitFor();
    await select(page, "/bytes");
    await responseBody(page).getByText("00000040  40 41 42").waitFor();
    await select(page, "/large");
    await page.getByText("Cut: the first 4.0 MiB of 12 MiB were kept.").waitFor();
  }));

test("forms and multipart bodies are taken apart", () =>
  withPage(async (page) => {
    await visit("/form", { method: "POST", body: new URLSearchParams({ name: "A & B", city: "Köln" }) });
    const upload = new FormData();
    upload.set("title", "Two pixels");
    upload.set("file", new Blob([Buffer.from("hello")], { type: "text/plain" }), "hello.txt");
    await visit("/upload", { method: "POST", body: upload });
    await select(page, "/form");
    const request = page.locator(".message").first();
    await request.locator(".body-view").getByText("A & B").waitFor();
    await request.locator(".body-view").getByText("Köln").waitFor();
    await select(page, "/upload");
    assert.deepEqual(await request.locator(".part-head strong").allInnerTexts(), ["title", "file"]);
    await request.locator(".parts").getByText("hello.txt").waitFor();
    await request.locator(".parts").getByText("Two pixels").waitFor();
  }));

test("a request is replayed as it was, with changes, and elsewhere", () =>
  withPage(async (page) => {
    const bytes = Buffer.from([...Array(256).keys()]);
    await visit("/hook?a=1&a=%20", { method: "POST", body: bytes, headers: { "x-signature": "abc", authorization: "Bearer s3cret" } });
    const first = last();
    await select(page, "/hook?a=1&a=%20");
    await page.getByText("Bearer [masked]").waitFor();
    await page.keyboard.press("r");
    await page.getByText("A replay of").waitFor();
    const second = last();
    assert.notEqual(first, second);
    assert.deepEqual(second.body, bytes);
    assert.deepEqual([second.method, second.url], [first.method, first.url]);
    assert.deepEqual(second.headers, first.headers);

    await visit("/order", { method: "POST", body: '{"a": 1}', headers: { "content-type": "application/json", authorization: "Bearer s3cret" } });
    await select(page, "/order");
    await page.keyboard.press("e");
    await page.fill("#edit-method", "PUT");
    await page.fill("#edit-path", "/order/2?dry=1");
    await page.fill("#edit-headers", `${await page.inputValue("#edit-headers")}\nX-Added: yes`);
    await page.fill("#edit-body", '{"a": 2}');
    await page.getByRole("button", { name: "Send" }).click();
    await page.getByText("An edited replay of").waitFor();
    const edited = last();
    assert.deepEqual([edited.method, edited.url, String(edited.body)], ["PUT", "/order/2?dry=1", '{"a": 2}']);
    assert.equal(edited.headers["x-added"], "yes");
    assert.equal(edited.headers.authorization, "Bearer s3cret", "what stays masked is sent as it was");
    assert.equal(edited.headers["content-length"], "8");

    const before = stack.origin.seen.length;
    await page.getByRole("button", { name: "Replay to…" }).click();
    await page.getByLabel("Target").fill(String(stack.other.port));
    await page.keyboard.press("Enter");
    await page.getByText(`to ${stack.other.port}`, { exact: false }).waitFor();
    assert.equal(stack.origin.seen.length, before);
    assert.equal(stack.other.seen.at(-1).url, "/order/2?dry=1");
  }));

test("two exchanges are compared", () =>
  withPage(async (page) => {
    await visit("/sum", { method: "POST", headers: { "content-type": "application/json" }, body: '{"a":1,"b":2}' });
    await visit("/sum", { method: "POST", headers: { "content-type": "application/json", "x-new": "1" }, body: '{"a":1,"b":3}' });
    await select(page, "/sum");
    await page.keyboard.press("m");
    const dialog = page.locator("#dialog");
    await dialog.locator(".diff .removed", { hasText: '"b": 2' }).waitFor();
    await dialog.locator(".diff .added", { hasText: '"b": 3' }).waitFor();
    await dialog.locator(".compare tr.changed", { hasText: "X-New" }).waitFor();
    assert.equal(await dialog.locator(".diff .same", { hasText: '"a": 1' }).count(), 1);
  }));

test("a webhook's signature is checked in the page", () =>
  withPage(async (page) => {
    const body = '{"action":"opened"}';
    const signature = createHmac("sha256", "It's a Secret").update(body).digest("hex");
    await visit("/github", { method: "POST", body, headers: { "x-hub-signature-256": `sha256=${signature}` } });
    const key = Buffer.from("0123456789abcdef");
    const time = String(Math.floor(Date.now() / 1000));
    const standard = createHmac("sha256", key).update(`msg_1.${time}.${body}`).digest("base64");
    await visit("/standard", { method: "POST", body, headers: { "webhook-id": "msg_1", "webhook-timestamp": time, "webhook-signature": `v1,AAAA v1,${standard}` } });
    const stripe = createHmac("sha256", "whsec_x").update(`${time}.${body}`).digest("hex");
    await visit("/stripe", { method: "POST", body, headers: { "stripe-signature": `t=${time},v1=${stripe}` } });
    const slack = createHmac("sha256", "slack").update(`v0:${time}:${body}`).digest("hex");
    await visit("/slack", { method: "POST", body, headers: { "x-slack-request-timestamp": time, "x-slack-signature": `v0=${slack}` } });
    for (const [path, right] of [["/github", "It's a Secret"], ["/standard", `whsec_${key.toString("base64")}`], ["/stripe", "whsec_x"], ["/slack", "slack"]]) {
      await select(page, path);
      await page.getByRole("button", { name: "Check signature" }).click();
      await page.getByLabel("Secret").fill("wrong");
      await page.keyboard.press("Enter");
      await page.locator(".verdict.is-wrong").waitFor();
      await page.getByLabel("Secret").fill(right);
      await page.keyboard.press("Enter");
      await page.locator(".verdict.is-right").waitFor();
      await page.keyboard.press("Escape");
    }
  }));

test("WebSocket messages are shown, both ways and inflated", () =>
  withPage(async (page) => {
    const socket = new WebSocket(`${stack.url.replace("http", "ws")}/chat`);
    await new Promise((resolve) => socket.once("open", resolve));
    const said = `tea ${"leaves ".repeat(50)}`;
    socket.send(said);
    await new Promise((resolve) => socket.once("message", resolve));
    await select(page, "/chat");
    await page.getByRole("tab", { name: /Messages/ }).click();
    await page.locator(".frame.visitor", { hasText: said.trim() }).waitFor();
    await page.locator(".frame.service", { hasText: `you said ${said}`.trim() }).waitFor();
    socket.close(1000, "enough");
    await page.locator(".frame.close", { hasText: "1000 enough" }).first().waitFor();
  }));

test("what fails is shown with its reason, and a stream while it goes on", () =>
  withPage(async (page) => {
    await visit("/break").then((response) => response.text()).catch(() => {});
    await select(page, "/break");
    await page.locator(".details-head .fault", { hasText: "broke off" }).waitFor();
    const leave = new AbortController();
    const stream = await visit("/events", { signal: leave.signal });
    const reader = stream.body.getReader();
    await reader.read();
    await select(page, "/events");
    await page.locator(".facts", { hasText: "in progress" }).waitFor();
    await page.getByRole("button", { name: "Hex" }).last().click();
    const shown = await responseBody(page).innerText();
    await page.waitForFunction((before) => [...document.querySelectorAll(".body-view")].at(-1).innerText !== before, shown);
    assert.equal(await page.getByRole("button", { name: "Hex" }).last().getAttribute("aria-pressed"), "true");
    leave.abort();
    await page.locator(".details-head .fault", { hasText: "the visitor left" }).waitFor();
  }));

test("nothing in a body runs", () =>
  withPage(
    async (page, context) => {
      await visit("/page");
      await select(page, "/page");
      await page.getByRole("button", { name: "Preview" }).click();
      await page.frameLocator("iframe.preview").getByText("A page").waitFor();
      assert.equal(await page.evaluate(() => window.stolen), undefined);
      assert.equal(await page.title(), "Inspector");
      // Also where the preview has a window of its own.
      const { requests } = await (await fetch(`${stack.inspector}/api/requests/http`)).json();
      const alone = await context.newPage();
      await alone.goto(`${stack.inspector}${requests[0].uri}/response/preview`);
      await alone.getByText("A page").waitFor();
      assert.notEqual(await alone.title(), "stolen");
    },
    { expected: /sandbox|Content Security Policy/ },
  ));

test("a page of another origin gets nothing and replays nothing", async () => {
  await visit("/secret");
  const context = await stack.browser.newContext();
  const page = await context.newPage();
  await page.goto(`http://127.0.0.1:${stack.origin.port}/page`);
  const { requests } = await (await fetch(`${stack.inspector}/api/requests/http`)).json();
  const outcome = await page.evaluate(
    async ([inspector, id]) => {
      const attempt = (path, options) => fetch(inspector + path, options).then((response) => response.text(), () => "refused");
      return Promise.all([
        attempt("/api/requests/http"),
        attempt("/api/tunnels", { mode: "no-cors" }),
        attempt("/api/requests/http", { method: "POST", mode: "no-cors", body: JSON.stringify({ id }), headers: { "content-type": "text/plain" } }),
        attempt("/api/requests/http", { method: "POST", body: JSON.stringify({ id }), headers: { "content-type": "application/json" } }),
        attempt("/api/requests/http", { method: "DELETE" }),
      ]);
    },
    [stack.inspector, requests[0].id],
  );
  assert.deepEqual(outcome, Array(5).fill("refused"));
  assert.equal(stack.origin.seen.filter(({ url }) => url === "/secret").length, 1);
  const still = await (await fetch(`${stack.inspector}/api/requests/http`)).json();
  assert.equal(still.requests.length, requests.length);
  await context.close();
});

test("copied commands make the same request again", () =>
  withPage(async (page, context) => {
    await context.grantPermissions(["clipboard-read", "clipboard-write"]);
    const body = "it's a \"quoted\" $body\nwith two lines";
    await visit("/copied?x=1", { method: "PUT", body, headers: { "content-type": "text/plain", "x-quote": "it's" } });
    await select(page, "/copied?x=1");
    await page.keyboard.press("c");
    await page.locator(".toast.is-shown", { hasText: "curl command copied" }).waitFor();
    const command = await page.evaluate(() => navigator.clipboard.readText());
    await promisify(execFile)("sh", ["-c", `${command} --silent --max-time 20`]);
    const again = last();
    assert.deepEqual([again.method, again.url, String(again.body), again.headers["x-quote"]], ["PUT", "/copied?x=1", body, "it's"]);
    await page.getByLabel("Copy as").selectOption("fetch");
    await page.locator(".toast.is-shown", { hasText: "fetch call copied" }).waitFor();
    const call = await page.evaluate(() => navigator.clipboard.readText());
    await eval(`(async () => { ${call} })()`);
    assert.deepEqual([last().method, String(last().body), last().headers["x-quote"]], ["PUT", body, "it's"]);
  }));

test("the HAR opens in a HAR reader", async () => {
  await (await visit("/gzip?page=1")).arrayBuffer();
  await (await visit("/picture.png")).arrayBuffer();
  const file = join(temporaryDirectory(), "requests.har");
  writeFileSync(file, await (await fetch(`${stack.inspector}/api/requests/har`)).text());
  const context = await stack.browser.newContext({ offline: true });
  const page = await context.newPage();
  await page.routeFromHAR(file, { notFound: "abort" });
  const response = await page.goto(`${stack.url}/gzip?page=1`);
  assert.equal(response.status(), 200);
  assert.match(await response.text(), /tea-042/);
  await context.close();
});

for (const [name, options] of [
  ["dark", { colorScheme: "dark" }],
  ["narrow", { viewport: { width: 380, height: 760 } }],
  ["wide", { viewport: { width: 1600, height: 1000 } }],
]) {
  test(`the page works ${name}, by keyboard alone`, () =>
    withPage(async (page) => {
      await visit("/orders?long=" + "x".repeat(300));
      await visit("/login", { method: "POST", body: "user=me", headers: { "content-type": "application/x-www-form-urlencoded" } });
      await row(page, "/login").waitFor();
      await page.keyboard.press("/");
      await page.keyboard.type("login");
      await page.keyboard.press("Escape");
      await page.keyboard.press("ArrowDown");
      await page.locator(".details-path", { hasText: "/login" }).waitFor();
      await page.getByText(/session=\[masked\]; Path=\S+; HttpOnly/).waitFor();
      const overflow = () => page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
      assert.equal(await overflow(), 0, "nothing is wider than the page");
      await page.keyboard.press("Enter");
      await page.locator("#details:focus").waitFor();
      await page.keyboard.press("e");
      await page.locator("#edit-path:focus").waitFor();
      assert.equal(await overflow(), 0);
      await page.keyboard.press("Escape");
      await page.locator("#dialog").waitFor({ state: "hidden" });
      await page.keyboard.press("Escape");
      await page.locator("#list:focus").waitFor();
      await page.keyboard.press("?");
      await page.getByText("edit and replay").waitFor();
    }, options));
}
