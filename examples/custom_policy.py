"""Policies of your own: what the prefix cache forgets first, and who is served first.

Four system prompts come again and again, among prompts that nobody sends twice. What was used
longest ago is then the wrong thing to forget. Everything is counted in tokens and steps.

Run: python examples/custom_policy.py
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from vattn import (
    LLM,
    EvictionPolicy,
    KeptSequence,
    RankFunction,
    Request,
    RequestOutputKind,
    SamplingParams,
)
from vattn.models import tiny_path

HEAD = 16  # tokens by which the policy knows a prompt
TURNS = 16
SMALL: dict[str, Any] = {"device": "cpu", "page_bytes": 4096, "max_model_len": 256}


class Frequent(EvictionPolicy):
    """Forgets first what saves least: requests that begin so, times the tokens they would find."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[int, ...]] = Counter()  # also of what was forgotten

    def keep(self, request: Request) -> bool:
        self.seen[tuple(request.prompt_ids[:HEAD])] += 1
        return True  # whatever it is: somebody may ask for it again

    def victims(self, kept: Sequence[KeptSequence], pages: int) -> Iterable[KeptSequence]:
        return sorted(kept, key=lambda k: self.seen[tuple(k.token_ids[:HEAD])] * k.tokens)


def shortest_first(request: Request) -> int:
    return len(request.prompt_ids)


def words(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, 2048) for _ in range(n)]


def hit_rate(policy: EvictionPolicy | None) -> tuple[float, float]:
    """Shares of the prompt tokens: those found in a cache of 1024, and those that came before."""
    rng = random.Random(0)
    systems = [words(rng, 96) for _ in range(4)]
    prompts = []
    for turn in range(TURNS):
        prompts.append(systems[turn % 4] + words(rng, 8))
        prompts += [words(rng, rng.randint(60, 140)) for _ in range(3)]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    memory = {**SMALL, "kv_cache_memory_bytes": "2MiB", "max_num_seqs": 1}
    with LLM(tiny_path(), eviction_policy=policy, **memory) as llm:
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        stats = llm.stats()
    asked = stats.prefix_cache_queries
    return stats.prefix_cache_hits / asked, 96 * (TURNS - 4) / asked


def ttft_steps(policy: str | RankFunction) -> list[int]:
    """Steps until the first token, of prompts of many lengths that come together."""
    rng = random.Random(1)
    prompts = [{"prompt_token_ids": words(rng, rng.choice([20, 60, 200]))} for _ in range(16)]
    kind = RequestOutputKind.CUMULATIVE
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, output_kind=kind)
    steps = {**SMALL, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    first: dict[str, int] = {}
    with LLM(tiny_path(), scheduling_policy=policy, **steps) as llm:
        for output in llm.stream(prompts, params):
            first.setdefault(output.request_id, llm.stats().num_steps)
    return list(first.values())


if __name__ == "__main__":
    for name, policy in (("used longest ago", None), ("least saving", Frequent())):
        found, most = hit_rate(policy)
        print(f"{name} goes first: {found:.1%} of the prompt tokens were found, of {most:.1%}")
    print("(0.0% is by construction: some 1600 tokens lie between two uses of a prompt)")
    for name, rank in (("first come", "fcfs"), ("shortest", shortest_first)):
        waits = ttft_steps(rank)
        print(f"{name} first: {sum(waits) / len(waits):.1f} steps on average, {max(waits)} at most")
