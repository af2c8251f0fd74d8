// The page of `elleci-run serve` in a headless Chromium: node check.mjs (run.sh sets it up and explains the environment).
//
// Without ELLECI_URL it talks to the stand-in of mock.mjs. With it, to a server that runs: the same steps, where what a server does
// not do on demand (a hostile answer, a wrong key, being busy) is put in its mouth by intercepting the request. An argument runs
// the steps alone whose names hold it; those before "settings begin" build on one another.

import assert from "node:assert/strict";
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { start } from "./mock.mjs";
import { shoot } from "./shots.mjs";
import { slow } from "./slow.mjs";

const { ELLECI_PAGE_MODULES: modules, ELLECI_CHROMIUM: chromium, ELLECI_URL: given, ELLECI_SHOTS: shots } = process.env;
const require = createRequire(`${modules}/package.json`);
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const mock = given ? null : await start({ delay: 15, router: true });
const url = given ? await slow(given, 40) : mock.url;
const browser = await puppeteer.launch({ executablePath: chromium, args: process.getuid?.() === 0 ? ["--no-sandbox"] : [] });
const told = [];            // what must not happen: console errors, exceptions, other hosts, violations of the policy
const only = process.argv[2];
let page, steps = 0;

// A tab with nothing stored, whose language is `language`; everything it asks for and complains of is written down.
async function open({ language = "it-IT", scheme = "light", width = 1180, height = 800, at = url, answers = null, bypass = false } = {}) {
  await page?.browserContext().close();
  const context = await browser.createBrowserContext();
  page = await context.newPage();
  page.sent = [];
  page.setDefaultTimeout(60000);
  await page.setBypassCSP(bypass);
  await page.setViewport({ width, height });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.evaluateOnNewDocument((tongue) => {
    Object.defineProperty(navigator, "language", { get: () => tongue });
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (e) => window.violations.push(`${e.violatedDirective} ${e.blockedURI}`));
  }, language);
  page.on("pageerror", (e) => told.push(`exception: ${e.message}`));
  page.on("console", (m) => {
    // The browser itself reports every response that is no success; those are looked at by the steps that ask for them.
    if (["error", "warn"].includes(m.type()) && !/^Failed to load resource: /.test(m.text())) told.push(`console: ${m.text()}`);
  });
  page.on("request", (r) => {
    if (!r.url().startsWith("data:") && new URL(r.url()).host !== new URL(at).host) told.push(`request to ${r.url()}`);
    if (r.method() === "POST" && r.url().endsWith("/chat/completions")) page.sent.push(JSON.parse(r.postData()));
  });
  if (answers) await intercept(answers);
  await page.goto(at);
  await page.waitForFunction(() => document.querySelector("#model").textContent || !document.querySelector("#notice").hidden);
  return page;
}

// Answers in the server's place: `answers` maps a path to {status, body, headers} or to a function of the request; `null` goes through.
async function intercept(answers) {
  await page.setRequestInterception(true);
  page.on("request", (request) => {
    const made = answers[new URL(request.url()).pathname.replace(/.*(?=\/v1\/|\/props)/, "")];
    const answer = typeof made === "function" ? made(request) : made;
    if (answer === "lost") request.abort("connectionrefused");
    else if (answer) request.respond({ status: 200, contentType: "application/json", ...answer });
    else request.continue();
  });
}
const failing = (status, error, headers = {}) => ({ status, headers, body: JSON.stringify({ error }) });
const streaming = (chunks, ending = "data: [DONE]\n\n") => ({
  contentType: "text/event-stream",
  body: chunks.map((c) => `data: ${JSON.stringify(typeof c === "string" ? { choices: [{ index: 0, delta: { content: c } }] } : c)}\n\n`).join("") + ending,
});

async function step(name, run) {
  if (only && !name.includes(only)) return;
  const began = Date.now();
  try {
    await run();
    told.push(...await page.evaluate(() => window.violations.splice(0)));
    assert.deepEqual(told, [], "complaints of the browser");
  } catch (error) {
    console.error(`FAILED ${name}`);
    if (shots) await page.screenshot({ path: `${shots}/failed.png` }).catch(() => {});
    throw error;
  }
  steps++;
  console.log(`ok  ${name} (${Date.now() - began} ms)`);
}

