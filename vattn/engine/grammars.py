"""Languages that outputs must be in, compiled by llguidance for one model's tokens."""

from __future__ import annotations

import copy
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vattn.engine.structural_tags import structural_grammar
from vattn.sampling_params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Compiling takes up to seconds for a text of this length.
MOST_CHARACTERS = 1 << 18
CANNOT_BE_COMPILED = "structured_outputs cannot be compiled"
# Compiled languages that are kept for the next request that asks for the same. Their lexers grow
# with use, a hard one to tens of MB, and llguidance does not tell their size.
_KEPT = 16
# A state of a lexer takes 1 to 2 KB; llguidance's own limit is five times as many.
_LEXER_STATES = 50_000
# What stands for the end of an output in masks. It is none of the model's tokens: which of those
# may end a request is the request's own affair.
_END = "<|vattn: end of the output|>"
# Keywords of drafts up to 3 that llguidance takes for names without a meaning.
_OLD_KEYWORDS = ("divisibleBy", "disallow", "extends")
_ERROR_CHARACTERS = 400


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of a model, as llguidance wants them.

    Args:
        tokenizer: has all of the model's tokens, and the one that stands for the end.
        end: the bit of a mask that says that the output may end.
        eos_token_ids: of the model.
        special: tokens that llguidance does not take for text, by name.
        plain: those that are text to their tokenizer: added ones that are written as ``<...>``.
    """

    tokenizer: LLTokenizer
    end: int
    eos_token_ids: frozenset[int]
    special: Mapping[str, int]
    plain: frozenset[int]

    @property
    def words(self) -> int:
        """32-bit words of a mask."""
        return -(-self.tokenizer.vocab_size // 32)


class Grammar:
    """The language of one output, and how far the output has come in it.

    Args:
        vocabulary: of the model.
        matcher: at the beginning of an output; of this grammar alone.
    """

    __slots__ = ("consumed", "error", "matcher", "vocabulary")

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher) -> None:
        self.vocabulary = vocabulary
        self.matcher = matcher
        self.consumed = 0  # tokens of the output that the matcher has seen
        self.error: str | None = None  # why the output cannot go on

    def copy(self) -> Grammar:
        """The same language at the same place, for another output."""
        copied = Grammar(self.vocabulary, self.matcher.deep_copy())
        copied.consumed, copied.error = self.consumed, self.error
        return copied

    def advance(self, output_ids: Sequence[int]) -> bool:
        """Goes on with tokens of the output; False if it cannot, which ``error`` then explains."""
        if self.error is None:
            for token in output_ids:
                if not self.matcher.consume_token(token):
                    self.fail(f"token {token} of the output is not in the language")
                    break
                self.consumed += 1
        return self.error is None

    def fail(self, what: str) -> None:
        """Remembers why the output cannot go on, with what llguidance says to it."""
        said = readable(self.matcher.get_error())
        self.error = f"{what}: {said}" if said else what

    def has_tokens(self) -> bool:
        """Whether something may follow, or the end; if not, the matcher has an error from now."""
        self.matcher.compute_bitmask()
        return not self.matcher.is_error()

    def allows_any(self, tokens: Sequence[int]) -> bool:
        """Whether one of these tokens may follow."""
        mask = self.matcher.compute_bitmask()
        return any(mask[token // 8] >> token % 8 & 1 for token in tokens)

    def is_complete(self) -> bool:
        """Whether nothing can follow what has been consumed."""
        if self.error is not None:
            return False
        if self.matcher.is_stopped():
            return not self.matcher.is_error()
        if not self.matcher.is_accepting():
            return False
        # What the parser holds possible may come to no token in the end; one bit is the end itself.
        return int.from_bytes(self.matcher.compute_bitmask(), "little").bit_count() == 1


class GrammarCompiler:
    """Compiles what structured outputs must be. Several threads may use it.

    Args:
        tokenizer: of transformers, a fast one; None if there is none, which is an error only when
            something is compiled.
        vocab_size: logits per row.
        eos_token_ids: of the model.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._vocabulary: Vocabulary | None = None  # made when needed, for it takes a second
        self._kept: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The language of an output that has not begun.

        Raises:
            ValueError: a schema, an expression or a grammar with an error, with something that
                would not be kept to, too large, or that no output meets; a tokenizer that does
                not serve; or llguidance is missing.
        """
        with self._lock:
            grammar = self._kept.pop(params, None)
            # Copies share a lexer, and with it the limit on its states.
            if grammar is None or not grammar.copy().has_tokens():
                grammar = self._compile(params)
            self._kept[params] = grammar
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return grammar.copy()

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        kind, given = _asked(params)
        if len(given) > MOST_CHARACTERS:
            raise ValueError(
                f"{kind} of structured_outputs has {len(given)} characters; at most "
                f"{MOST_CHARACTERS} are compiled"
            )
        vocabulary = self._vocabulary = self._vocabulary or self._make_vocabulary()
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=_LEXER_STATES, verbose_errors=False)
        try:
            text = _source(params, vocabulary)
            _, messages = LLMatcher.validate_grammar_with_warnings(
                text, vocabulary.tokenizer, limits=limits
            )
            if messages:  # a warning is of something that would not be kept to
                raise ValueError(readable("; ".join(messages)))
            grammar = Grammar(
                vocabulary, LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=limits)
            )
            # Twice: the first may use up what the lexer, which all copies share, can hold.
            if not (grammar.copy().has_tokens() and grammar.copy().has_tokens()):
                raise ValueError(_why_empty(grammar.copy()))
        except (ValueError, RecursionError) as error:
            shown = given if len(given) <= _ERROR_CHARACTERS else f"{given[:_ERROR_CHARACTERS]}..."
            raise ValueError(f"{CANNOT_BE_COMPILED}: {kind}={shown!r}: {error}") from error
        return grammar

    def _make_vocabulary(self) -> Vocabulary:
        try:
            import llguidance
        except ImportError as error:
            raise ValueError(
                "structured_outputs need llguidance; install it with pip install llguidance"
            ) from error
        if self._tokenizer is None:
            raise ValueError("structured_outputs need a tokenizer, and this engine has none")
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"structured_outputs need a fast tokenizer, one of the tokenizers library, and "
                f"{type(self._tokenizer).__name__} is none"
            )
        backend = copy.deepcopy(backend)
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens([_END])
        end = backend.token_to_id(_END)
        size = max(self._vocab_size, end + 1, backend.get_vocab_size())
        try:
            tokenizer = llguidance.LLTokenizer(backend.to_str(), n_vocab=size, eos_token=end)
        except Exception as error:  # of a tokenizer, which may be anybody's
            raise ValueError(
                f"structured_outputs cannot be had with this tokenizer, a "
                f"{type(self._tokenizer).__name__}: {error}"
            ) from error
        added = {
            token: content
            for token, content in backend.get_added_tokens_decoder().items()
            if token != end and tokenizer.is_special_token(token)
        }
        return Vocabulary(
            tokenizer,
            end,
            self._eos_token_ids,
            special={content.content: token for token, content in added.items()},
            plain=frozenset(token for token, content in added.items() if not content.special),
        )


def problem(params: StructuredOutputsParams) -> str | None:
    """What is wrong with a language, as far as that shows without a tokenizer; or None."""
    from llguidance import LLMatcher

    try:
        _, messages = LLMatcher.validate_grammar_with_warnings(_source(params))
    except (ValueError, RecursionError) as error:
        return str(error)
    return readable("; ".join(messages)) or None


def readable(error: str) -> str:
    """An error of llguidance, without the state of its parser and not too long."""
    error = error.partition("\n<state>")[0].replace("<non-verbose/>", "").strip()
    if len(error) > _ERROR_CHARACTERS:
        error = f"{error[: _ERROR_CHARACTERS // 2]} ... {error[-_ERROR_CHARACTERS // 4 :]}"
    return error


def _why_empty(grammar: Grammar) -> str:
    """Why a language has no beginning."""
    grammar.has_tokens()
    said = readable(grammar.matcher.get_error())
    return "no output is in it" if "NoExtension" in said else said


def _asked(params: StructuredOutputsParams) -> tuple[str, str]:
    """Which of them it is, and what was given, as text."""
    if params.choice is not None:
        return "choice", str(list(params.choice))
    for kind in ("json", "regex", "grammar", "structural_tag"):
        given = getattr(params, kind)
        if given is not None:
            return kind, given
    return "json_object", "True"


def _source(params: StructuredOutputsParams, vocabulary: Vocabulary | None = None) -> str:
    """The language as llguidance reads it; it may use tokens of the vocabulary."""
    import llguidance
    from llguidance import LLMatcher

    if params.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(map(_literal, params.choice)))
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.grammar is not None:
        is_gbnf = re.search(r"^\s*root\s*::=", params.grammar, re.MULTILINE)
        return llguidance.grammar_from("gbnf" if is_gbnf else "lark", params.grammar)
    options = _json_options(params)
    if isinstance(params.structural_tag, str):
        tag = json.loads(params.structural_tag)
        for structure in tag["structures"]:
            check_schema(structure["schema"])
        special = {} if vocabulary is None else vocabulary.special
        return structural_grammar(
            tag, options, special, vocabulary.plain if vocabulary is not None else ()
        )
    schema: Any = {"type": "object"}
    if isinstance(params.json, str):
        schema = json.loads(params.json)
        check_schema(schema)
    if schema is True:  # which llguidance takes no options for
        schema = {}
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]


def _json_options(params: StructuredOutputsParams) -> dict[str, Any]:
    """For llguidance, of schemas."""
    # Lenient, it would leave out what it does not know.
    options: dict[str, Any] = {"lenient": False}
    if params.disable_any_whitespace:
        options |= {"whitespace_flexible": False}
    if params.whitespace_pattern is not None:
        options |= {"whitespace_flexible": True, "whitespace_pattern": params.whitespace_pattern}
    return options


def _literal(text: str) -> str:
    """A regular expression for exactly this text."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def check_schema(schema: Any) -> None:
    """Refuses what is no schema, and what llguidance accepts and does not keep to.

    Raises:
        ValueError: it says what.
    """
    if schema is False:
        raise ValueError("no output is in it")
    if schema is not True and not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object or a boolean")
    for each in _subschemas(schema):
        for keyword in _OLD_KEYWORDS:
            if keyword in each:
                raise ValueError(f"{keyword} is of an old draft and would not be kept to")
        required, least = each.get("required", ()), each.get("minProperties", 0)
        # A key may come twice where its name is free, and llguidance counts it twice.
        if (
            isinstance(least, int)
            and isinstance(required, Sequence)
            and least > len(set(required)) + 1
            and (each.get("additionalProperties", True) or each.get("patternProperties"))
        ):
            raise ValueError(
                f"minProperties={least} would not be kept to, since a key may come twice; list the "
                "required properties, all of them or all but one"
            )


def _subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """The schema and all within, wherever a keyword has schemas."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if not isinstance(each, Mapping):
            continue
        yield each
        for keyword, value in each.items():
            if keyword in ("properties", "patternProperties", "$defs", "definitions"):
                waiting += value.values() if isinstance(value, Mapping) else ()
            elif keyword in ("prefixItems", "anyOf", "allOf", "oneOf", "items"):
                waiting += value if isinstance(value, list) else [value]
            elif keyword in ("additionalProperties", "additionalItems"):
                waiting.append(value)
