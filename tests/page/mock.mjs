// A stand-in for `elleci-run serve`, for working on its page without a model: node tests/page/mock.mjs [PORT] [--router] [--key K].
// It sends the page under the policy that the server sends it under, and answers in tokens with pauses between them.

import { createHash } from "node:crypto";
import { readFileSync, realpathSync } from "node:fs";
import { createServer } from "node:http";
import { setTimeout as pause } from "node:timers/promises";
import { fileURLToPath } from "node:url";

const PAGE = fileURLToPath(new URL("../../elleci-tools/src/serve/page/index.html", import.meta.url));

// The server's policy: the page's script by its hash.
function policy(html) {
  const hash = createHash("sha256").update(/<script[^>]*>([^]*)<\/script>/.exec(html)[1]).digest("base64");
  return `default-src 'none'; script-src 'sha256-${hash}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'`;
}

const CONTEXT = 1024;
const ANSWERS = [
  [/mela|mele|apple/i, `Anna parte da 17 mele e ne regala 5, quindi:

1. mele all’inizio: 17
2. mele regalate: 5
3. mele rimaste: 17 − 5 = **12**

Ad Anna restano **12 mele**.`],
  [/mattino|winter|inverno/i, `La neve della notte ha chiuso i sentieri, e nel paese si sente soltanto l’acqua della fontana sotto il ghiaccio. Dai comignoli il fumo sale dritto, mentre la luce scende piano dalla cresta e arriva prima sul campanile, poi sui tetti. Quando il fornaio apre la porta, l’odore del pane è la prima cosa calda della giornata.`],
  [/codice|code|rust/i, `Una funzione che conta le vocali:

\`\`\`rust
fn vocali(testo: &str) -> usize {
    testo.chars().filter(|c| "aeiouàèéìòù".contains(*c)).count()
}
\`\`\`

Con \`vocali("perché")\` il risultato è 2.`],
];
const LONG = "Questa frase è una prova, e ne segue sempre un’altra che dice la stessa cosa con parole diverse. ".repeat(12).trim();

// Pieces of about a token: a word's head, its tail, marks on their own.
const pieces = (text) => text.match(/\s*[\p{L}\p{N}]{1,5}|\s*[^\s\p{L}\p{N}]|\s+$/gu) ?? [];

// Starts the server; resolves to {url, requests, cut, options, close}. `cut` counts streams that the other side ended.
export function start({ port = 0, router = false, key = null, delay = 25 } = {}) {
  const mock = { requests: [], cut: 0, options: { router, key, delay } };
  const json = (response, status, body, headers = {}) => {
    response.writeHead(status, { "Content-Type": "application/json", ...headers });
    response.end(JSON.stringify(body));
  };

  async function chat(request, response) {
    let raw = "";
    for await (const part of request) raw += part;
    const body = JSON.parse(raw);
    mock.requests.push(body);
    const last = body.messages.at(-1).content;
    const prompt = body.messages.reduce((sum, m) => sum + 6 + pieces(m.content).length, 0);
    if (prompt >= CONTEXT) {
      return json(response, 400, { error: { message: `the prompt has ${prompt} tokens, the context ${CONTEXT}`, type: "invalid_request_error",
        code: "context_length_exceeded", n_prompt_tokens: prompt, n_ctx: CONTEXT } });
    }
    const all = pieces((ANSWERS.find(([asked]) => asked.test(last)) ?? [null, LONG])[1]);
    const tokens = all.slice(0, body.max_tokens ?? Infinity);
    response.writeHead(200, { "Content-Type": "text/event-stream", "Cache-Control": "no-store" });
    let gone = false;
    response.on("close", () => { if (!response.writableEnded) { gone = true; mock.cut++; } });
    const base = { id: "chatcmpl-1", object: "chat.completion.chunk", created: 0, model: "nano" };
    const chunk = (delta, more = {}, finish = null) =>
      response.write(`data: ${JSON.stringify({ ...base, choices: [{ index: 0, delta, finish_reason: finish }], ...more })}\n\n`);
    chunk({ role: "assistant", content: "" });
    for (const token of tokens) {
      await pause(mock.options.delay);
      if (gone) return undefined;
      const slow = /[\d−=]|ghiacc|cresta|comign|vocal|count/.test(token);
      chunk({ content: token }, mock.options.router ? { elleci: { path: slow ? "slow" : "fast", iterations: slow ? 3 : 0 } } : {});
    }
    chunk({}, {}, tokens.length < all.length ? "length" : "stop");
    if (body.stream_options?.include_usage) {
      const usage = { prompt_tokens: prompt, completion_tokens: tokens.length, total_tokens: prompt + tokens.length };
      response.write(`data: ${JSON.stringify({ ...base, choices: [], usage })}\n\n`);
    }
    return response.end("data: [DONE]\n\n");
  }

  const server = createServer(async (request, response) => {
    const path = new URL(request.url, "http://mock").pathname;
    if (path === "/") {
      const html = readFileSync(PAGE, "utf8");
      response.writeHead(200, { "Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": policy(html) });
      return response.end(html);
    }
    if (mock.options.key && request.headers.authorization !== `Bearer ${mock.options.key}`) {
      return json(response, 401, { error: { message: "missing or wrong API key", type: "authentication_error", code: "invalid_api_key" } });
    }
    switch (`${request.method} ${path}`) {
      case "GET /v1/models": return json(response, 200, { object: "list", data: [{ id: "nano", object: "model", created: 0, owned_by: "elleci" }] });
      case "GET /props": return json(response, 200, { model: "nano", parameters: 5937672, context_length: CONTEXT, vocab_size: 4096,
        router: mock.options.router, version: "0.1.0" });
      case "POST /v1/chat/completions": return chat(request, response);
      default: return json(response, 404, { error: { message: `no ${path} here`, type: "invalid_request_error", code: null } });
    }
  });
  return new Promise((resolve) => server.listen(port, "127.0.0.1", () => resolve(Object.assign(mock, {
    url: `http://127.0.0.1:${server.address().port}/`,
    close: () => { server.closeAllConnections(); server.close(); },
  }))));
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const args = process.argv.slice(2), key = args.indexOf("--key");
  const mock = await start({ port: Number(args.find((a) => /^\d+$/.test(a)) ?? 8080), router: args.includes("--router"), key: key < 0 ? null : args[key + 1] });
  console.log(mock.url);
}