const value = (selector) => page.$eval(selector, (e) => e.value);
const text = (selector) => page.$eval(selector, (e) => e.textContent);
const count = (selector) => page.$$eval(selector, (all) => all.length);
const answer = () => page.evaluate(() => [...document.querySelectorAll(".model .text")].at(-1)?.textContent ?? "");
const busy = () => page.$eval("#send", (e) => e.classList.contains("stop"));
const idle = () => page.waitForFunction(() => !document.querySelector("#send").classList.contains("stop"), { timeout: 60000 });
const grown = (to) => page.waitForFunction((n) => ([...document.querySelectorAll(".model .text")].at(-1)?.textContent ?? "").length > n, {}, to);
// The same, or the end of the answer.
const changed = (from) => page.waitForFunction((n) => ([...document.querySelectorAll(".model .text")].at(-1)?.textContent ?? "").length > n
  || !document.querySelector("#send").classList.contains("stop"), {}, from);
const say = async (words) => { await page.type("#input", words); await page.keyboard.press("Enter"); };
const QUESTION = "Racconta per esteso la storia di un paese di montagna.";

// Asks until an answer is long enough to be watched: a model may end any answer after a word.
async function watched(enough) {
  for (let attempt = 1; ; attempt++) {
    await say(QUESTION);
    try {
      await page.waitForFunction((n) => ([...document.querySelectorAll(".model .text")].at(-1)?.textContent ?? "").length > n
        && document.querySelector("#send").classList.contains("stop"), { timeout: given ? 15000 : 60000 }, enough);
      return;
    } catch (error) {
      if (!given || attempt === 6) throw new Error(`no answer of more than ${enough} characters could be caught in ${attempt} attempts`, { cause: error });
      await idle();
      await page.$eval("#input", (e) => { e.value = ""; });
      await page.click("#fresh");
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------- steps

await open();

await step("one small file that needs nothing else, under a strict policy", async () => {
  const response = await fetch(url), source = await response.text();
  assert.match(response.headers.get("content-type"), /^text\/html; *charset=utf-8$/i);
  const policy = response.headers.get("content-security-policy") ?? "";
  for (const rule of ["default-src 'none'", "connect-src 'self'"]) assert.ok(policy.includes(rule), `the server's policy has ${rule}: ${policy}`);
  assert.ok(Buffer.byteLength(source) < 45000, `${Buffer.byteLength(source)} bytes`);
  for (const banned of [/\bon[a-z]+\s*=\s*["']/, /innerHTML|outerHTML|insertAdjacentHTML|document\.write/, /\beval\(|new Function/, /@import|url\(/, /<link(?! rel="icon" href="data:)/]) {
    assert.doesNotMatch(source, banned);
  }
});

await step("an answer streams in several steps and is counted", async () => {
  assert.equal(await page.$eval("#blank", (e) => e.hidden), false);
  let lengths;
  // A small model may say all that it has to say in one piece: it is asked again.
  for (let attempt = 1; attempt <= (given ? 6 : 1) && new Set(lengths).size < 3; attempt++) {
    if (attempt > 1) { await idle(); await page.click("#fresh"); }
    await watched(0);
    lengths = [(await answer()).length];
    for (let i = 0; i < 3; i++) { await changed(lengths.at(-1)); lengths.push((await answer()).length); }
  }
  assert.ok(new Set(lengths).size >= 3, `the text grew in steps: ${lengths}`);
  assert.match(await text(".model .facts"), /\d+ token.*[\d,]+ token\/s/, "live count and speed");
  await idle();
  const facts = await text(".model .facts");
  assert.match(facts, /\d+ token.*[\d,]+ token\/s.*[\d,]+ s.*seme \d+/);
  assert.match(await text("#used"), /^[\d.]+ \/ [\d.]+$/, "exact use of the context");
  if (mock) {
    assert.match(await text("#model"), /nano · 5,94\s*Mln parametri · contesto 1024/);
    assert.ok(Math.abs(Number(/(\d+) token/.exec(facts)[1]) - (await answer()).length / 4) < 200);
  }
  assert.equal(await text(".you .text"), QUESTION);
  assert.equal(await value("#input"), "");
});

await step("a screen reader hears the whole answer, sentence by sentence", async () => {
  const heard = await page.$eval("#spoken", (e) => ({ live: e.getAttribute("aria-live"), parts: [...e.children].map((p) => p.textContent) }));
  assert.equal(heard.live, "polite");
  assert.equal(heard.parts.pop(), "Risposta completa.");
  assert.equal(heard.parts.join("").replace(/\s/g, ""), (await page.evaluate(() => JSON.parse(localStorage["elleci.turns"]).at(-1).content)).replace(/\s/g, ""));
});

await step("the request carries the conversation and every setting", async () => {
  const body = page.sent.at(-1);
  assert.deepEqual(body.messages, [{ role: "user", content: QUESTION }]);
  const { messages, model, seed, stream, stream_options, ...rest } = body;
  assert.ok(Number.isInteger(seed) && model && stream && stream_options.include_usage);
  assert.deepEqual(rest, { temperature: 0.8, top_p: 0.95, top_k: 40, min_p: 0.05, repeat_penalty: 1 }, "a server given is to run with its defaults");
});

await step("the conversation and a half-typed message outlive a reload", async () => {
  if (!await count(".turn")) { await watched(5); await page.keyboard.press("Escape"); await idle(); }
  const before = await text("#log");
  await page.type("#input", "non ancora mandato");
  await page.reload();
  await page.waitForFunction(() => document.querySelector("#model").textContent);
  assert.equal(await text("#log"), before);
  assert.equal(await value("#input"), "non ancora mandato");
});

await step("Esc stops: what has arrived stays, and the next message goes", async () => {
  await page.$eval("#input", (e) => { e.value = ""; e.dispatchEvent(new Event("input")); });
  await page.click("#fresh");
  await watched(20);
  const cut = mock?.cut;
  await page.keyboard.press("Escape");
  await idle();
  const partial = await answer();
  assert.ok(partial.length > 20);
  await new Promise((done) => setTimeout(done, 300));
  assert.equal(await answer(), partial, "nothing arrives after the stop");
  assert.match(await text(".model .facts"), /fermata/);
  if (mock) assert.equal(mock.cut, cut + 1, "the server saw the end of the connection");
  await say("Ancora.");
  await page.waitForFunction(() => document.querySelectorAll(".model").length === 2);
  await grown(0);
  const history = page.sent.at(-1).messages;
  assert.deepEqual(history.map((m) => m.role), ["user", "assistant", "user"]);
  assert.equal(history[1].content.replace(/\s/g, ""), partial.replace(/\s/g, ""), "the partial answer is part of the conversation");
});

await step("the Stop button stops, by mouse", async () => {
  const facts = () => page.evaluate(() => [...document.querySelectorAll(".model .facts")].at(-1).textContent);
  // A short answer may end before the button is reached: it is asked again.
  for (let attempt = 1; attempt <= (given ? 6 : 1); attempt++) {
    if (!await busy()) { await idle(); await page.click("#fresh"); await watched(5); }
    await page.click("#send");
    await idle();
    if (/fermata/.test(await facts())) break;
  }
  assert.match(await facts(), /fermata/);
});

await step("Regenerate replaces the last answer alone, with another seed", async () => {
  const { turns, seed } = { turns: await count(".turn"), seed: page.sent.at(-1).seed };
  await page.click(".again");
  await page.waitForFunction((n) => document.querySelectorAll(".turn").length === n, {}, turns);
  await grown(0);
  await idle();
  assert.equal(await count(".turn"), turns);
  assert.notEqual(page.sent.at(-1).seed, seed);
  assert.equal(page.sent.at(-1).messages.at(-1).role, "user");
});

await step("Edit puts the last message back into the box", async () => {
  const last = page.sent.at(-1).messages.at(-1).content, turns = await count(".turn");
  await page.click(".edit");
  assert.equal(await value("#input"), last);
  assert.equal(await count(".turn"), turns - 2);
});

await step("New chat clears, keeps what is typed, and can be undone", async () => {
  if (!await count(".turn")) {
    await page.$eval("#input", (e) => { e.value = ""; });
    await watched(5);
    await page.keyboard.press("Escape");
    await idle();
    await page.type("#input", "ancora da dire");
  }
  const turns = await count(".turn"), typed = await value("#input");
  await page.click("#fresh");
  assert.equal(await count(".turn"), 0);
  assert.equal(await value("#input"), typed);
  await page.click("#notice button");
  assert.equal(await count(".turn"), turns);
  assert.equal(await page.evaluate(() => JSON.parse(localStorage["elleci.turns"]).length), turns);
});

await step("New chat during an answer ends it", async () => {
  await page.click("#fresh");
  await page.$eval("#input", (e) => { e.value = ""; });
  await watched(5);
  await page.click("#fresh");
  await idle();
  assert.equal(await count(".turn"), 0);
});

await step("settings go into the request, are bounded, kept and reset", async () => {
  await page.click("#tune");
  const set = async (name, typed) => { await page.click(`#${name}`, { count: 3 }); await page.keyboard.press("Backspace"); await page.type(`#${name}`, typed); await page.keyboard.press("Tab"); };
  const wanted = { temperature: "0.3", top_p: "0.5", top_k: "7", min_p: "0.2", repeat_penalty: "1.15", max_tokens: "5", seed: "1234", system: "Sii breve." };
  for (const [name, typed] of Object.entries(wanted)) await set(name, typed);
  await set("top_p", "9");
  assert.equal(await value("#top_p"), "1");
  await set("top_k", "3.6");
  assert.equal(await value("#top_k"), "4");
  await set("temperature", "0,5");
  assert.equal(await value("#temperature"), "0.5", "a decimal comma");
  await set("temperature", "0.3");
  await page.reload();
  await page.waitForFunction(() => document.querySelector("#model").textContent);
  await page.click("#tune");
  assert.equal(await value("#temperature"), "0.3");
  await say("Ciao.");
  await page.waitForSelector(".again");
  const { messages, model, stream, stream_options, ...rest } = page.sent.at(-1);
  assert.deepEqual(rest, { temperature: 0.3, top_p: 1, top_k: 4, min_p: 0.2, repeat_penalty: 1.15, max_tokens: 5, seed: 1234 });
  assert.deepEqual(messages, [{ role: "system", content: "Sii breve." }, { role: "user", content: "Ciao." }]);
  if (mock) assert.match(await text(".model .facts"), /5 token.*seme 1234.*tagliata al limite/);
  await page.click("#reset");
  assert.equal(await value("#temperature"), "0.8");
  assert.equal(await value("#max_tokens"), "");
  assert.equal(await page.$eval("#reset", (e) => e === document.activeElement), true);
  assert.equal(await count(".field.changed"), 0);
  await page.keyboard.press("Escape");
  assert.equal(await page.$eval("#panel", (e) => e.hidden), true);
  assert.equal(await page.evaluate(() => document.activeElement.id), "tune", "focus returns to the button");
});

await step("settings begin where the server's do, and stay where they were put", async () => {
  const props = { model: "m", context_length: 256, router: false, defaults: { temperature: 0.30000001192092896, top_k: 9, repetition_penalty: 1.1 } };
  const answers = { "/props": { body: JSON.stringify(props) }, "/v1/chat/completions": streaming(["Sì.", { choices: [{ delta: {}, finish_reason: "stop" }] }]) };
  await open({ answers });
  await page.click("#tune");
  await page.click("#top_k", { count: 3 });
  await page.type("#top_k", "5");
  await page.keyboard.press("Tab");
  await page.type("#max_tokens", "4096");
  await page.keyboard.press("Tab");
  assert.equal(await value("#max_tokens"), "256", "no more than the context");
  await page.click("#max_tokens", { count: 3 });
  await page.keyboard.press("Backspace");
  await page.keyboard.press("Tab");
  props.defaults.temperature = 0.6;
  answers["/props"].body = JSON.stringify(props);
  await page.reload();
  await page.waitForFunction(() => document.querySelector("#model").textContent);
  await say("Ciao.");
  await page.waitForSelector(".again");
  const { temperature, top_k, top_p, repeat_penalty } = page.sent.at(-1);
  assert.deepEqual({ temperature, top_k, top_p, repeat_penalty }, { temperature: 0.6, top_k: 5, top_p: 0.95, repeat_penalty: 1.1 });
});

await step("a server that still loads its model is asked again", async () => {
  let calls = 0;
  const loading = failing(503, { message: "loading", code: "loading" }, { "Retry-After": "1" });
  await open({ answers: { "/v1/models": loading, "/props": () => (calls++ ? { body: JSON.stringify({ model: "pronto", context_length: 256 }) } : loading) } });
  assert.match(await text("#notice"), /sta caricando/);
  await page.waitForFunction(() => document.querySelector("#model").textContent.startsWith("pronto") && document.querySelector("#notice").hidden);
});

await step("Shift+Enter breaks the line; the box grows", async () => {
  await open();
  const height = await page.$eval("#input", (e) => e.offsetHeight);
  await page.type("#input", "una");
  await page.keyboard.down("Shift"); await page.keyboard.press("Enter"); await page.keyboard.up("Shift");
  await page.type("#input", "due");
  assert.equal(await value("#input"), "una\ndue");
  assert.ok(await page.$eval("#input", (e) => e.offsetHeight) > height);
});

await step("the language follows the browser, and the switch", async () => {
  assert.equal(await page.$eval("html", (e) => e.lang), "it");
  // What comes all at once has no rate; a server beside other work may send even a long answer so.
  for (let attempt = 1; ; attempt++) {
    await watched(60);
    await page.keyboard.press("Escape");
    await idle();
    if (!given || attempt === 6 || (await text(".model .facts")).includes("token/s")) break;
    await page.click("#fresh");
  }
  await page.click("#lang");
  assert.equal(await page.$eval("html", (e) => e.lang), "en");
  assert.equal(await text("#send"), "Send");
  assert.equal(await text("#fresh"), "New chat");
  assert.match(await text(".model .facts"), /\d+ tokens.*[\d.]+ tokens\/s.*seed \d+.*stopped/);
  await page.reload();
  assert.equal(await text("#send"), "Send");
  await open({ language: "de-DE" });
  assert.equal(await text("#send"), "Send");
  const [it, en] = await page.evaluate(async () => {
    // Every phrase exists in both: the switch leaves no "undefined" and no phrase of the other language behind.
    const read = () => [...document.querySelectorAll("[data-t],[data-label],[data-hint]")].map((e) => e.dataset.label ? e.getAttribute("aria-label") : e.textContent || e.placeholder);
    const english = read(); document.querySelector("#lang").click(); return [read(), english];
  });
  assert.ok([...it, ...en].every((w) => w && w !== "undefined"));
  assert.deepEqual(it.filter((w, i) => w === en[i]), []);
});

await step("dark and light follow the system, and the toggle", async () => {
  const paper = () => page.$eval("body", (e) => getComputedStyle(e).backgroundColor);
  await open({ scheme: "dark" });
  const dark = await paper();
  assert.equal(await page.$eval("#theme", (e) => e.getAttribute("aria-pressed")), "true");
  await page.click("#theme");
  const light = await paper();
  assert.notEqual(light, dark);
  await page.reload();
  assert.equal(await paper(), light, "the choice is kept");
  await page.click("#theme");
  assert.equal(await paper(), dark);
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "light" }]);
  assert.equal(await paper(), light, "a choice that agreed with the system follows it again");
});

