#!/usr/bin/env python3
"""Load and speed of `elleci-run serve`, standard library only: load.py MODEL [--threads N]

1. Rounds of 64 streams at once: none lost, none starved, memory flat. With glibc's many arenas, which give
   memory back at their ends only, resident memory moves by 5 MiB from round to round as tasks fall on threads; with one arena
   that gives nothing back it is the most that was in use at once, so that a leak of 2 KiB a stream is seen.
2. What the server costs at one stream, from the request to the end of the response, beside the time in the model.
3. Eight streams together against one.
Traffic stays on this machine.
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time

from common import Server, binary

STREAMS, TOKENS, ROUNDS = 64, 128, 26
# Rounds that memory takes to its plateau, those after them and at the end whose medians are compared, and the MiB that they may differ by
# (0.3 at most without a leak, in docs/LOG.md).
WARM, COMPARED, GROWTH = 11, 5, 0.75
ONE_ARENA = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
# No stream takes so many times as long as another in a quarter of the rounds (1.1 to 1.2 where all have their share), and in any so many as
# one that a quarter of them are faster than: in single rounds the first to come is half done before the server has read the last.
EVEN, STARVED = 1.5, 2.0
# Rounds with the arenas that a user's server has.
USUAL = 4
# Turns of the comparisons, and tokens of an answer in them.
TURNS, LONG = 10, 400


def request(body):
    """A streamed completion by a bare HTTP client that costs little itself."""
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def stream(reader, writer, body, began):
    """The times since `began` of the first piece and of the end of an answer to `body`, which has been sent."""
    first, tail = None, b""
    while part := await reader.read(1 << 16):
        if first is None and b"data: " in part:
            first = time.perf_counter() - began
        tail = (tail + part)[-2000:]
    writer.close()
    assert b"data: [DONE]" in tail, f"a stream broke off: {tail[-300:]!r}"
    tokens = int(tail.rsplit(b'"completion_tokens":', 1)[1].split(b",")[0])
    assert tokens == body["max_tokens"], f"{tokens} tokens"
    return first, time.perf_counter() - began


def crowd(server, count, tokens, prompt_words=40):
    """`count` streams at once; returns the times of each and of all."""
    port = int(server.url.rsplit(":", 1)[1])
    bodies = [
        {"prompt": f"{i} " + "parola " * (prompt_words + i % 7), "max_tokens": tokens, "seed": i, "ignore_eos": True}
        for i in range(count)
    ]

    async def run():
        # All connections first, and then all requests at once: whoever came first would be through before the others are sent.
        pairs = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in bodies))
        requests = [request(b) for b in bodies]
        began = time.perf_counter()
        for (_, writer), data in zip(pairs, requests):
            writer.write(data)
        times = await asyncio.gather(*(stream(*pair, b, began) for pair, b in zip(pairs, bodies)))
        return times, time.perf_counter() - began

    return asyncio.run(run())


def rush(server, name):
    """64 streams at once, told as `name`. Returns how many times as long the last took as the first, and as the fastest but a quarter,
    and the server's resident MiB afterwards."""
    times, took = crowd(server, STREAMS, TOKENS)
    firsts, ends = [t[0] for t in times], [t[1] for t in times]
    resident = server.metric("elleci_resident_memory_bytes") / 2**20
    print(f"{name}: {STREAMS} streams, {STREAMS * TOKENS / took:.0f} tokens/s | first piece {min(firsts):.2f} to {max(firsts):.2f} s"
          f" | end {min(ends):.2f} to {max(ends):.2f} s | {resident:.1f} MiB", flush=True)
    return max(ends) / min(ends), max(ends) / sorted(ends)[STREAMS // 4], resident


def whole(server, tokens):
    """Seconds of one answer that comes at once, on a connection of its own. By a bare client again: Python's own takes 0.3 ms a request."""
    body = json.dumps({"prompt": "Il", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    port, answer = int(server.url.rsplit(":", 1)[1]), b""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        while part := connection.recv(1 << 16):
            answer += part
    seconds = time.perf_counter() - began
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["usage"]["completion_tokens"] == tokens, answer[-300:]
    return seconds


def bench(model, threads, tokens):
    """Seconds a token of decoding, by elleci-run bench."""
    out = subprocess.run(
        [binary("elleci-run"), "bench", "-m", model, "-p", "0", "-n", str(tokens), "-r", "2", "-t", str(threads), "-o", "json"],
        check=True, capture_output=True, text=True).stdout
    return 1 / max(json.loads(out)[0]["samples_ts"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report-only", action="store_true", help="speed is told and not judged: on a busy machine")
    arguments = parser.parse_args()
    model, threads = arguments.model, arguments.threads
    # What a busy machine must not change, and what it does.
    faults, slow = [], []

    options = ("--cache", "16", "-t", str(threads))
    with Server(model, *options, environment=ONE_ARENA) as server:
        spread, late_by, resident = zip(*(rush(server, f"one arena, round {i + 1}") for i in range(ROUNDS)))
        # The first rounds fill the cache and the buffers.
        early, late = statistics.median(resident[WARM:WARM + COMPARED]), statistics.median(resident[-COMPARED:])
        print(f"resident: {early:.2f} MiB in rounds {WARM + 1} to {WARM + COMPARED}, {late:.2f} in the last {COMPARED}")
        if late > early + GROWTH:
            faults.append(f"memory grows: {resident}")
        if sorted(spread)[3 * ROUNDS // 4] > EVEN or max(late_by) > STARVED:
            faults.append(f"starved: the last stream takes {', '.join(f'{s:.2f}' for s in spread)} times as long as the first, and"
                          f" {max(late_by):.2f} times as long as a quarter of them")

    with Server(model, *options) as server:
        _, late_by, _ = zip(*(rush(server, f"round {i + 1}") for i in range(USUAL)))
        if max(late_by) > STARVED:
            faults.append(f"starved: the last stream takes {max(late_by):.2f} times as long as a quarter of them")
        server.settle()

        whole(server, 64)
        model_before, answered, decoded, one, eight = server.metric("elleci_model_seconds_total"), 0.0, [], [], []
        for _ in range(TURNS):
            answered += whole(server, LONG)
        # Within one run, so that what else the machine does meets both alike.
        in_model = server.metric("elleci_model_seconds_total") - model_before
        overhead = answered / in_model - 1
        # The best of each: what else the machine does can only make them slower.
        for _ in range(TURNS):
            decoded.append(bench(model, threads, LONG))
            one.append(TOKENS / crowd(server, 1, TOKENS)[1])
            eight.append(8 * TOKENS / crowd(server, 8, TOKENS)[1])
        gain = max(eight) / max(one)
        per_token = 1e6 / (TURNS * LONG)
        print(f"one answer: {answered * per_token:.0f} µs a token from request to response, {in_model * per_token:.0f} of them in the model:"
              f" overhead {100 * overhead:.1f} % (elleci-run bench: {min(decoded) * 1e6:.0f} to {max(decoded) * 1e6:.0f} µs)")
        print(f"8 streams: {max(eight):.0f} tokens/s, 1 stream: {max(one):.0f}: {gain:.2f} times (best of {TURNS})")
        if overhead > 0.05:
            slow.append(f"overhead {100 * overhead:.1f} %, asked are 5")
        if gain < 3:
            slow.append(f"8 streams are {gain:.2f} times one, asked are 3")
    for failure in faults + slow:
        print(f"load.py: {failure}")
    if faults or (slow and not arguments.report_only):
        sys.exit("load.py: FAILED")
    print("load.py: ok" if not slow else "load.py: ok but for speed, which is not judged")


if __name__ == "__main__":
    main()
