"""Keep the old names of the packages working: jobs, data_shards, kernels and cluster.

These were the names in a checkout before the packages became one. `python -m jobs.train` and `from data_shards.dataset
import Shards` still work in this release, as names of the same modules.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType
from typing import Any

NEW_FORMS = {
    "jobs": "`python -m jobs.train` is now `deepskip train`, `jobs` deepskip.jobs",
    "data_shards": "`python -m data_shards pack` is now `deepskip pack`, `data_shards` deepskip.data_shards",
    "cluster": "`python -m cluster` is now `deepskip cluster`, `cluster` deepskip.cluster",
    "kernels": "`kernels` is now deepskip.kernels",
}


class SameModule(importlib.abc.InspectLoader):
    """Load the module of a new name for an old one.

    Args:
        name: the new name.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Import the module by its new name and return it."""
        self.module = importlib.import_module(self.name)
        self.spec = self.module.__spec__
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec; its code has run already."""
        # The import has set the spec of the old name.
        module.__spec__ = self.spec

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the code that `python -m` runs."""
        found = importlib.util.find_spec(self.name)
        return found.loader.get_code(self.name) if found and found.loader else None  # type: ignore[attr-defined]

    def get_source(self, fullname: str) -> str | None:
        """Return the source of the module."""
        found = importlib.util.find_spec(self.name)
        return found.loader.get_source(self.name) if found and found.loader else None  # type: ignore[attr-defined]

    def is_package(self, fullname: str) -> bool:
        """Return whether the module is a package."""
        found = importlib.util.find_spec(self.name)
        return bool(found and found.submodule_search_locations is not None)


class OldNames(importlib.abc.MetaPathFinder):
    """Find deepskip.jobs.train for jobs.train, once `jobs` has been imported by that name."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec that loads the module of the new name, or None for any other module."""
        if name.partition(".")[0] not in self.packages:
            return None
        new = f"deepskip.{name}"
        found = importlib.util.find_spec(new)
        if found is None:
            return None
        is_package = found.submodule_search_locations is not None
        made = importlib.util.spec_from_loader(name, SameModule(new), origin=found.origin, is_package=is_package)
        if made and is_package:
            made.submodule_search_locations = list(found.submodule_search_locations or [])
        return made


_finder = OldNames()


def alias(package: str) -> None:
    """Replace a package that was imported by its old name with that of the new name, and report this once."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if package not in _finder.packages:
        _finder.packages.add(package)
        print(f"note: {NEW_FORMS[package]}; the old name will be removed in the next release", file=sys.stderr)
    sys.modules[package] = importlib.import_module(f"deepskip.{package}")