await step("no motion where none is wanted", async () => {
  await page.emulateMediaFeatures([{ name: "prefers-reduced-motion", value: "reduce" }]);
  await watched(3);
  const moving = await page.evaluate(() => document.getAnimations().length);
  assert.equal(moving, 0);
  await page.emulateMediaFeatures([{ name: "prefers-reduced-motion", value: "no-preference" }]);
  if (await busy()) assert.ok(await page.evaluate(() => document.getAnimations().length) > 0, "the caret blinks otherwise");
  await page.keyboard.press("Escape");
  await idle();
});

// As if the page had just been entered: where a focused element was only blurred, Tab would go on from there.
const fromTop = () => page.evaluate(() => { document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute("tabindex"); scrollTo(0, 0); });

// Everything that can be reached, in the document's order; then what Tab reaches, and whether it shows.
async function walk() {
  const expected = await page.evaluate(() => {
    const all = [...document.querySelectorAll("a[href],button,input,textarea,pre[tabindex]")];
    window.stops = all.filter((e) => !e.closest("[hidden],[inert]") && getComputedStyle(e).display !== "none");
    return stops.map((e) => e.id || e.textContent);
  });
  const reached = [];
  await fromTop();
  for (let i = 0; i < expected.length; i++) {
    await page.keyboard.press("Tab");
    reached.push(await page.evaluate(() => {
      const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
      const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 || e.id === "input" && getComputedStyle(e.parentNode).boxShadow !== "none";
      const on = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
      const seen = on && (e.contains(on) || on.contains(e));
      return `${e.id || e.textContent}${ring ? "" : " (focus does not show)"}${seen ? "" : " (covered)"}`;
    }));
  }
  assert.deepEqual(reached, expected);
  return expected.length;
}

