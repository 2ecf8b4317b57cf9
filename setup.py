"""Builds csrc/ as wikigpt._C where torch and a C++ compiler are found. An install never fails because of it.

Environment: WIKIGPT_NO_EXT=1 leaves the extension out; MAX_JOBS limits parallel compilation.
"""

import glob
import os
import sys

from setuptools import setup

# The oldest torch whose stable ABI the library asks for: it loads under this version and every later one.
STABLE_ABI = 2 << 56 | 11 << 48


def say(message: str) -> None:
    print(f"wikigpt: {message}", file=sys.stderr, flush=True)


def extension() -> dict:
    """The keyword arguments of setup() that build wikigpt._C, or none, with one line saying why."""
    if os.environ.get("WIKIGPT_NO_EXT") == "1":
        say("the C++ extension is left out (WIKIGPT_NO_EXT=1)")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        say(
            "the C++ extension is left out: no torch in the build environment "
            "(to build it: pip install torch, then pip install --no-build-isolation wikigpt)"
        )
        return {}

    class BuildOrSkip(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                say(f"the C++ extension is left out: it did not build ({reason})")
                # A later step would copy the files that were never made.
                self.extensions = []

    if sys.platform == "win32":
        flags, link = ["/O2", "/openmp", "/std:c++20"], []
    else:
        openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
        flags, link = ["-O3", "-std=c++20", "-fno-math-errno", *openmp], openmp
    module = CppExtension(
        "wikigpt._C",
        sorted(glob.glob("csrc/*.cpp")),
        extra_compile_args=[
            *flags,
            f"-DTORCH_TARGET_VERSION={STABLE_ABI:#018x}",
            f'-DWIKIGPT_TORCH_VERSION="{torch.__version__}"',
        ],
        extra_link_args=link,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildOrSkip}}


setup(**extension())
