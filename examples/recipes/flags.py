"""Write the table of all flags of train_ltd.py into the README.md beside this file, between its two markers.

python examples/recipes/flags.py           # rewrites README.md
python examples/recipes/flags.py --check   # exit code 1 when README.md is out of date
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # train_ltd.py is a script in the repository's root, not an installed module

from train_ltd import build_parser

BEGIN, END = "<!-- flags: written by examples/recipes/flags.py -->", "<!-- end of flags -->"


def flags_table() -> str:
    """One Markdown table a group of flags."""
    parts = []
    for group in build_parser()._action_groups[2:]:
        parts.append(f"**{group.title}**\n\n| flag | default | what it does |\n|---|---|---|")
        for action in group._group_actions:
            choices = " " + " \\| ".join(action.choices) if action.choices else ""
            default = "" if action.default is None else f"`{action.default}`"
            text = (action.help or "").replace("%%", "%").replace("|", "\\|")
            parts[-1] += f"\n| `--{action.dest}`{choices} | {default} | {text} |"
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    check = parser.parse_args().check
    readme = Path(__file__).with_name("README.md")
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    wanted = f"{head}{BEGIN}\n\n{flags_table()}\n\n{END}{rest.split(END)[1]}"
    if check:
        return int(wanted != text)
    readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