await step("Tab reaches everything in order, and focus shows", async () => {
  await open();
  const blank = await walk();
  await watched(5);
  await page.keyboard.press("Escape");
  await idle();
  await page.click("#tune");
  const full = await walk();
  assert.ok(blank >= 8 && full >= 16, `${blank} and ${full} stops`);
  await open({ width: 390, height: 700 });
  await page.click("#tune");
  assert.equal(await walk(), 10, "the panel of a narrow window covers all else: eight fields, Close, Defaults");
});

await step("without a mouse: skip link, an idea, send, stop, settings", async () => {
  await open();
  const to = async (id) => {
    for (let i = 0; i < 40; i++) { if (await page.evaluate((want) => document.activeElement.id === want, id)) return; await page.keyboard.press("Tab"); }
    assert.fail(`Tab never reached #${id}`);
  };
  await fromTop();
  await page.keyboard.press("Tab");
  assert.ok(await page.$eval("#skip", (e) => e.getBoundingClientRect().width > 40), "the skip link shows when it has focus");
  await page.keyboard.press("Enter");
  assert.equal(await page.evaluate(() => document.activeElement.id), "input");
  await page.keyboard.down("Shift"); await page.keyboard.press("Tab"); await page.keyboard.up("Shift");
  await page.keyboard.press("Enter");
  assert.match(await value("#input"), /sky/, "an idea is put into the box");
  await to("send");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll(".turn").length === 2);
  if (await busy()) { await to("send"); await page.keyboard.press("Enter"); }
  await idle();
  await fromTop();
  await to("tune");
  await page.keyboard.press("Enter");
  assert.equal(await page.$eval("#tune", (e) => e.getAttribute("aria-expanded")), "true");
});

