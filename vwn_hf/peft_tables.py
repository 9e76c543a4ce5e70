"""VWN model types in peft's tables, which say by a model's type what of it is adapted.

peft keeps them in dicts without a way to register: the modules that a method adapts by default, and how experts,
single in checkpoints and fused in memory, are adapted. Of a type that is not in them, `target_modules="all-linear"`
leaves the experts and the router out, without an error. Here each VWN type gets its family's entries: at once if peft
is imported already, else right after it is. Nothing of peft is imported for it. Written for peft 0.21. Its table of
adaption prompts is left alone: they replace attention by a module that takes no positional argument, as VWN gives it.
"""

import sys
import warnings
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TABLES = {  # modules of peft, and how the names of their dicts by model type begin
    "peft.utils.constants": "TRANSFORMERS_MODELS_TO_",
    "peft.utils.transformers_weight_conversion": "_MODEL_TO_CONVERSION_PATTERN",
}
FAMILY_OF: dict[str, str] = {}  # model type by VWN model type


def register_with_peft(model_type: str, vwn_model_type: str) -> None:
    """Have peft adapt models of `vwn_model_type` as those of `model_type`, its family, whenever peft is imported."""
    FAMILY_OF[vwn_model_type] = model_type
    if not any(isinstance(finder, PeftTableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PeftTableFinder())
    for name in TABLES.keys() & sys.modules.keys():
        add_entries(sys.modules[name])


def add_entries(module: ModuleType) -> None:
    """Give every VWN type its family's entry in each table of one of peft's modules, where the family has one."""
    start = TABLES[module.__name__]
    tables = [table for name, table in vars(module).items() if name.startswith(start) and isinstance(table, dict)]
    if not tables:
        warnings.warn(
            f"{module.__name__} has no {start}… as in peft 0.21: this version of peft may leave out experts of VWN "
            "models. Name them in target_parameters, or install peft 0.21.",
            stacklevel=2,
        )
    for table in tables:
        table.update({ours: table[theirs] for ours, theirs in FAMILY_OF.items() if theirs in table})


class PeftTableFinder(MetaPathFinder):
    """Finds peft's modules as the other finders do, and adds the entries once they have been run."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name not in TABLES:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(run_module, spec.loader)
        return spec


def run_module(loader, module: ModuleType) -> None:
    """The loader's own `exec_module`, which this function covers on the instance, then the entries."""
    del loader.exec_module
    loader.exec_module(module)
    add_entries(module)
