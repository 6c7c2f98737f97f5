"""What differs between versions of transformers, from 5.17 on; nothing else here asks for one.

- Layers that store nothing are "dummy" from 5.23 on, each a DummyLayer that masks look for. Before,
  the last layers, which share K and V, have no place in the cache at all, and layers without
  attention are "moe" or "mlp": any layer that is no CacheLayerMixin does for those.
- The windows that get_layer_types_and_kwargs gives are one dict for all layers before 5.19, one for
  each since. They are not used: ``config.per_layer_config`` tells the same in all versions.
"""

from __future__ import annotations

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

try:
    from transformers.cache_utils import DummyLayer
except ImportError:

    class DummyLayer:  # type: ignore[no-redef]
        """What a Cache asks of a layer that stores nothing."""

        supports_early_init = False
        is_initialized = True
        is_compileable = True
        is_croppable = True
        keys = values = None

        def get_max_length(self) -> int:
            """-1 for none."""
            return -1


__all__ = ["NOTHING", "DummyLayer", "layer_types"]

NOTHING = "dummy"


def layer_types(config: PreTrainedConfig) -> list[str]:
    """The type of each layer that has a place in a cache, :data:`NOTHING` if it stores nothing.

    Raises:
        AttributeError: the config does not tell.
    """
    types, _ = get_layer_types_and_kwargs(config)
    return [NOTHING if kind in ("moe", "mlp") else kind for kind in types]
