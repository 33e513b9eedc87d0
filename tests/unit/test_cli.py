"""The console command, as typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import transformers

from ..models import config_of


COMMAND = Path(sys.executable).with_name("hf-longctx")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True)


def test_env_names_versions_and_kernels():
    done = run("env")
    assert done.returncode == 0, done.stderr
    assert transformers.__version__ in done.stdout and "sdpa" in done.stdout


def test_check_shows_who_gets_which_heads(tmp_path):
    config_of("llama", num_attention_heads=9, num_key_value_heads=3, hidden_size=36).save_pretrained(tmp_path)
    done = run("check", str(tmp_path), "--sequence_parallel_size", "2")
    assert done.returncode == 0, done.stdout
    assert "0..4" in done.stdout and "5..8" in done.stdout and "1.33 times" in done.stdout


def test_check_refuses_with_the_sentence(tmp_path):
    config_of("llama").save_pretrained(tmp_path)
    done = run("check", str(tmp_path), "--sequence_parallel_size", "7")
    assert done.returncode == 2
    assert "exceeds the model's query heads (6)" in done.stdout


def test_help_is_cheap_and_a_wrong_command_is_told():
    done = run("chek")
    assert done.returncode == 2 and "invalid choice" in done.stderr
    code = "import sys; from hf_longctx.cli import main\ntry: main(['--help'])\nexcept SystemExit: "
    code += "print('torch' in sys.modules)"
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert helped.stdout.strip().endswith("False")


def test_every_module_can_be_imported_first():
    """Registration runs inside somebody's import, which must not be one of our own half-imported files."""
    root = Path(__file__).parents[2] / "hf_longctx"
    for path in sorted((root / "attention").glob("*.py")):
        name = ".".join(path.relative_to(root.parent).with_suffix("").parts)
        code = f"import {name}, transformers; assert 'ulysses' in transformers.AttentionInterface()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"
