"""Ways to decode: penalties, structured output, beams that share pages, speculation.

Run: python examples/decoding.py [MODEL_DIR_OR_ID]
"""

import sys

from vattn import LLM, BeamSearchParams, KVUsage, SamplingParams, StructuredOutputsParams
from vattn.models import tiny_path

PROMPT = "A session that reads the table while another one writes to it"
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "rank": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "rank"],
    "additionalProperties": False,
}


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(tiny_path())
    with LLM(model, max_num_seqs=16, seed=1) as llm:
        params = SamplingParams(temperature=0, max_tokens=24, frequency_penalty=0.6, logprobs=1)
        for sample in llm.generate(PROMPT, params, use_tqdm=False)[0].outputs:
            print(f"log probability {sample.cumulative_logprob:.1f}: {sample.text!r}")

        structured = StructuredOutputsParams(json=CITY, disable_any_whitespace=True)
        params = SamplingParams(max_tokens=64, structured_outputs=structured, n=2)
        for sample in llm.generate(f"{PROMPT}. A city: ", params, use_tqdm=False)[0].outputs:
            kv = sample.kv or KVUsage()  # None before it has ended
            print(f"{sample.text}  [{kv.shared_pages} of {kv.pages} pages shared]")

        beams = BeamSearchParams(beam_width=4, max_tokens=16)
        for sequence in llm.beam_search(PROMPT, beams, use_tqdm=False)[0].sequences:
            print(f"{sequence.score:.3f} {sequence.text!r}")

    drafts = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
    with LLM(model, max_num_seqs=16, speculative_config=drafts) as llm:
        llm.generate(f"{PROMPT}. {PROMPT}", SamplingParams(temperature=0, max_tokens=64), False)
        stats = llm.stats()
        print(f"{stats.generation_tokens} tokens in {stats.num_steps} steps:", end=" ")
        print(f"{stats.spec_decode_num_accepted_tokens}", end=" of ")
        print(f"{stats.spec_decode_num_draft_tokens} drafts accepted")


if __name__ == "__main__":
    main()
