"""Policies of your own: what the prefix cache keeps and forgets first, and who is served first.

A few system prompts come again and again, among many prompts that nobody sends twice. What was used
longest ago is then the wrong thing to forget. Everything is counted in tokens and steps.

Run: python examples/custom_policy.py
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vattn import LLM, EvictionPolicy, KeptSequence, RequestOutputKind, SamplingParams
from vattn.models import tiny_path
from vattn.request import Request

HEAD = 16  # tokens by which a policy knows a prompt
SMALL: dict[str, Any] = {
    "device": "cpu",
    "page_bytes": 4096,
    "order": "token",
    "max_model_len": 256,
}


class Frequent(EvictionPolicy):
    """Forgets first what saves least: requests that begin so, times the tokens they would find."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[int, ...]] = Counter()  # also of what was forgotten

    def keep(self, request: Request) -> bool:
        self.seen[tuple(request.prompt_ids[:HEAD])] += 1
        return True

    def victims(self, kept: Sequence[KeptSequence], pages: int) -> Iterable[KeptSequence]:
        return sorted(kept, key=lambda k: self.seen[tuple(k.token_ids[:HEAD])] * k.tokens)


class Repeated(Frequent):
    """And keeps nothing of what is asked for the first time."""

    def keep(self, request: Request) -> bool:
        return super().keep(request) and self.seen[tuple(request.prompt_ids[:HEAD])] > 1


def shortest_first(request: Request) -> int:
    return len(request.prompt_ids)


def words(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, 2048) for _ in range(n)]


def hit_rate(policy: EvictionPolicy | None) -> float:
    """Share of the prompt tokens found in a cache of 1024 tokens, one request after another."""
    rng = random.Random(0)
    systems = [words(rng, 96) for _ in range(4)]
    prompts = []
    for turn in range(16):
        prompts.append(systems[turn % 4] + words(rng, 8))  # again after 1600 tokens
        prompts += [words(rng, rng.randint(60, 140)) for _ in range(3)]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    with LLM(
        tiny_path(),
        kv_cache_memory_bytes="2MiB",
        max_num_seqs=1,
        eviction_policy=policy,
        **SMALL,
    ) as llm:
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        stats = llm.stats()
        return stats.prefix_cache_hits / stats.prefix_cache_queries


def mean_ttft_steps(policy: str | Callable[[Request], float]) -> float:
    """Steps until the first token, on average over prompts of many lengths that come together."""
    rng = random.Random(1)
    prompts = [{"prompt_token_ids": words(rng, rng.choice([20, 60, 200]))} for _ in range(16)]
    kind = RequestOutputKind.CUMULATIVE
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, output_kind=kind)
    first: dict[str, int] = {}
    with LLM(
        tiny_path(),
        max_num_seqs=4,
        max_num_batched_tokens=64,
        scheduling_policy=policy,
        **SMALL,
    ) as llm:
        for output in llm.stream(prompts, params):
            first.setdefault(output.request_id, llm.stats().num_steps)
    return sum(first.values()) / len(first)


def main() -> None:
    for name, policy in (("used last", None), ("Frequent", Frequent()), ("Repeated", Repeated())):
        print(f"kept by {name}: {hit_rate(policy):.1%} of the prompt tokens were found")
    print(f"first come, first served: a first token after {mean_ttft_steps('fcfs'):.1f} steps")
    print(f"shortest first: a first token after {mean_ttft_steps(shortest_first):.1f} steps")


if __name__ == "__main__":
    main()
