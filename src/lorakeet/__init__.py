"""Lorakeet: from documents and a base model to a specialist that can be served.

    import lorakeet as lk
    result = lk.train("recipe.yaml", run="runs/law")

Every verb of the command line is one function here.  Names are imported at
their first use, so ``import lorakeet`` costs milliseconds and no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "load_model": "lorakeet.models.load",
    "Lora": "lorakeet.adapters.layer",
    "attach": "lorakeet.adapters.attach",
    "detach": "lorakeet.adapters.attach",
    "merge": "lorakeet.adapters.merge",
    "unmerge": "lorakeet.adapters.merge",
    "read_adapter": "lorakeet.adapters.files",
    "write_adapter": "lorakeet.adapters.files",
    "train": "lorakeet.api.training",
    "resume": "lorakeet.api.training",
    "plan": "lorakeet.api.planning",
    "evaluate": "lorakeet.api.evaluation",
    "export_merged": "lorakeet.api.shipping",
    "serve": "lorakeet.api.shipping",
    "read_recipe": "lorakeet.base.recipe_file",
    "Recipe": "lorakeet.base.recipe",
    "LorakeetError": "lorakeet.base.errors",
}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    """Imports a public name from its floor at the first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lorakeet' has no attribute '{name}'")
    return getattr(import_module(_HOME_OF[name]), name)


class _Floor(ModuleType):
    """A floor that is called like the verb of the same name: ``lk.train``, ``lk.plan``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the verb."""
        return __getattr__(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """This package: importing ``lorakeet.train`` puts the floor where the verb was looked up."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Keeps what the import system sets, and lets a floor stand for its verb."""
        if name in _HOME_OF and type(value) is ModuleType:
            value.__class__ = _Floor
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(__all__)
