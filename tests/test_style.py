"""The house's own rules, counted: a line of code holds one thought, and other programs enter by the door."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
FSTRING_START = getattr(tokenize, "FSTRING_START", None)  # since Python 3.12 an f-string is many tokens
FSTRING_END = getattr(tokenize, "FSTRING_END", None)
# What the docstring of train_ltd.py offers to other programs
DOOR = {
    "parse_args",
    "build_accelerator",
    "identify_wan",
    "prepare_data",
    "read_clip",
    "encode_clip",
    "cache_captions",
    "LatentDataset",
    "load_vae",
    "load_transformer",
    "add_lora",
    "predict_flow",
    "evaluate",
    "main",
}
# And what one example may take beside: how a mistake ends, a loss to wrap, the parser for the table of flags, other
# people's LoRA files, both experts of a pipeline, a picture to start from and CLIP for it, rows for thumbnails
DOOR_OF = {
    "ablation.py": {"run_script"},
    "benchmark.py": {"compute_loss", "run_script"},
    "flags.py": {"build_parser"},
    "generate.py": {
        "FlagParser",
        "Wan",
        "expert_boundary",
        "find_lora",
        "load_image_encoder",
        "network_fault",
        "read_image",
        "read_lora",
        "run_script",
    },
    "small_wan.py": {"run_script"},
    "tilt.py": {"run_script"},
    "visualize_ltd.py": {
        "FlagParser",
        "describe_fault",
        "eval_sigmas",
        "frames_at",
        "load_image_encoder",
        "locate_clip",
        "open_dataset",
        "run_script",
        "video_seconds",
    },
}


def counted_lines(source: str) -> list[int]:
    """Return the line of each token that counts: a whole f-string is one."""
    lines = []
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == FSTRING_START:
            depth += 1
            if depth == 1:
                lines.append(token.start[0])
        elif token.type == FSTRING_END:
            depth -= 1
        elif depth == 0 and token.type in COUNTED:
            lines.append(token.start[0])
    return lines


def left_out(tree: ast.Module) -> set[int]:
    """Return the lines of docstrings, and of `build_parser`, which is a flag a line."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef) and node.name == "build_parser":
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def density(path: Path) -> float:
    """Return the tokens of code a line that has any."""
    source = path.read_text(encoding="utf-8")
    skipped = left_out(ast.parse(source))
    lines = [line for line in counted_lines(source) if line not in skipped]
    return len(lines) / len(set(lines))


def test_density_is_counted_right(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        '"""A docstring."""\n\nx = f"{1 + 1} and {2}"  # a comment\n\n\ndef double(a):\n    return 2 * a\n'
    )
    # x = f"" / def double ( a ) : / return 2 * a
    assert density(path) == (3 + 6 + 4) / 3


@pytest.mark.parametrize("name", ["train_ltd.py", "ltd_loss.py"])
def test_script_is_not_folded(name):
    assert density(ROOT / name) <= 10.0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_not_folded(path):
    assert density(path) <= 11.0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_enter_by_the_door(path):
    """They use the names that are offered, and assign to none of them."""
    allowed = DOOR | DOOR_OF.get(path.name, set())
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "train_ltd":
            assert {alias.name for alias in node.names} <= allowed
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "train_ltd":
            assert node.attr in allowed
            assert isinstance(node.ctx, ast.Load)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_command_ends_a_mistake_in_one_line(path):
    source = path.read_text(encoding="utf-8")
    assert "def parse_args(" not in source or source.endswith("run_script(main, parse_args)\n")


def test_docstring_of_the_script_lists_the_door():
    docstring = ast.get_docstring(ast.parse((ROOT / "train_ltd.py").read_text(encoding="utf-8")))
    listed = re.search(r"import these names: (.*?)\.\n", docstring, re.DOTALL)[1]
    assert set(re.findall(r"\w+", listed)) - {"and"} == DOOR
