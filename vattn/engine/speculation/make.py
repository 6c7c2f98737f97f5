"""The proposer that an engine's settings ask for.

A draft model is loaded before the engine's pool is made, whose budget is what the weights leave.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from transformers import PreTrainedModel

from vattn.attention.select import choose
from vattn.engine.config import EngineConfig
from vattn.engine.setup import make_runner
from vattn.engine.speculation.config import SpeculativeConfig
from vattn.engine.speculation.draft_model import DraftModel
from vattn.engine.speculation.ngram import NgramProposer
from vattn.engine.speculation.proposer import Proposer
from vattn.hf.attention import taken_over
from vattn.hf.model import LoadedModel, ModelError, load_model
from vattn.kv.cache import KVCache
from vattn.kv.pool import PagePool


def draft_taken_over(config: EngineConfig) -> AbstractContextManager[None]:
    """Gives the attention of a draft model object back if the block fails."""
    wanted = config.speculative_config
    given = wanted is not None and isinstance(wanted.model, PreTrainedModel)
    return taken_over(wanted.model) if given else nullcontext()


def load_draft(config: EngineConfig, loaded: LoadedModel) -> LoadedModel | None:
    """The draft model that the settings ask for; None if they ask for none.

    Args:
        config: of the engine.
        loaded: the model that verifies.

    Raises:
        ValueError: it cannot be served, or has another vocabulary.
    """
    wanted = config.speculative_config
    if wanted is None or wanted.method != "draft_model":
        return None
    try:
        draft = load_model(wanted.model, dtype=loaded.dtype, device=loaded.device)
    except ModelError as error:
        raise ModelError(f"speculative_config's model: {error}") from error
    if draft.vocab_size != loaded.vocab_size:
        raise ValueError(
            f"speculative_config's model has a vocabulary of {draft.vocab_size} tokens, and the "
            f"model that it drafts for one of {loaded.vocab_size}; give one of the same tokenizer"
        )
    return draft


def make_proposer(
    config: EngineConfig,
    draft: LoadedModel | None,
    pool: PagePool | None,
    max_model_len: int,
    *,
    graphs: bool,
) -> Proposer | None:
    """What makes drafts for an engine; None if it does not speculate.

    Args:
        config: of the engine.
        draft: as :func:`load_draft` gives it.
        pool: of the engine's KV cache; None if it has none.
        max_model_len: longest sequence in tokens.
        graphs: decode steps run as CUDA graphs.

    Raises:
        ValueError: a draft model that no attention backend can serve, or without a pool for its
            pages.
    """
    wanted = config.speculative_config
    if wanted is None:
        return None
    assert isinstance(wanted, SpeculativeConfig)
    if draft is not None:
        if pool is None:
            raise ValueError(
                "a draft model takes its pages from the engine's pool, and this storage has none; "
                'use {"method": "ngram"}, or leave speculative_config out'
            )
        return _draft_model(config, wanted, draft, pool, max_model_len, graphs=graphs)
    assert wanted.prompt_lookup_min is not None
    assert wanted.prompt_lookup_max is not None
    return NgramProposer(
        wanted.num_speculative_tokens, wanted.prompt_lookup_min, wanted.prompt_lookup_max
    )


def _draft_model(
    config: EngineConfig,
    wanted: SpeculativeConfig,
    draft: LoadedModel,
    pool: PagePool,
    max_model_len: int,
    *,
    graphs: bool,
) -> DraftModel:
    length = min(max_model_len, draft.max_positions or max_model_len)
    backend = choose(draft.specs, draft.device, config.order, name=config.attention_backend)
    graphs = graphs and backend.graphs
    cache = KVCache(
        draft.layer_specs(),
        max_seqs=config.max_num_seqs + graphs,
        max_tokens=length,
        pool=pool,
        order=config.order or backend.order,
        kv_tile_tokens=backend.kv_tile_tokens,
    )
    scratch = None
    if graphs:
        scratch = config.max_num_seqs
        cache.open(slot=scratch)
        cache.ensure(scratch, 1)
    runner = make_runner(
        draft,
        config,
        cache,
        backend,
        max_model_len=length,
        scratch_slot=scratch,
        graphs=graphs,
    )
    runner.capture(show_progress=True)
    return DraftModel(
        runner,
        cache,
        count=wanted.num_speculative_tokens,
        max_tokens=config.step_tokens,
        max_length=length,
        scratch_slot=scratch,
    )
