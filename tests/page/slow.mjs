// A server in front of a server, which hands on the events of a stream one by one: a small model writes faster than anyone can watch, and a
// browser's own throttling hands a short answer over whole.

import { createServer, request } from "node:http";

// Resolves to the URL of a copy of the server at `url` whose events are `delay` ms apart.
export async function slow(url, delay) {
  const { hostname, port } = new URL(url);
  const server = createServer((asked, reply) => {
    const onward = request({ hostname, port, path: asked.url, method: asked.method, headers: asked.headers }, async (answer) => {
      reply.writeHead(answer.statusCode, answer.headers);
      if (!/^text\/event-stream/.test(answer.headers["content-type"] ?? "")) return answer.pipe(reply);
      let rest = "";
      try {
        for await (const piece of answer.setEncoding("utf8")) {
          const events = (rest + piece).split(/(?<=\n\n)/);
          rest = events.at(-1).endsWith("\n\n") ? "" : events.pop();
          for (const event of events) {
            reply.write(event);
            await new Promise((next) => setTimeout(next, delay));
          }
        }
        reply.end(rest);
      } catch {
        // The server broke off in the middle, and so does this one.
        reply.destroy();
      }
    });
    onward.on("error", () => reply.destroy());
    // The server is to see that nobody listens any more.
    reply.on("close", () => onward.destroy());
    asked.pipe(onward);
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  server.unref();
  return `http://127.0.0.1:${server.address().port}/`;
}