const EVIL = `<img src=x onerror="window.hit=1"><script>window.hit=1</` + `script> [a](javascript:hit=1) **<b onclick=hit()>x</b>** \`<i>\`\n\n\`\`\`\n</code><svg onload=hit()>\n\`\`\`\n# <u>t</u>\n- <a href="//evil.example/">l</a>`;

await step("a hostile answer stays text", async () => {
  await open({ answers: { "/v1/chat/completions": streaming([...EVIL.match(/[^]{1,7}/g), { choices: [{ delta: {}, finish_reason: "stop" }] }]) } });
  const tags = await page.evaluate(() => document.querySelectorAll("img,script,svg,a,iframe").length);
  await say("<img src=y onerror=window.hit=2>");
  await page.waitForSelector(".again");
  assert.equal(await page.evaluate(() => window.hit), undefined);
  assert.equal(await page.evaluate(() => document.querySelectorAll("img,script,svg,a,iframe").length), tags);
  const shown = await answer();
  for (const part of ["<img src=x onerror=\"window.hit=1\">", "<script>", "<b onclick=hit()>x</b>", "</code><svg onload=hit()>", "<u>t</u>", "<a href=\"//evil.example/\">"]) {
    assert.ok(shown.includes(part), `${part} is shown as it came`);
  }
  assert.deepEqual(await page.$$eval(".model .text *", (all) => [...new Set(all.map((e) => e.localName))].sort()), ["code", "h3", "p", "pre", "span", "strong"]);
  assert.equal(await text(".you .text"), "<img src=y onerror=window.hit=2>");
  await page.reload();
  await page.waitForSelector(".model");
  assert.equal(await page.evaluate(() => window.hit), undefined);
});

