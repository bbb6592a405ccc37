"""The command where neither torch nor diffusers can be imported: python without_torch.py WORDS …"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec


class NoTorch(MetaPathFinder):
    """Makes an import of them, and of what needs them, an error."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] in ("torch", "torchvision", "diffusers"):
            raise ModuleNotFoundError(f"{fullname} is not here", name=fullname)
        return None


sys.meta_path.insert(0, NoTorch())

if __name__ == "__main__":
    from action_diffusion.cli import main

    raise SystemExit(main(sys.argv[1:]))
