"""Many requests at once: shared prefixes, samples, a stream, statistics.

Run: python examples/offline.py [MODEL_DIR_OR_ID]
"""

import sys

from vattn import LLM, SamplingParams
from vattn.models import tiny_path

PREFIX = "A session that reads the table while another one writes to it"


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(tiny_path())
    with LLM(model, max_num_seqs=16, seed=1) as llm:
        prompts = [f"{PREFIX} {verb}" for verb in ("sees", "waits", "fails", "commits")]
        params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, n=2)
        for output in llm.generate(prompts, params, use_tqdm=False):
            for sample in output.outputs:
                print(f"[{output.num_cached_tokens:2} cached] ...{sample.text!r}")

        # A follow-up turn goes on in place: only its new tokens are computed.
        first = llm.generate(PREFIX, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        turn = first[0].prompt_token_ids + first[0].outputs[0].token_ids
        for output in llm.stream(turn, SamplingParams(temperature=0, max_tokens=8)):
            print(f"[{output.num_cached_tokens} cached] {output.outputs[0].text!r}")

        stats = llm.stats()
        print(f"{stats.generation_tokens} tokens in {stats.num_steps} steps,", end=" ")
        print(f"{stats.prefix_cache_hits} of {stats.prefix_cache_queries} prompt tokens found,")
        print(f"{stats.cache.kept_bytes} bytes kept, {stats.cache.live_bytes} live")


if __name__ == "__main__":
    main()
