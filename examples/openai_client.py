"""The `openai` package against `vattn serve`: text, a stream, structured output, many at once.

Run: vattn serve, and in another terminal: python examples/openai_client.py [URL [KEY]]
"""

import asyncio
import json
import sys

from openai import AsyncOpenAI, OpenAI

PROMPT = "A transaction is a group of statements"
SCHEMA = {
    "type": "object",
    "properties": {"table": {"type": "string", "maxLength": 12}, "rows": {"type": "integer"}},
    "required": ["table", "rows"],
    "additionalProperties": False,
}


def one_after_another(url: str, key: str) -> None:
    with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        model = client.models.list().data[0].id
        made = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, n=2, seed=1)
        for choice in made.choices:
            print(f"{choice.index}: ...{choice.text!r} ({choice.finish_reason})")

        stream = client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 20, "cache_salt": "tenant-1"},  # vLLM's fields
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].text, end="", flush=True)
            elif chunk.usage is not None:
                print(f"\n{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens")

        made = client.completions.create(
            model=model,
            prompt="The table: ",
            max_tokens=48,
            temperature=0,
            extra_body={
                "structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True},
            },
        )
        text = made.choices[0].text
        print(json.loads(text) if made.choices[0].finish_reason == "stop" else f"cut off: {text}")


async def many_at_once(url: str, key: str) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
        model = (await client.models.list()).data[0].id
        made = await asyncio.gather(
            *(
                client.completions.create(model=model, prompt=f"{PROMPT} {i}", max_tokens=16)
                for i in range(8)
            )
        )
        print(f"{sum(each.usage.completion_tokens for each in made if each.usage)} tokens of 8")


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    key = sys.argv[2] if len(sys.argv) > 2 else "none"
    one_after_another(url.rstrip("/"), key)
    asyncio.run(many_at_once(url.rstrip("/"), key))


if __name__ == "__main__":
    main()
