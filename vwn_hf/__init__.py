"""Virtual Width Networks (arXiv:2511.11238) for transformers; importing it registers them with the Auto classes."""

from . import modeling_vwn
from .hyper_connections import GeneralizedHyperConnection
from .upcycling import UpcyclingError, upcycle

__version__ = "0.1.0"
__all__ = ["GeneralizedHyperConnection", "UpcyclingError", "upcycle"]


def __getattr__(name: str):
    """The families' classes: VwnOlmoeConfig, VwnOlmoeModel, VwnOlmoeForCausalLM, …"""
    if name.startswith("Vwn") and hasattr(modeling_vwn, name):
        return getattr(modeling_vwn, name)
    raise AttributeError(f"module 'vwn_hf' has no attribute {name!r}")
