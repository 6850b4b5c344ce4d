"""Builds looksam_kernels._C and ._cuda where it can; everything else about the package is in pyproject.toml.

LOOKSAM_NATIVE=auto (the default) compiles where torch and a C++ compiler are there, and says in one line what was
built or why not; 0 leaves it out; 1 makes every reason not to build it an error. LOOKSAM_CUDA says the same about the
CUDA kernels, which need nvcc and a torch with CUDA. TORCH_CUDA_ARCH_LIST names the architectures.

With build isolation, pip's default, there is no torch to compile against: the package is installed with its sources,
and ``python -m looksam_kernels build`` compiles them later.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = "looksam_kernels"


def part_of_the_package(name: str) -> ModuleType:
    """A file of looksam_kernels/build, without importing the package: that needs torch."""
    spec = importlib.util.spec_from_file_location(name, ROOT / PACKAGE / "build" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


recipe = part_of_the_package("recipe")
compiling = part_of_the_package("compiling")

CSRC = ROOT / "csrc"
VARIABLES = {recipe.CPU: "LOOKSAM_NATIVE", recipe.CUDA: "LOOKSAM_CUDA"}


def say(line: str) -> None:
    print(f"looksam-kernels: {line}", file=sys.stderr, flush=True)


def left_out(module: str, reason: str) -> None:
    """Says so; an error where the module was asked for."""
    what = {recipe.CPU: "native backend", recipe.CUDA: "CUDA kernels"}[module]
    if recipe.setting(VARIABLES[module]) == "1":
        raise SystemExit(f"looksam-kernels: no {what}: {reason} ({VARIABLES[module]}=0 installs without)")
    say(f"no {what}: {reason}")


class BuildExtensions(build_ext):
    """Each module by itself: what stands in the way of one does not cost the other."""

    def build_extension(self, extension: Extension) -> None:
        module = extension.name.rpartition(".")[2]
        into = Path(self.get_ext_fullpath(extension.name))
        lines: list[str] = []
        try:
            stamp = recipe.wanted_stamp(CSRC, module, recipe.cuda_arch_list() if module == recipe.CUDA else "")
            made = compiling.compile_module(recipe, CSRC, stamp, self.objects(stamp), into.parent, lines.append)
        except (compiling.CompileError, OSError, ValueError) as error:
            print("\n".join(["", *getattr(error, "tail", [])]), file=sys.stderr)
            reason = f"the compiler failed ({error})"
            left_out(module, reason)
            extension.optional = True
            if module == recipe.CPU:
                self.note(into.parent, reason)
        else:
            made.replace(into)
            if module == recipe.CPU:
                self.note(into.parent, None)
            device = "the CPU" if module == recipe.CPU else f"CUDA {stamp.cuda} ({stamp.arch})"
            say(f"native backend built for {device} with torch {stamp.torch}")

    def objects(self, stamp: object) -> Path:
        """Kept between builds. Objects for another torch or compiler are no use: torch's headers count as the system's,
        which nobody watches."""
        made_for = hashlib.sha256(repr(stamp._replace(sources="")).encode()).hexdigest()[:10]
        kept = ROOT / "build" if self.editable_mode or self.in_place else Path(self.build_temp)
        return kept / "objects" / f"{stamp.module}-{made_for}"

    def run(self) -> None:
        self.in_place = self.inplace  # which the superclass resets while it runs
        super().run()

    def note(self, package: Path, reason: str | None) -> None:
        write_note(package, reason)
        if self.editable_mode or self.in_place:
            write_note(ROOT / PACKAGE, reason)


class BuildPackages(build_py):
    """Puts the sources of the native backend into the package, from which they are compiled later."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib, PACKAGE)
        for module in (recipe.CPU, recipe.CUDA):
            for path in recipe.files(CSRC, recipe.SOURCES[module] + recipe.HEADERS[module]):
                target = package / "csrc" / path.relative_to(CSRC)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        if os.environ.get("LOOKSAM_NATIVE") == "0":
            write_note(package, "left out at installation with LOOKSAM_NATIVE=0")


def write_note(package: Path, reason: str | None) -> None:
    """The installed package tells from this file why it has no extension: pip shows a build's output only on failure."""
    note = package / "native_build.txt"
    if reason is None:
        note.unlink(missing_ok=True)
    else:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{reason}\n")


class EditableInstall(editable_wheel):
    """One line of a .pth file that names a folder with links to both packages.

    setuptools' own answer to two source folders is an import hook, which type checkers and editors do not see through.
    """

    def _select_strategy(self, name: str, tag: str, build_lib: str) -> EditableInstall:
        return self

    def __enter__(self) -> EditableInstall:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def __call__(self, wheel: object, files: list[str], mapping: dict[str, str]) -> None:
        links = ROOT / ".editable"
        links.mkdir(exist_ok=True)
        for name, target in (("looksam", "../python/looksam"), (PACKAGE, f"../{PACKAGE}")):
            link = links / name
            link.unlink(missing_ok=True)
            link.symlink_to(target, target_is_directory=True)
        wheel.writestr(f"__editable__.{PACKAGE}.pth", f"{links}\n")


def modules() -> list[str]:
    """Those that are to be compiled."""
    if recipe.setting("LOOKSAM_NATIVE") == "0":
        say("no native backend: LOOKSAM_NATIVE=0")
        return []
    reasons = {recipe.CPU: recipe.why_no_cpu()}
    if reasons[recipe.CPU] is None:
        reasons[recipe.CUDA] = recipe.why_no_cuda()
    for module, reason in reasons.items():
        if reason is not None:
            left_out(module, reason)
    return [module for module, reason in reasons.items() if reason is None]


try:
    extensions = [Extension(f"{PACKAGE}.{module}", sources=[]) for module in modules()]
except ValueError as error:
    raise SystemExit(f"looksam-kernels: {error}") from None
commands = {"build_ext": BuildExtensions, "build_py": BuildPackages, "editable_wheel": EditableInstall}
setup(ext_modules=extensions, cmdclass=commands)
