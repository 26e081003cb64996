// What a visitor of a dev server sees: the page, an edit that shows without a reload, and a route that survives one.

import assert from "node:assert/strict";
import { openPage } from "./servers.js";

/** Visits the project at an address, and returns how many milliseconds an edit took to show. */
export async function check(browser, project, address) {
  const { page, failures, settle, close } = await openPage(browser);
  try {
    return await visit(project, address, page, failures, settle);
  } finally {
    project.restore();
    await close();
  }
}

async function visit(project, address, page, failures, settle) {
  const shows = (text) => page.getByText(text, { exact: false }).first().waitFor();
  await page.goto(address);
  await shows(project.text);
  // Whatever the page still fetches is part of it, and so is the socket over which it hears of edits.
  await settle();
  await page.evaluate(() => {
    window.isSamePage = true;
  });
  const edited = performance.now();
  project.edit();
  await shows(project.edited);
  const took = Math.round(performance.now() - edited);
  assert.equal(await page.evaluate(() => window.isSamePage), true, "the page was reloaded");
  if (project.link) {
    await page.getByText(project.link).click();
    await shows("All about it");
    await page.reload();
    await shows("All about it");
  } else {
    await page.evaluate(() => history.pushState({}, "", "/some/where"));
    await page.reload();
    await shows(project.edited);
  }
  assert.deepEqual(failures, []);
  return took;
}
