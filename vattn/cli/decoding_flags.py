"""Options of ``vattn generate`` on how tokens are chosen, as they are shown in its help."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from vattn.cli.options import number, option, whole

_CHOICE, _STRUCTURE, _SEARCH = "Choice of tokens", "Structured output", "Beams and speculation"

PresencePenalty: TypeAlias = Annotated[
    float | None,
    number("--presence-penalty", panel=_CHOICE, help="Off the logits of tokens that were written."),
]
FrequencyPenalty: TypeAlias = Annotated[
    float | None,
    number("--frequency-penalty", panel=_CHOICE, help="The same, once for each time."),
]
RepetitionPenalty: TypeAlias = Annotated[
    float | None,
    number(
        "--repetition-penalty",
        panel=_CHOICE,
        help="Above 1 against tokens of the prompt and the text; default 1.",
    ),
]
LogitBias: TypeAlias = Annotated[
    list[str] | None,
    option(
        "--logit-bias",
        panel=_CHOICE,
        metavar="ID=VALUE",
        help="Added to a token's logit, -100 to 100; can be given several times.",
    ),
]
BadWords: TypeAlias = Annotated[
    list[str] | None,
    option(
        "--bad-words",
        panel=_CHOICE,
        metavar="STRING",
        help="Is not written; can be given several times.",
    ),
]
AllowedTokenIds: TypeAlias = Annotated[
    list[str] | None,
    option(
        "--allowed-token-ids",
        panel=_CHOICE,
        metavar="ID,...",
        help="Only these tokens are written; can be given several times.",
    ),
]
Logprobs: TypeAlias = Annotated[
    int | None,
    whole(
        "--logprobs",
        panel=_CHOICE,
        help="Log probabilities of the text's tokens and of so many likeliest ones, -1 for all; "
        "each of them goes to the --json file.",
    ),
]
PromptLogprobs: TypeAlias = Annotated[
    int | None, whole("--prompt-logprobs", panel=_CHOICE, help="The same of the prompt's tokens.")
]
TruncatePromptTokens: TypeAlias = Annotated[
    int | None,
    whole(
        "--truncate-prompt-tokens",
        panel=_CHOICE,
        help="Use only the last so many tokens of a prompt, -1 for as many as fit.",
    ),
]
JsonSchema: TypeAlias = Annotated[
    str | None,
    option(
        "--json-schema",
        panel=_STRUCTURE,
        metavar="FILE|TEXT",
        help="The text is JSON that this schema allows.",
    ),
]
Regex: TypeAlias = Annotated[
    str | None,
    option("--regex", panel=_STRUCTURE, metavar="REGEX", help="The text matches it as a whole."),
]
Choice: TypeAlias = Annotated[
    list[str] | None,
    option(
        "--choice",
        panel=_STRUCTURE,
        metavar="STRING",
        help="The text is one of those that are given.",
    ),
]
Grammar: TypeAlias = Annotated[
    str | None,
    option(
        "--grammar",
        panel=_STRUCTURE,
        metavar="FILE|TEXT",
        help="The text is of this context-free grammar, in the form of Lark.",
    ),
]
BeamWidth: TypeAlias = Annotated[
    int | None,
    whole("--beam-width", panel=_SEARCH, help="Beam search: so many texts, the best first."),
]
LengthPenalty: TypeAlias = Annotated[
    float | None,
    number(
        "--length-penalty",
        panel=_SEARCH,
        help="Of beam search: above 0 favours long texts, below 0 short ones; default 1.",
    ),
]
SpeculativeConfig: TypeAlias = Annotated[
    str | None,
    option(
        "--speculative-config",
        panel=_SEARCH,
        metavar="JSON",
        help='Guess tokens and verify them, as in \'{"method": "ngram", '
        '"num_speculative_tokens": 5, "prompt_lookup_max": 4}\'.',
    ),
]
