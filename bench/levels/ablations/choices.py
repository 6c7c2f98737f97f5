"""The choices of the engine that the ablations undo one by one, and the engines without them."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.common import Json, short_bytes
from vattn.attention.select import choose
from vattn.engine.graphs import can_capture
from vattn.engine.setup import make_memory, make_pool, virtual_storage
from vattn.engine.storage import MakeStorage, Storage, StorageNeeds
from vattn.kv.cache import KVCache


@dataclass(frozen=True)
class Choice:
    """Two engines that differ in one choice.

    Args:
        name: of the choice.
        paper: what vAttention's paper does.
        ours: our own choice, in words.
        other: what it is compared with, in words.
        options: of :class:`vattn.LLM`, on both sides.
        ours_options: on our side beside them.
        other_options: on the other side.
        other_storage: of the other side.
        workload: ``"trace"``, or ``"prefix"`` for requests that begin alike.
        devices: where there is anything to choose.
    """

    name: str
    paper: str
    ours: str
    other: str
    options: Json = field(default_factory=dict)
    ours_options: Json = field(default_factory=dict)
    other_options: Json = field(default_factory=dict)
    other_storage: MakeStorage = virtual_storage
    workload: str = "trace"
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def label(self) -> str:
        """Of the row and of its part of the run."""
        return f"{self.name}: {self.other}"


def fresh_storage(needs: StorageNeeds) -> Storage:
    """Ours without deferred reclamation: a slot that is released has its pages unmapped at once.

    Raises:
        ValueError: with prefix caching, which is made of what released slots keep.
    """
    config, loaded = needs.config, needs.loaded
    if config.enable_prefix_caching:
        raise ValueError("without deferred reclamation give enable_prefix_caching=False")
    backend = choose(loaded.specs, loaded.device, config.order, name=config.attention_backend)
    pool = needs.pool or make_pool(loaded.device, config)
    graphs = not config.enforce_eager and backend.graphs and can_capture(loaded.device)
    cache = KVCache(
        loaded.layer_specs(),
        max_seqs=config.max_num_seqs * (1 + needs.steps_in_flight) + graphs,
        max_tokens=needs.max_model_len,
        pool=pool,
        order=config.order or backend.order,
        layers_per_region=config.layers_per_region,
        kv_tile_tokens=backend.kv_tile_tokens,
        reuse_stale=False,
    )
    return Storage(backend, cache, make_memory(cache, config, graphs=graphs), graphs, pool)


_NO_PREFIX: Json = {"enable_prefix_caching": False}
_CPU_PAGE, _CUDA_PAGE = 16 << 10, 2 << 20


def _page_choices(device: str) -> list[Choice]:
    ours, others, paper = {
        "cpu": (_CPU_PAGE, (4 << 10, 64 << 10, 2 << 20), "64K to 256K (patched driver), or 2M"),
        "cuda": (_CUDA_PAGE, (4 << 20, 8 << 20), "64K to 256K (patched driver), or 2M"),
    }[device]
    return [
        Choice(
            "page size",
            paper,
            f"pages of {short_bytes(ours)}",
            f"pages of {short_bytes(page)}",
            options=_NO_PREFIX,
            ours_options={"page_bytes": ours},
            other_options={"page_bytes": page},
        )
        for page in others
    ]


def _slicing_choices(device: str, layers: int) -> list[Choice]:
    """Token order by the layers that share a page, against our default of the device.

    Of head order there is nothing to see on a GPU: FlashAttention does not read it.
    """
    ours = {"cpu": "head order", "cuda": "token order, 8 layers per region"}[device]
    found = []
    for per_region in sorted({1, min(4, layers), layers}):
        options: Json = {"order": "token", "layers_per_region": per_region}
        of_all = ", all" if per_region == layers else ""
        number = "1 layer" if per_region == 1 else f"{per_region} layers"
        other = f"token order, {number} per region{of_all}"
        found.append(
            Choice(
                "layout",
                "all layers in a page (tensor slicing), or one",
                ours,
                other,
                options=_NO_PREFIX,
                other_options=options,
            )
        )
    return found


def choices(device: str, layers: int) -> list[Choice]:
    """All of a device, for a model of so many layers."""
    return [
        Choice(
            "mapping ahead",
            "in the background, as the default",
            "the next step's pages in the background",
            "all mapping between steps",
            options=_NO_PREFIX,
            other_options={"prepare_ahead": False},
        ),
        Choice(
            "deferred reclamation",
            "yes",
            "a released slot keeps its pages mapped",
            "unmapped at once",
            options=_NO_PREFIX,
            other_storage=fresh_storage,
        ),
        *_page_choices(device),
        *_slicing_choices(device, layers),
        Choice(
            "prefix caching",
            "none",
            "shared by aliases",
            "off",
            other_options=_NO_PREFIX,
            workload="prefix",
        ),
        Choice(
            "asynchronous scheduling",
            "none",
            "on, as the default of a GPU",
            "off",
            options=_NO_PREFIX,
            ours_options={"async_scheduling": True},
            other_options={"async_scheduling": False},
            devices=("cuda",),
        ),
    ]
