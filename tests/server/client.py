#!/usr/bin/env python3
"""The official Python client (PyPI `openai`) against `elleci-run serve`: client.py MODEL"""

import math
import sys

import openai
from common import Server


def check(condition, what):
    if not condition:
        sys.exit(f"client.py: FAILED: {what}")


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    sys.exit(f"client.py: FAILED: {kind.__name__} was expected")


def main():
    model = sys.argv[1]
    with Server(model, "--api-key", "secret", "--context", "512") as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0)
        name = client.models.list().data[0].id

        messages = [{"role": "system", "content": "Sii breve."}, {"role": "user", "content": "Ciao!"}]
        ask = dict(model=name, messages=messages, max_completion_tokens=24, seed=7, temperature=1)
        chat = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
        choice = chat.choices[0]
        check(choice.message.role == "assistant" and choice.finish_reason in ("stop", "length"), choice)
        check(chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens, chat.usage)
        check(len(choice.logprobs.content[0].top_logprobs) == 2, choice.logprobs)
        check(bytes(b for t in choice.logprobs.content for b in t.bytes).decode(errors="replace") == choice.message.content,
              "the tokens are not the text")

        text, usage = "", None
        for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            usage = chunk.usage or usage
        check(text == choice.message.content, "the stream is not the answer")
        check(usage.model_dump(exclude={"prompt_tokens_details"}) == chat.usage.model_dump(exclude={"prompt_tokens_details"}), usage)

        whole = client.completions.create(model=name, prompt=["C'era una volta", "Il"], max_tokens=16, seed=1, n=2, echo=True, logprobs=1)
        check([c.index for c in whole.choices] == [0, 1, 2, 3], whole)
        check(whole.choices[0].text.startswith("C'era una volta"), whole.choices[0])
        check(whole.choices[0].logprobs.token_logprobs[0] is None, whole.choices[0].logprobs)
        parts = ["", "", "", ""]
        for chunk in client.completions.create(model=name, prompt=["C'era una volta", "Il"], max_tokens=16, seed=1, n=2, echo=True, stream=True):
            parts[chunk.choices[0].index] += chunk.choices[0].text
        check(parts == [c.text for c in whole.choices], "the streams are not the answers")

        # The client asks for base64 by itself and decodes it.
        vectors = [e.embedding for e in client.embeddings.create(model=name, input=["uno", "due"]).data]
        check(all(abs(math.hypot(*v) - 1) < 1e-5 for v in vectors), "an embedding is not of length 1")
        plain = client.embeddings.create(model=name, input="uno", encoding_format="float").data[0].embedding
        check(all(abs(a - b) < 1e-6 for a, b in zip(plain, vectors[0])), "the formats differ")

        long = refused(openai.BadRequestError, lambda: client.completions.create(model=name, prompt="parola " * 2000))
        check(long.code == "context_length_exceeded" and long.param == "prompt", long)
        wrong = refused(openai.BadRequestError, lambda: client.chat.completions.create(**{**ask, "temperature": -1}))
        check(wrong.param == "temperature", wrong)
        refused(openai.AuthenticationError, lambda: openai.OpenAI(base_url=server.url + "/v1", api_key="x").models.list())
        refused(openai.NotFoundError, lambda: client.files.list())

        # A client that leaves in the middle of a stream.
        stream = client.completions.create(model=name, prompt="Il", max_tokens=500, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        stream.close()
    print(f"client.py: ok (openai {openai.__version__})")


if __name__ == "__main__":
    main()
