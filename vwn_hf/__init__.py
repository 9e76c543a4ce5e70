"""Virtual Width Networks (arXiv:2511.11238) for transformers; importing it makes their classes known to it.

The classes are built when one is first asked for, here or through an Auto class: until then neither torch nor any
modeling code of transformers is imported.
"""

import importlib

from .backbones import Backbone, Sublayer, register_backbone

__version__ = "0.1.0"

_MODULE_OF = {
    "CheckpointError": "checkpoints",
    "GeneralizedHyperConnection": "hyper_connections",
    "VwnTrainer": "training",
    "VwnTrainerMixin": "training",
    "added_parameters": "modeling_vwn",
    "apply_delta": "deltas",
    "extract_delta": "deltas",
    "upcycle": "upcycling",
    "widen": "in_memory",
}
__all__ = ["Backbone", "Sublayer", "register_backbone", *_MODULE_OF]  # and VwnOlmoeConfig, VwnOlmoeModel, …


def __getattr__(name: str):
    module = _MODULE_OF.get(name)
    if module is None:
        if not name.startswith("Vwn"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = "modeling_vwn"
    return getattr(importlib.import_module(f".{module}", __name__), name)