await step("slow tokens are marked and counted while the router is on, and only then", async () => {
  const chunk = (content, path, iterations) => ({ choices: [{ delta: { content } }], elleci: { path, iterations } });
  const answers = (router) => ({
    "/props": { body: JSON.stringify({ model: "m", parameters: 1494416256, context_length: 1024, vocab_size: 32128, router, version: "1" }) },
    "/v1/chat/completions": streaming([chunk("Fa", "fast", 0), chunk(" dodici", "slow", 4), chunk(", ", "slow", 2), chunk("ecco.", "fast", 0), { choices: [{ delta: {}, finish_reason: "stop" }] }]),
  });
  await open({ answers: answers(true) });
  await say("Quanto?");
  await page.waitForSelector(".again");
  assert.deepEqual(await page.$$eval(".text .slow", (all) => all.map((e) => e.textContent)), ["dodici, "]);
  assert.match(await text(".model .facts"), /4 token.*50 % lenti.*1,5 iter/);
  await open({ answers: answers(false) });
  await say("Quanto?");
  await page.waitForSelector(".again");
  assert.equal(await count(".slow"), 0);
  assert.doesNotMatch(await text("main"), /lenti|iter\./);
});

// What the server says instead of an answer; the words must still be in the box.
async function refused(said, shown, on = {}) {
  await open({ answers: { "/v1/chat/completions": said } });
  await say("parole che non vanno perse");
  await page.waitForFunction(() => !document.querySelector("#notice").hidden);
  await idle();
  assert.match(await text("#notice"), shown);
  assert.equal(await page.$eval("#notice", (e) => e.getAttribute("role")), on.role ?? "alert");
  assert.equal(await value("#input"), "parole che non vanno perse");
  assert.equal(await count(".turn"), 0);
}

