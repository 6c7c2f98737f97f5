"""Programs of `bench.serving` that have an engine.

    python -m bench.server_children offline MODEL OPTIONS    # vattn.LLM in this process
    python -m bench.server_children server MODEL OPTIONS     # the server, as `vattn serve` runs it

Options are JSON, of EngineConfig. Each says ``{"ready": ...}`` first and ends with stdin.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from bench.common import Json

if TYPE_CHECKING:
    from vattn import LLM


def talk() -> tuple[Iterator[Json], IO[str]]:
    """Questions, and where answers go; what else is printed goes to stderr."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return (json.loads(line) for line in sys.stdin), out


def tell(out: IO[str], answer: Json) -> None:
    out.write(json.dumps(answer) + "\n")


def offline(model: str, options: dict[str, Any]) -> None:
    """All prompts of a round in one call of generate."""
    from vattn import LLM, SamplingParams

    questions, out = talk()
    llm = LLM(model, **options)
    tell(out, {"ready": True})
    for question in questions:
        if "other" in question:
            tell(out, {"gap": gap(llm, question)})
            continue
        params = SamplingParams(temperature=0, max_tokens=question["new_tokens"], ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in question["prompts"]], params, use_tqdm=False
        )
        seconds = time.perf_counter() - start
        times = [output.metrics for output in outputs]
        pieces = question["new_tokens"] - 1
        tell(
            out,
            {
                "seconds": seconds,
                "texts": [output.outputs[0].text for output in outputs],
                "first_token_s": [t.first_token_s - t.arrival_s for t in times],
                "gaps_s": [(t.last_token_s - t.first_token_s) / max(1, pieces) for t in times],
            },
        )
    llm.close()


def gap(llm: LLM, question: Json) -> float | None:
    """How much likelier the best token is than the second where another text departs from ours.

    A difference of log probabilities, which is one of logits; None if nothing departs here.
    """
    from vattn import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=question["new_tokens"], ignore_eos=True, logprobs=2
    )
    prompt = {"prompt_token_ids": question["prompt"], "cache_salt": "gap"}
    found = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
    assert found.logprobs is not None
    for i, entry in enumerate(found.logprobs):
        # A character that is not complete yet may still become the other's.
        text = llm.tokenizer.decode(found.token_ids[: i + 1]).rstrip("\ufffd")
        if not question["other"].startswith(text):
            best, second = sorted((each.logprob for each in entry.values()), reverse=True)[:2]
            return best - second
    return None


def server(model: str, options: dict[str, Any]) -> None:
    """Serves until stdin ends."""
    from vattn.async_llm import AsyncLLM
    from vattn.server.run import serve
    from vattn.server.settings import ServerSettings

    questions, out = talk()

    def end_with_stdin() -> None:
        for _ in questions:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    def told(url: str, llm: AsyncLLM) -> None:
        tell(out, {"ready": url, "engine_pid": llm.engine_pid})
        threading.Thread(target=end_with_stdin, daemon=True).start()

    settings = ServerSettings(port=0, served_model_names=("model",), log_level="warning")
    raise SystemExit(serve(lambda: AsyncLLM(model, log_level="warning", **options), settings, told))


if __name__ == "__main__":
    kind, model, options = sys.argv[1:]
    {"offline": offline, "server": server}[kind](model, json.loads(options))
