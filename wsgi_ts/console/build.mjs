// Makes console.html and docs.html of src: one file each, with script and style in it and nothing to load.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const folder = dirname(fileURLToPath(import.meta.url));
const target = process.argv[2] ?? folder;
const pages = { console: "wsgi-ts console", docs: "wsgi-ts API" };
// page.py works out the same sum.
const recipe = ["build.mjs", "package.json", "package-lock.json"];

function sum() {
  const paths = [...recipe, ...readdirSync(join(folder, "src")).map((name) => `src/${name}`)].sort();
  const all = createHash("sha256");
  for (const path of paths) {
    all.update(`${path}\0`);
    all.update(createHash("sha256").update(readFileSync(join(folder, path))).digest());
  }
  return all.digest("hex");
}

async function bundle(entry) {
  const { outputFiles } = await build({
    entryPoints: [join(folder, "src", entry)],
    bundle: true,
    minify: true,
    write: false,
    target: "es2022",
    format: "iife",
    legalComments: "none",
    jsx: "automatic",
    jsxImportSource: "preact",
    logLevel: "warning",
  });
  // In an inline script nothing may look like its end.
  return outputFiles[0].text.trim().replaceAll("</script", "<\\/script").replaceAll("<!--", "<\\!--");
}

const template = readFileSync(join(folder, "src", "page.html"), "utf8");
const style = await bundle("style.css");
for (const [name, title] of Object.entries(pages)) {
  const parts = { title, style, sum: sum(), script: await bundle(`${name}.jsx`) };
  writeFileSync(join(target, `${name}.html`), template.replace(/@(title|style|sum|script)@/g, (_, part) => parts[part]));
}