await step("an overlong prompt is told with its counts", async () => {
  await refused(failing(400, { message: "too long", code: "context_length_exceeded", n_prompt_tokens: 1311, n_ctx: 1024 }), /1311 token, e il modello ne legge 1024.*Nuova chat/);
  await refused(failing(400, { message: "no room", code: "context_length_exceeded", param: "max_tokens", n_prompt_tokens: 10, n_ctx: 600 }), /10 token su 600.*Token massimi/);
  await refused(failing(400, { message: "1311 tokens, of 1024", code: "context_length_exceeded" }), /troppo lunghi.*1311 tokens, of 1024/);
  await open();
  await page.$eval("#input", (e) => { e.value = "parola ".repeat(20000); e.dispatchEvent(new Event("input")); });
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => !document.querySelector("#notice").hidden, { timeout: 60000 });
  assert.match(await text("#notice"), given ? /troppo lunghi/ : /troppo lunghi.*\d+ token, e il modello ne legge 1024/);
  assert.ok((await value("#input")).length > 100000);
});

await step("other refusals, a busy server, a lost one, in plain words", async () => {
  await refused(failing(400, { message: "`temperature` is -1" }), /non accetta la richiesta: `temperature` is -1/);
  await refused(failing(429, { message: "busy" }), /occupato. Riprova tra poco/);
  await refused(failing(503, { message: "busy" }, { "Retry-After": "7" }), /occupato. Riprova tra 7 s/);
  await refused(failing(500, { message: "disk" }), /Errore del server: disk/);
  await refused({ status: 502, contentType: "text/html", body: "<h1>Bad gateway</h1>" }, /Errore del server: <h1>Bad gateway/);
  await refused("lost", /non risponde/);
  await refused(streaming([]), /senza scrivere nulla/);
  await page.keyboard.press("Escape");
  assert.equal(await page.$eval("#notice", (e) => e.hidden), true);
});

await step("a connection lost in the middle leaves what has arrived", async () => {
  await open({ answers: { "/v1/chat/completions": streaming(["Una mezza", " frase"], "") } });
  await say("Dimmi.");
  await page.waitForSelector(".again");
  assert.equal(await answer(), "Una mezza frase");
  assert.match(await text("#notice"), /caduta a metà/);
  assert.match(await text(".model .facts"), /interrotta/);
  await open({ answers: { "/v1/chat/completions": streaming(["Una", { error: { message: "out of memory", code: 500 } }]) } });
  await say("Dimmi.");
  await page.waitForSelector(".again");
  assert.equal(await answer(), "Una");
  assert.match(await text("#notice"), /Errore del server: out of memory/);
});

await step("an answer can be copied, and a failed Regenerate leaves it", async () => {
  let calls = 0;
  await open({ answers: { "/v1/chat/completions": () => (calls++ ? failing(429, { message: "busy" }) : streaming([..."Vecchia", { choices: [{ delta: {}, finish_reason: "stop" }] }])) } });
  await say("Dimmi.");
  await page.waitForSelector(".again");
  assert.match(await text(".model .facts"), /^7 token(?!.*token\/s)/, "no speed of what came all at once");
  // A headless window has no focus, and without it the browser refuses its clipboard.
  assert.deepEqual(await page.evaluate(async () => {
    let copied;
    navigator.clipboard.writeText = async (what) => { copied = what; };
    document.querySelector(".copy").click();
    await new Promise((done) => setTimeout(done));
    return [copied, document.querySelector(".copy").textContent];
  }), ["Vecchia", "Copiato"]);
  await page.click(".again");
  await page.waitForFunction(() => !document.querySelector("#notice").hidden);
  await idle();
  assert.equal(await answer(), "Vecchia");
  assert.equal(await value("#input"), "");
});

