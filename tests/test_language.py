"""Docstrings, comments, messages and documentation avoid phrases that read as translated."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("kafjax", "data_prep", "configs", "docs", "benchmarks", "tests")
# The one names the phrases, the other is generated.
SKIPPED = {Path(__file__), ROOT / "docs" / "configuration.md"}

# What not to write, and a plain way to say it.
PHRASES = {
    r"\bgo(es|ing)? on\b(?! disk)": "continue, resume",
    r"\b(begins?|begun|began|made|writes?|written) anew\b": "start from scratch, rebuild, rewrite",
    r"\bafresh\b": "from scratch",
    r"\btells?\b(?! .*apart)": "report, record, identify",
    r"\btold\b(?! apart)": "reported, given",
    r"\bbeside\b": "next to, in addition to, plus",
    r"\bbut for\b": "except",
    r"(?<!each )(?<!part )(?<!some )(?<!one )\bof which\b": "split the sentence",
    r"\b(that|which) there (is|are)\b": "existing, missing, unknown",
    r"\bas (it|they) comes?\b": "unchanged",
    r"\bnobody (looks|takes)\b": "discarded",
    r"\bwas begun\b": "started",
    r"\ball that\b": "everything that",
    r"\bwithout a word\b": "silently",
    r"\bpassed over\b": "skipped",
    r"\bvouch|\bbelie(f|ved?)\b": "verify, accept",
    r"^\"\"\"(Of|Whose) ": "a verb or a noun first",
}


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a page, or a Python file's comments and strings; docstrings with their quotes."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield from enumerate(text.splitlines(), start=1)
        return
    tree = ast.parse(text)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            quotes = '"""' if node in docstrings else ""
            yield node.lineno, quotes + " ".join(node.value.split())
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def test_the_prose_is_plain_english() -> None:
    paths = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    paths |= {*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; rather: {plain}"
        for path in sorted(paths - SKIPPED)
        for line, text in prose(path)
        for phrase, plain in PHRASES.items()
        if (match := re.search(phrase, text))
    ]
    assert not found, "\n".join(found)


def test_a_phrase_is_found_in_docstrings_comments_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text('"""Of what\ngoes on."""\nx = 1  # beside it\nprint(f"was told of {x}")\n')
    found = dict(prose(path))
    assert found == {1: '"""Of what goes on.', 3: "# beside it", 4: "was told of"}
    for text in found.values():
        assert any(re.search(phrase, text) for phrase in PHRASES), text
