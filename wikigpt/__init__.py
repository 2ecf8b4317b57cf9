"""WikiGPT: fused GPU kernels for transformers (wikigpt.kernels), proven on a GPT trained on WikiText-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "kernels" / "_dispatch.py").is_file():
    # A source tree that is not installed: wikigpt.kernels lies beside this package instead of inside it.
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import wikigpt` and `import wikigpt.kernels` stay quick.
    if name in ("GPT", "GPTConfig"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module 'wikigpt' has no attribute {name!r}")


__all__ = ["GPT", "GPTConfig", "__version__"]
