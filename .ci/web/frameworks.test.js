// Untouched projects behind the tunnel, in a browser.

import { after, before, describe, test } from "node:test";
import { check } from "./hot_reload.js";
import { KINDS, startProject } from "./projects.js";
import { endAll, openBrowser, openTunnels, startServices } from "./servers.js";

let services, browser;
before(async () => {
  [services, browser] = await Promise.all([startServices(), openBrowser()]);
});
after(endAll);

for (const name of Object.keys(KINDS)) {
  describe(name, () => {
    let project, addresses;
    before(async () => {
      project = await startProject(name);
      addresses = await openTunnels(services, name, project.port);
    });
    for (const kind of ["path", "localhost", "subdomain"]) {
      test(`by ${kind}`, async (t) => {
        const took = await check(browser, project, addresses[kind]);
        t.diagnostic(`an edit showed after ${took} ms`);
      });
    }
  });
}
