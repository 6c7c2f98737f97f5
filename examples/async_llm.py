"""Many prompts at once, streamed, in an asyncio program; the engine is a process of its own."""

import asyncio

import vattn

PROMPTS = ["The engine", "A page of memory", "The server", "Every request"]


async def stream(llm: vattn.AsyncLLM, number: int, prompt: str) -> None:
    params = vattn.SamplingParams(
        temperature=0, max_tokens=16, output_kind=vattn.RequestOutputKind.DELTA
    )
    async for output in llm.generate(prompt, params, f"request-{number}"):
        print(f"{number}: {output.outputs[0].text!r}")
        if output.finished:
            print(f"{number}: ended by {output.outputs[0].finish_reason}")


async def first_piece(llm: vattn.AsyncLLM) -> str:
    """Who leaves the loop early has the request aborted, and its pages are free again."""
    params = vattn.SamplingParams(temperature=0, max_tokens=200)
    async for output in llm.generate("A long story", params, "left-early"):
        return output.outputs[0].text
    return ""


async def main() -> None:
    # The embedded model; give a directory or an id of the Hugging Face Hub for one of your own.
    async with vattn.AsyncLLM(max_num_seqs=8, max_model_len=256) as llm:
        await asyncio.gather(*(stream(llm, n, prompt) for n, prompt in enumerate(PROMPTS)))
        print("the first piece:", await first_piece(llm))
        await llm.check()  # no page has leaked


if __name__ == "__main__":
    asyncio.run(main())
