// An untouched Vite project behind a deployment with an edge, in a browser. .ci/e2e-deploy runs this with the addresses for visitors and
// agents, EDGE and AGENTS, and an agent's token, TTF_TOKEN.

import { join } from "node:path";
import { after, test } from "node:test";
import { check } from "./hot_reload.js";
import { startProject } from "./projects.js";
import { BIN, endAll, openBrowser, startProcess } from "./servers.js";

const ID = "e2e-web";
const { EDGE, AGENTS } = process.env;

after(endAll);

// MiniStack takes the final slash off a path of one segment, and would be redirected to it for ever.
test("an edit shows without a reload", async (t) => {
  const [project, browser] = await Promise.all([startProject("react"), openBrowser()]);
  await startProcess(join(BIN, "ttf"), ["http", String(project.port), "--endpoint", AGENTS, "--tunnel-id", ID], /^(http:\S+)$/m);
  t.diagnostic(`an edit showed after ${await check(browser, project, `${EDGE}/${ID}/index.html`)} ms`);
});
