"""Fields of OpenAI's and vLLM's API that are not served, and the values that ask for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Off = Mapping[str, tuple[Any, ...]]

# Of both completions and chat.
COMMON_OFF: Off = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "watermarking": (False,),
    "spaces_between_special_tokens": (True,),
    "truncation_side": ("left",),
    "logprob_token_ids": (),
    "session_id": (),
    "return_token_offsets": (False,),
    "return_mm_kwargs": (True,),
    "routed_experts_prompt_start": (0,),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "repetition_detection": (),
    "thinking_token_budget": (-1,),
    "stream_interval": (1,),
    "logits_processors": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
}