await step("a key is asked for on 401 alone, kept for the session, and sent", async () => {
  const wants = (next) => (request) => (request.headers().authorization === "Bearer giusta" ? next : failing(401, { message: "key", code: "invalid_api_key" }));
  const props = { body: JSON.stringify({ model: "m", parameters: 1e6, context_length: 256, router: false }) };
  assert.equal(await count("#key"), 0);
  await open({ answers: { "/v1/models": wants({ body: JSON.stringify({ data: [{ id: "m" }] }) }), "/props": wants(props),
    "/v1/chat/completions": wants(streaming(["Eccomi.", { choices: [{ delta: {}, finish_reason: "stop" }] }])) } });
  assert.match(await text("#notice"), /chiede una chiave/);
  await page.type("#input", "Ci sei?");
  await page.type("#key", "sbagliata");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => /non accetta questa chiave/.test(document.querySelector("#notice").textContent));
  await idle();
  assert.equal(await value("#input"), "Ci sei?");
  await page.type("#key", "giusta");
  await page.keyboard.press("Enter");
  await page.waitForSelector(".again");
  assert.equal(await answer(), "Eccomi.", "the message that waited for the key went out");
  assert.equal(await page.$eval("#notice", (e) => e.hidden), true);
  assert.deepEqual(await page.evaluate(() => [sessionStorage["elleci.key"], JSON.stringify(localStorage).includes("giusta")]), ["\"giusta\"", false]);
  await page.reload();
  await page.waitForFunction(() => document.querySelector("#model").textContent.startsWith("m"));
  assert.equal(await page.$eval("#notice", (e) => e.hidden), true);
});

await step("a browser without storage still chats", async () => {
  await open();
  await page.evaluateOnNewDocument(() => {
    for (const area of ["localStorage", "sessionStorage"]) Object.defineProperty(window, area, { get() { throw new DOMException("no", "SecurityError"); } });
  });
  await page.reload();
  // Neither `watched`, as another chat would put another notice there, nor Esc, which takes the notice away after a short answer.
  await say(QUESTION);
  await grown(0);
  await idle();
  assert.equal(await count(".turn"), 2);
  assert.match(await text("#notice"), /non conserva/);
});

await step("nothing is wider than a narrow window", async () => {
  await open({ width: 320, height: 600, answers: { "/v1/chat/completions": streaming(["x".repeat(300), `\n\n\`\`\`\n${"y".repeat(300)}\n\`\`\`\n`, { choices: [{ delta: {}, finish_reason: "stop" }] }]) } });
  await say("z".repeat(200));
  await page.waitForSelector(".again");
  const [wide, window] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  assert.equal(wide, window);
});

// axe compiles its rules at run time, which the page's own policy forbids: this tab alone goes without it.
await step("axe finds nothing, in either theme, at either width, in every state", async () => {
  let checked = 0;
  const look = async (what) => {
    await page.evaluate(axe);
    const { violations, passes } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
    assert.deepEqual(violations.map((v) => `${what}: ${v.impact} ${v.id}: ${v.nodes.map((n) => n.html.slice(0, 120)).join(" | ")}`), []);
    assert.ok(passes.length > 15, `${what}: ${passes.length} rules passed`);
    checked++;
  };
  for (const scheme of ["light", "dark"]) {
    for (const width of [1180, 390]) {
      const what = `${scheme} ${width}`, codes = [];
      const stream = streaming(["Ecco **due** `righe`:\n\n```\nfn main() {}\n```\n\n# Titolo\n- voce", { choices: [{ delta: {}, finish_reason: "length" }] }]);
      await open({ scheme, width, bypass: true, answers: { "/v1/chat/completions": () => codes.pop() ?? stream } });
      await look(`${what} blank`);
      await say("Scrivi.");
      await page.waitForSelector(".again");
      await look(`${what} answer`);
      await page.click("#tune");
      await look(`${what} panel`);
      await page.keyboard.press("Escape");
      codes.push(failing(401, { message: "key" }));
      await say("Ancora.");
      await page.waitForSelector("#key");
      await look(`${what} key`);
      codes.push(failing(400, { message: "long", n_prompt_tokens: 9, n_ctx: 8 }));
      await page.focus("#input");
      await page.keyboard.press("Enter");
      await page.waitForSelector("#notice.bad");
      await idle();
      await look(`${what} refusal`);
    }
  }
  assert.equal(checked, 20);
});

assert.ok(steps > 0, `no step is named ${only}`);
if (shots && !only) {
  mkdirSync(shots, { recursive: true });
  console.log((await shoot(browser, given ?? url, shots)).join("\n"));
}
await browser.close();
mock?.close();
console.log(`the page passed ${steps} steps against ${given ?? "the stand-in server"}`);
