// The official JavaScript client (npm `openai`) against a running server: node client.mjs URL
// It is found beside OPENAI_FROM, the folder where npm has installed it.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.env.OPENAI_FROM ?? process.cwd(), "x.js"));
const { default: OpenAI } = await import(pathToFileURL(require.resolve("openai")).href);

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "any", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;

const ask = { model, messages: [{ role: "user", content: "Ciao!" }], max_completion_tokens: 24, seed: 7, temperature: 1 };
const chat = await client.chat.completions.create(ask);
assert.equal(chat.choices[0].message.role, "assistant");
assert.equal(chat.usage.total_tokens, chat.usage.prompt_tokens + chat.usage.completion_tokens);

let text = "";
for await (const chunk of await client.chat.completions.create({ ...ask, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, chat.choices[0].message.content);

const helper = client.chat.completions.stream(ask);
assert.equal(await helper.finalContent(), text);

const completion = await client.completions.create({ model, prompt: "C'era una volta", max_tokens: 8, seed: 1, echo: true, logprobs: 1 });
assert.ok(completion.choices[0].text.startsWith("C'era una volta"));
assert.equal(completion.choices[0].logprobs.token_logprobs[0], null);

const { data } = await client.embeddings.create({ model, input: ["uno", "due"] });
for (const { embedding } of data) assert.ok(Math.abs(Math.hypot(...embedding) - 1) < 1e-5);

await assert.rejects(client.completions.create({ model, prompt: "parola ".repeat(200000) }), (e) => e instanceof OpenAI.BadRequestError && e.code === "context_length_exceeded");
await assert.rejects(client.chat.completions.create({ ...ask, top_p: 7 }), (e) => e instanceof OpenAI.BadRequestError && e.param === "top_p");

// A client that leaves in the middle of a stream.
const stream = await client.completions.create({ model, prompt: "Il", max_tokens: 500, stream: true });
for await (const _ of stream) break;
console.log("client.mjs: ok");
