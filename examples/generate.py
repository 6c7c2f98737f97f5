"""An unmodified transformers model with its KV cache in virtual memory.

Run: python examples/generate.py [MODEL_DIR_OR_ID]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vattn
from vattn.config import format_bytes
from vattn.models import tiny_path


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else str(tiny_path())
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    inputs = tokenizer("The function returns", return_tensors="pt")

    # The only line that differs from plain transformers is this one and its use below.
    cache = vattn.VirtualCache(model.config, max_tokens=1024)
    torch.manual_seed(0)
    output = model.generate(  # type: ignore[misc]  # its self is typed for another class
        **inputs, past_key_values=cache, max_new_tokens=60, do_sample=True
    )

    print(tokenizer.decode(output[0], skip_special_tokens=True))
    stats = cache.stats()
    print(
        f"\n{stats.tokens} tokens, {format_bytes(stats.token_bytes)} of K and V in "
        f"{format_bytes(stats.live_bytes)} of pages, {format_bytes(stats.reserved_bytes)} reserved"
    )


if __name__ == "__main__":
    main()
