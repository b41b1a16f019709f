"""What a model's configuration says about the state that its layers keep. The shortcuts depend on it."""

import math

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin


def attention_window(model: PreTrainedModel) -> float:
    """The smallest attention window of all layers, in tokens; infinity if no layer has a window."""
    config = model.config.get_text_config()
    names = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")
    widths = [getattr(config, name, None) for name in names]
    return min((width for width in widths if isinstance(width, int)), default=math.inf)


def has_other_states(model: PreTrainedModel) -> bool:
    """Whether a layer has state other than keys and values, such as a convolution or a recurrence."""
    layers = DynamicCache(config=model.config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def rotation_limit(model: PreTrainedModel) -> float:
    """Length up to which rotary embeddings do not depend on the batch. Beyond, some models use the longest row's."""
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return math.inf
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return original or config.max_position_embeddings
