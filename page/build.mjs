// Bundles the page into dist/, which the API server embeds. The same sources and versions give the same bytes.
// With --tests: bundles tests/ into build/, for node's test runner. With --check: says whether dist/ is what the sources give.
import { build } from "esbuild";
import { mkdir, readdir, readFile, writeFile } from "node:fs/promises";

const common = { bundle: true, charset: "utf8", jsx: "automatic", jsxImportSource: "preact", legalComments: "none" };

async function tests() {
  const files = (await readdir("tests")).filter((name) => name.endsWith(".test.ts"));
  await build({
    ...common,
    entryPoints: files.map((name) => `tests/${name}`),
    outdir: "build",
    platform: "node",
    format: "esm",
    target: "node20",
  });
}

async function page() {
  const bundled = await build({
    ...common,
    entryPoints: { page: "src/main.tsx" },
    outdir: "dist",
    minify: true,
    format: "esm",
    target: "es2022",
    write: false,
    metafile: true,
  });
  const licences = await Promise.all(
    // What of other people's work is inside says so.
    ["preact", "markdown-it", "mdurl", "uc.micro", "entities", "linkify-it", "punycode.js"].map(async (name) => {
      const dir = `node_modules/${name}`;
      const about = await readFile(`${dir}/package.json`, "utf8").catch(() => null);
      if (!about || !Object.keys(bundled.metafile.inputs).some((input) => input.startsWith(`${dir}/`))) return "";
      const { version, license } = JSON.parse(about);
      const files = (await readdir(dir)).filter((file) => /^licen[cs]e/i.test(file));
      const text = files[0] ? await readFile(`${dir}/${files[0]}`, "utf8") : license;
      return `${name} ${version}\n\n${text.trim()}\n`;
    }),
  );
  const files = new Map(bundled.outputFiles.map((file) => [file.path.split("/").pop(), file.text]));
  files.set("index.html", await readFile("src/index.html", "utf8"));
  files.set("licences.txt", licences.filter(Boolean).join("\n---\n\n"));
  return files;
}

if (process.argv.includes("--tests")) {
  await tests();
} else {
  const files = await page();
  const wrong = [];
  await mkdir("dist", { recursive: true });
  for (const [name, text] of files) {
    if (process.argv.includes("--check")) {
      const there = await readFile(`dist/${name}`, "utf8").catch(() => "");
      if (there !== text) wrong.push(name);
    } else {
      await writeFile(`dist/${name}`, text);
      console.log(`dist/${name}: ${Buffer.byteLength(text)} bytes`);
    }
  }
  if (wrong.length) {
    console.error(`page/dist is not what page/src gives: ${wrong.join(", ")}. Run: cd page && npm ci && npm run build`);
    process.exit(1);
  }
}
