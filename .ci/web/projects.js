// Projects as their own tools make them, and the dev servers that come with them.

import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { freePort, startProcess } from "./servers.js";

/** Beside the packages, so that the projects find them without an installation of their own. */
const PROJECTS = join(import.meta.dirname, "projects");
const MODULES = join(import.meta.dirname, "node_modules");
const ENV = { CI: "1", NEXT_TELEMETRY_DISABLED: "1", FORCE_COLOR: "0", NO_COLOR: "1" };

function node(script, ...args) {
  execFileSync(process.execPath, [join(MODULES, script), ...args], { cwd: PROJECTS, env: { ...process.env, ...ENV }, stdio: "pipe" });
}

function write(name, files) {
  for (const [path, text] of Object.entries(files)) {
    mkdirSync(join(PROJECTS, name, path, ".."), { recursive: true });
    writeFileSync(join(PROJECTS, name, path), text);
  }
}

function vite(template) {
  return () => node("create-vite/index.js", template, "--template", template, "--no-interactive");
}

/** Routes of a framework that has files for them; the others answer every path with the one page that they have. */
const SVELTE_ABOUT = { "src/routes/about/+page.svelte": "<h1>All about it</h1>\n" };
const NEXT_ABOUT = { "app/about/page.js": "export default function About() {\n  return <h1>All about it</h1>;\n}\n" };

const WEBPACK = {
  "package.json": '{ "private": true }\n',
  "webpack.config.cjs": `const HtmlPlugin = require("html-webpack-plugin");
module.exports = { mode: "development", entry: "./src/index.js", output: { publicPath: "/" }, plugins: [new HtmlPlugin({ title: "webpack" })],
  devServer: { historyApiFallback: true, client: { webSocketURL: "auto://0.0.0.0:0/ws" } } };
`,
  "src/index.js": `import { greeting } from "./greeting.js";
const heading = document.createElement("h1");
const render = () => { heading.textContent = greeting; };
document.body.append(heading);
render();
module.hot?.accept("./greeting.js", render);
`,
  "src/greeting.js": 'export const greeting = "Hello from webpack";\n',
};

/** `edit` is what changes in the source: the file, what a visitor sees of it, and what that becomes. */
export const KINDS = {
  react: {
    make: vite("react"),
    serve: ["vite/bin/vite.js", "--strictPort", "--host", "127.0.0.1", "--port"],
    edit: ["src/App.jsx", "Get started", "Get going"],
  },
  vue: {
    make: vite("vue"),
    serve: ["vite/bin/vite.js", "--strictPort", "--host", "127.0.0.1", "--port"],
    edit: ["src/components/HelloWorld.vue", "Get started", "Get going"],
  },
  svelte: {
    make: () => {
      node("sv/dist/bin.mjs", "create", "svelte", "--template", "minimal", "--no-types", "--no-add-ons", "--no-install");
      write("svelte", SVELTE_ABOUT);
    },
    serve: ["vite/bin/vite.js", "--strictPort", "--host", "127.0.0.1", "--port"],
    edit: ["src/routes/+page.svelte", "Welcome to SvelteKit", '<a href="/about">Read on</a>'],
    link: "Read on",
  },
  webpack: {
    make: () => write("webpack", WEBPACK),
    serve: ["webpack-cli/bin/cli.js", "serve", "--port"],
    edit: ["src/greeting.js", "Hello from webpack", "Goodbye from webpack"],
  },
  next: {
    make: () => {
      const flags = ["--js", "--app", "--empty", "--no-tailwind", "--no-eslint", "--no-src-dir", "--no-react-compiler"];
      node("create-next-app/dist/index.js", "next", ...flags, "--skip-install", "--disable-git", "--use-npm", "--yes");
      write("next", NEXT_ABOUT);
    },
    serve: ["next/dist/bin/next", "dev", "--hostname", "127.0.0.1", "--port"],
    edit: ["app/page.js", "Hello World!", '<a href="/about">Read on</a>'],
    link: "Read on",
  },
};

/** Makes a project and starts its dev server. */
export async function startProject(name) {
  const { make, serve, edit, link } = KINDS[name];
  rmSync(join(PROJECTS, name), { recursive: true, force: true });
  mkdirSync(PROJECTS, { recursive: true });
  make();
  const port = await freePort();
  const [script, ...args] = serve;
  const isReady = new RegExp(`(https?://(?:127\\.0\\.0\\.1|localhost):${port})`);
  const options = { cwd: join(PROJECTS, name), env: ENV };
  await startProcess(process.execPath, [join(MODULES, script), ...args, String(port)], isReady, options);
  const [path, before, after] = edit;
  const file = join(PROJECTS, name, path);
  const source = readFileSync(file, "utf8");
  return {
    port,
    text: before,
    edited: after.replace(/<[^>]*>/g, ""),
    link,
    edit: () => writeFileSync(file, source.replace(before, after)),
    restore: () => writeFileSync(file, source),
  };
}
