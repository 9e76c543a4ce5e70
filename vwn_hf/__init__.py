"""Virtual Width Networks (arXiv:2511.11238) for transformers; importing it makes their classes known to it.

The classes are built when one is first asked for, here or through an Auto class: until then neither torch nor any
modeling code of transformers is imported.
"""

import importlib
import sys
from types import ModuleType

from .backbones import BACKBONES

__version__ = "0.1.0"

_MODULE_OF = {
    "GeneralizedHyperConnection": "hyper_connections",
    "UpcyclingError": "upcycling",
    "VwnTrainer": "training",
    "VwnTrainerMixin": "training",
    "added_parameters": "modeling_vwn",
    "upcycle": "upcycling",
}
__all__ = [*_MODULE_OF]  # and VwnOlmoeConfig, VwnOlmoeModel, …


def __getattr__(name: str):
    module = _MODULE_OF.get(name)
    if module is None:
        if not name.startswith("Vwn"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = "modeling_vwn"
    return getattr(importlib.import_module(f".{module}", __name__), name)


class _FamilyModule(ModuleType):
    """What transformers finds where it looks for a family's own module: the classes of `modeling_vwn`, on demand."""

    def __getattr__(self, name: str):
        if not name.startswith("Vwn"):
            raise AttributeError(name)
        return __getattr__(name)


def _register() -> None:
    """Have AutoConfig find the VWN configs; whatever finds one has imported `modeling_vwn`, which registers the rest.

    AutoConfig copies transformers' table of config names when it is first imported. Before that, an entry there, and
    the module that it names, cost nothing; after that, the classes are registered with it at once.
    """
    if "transformers.models.auto.configuration_auto" in sys.modules:
        importlib.import_module(".modeling_vwn", __name__)
        return
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    for backbone in BACKBONES.values():
        CONFIG_MAPPING_NAMES[backbone.vwn_model_type] = f"Vwn{backbone.prefix}Config"
        name = f"transformers.models.{backbone.vwn_model_type}"
        sys.modules[name] = _FamilyModule(name)


_register()
