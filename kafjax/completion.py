"""Completion of the command `kafjax`: `kafjax completion bash` or `zsh` prints a script.

    eval "$(kafjax completion bash)"    # in ~/.bashrc; in ~/.zshrc after compinit, with zsh

The script asks `kafjax completion words` for the candidates at the cursor: commands, flags, shipped
configs and tables. Flags are parsed from the commands' sources, to avoid slow imports. Without
candidates the shell completes files.
"""

import ast
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kafjax.cli import COMMANDS, find_source
from kafjax.config_files import CONFIGS, TABLES, shipped_names

# COMP_WORDBREAKS splits at = and :, so bash replaces only the text after them.
_SCRIPTS = {
    "bash": """\
_kafjax() {
    local IFS=$'\\n'
    COMPREPLY=($(kafjax completion words "${COMP_LINE:0:COMP_POINT}" \
        "${COMP_WORDS[COMP_CWORD]}" 2>/dev/null))
}
complete -o default -F _kafjax kafjax
""",
    "zsh": """\
#compdef kafjax
_kafjax() {
    local -a words_at_cursor
    words_at_cursor=(${(f)"$(kafjax completion words "${(j: :)words[1,CURRENT]}" 2>/dev/null)"})
    if (( $#words_at_cursor )); then compadd -a words_at_cursor; else _files; fi
}
compdef _kafjax kafjax
""",
}
_NAMES = {"--config": CONFIGS, "--table": TABLES}
# Arguments without dashes.
_PARTS = {"completion": list(_SCRIPTS), "figures": ["keypoints", "similarity", "segmentation"]}


def complete(line: str) -> list[str]:
    """The candidates for the last word of a command line that begins with `kafjax`."""
    try:
        words = shlex.split(line)
    except ValueError:  # inside a quotation
        return []
    if line[-1:].isspace() or not words:
        words.append("")
    *before, current = words[1:] or [""]
    return sorted(word for word in _candidates(before, current) if word.startswith(current))


def flags_of(module: str) -> set[str]:
    """The flags of `python -m MODULE`, without dashes and without absl's own."""
    source = find_source(module)
    sources = [source, *source.parent.glob("flags.py")]
    return {name for path in sources for name in _flags(ast.parse(path.read_bytes()))}


def _candidates(before: Sequence[str], current: str) -> Iterator[str]:
    if not before:
        yield from (*COMMANDS, "--help", "--version")
        return
    flag, equals, text = current.partition("=")
    if equals and flag in _NAMES:
        yield from (f"{flag}={name}" for name in _values(flag, text))
    elif before[-1] in _NAMES:
        yield from _values(before[-1], current)
    elif before[0] in COMMANDS and not equals:
        if len(before) == 1:
            yield from _PARTS.get(before[0], ())
        if current.startswith("-"):
            yield from (f"--{name}" for name in (*flags_of(COMMANDS[before[0]].module), "help"))


def _values(flag: str, text: str) -> Iterator[str]:
    """Shipped names, and Python files that start with the text."""
    yield from shipped_names(_NAMES[flag])
    start = Path(text or ".")
    folder = start if text.endswith("/") or not text else start.parent
    prefix = text[: text.rfind("/") + 1]
    yield from (f"{prefix}{path.name}" for path in folder.glob("*.py"))


def _flags(tree: ast.Module) -> Iterator[str]:
    """The names in calls that define flags with absl or argparse."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        function, first = ast.unparse(node.func), getattr(node.args[0], "value", None)
        if function.endswith("define_config"):
            yield "config"
        if function.endswith("define_data_dir"):
            yield "data_dir"
        # A call with a name, a default and a help defines a flag, whatever the function's name.
        is_flag = "DEFINE_" in function or len(node.args) == 3 or str(first).startswith("--")
        if is_flag and isinstance(first, str) and re.fullmatch(r"(--)?[a-z]\w*", first):
            yield first.removeprefix("--")


def main(arguments: Sequence[str]) -> int:
    """Prints a shell's script, or the words at the cursor; returns the exit status."""
    match arguments:
        case [shell] if shell in _SCRIPTS:
            print(_SCRIPTS[shell], end="")
        case ["words", line, *current]:
            words = complete(line)
            # bash splits this part off the last word.
            cut = 0
            if current and words:
                last = (shlex.split(line) or [""])[-1] if not line[-1:].isspace() else ""
                cut = len(last) - len(current[0].lstrip("=:"))
            print("\n".join(word[cut:] for word in words))
        case _:
            print(f"error: found {shlex.join(arguments)!r}, expected bash or zsh", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
