"""Speculative decoding: guesses at the next tokens, which the model verifies in one step.

A request with ``k`` drafts computes ``k + 1`` tokens in a step and samples a token after each of
them. What is drawn depends on nothing but the logits, the seed and the position, so the tokens that
a request would have got one by one are those sampled after its last token and after each draft that
equals the token sampled before it. These are appended; the rest of the step leaves no trace.

Drafts come from the request's own text (:mod:`.ngram`) or from a small model
(:mod:`.draft_model`). Guess and verify is of Leviathan et al., "Fast inference from transformers
via speculative decoding", 2023 (https://arxiv.org/abs/2211.17192).
"""
