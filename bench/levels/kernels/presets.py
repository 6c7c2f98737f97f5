"""The vAttention paper's experiments with kernels, and what it and others published."""

from __future__ import annotations

from bench.levels.level import Preset, Published

_PAPER = "vAttention, arXiv 2405.04437"
_OTHERS = "reports of others, evidence the other way"
_A100 = "A100, FlashAttention-2 2.5.9, FlashInfer; Llama-3-8B and Yi-34B on two GPUs"
_MODELS = ["yi-6b", "llama-3-8b-tp2", "yi-34b-tp2"]


def _of_models(what: str, figures: tuple[str, ...], setting: str) -> tuple[Published, ...]:
    models = ("Yi-6B", "Llama-3-8B", "Yi-34B")
    return tuple(
        Published(f"{what}, {model}", figure, _PAPER, setting)
        for model, figure in zip(models, figures, strict=True)
    )


PAPER_PREFILL = Preset(
    help="prefill of one request of 1K to 192K tokens, contiguous against paged",
    settings={
        "cuda": {
            "shapes": _MODELS,
            "phases": ["prefill"],
            "prompts": [1024, 4096, 16384, 65536, 131072, 196608],
            "wide": 3,
            "rounds": 5,
            "budget_s": 400.0,
        },
        # The longest is a 96th of the paper's; heads are the same. See kernels.py for the chunk.
        "cpu": {
            "shapes": _MODELS,
            "phases": ["prefill"],
            "prompts": [512, 1024, 2048],
            "wide": 3,
            "blocks": [16, 64, 256],
        },
    },
    small={"shapes": _MODELS[:1], "prompts": [64]},
    published=(
        *_of_models(
            "prefill of 192K tokens, FA2 paged / contiguous",
            ("1.24x", "1.26x", "1.24x"),
            _A100,
        ),
        Published("prefill kernel alone, paged slower by up to", "37% (FA2)", _PAPER, _A100),
        Published("prefill kernel alone, paged slower by up to", "42% (FlashInfer)", _PAPER, _A100),
        Published(
            "prefill, FlashInfer ragged against paged: apart by", "1-2%", _OTHERS, "some GPUs"
        ),
    ),
)

PAPER_DECODE = Preset(
    help="decode of 1 to 32 requests of 16K tokens each, contiguous against paged",
    settings={
        "cuda": {
            "shapes": _MODELS,
            "phases": ["decode"],
            "batches": [1, 4, 8, 16, 32],
            "contexts": [16384],
            "wide": 3,
        },
        # A 16th of the paper's context; the same heads and the lower batches.
        "cpu": {
            "shapes": _MODELS,
            "phases": ["decode"],
            "batches": [1, 4, 16],
            "contexts": [1024],
            "wide": 3,
        },
    },
    small={"shapes": _MODELS[:1], "batches": [1, 2], "contexts": [64]},
    published=(
        *_of_models(
            "decode at 16K, vLLM's kernel of 2024 / contiguous FA2",
            ("1.99x", "1.58x", "1.53x"),
            _A100,
        ),
        Published(
            "FA2's own paged decode, faster than its contiguous one by up to",
            "34%",
            _OTHERS,
            "some cases",
        ),
        Published(
            "decode, kernels whose page equals their tile",
            "about a tie",
            _OTHERS,
            "modern kernels",
        ),
        Published(
            "pages of 16-64 tokens, FlashAttention-4 slower by",
            "17-24%",
            "reports of others",
            "against large pages",
        ),
    ),
)

PRESETS = {"paper-prefill": PAPER_PREFILL, "paper-decode": PAPER_DECODE}
