// A program on a terminal of its own, with tmux, and a picture of that.

import { execFile } from "node:child_process";
import { promisify } from "node:util";
import { PATIENCE_MS, atEnd } from "./servers.js";

const run = promisify(execFile);
const COLUMNS = 96;
const ROWS = 24;
const INTERVAL_MS = 100;

/** By the last digit of their codes. */
const COLOURS = ["#45475a", "#f38ba8", "#a6e3a1", "#f9e2af", "#89b4fa", "#f5c2e7", "#94e2d5", "#bac2de"];

/** Starts a program, and returns what types on its terminal, what waits for a text, and what draws it on a page. */
export async function startTerminal(command, args) {
  const socket = `ttf-${process.pid}`;
  const tmux = async (...words) => (await run("tmux", ["-L", socket, "-f", "/dev/null", ...words])).stdout;
  await tmux("new-session", "-d", "-x", String(COLUMNS), "-y", String(ROWS), command, ...args);
  atEnd(() => tmux("kill-server"));
  const shown = (...flags) => tmux("capture-pane", "-p", ...flags);
  return {
    type: (key) => tmux("send-keys", key),
    async until(text) {
      const latest = performance.now() + PATIENCE_MS;
      while (!(await shown()).includes(text)) {
        if (performance.now() > latest) throw new Error(`no ${text} in\n${await shown()}`);
        await new Promise((resolve) => setTimeout(resolve, INTERVAL_MS));
      }
    },
    html: async () => page(await shown("-e")),
  };
}

function page(text) {
  const style = "margin: 0; padding: 18px 22px; background: #1e1e2e; color: #cdd6f4; font: 15px/1.35 'DejaVu Sans Mono', monospace; width: max-content";
  return `<!doctype html><meta charset="utf-8"><pre style="${style}">${spans(text.trimEnd())}</pre>`;
}

/** Text with the codes of a terminal, as HTML. */
function spans(text) {
  const escape = (plain) => plain.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  let style = {};
  return text
    .split(/\x1b\[([\d;]*)m/)
    .map((part, at) => {
      if (at % 2 === 0) {
        const css = Object.entries(style).map(([name, value]) => `${name}: ${value}`);
        return part && `<span style="${css.join("; ")}">${escape(part)}</span>`;
      }
      // A colour may be the one of this number, of 256.
      for (const [, colour, code] of (part || "0").matchAll(/38[;:]5[;:](\d+)|(\d+)/g)) style = changed(style, colour ?? Number(code) - 30, Number(code));
      return "";
    })
    .join("");
}

/** The style after a code, which may be that of a colour. */
function changed(style, colour, code) {
  if (code === 0) return {};
  if (code === 1) return { ...style, "font-weight": "bold" };
  if (code === 2) return { ...style, opacity: 0.6 };
  if (code === 22) return { ...style, "font-weight": "normal", opacity: 1 };
  if (code === 39) return { ...style, color: "inherit" };
  return COLOURS[colour] ? { ...style, color: COLOURS[colour] } : style;
}
