"""The documentation: links lead somewhere, commands exist, and what can be run is run.

A block of commands (`sh`) or Python is run as it stands, in order with the others of its page,
unless a comment directly above it says what it needs: `<!-- needs: CHD -->`. Those that need
minutes are run by `make test-slow`; all others are read, and their modules, flags and config fields
must exist.
"""

import ast
import importlib
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import flax
import pytest
from absl import flags
from ml_collections import config_flags

from data_prep.flags import make_parser, refuse_stray
from data_prep.readers import READERS
from docs import configuration
from kafjax.cli import COMMANDS
from kafjax.completion import flags_of
from kafjax.config_files import find
from kafjax.models import MODELS
from kafjax.training.config_checks import check_fields
from tests.runs import ROOT, command_environment

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
LANGUAGES = ("sh", "python", "text", "bibtex")
NEEDS = (
    "CHD",
    "ACDC",
    "your own data",
    "a run",
    "the release's weights",
    "several GPUs",
    "several hosts",
    "SLURM",
    "a TPU",
    "Docker",
    "wandb",  # and, as mlflow, a service to send a run to
    "mlflow",
    "a clone",  # of the repository, to install in: `make demo` and its like
    "minutes",
    "hours",
)
_FENCE = re.compile(r"(?:^<!-- (.*) -->\n)?^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
_ENDS = {";", "&&", "||", "|", "&", ">", ">>", "<", "(", ")"}


class Block(NamedTuple):
    """A fenced block, and what it needs; nothing if it is to be run."""

    page: Path
    language: str
    text: str
    needs: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, variables and substitutions replaced by 0."""
        text = self.text.replace("\\\n", " ").replace("\\$", "$")
        return list(_commands(re.sub(r"\$\([^()]*\)|\$\{\w+\}|\$[\w?!]+", "0", text)))


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of a script; words that hold one, as after `bash -c`, are read too."""
    lexer = shlex.shlex(text.replace("\n", "\n ; "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    for ends, words in itertools.groupby(lexer, lambda word: word in _ENDS):
        command = [] if ends else list(words)
        inner = (word for word in command if re.search(r"python -m |kafjax [a-z]", word))
        yield from (words for word in inner for words in _commands(word))
        if command:
            yield command


def blocks(page: Path) -> list[Block]:
    found = []
    for comment, language, text in _FENCE.findall(page.read_text()):
        needs = comment.removeprefix("needs: ") if comment.startswith("needs: ") else None
        found.append(Block(page, language, text, needs))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def modules_run(block: Block) -> list[tuple[str, list[str]]]:
    """What a block calls as `kafjax COMMAND ARGUMENTS` or `python -m MODULE ARGUMENTS`."""
    found = []
    for words in block.commands:
        for i, word in enumerate(words):
            if word == "kafjax" and words[i + 1][0] != "-":
                found.append((COMMANDS[words[i + 1]].module, words[i + 2 :]))
            elif word.endswith("python") and words[i + 1] == "-m":
                found.append((words[i + 2], words[i + 3 :]))
    return found


CALLS = [
    pytest.param(module, arguments, id=f"{block.page.stem}-{module}-{i}")
    for block in BLOCKS
    if block.language == "sh"
    for i, (module, arguments) in enumerate(modules_run(block))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = _FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in headings(place), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_fields_in_the_text_exist(page: Path) -> None:
    shipped = itertools.product(("chd", "own"), ("pretrain", "finetune"))
    fields = set().union(*(fields_of(f"{data}_{task}") for data, task in shipped))
    ignored = (ROOT / ".gitignore").read_text().split()
    for code in re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text())):
        if re.fullmatch(r"(kafjax|data_prep|configs|docs|tests|benchmarks|faults)/[\w/.]*", code):
            assert (ROOT / code).exists() or code in ignored, f"{page.name}: {code}"
        for field in re.findall(r"--config\.([\w.]+\w)", code):
            assert field in fields, f"{page.name}: {code}"


def fields_of(config: str) -> set[str]:
    tree = importlib.import_module(f"kafjax.configs.{config}").get_config().to_dict()
    return set(flax.traverse_util.flatten_dict(tree, sep="."))


def test_every_block_says_what_it_is_and_what_it_needs() -> None:
    assert len(BLOCKS) > 20
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block.page.name}: ```{block.language}\n{block.text}"
        assert block.needs in (None, *NEEDS), f"{block.page.name}: {block.needs}"


def test_commands_are_read_as_a_shell_does() -> None:
    text = (
        "for i in 0 1; do\n  X=1 python -m a --b=$i \\\n    --c='(1, 2)' > log &\ndone\n"
        "srun bash -c 'python -m d --e=$F'  # --g\n"
        "until srun kafjax train --config x; do kafjax --help; done\n"
    )
    block = Block(ROOT, "sh", text, None)
    assert modules_run(block) == [
        ("a", ["--b=0", "--c=(1, 2)"]),
        ("d", ["--e=0"]),
        ("kafjax.main", ["--config", "x"]),
    ]


@pytest.mark.parametrize(("module", "arguments"), CALLS)
def test_commands_have_modules_flags_and_fields(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = flags_of(module)
    for word in arguments:
        name = re.match(r"--(\w+)", word)
        assert not name or name[1] in known, f"{module} has no flag {word}"
    text = arguments[arguments.index("--config") + 1] if "--config" in arguments else "~"
    if not text.startswith("~"):  # a reader's own config
        # The parser of the commands themselves: types, names, and the method after a colon.
        found = find(text)
        config = ["--config", ":".join(filter(None, (str(found.path), found.variant)))]
        given = [word for word in arguments if word.startswith("--config.")]
        absent = [word for word in given if word.endswith("=None")]  # which any field may be given
        config += [word for word in given if word not in absent]
        monkeypatch.setattr(sys, "argv", ["program", *config])
        values = flags.FlagValues()
        flag = config_flags.DEFINE_config_file("config", flag_values=values)
        values(sys.argv)
        none = dict.fromkeys(w.removeprefix("--config.").removesuffix("=None") for w in absent)
        flag.value.update_from_flattened_dict(none)
        check_fields(flag.value)
    if module == "data_prep.main":
        refuse_stray(make_parser().parse_args(arguments))


@pytest.mark.parametrize("command", ["make", "pip"])
def test_targets_and_extras_exist(command: str) -> None:
    words = [c[1:] for b in BLOCKS if b.language == "sh" for c in b.commands if c[0] == command]
    assert words
    known = {
        "make": re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE),
        "pip": re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE),
    }[command]
    for arguments in words:
        found = re.findall(r"[\w-]+", arguments[-1])
        assert set(found) <= set(known), arguments


def run_blocks(page: Path, needs: tuple[str | None, ...]) -> None:
    """Runs a page's blocks in order, in the current folder; Python in one namespace."""
    namespace = {"__name__": f"docs.{page.stem}"}
    environment = command_environment(Path("bin"))
    for block in blocks(page):
        if block.needs not in needs:
            continue
        if block.language == "python":
            exec(compile(block.text, page.name, "exec", dont_inherit=True), namespace)
        elif block.language == "sh":
            subprocess.run(["bash", "-euc", block.text], env=environment, check=True)


def pages_with(needs: str | None) -> list[Path]:
    runnable = [b for b in BLOCKS if b.language in ("sh", "python") and b.needs == needs]
    return list(dict.fromkeys(block.page for block in runnable))


@pytest.mark.parametrize("page", pages_with(None), ids=lambda page: page.stem)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(MODELS), dict(READERS)
    try:
        run_blocks(page, (None,))
    finally:
        for registry, names in zip((MODELS, READERS), before, strict=True):
            for name in registry.keys() - names.keys():
                del registry[name]


def test_python_that_is_not_run_imports_what_there_is() -> None:
    unrun = [b for b in BLOCKS if b.language == "python" and b.needs not in (None, "minutes")]
    assert unrun
    for block in unrun:
        tree = ast.parse(block.text)
        imports = [
            node
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            or (isinstance(node, ast.Import) and node.names[0].name != block.needs)
        ]
        exec(compile(ast.Module(imports, []), block.page.name, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("minutes"), ids=lambda page: page.stem)
def test_longer_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(page, (None, "minutes"))


def test_the_configuration_page_is_up_to_date() -> None:
    assert configuration.PAGE.read_text() == configuration.page(), (
        "run python -m docs.configuration"
    )


@pytest.mark.slow
def test_the_reference_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "kafjax", "data_prep"]
    done = subprocess.run(
        [*command, "--output-directory", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    assert "supervised_contrastive_loss" in (tmp_path / "kafjax" / "losses.html").read_text()
