"""What the command does before it trains: what it imports, which process of torchrun speaks."""

import os
import subprocess
import sys

import pytest

import looksam


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_help_imports_neither_torch_nor_figures():
    code = (
        "import sys\nfrom looksam.lab.cli import main\n"
        "try: main(['--help'])\nfinally: print(sorted({'torch', 'matplotlib', 'sklearn', 'numpy'} & set(sys.modules)))"
    )
    output = python("-c", code).stdout
    assert output.rstrip().endswith("[]"), output
    for name in ("train", "compare", "report", "cache", "info"):
        assert f"  {name} " in output


def test_every_public_name_is_there_without_its_module():
    code = "import looksam; print(all(hasattr(looksam, n) for n in looksam.__all__), looksam.optimizer.__name__)"
    assert python("-c", code).stdout.split() == ["True", "looksam.optimizer"]
    assert set(looksam.__all__) <= set(dir(looksam))
    with pytest.raises(AttributeError, match="'looksam' has no attribute 'LokSAM'"):
        _ = looksam.LokSAM


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--epochs", "none"], ["nonsense"]])
def test_under_torchrun_one_process_speaks(rank, speaks, arguments):
    done = python("-m", "looksam.lab.cli", *arguments, TORCHELASTIC_RUN_ID="x", RANK=rank)
    assert bool(done.stdout + done.stderr) == speaks, done
    assert done.returncode == (0 if arguments == ["--help"] else 2)


def test_a_locale_without_the_signs_is_no_reason_to_fail():
    done = python("-m", "looksam.lab.cli", "info", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout
