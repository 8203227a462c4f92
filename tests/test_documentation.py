"""What the Markdown files name is there: files, headings, commands, their options, tests.

Left out: what the commands print and whether figures are right (test_study_facts.py and the benchmarks' own tests).
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ppow_train import cli

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A command stands at the start of a line of a code block, perhaps behind `&&` or variables, or inline in `…`.
IN_LINE = re.compile(r"`([^`\n]+)`")
VARIABLES = re.compile(r"^(?:[A-Z_]+=\S+ |taskset -c \d+ )*")
# Other options of `ppow serve` are vLLM's; `…` stands for options left out.
PASSED_ON = {"serve"}


def documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a document: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


def dead_links(path: Path, text: str) -> list[str]:
    """Relative links of a document to files or headings that are not there."""
    dead = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        aim = (path.parent / file) if file else path
        if not aim.exists() or (anchor and anchor not in anchors(_text(aim, path, text))):
            dead.append(link)
    return dead


def _text(aim: Path, path: Path, text: str) -> str:
    return text if aim == path else aim.read_text("utf-8")


def commands(text: str) -> Iterator[str]:
    """Every shell command that a document shows, continued lines joined and comments cut."""
    blocks = "\n".join(block.strip("`") for block in FENCE.findall(text)).replace("\\\n", " ")
    shown = blocks.splitlines() + IN_LINE.findall(FENCE.sub("", text))
    for line in shown:
        for part in re.split(r"&&|;", line):
            yield VARIABLES.sub("", part.split(" #")[0].strip().removeprefix(".venv/bin/"))


def unknown_options(command: str) -> list[str]:
    """Options of a `ppow …` command that its subcommand has not, or the subcommand itself."""
    words = shlex.split(command.replace("…", " "))[1:]
    found: click.Command | None = cli.ppow
    context = click.Context(cli.ppow)
    while isinstance(found, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        found = found.get_command(context, name)
        if found is None:
            return [name]
        if name in PASSED_ON:
            return []
    assert found is not None
    known = {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}
    known.add("--help")
    return [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]


def wrong_ppow(text: str) -> list[str]:
    shown = [command for command in commands(text) if re.match(r"ppow [a-z]", command)]
    return [f"{command}: {unknown}" for command in shown if (unknown := unknown_options(command))]


def wrong_scripts(text: str) -> list[str]:
    """Commands that run a file of the repository which is not there, or with options that it does not mention."""
    wrong = []
    for command in commands(text):
        match = re.match(r"(?:python )?((?:examples|tests)/[\w/.-]+\.(?:py|sh))\b(.*)", command)
        if not match:
            continue
        path = ROOT / match[1]
        if not path.is_file():
            wrong.append(command)
            continue
        source = "".join(file.read_text("utf-8") for file in path.parent.glob("*.py")) + path.read_text(
            "utf-8"
        )
        unknown = [
            option for option in re.findall(r"(?<= )--[\w-]+", match[2]) if f'"{option}"' not in source
        ]
        if unknown:
            wrong.append(f"{command}: {unknown}")
    return wrong


def missing_tests(text: str) -> list[str]:
    named = [command for command in commands(text) if command.startswith("pytest ")]
    paths = [word for command in named for word in command.split() if word.startswith("tests")]
    return [path for path in paths if not (ROOT / path.partition("::")[0]).exists()]


CHECKS = {"ppow": wrong_ppow, "scripts": wrong_scripts, "tests": missing_tests}


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert dead_links(path, path.read_text("utf-8")) == []


@pytest.mark.parametrize("check", CHECKS)
def test_commands_can_be_given_as_they_stand(check):
    wrong = {path.name: CHECKS[check](path.read_text("utf-8")) for path in documents()}
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    ("file", "start"),
    [
        ("README.md", "ppow train --"),
        ("train/README.md", "ppow bench --"),
        ("vllm_ppow/README.md", "ppow profile --"),
        ("tests/README.md", "pytest tests/"),
        ("examples/benchmarks/README.md", "python examples/benchmarks/"),
    ],
)
def test_commands_are_seen(file, start):
    assert any(command.startswith(start) for command in commands((ROOT / file).read_text("utf-8")))


INTERVAL = re.compile(r"[-+]\d+\.\d \([-+]\d+\.\d … [-+]\d+\.\d\)")
STUDIES = "examples/benchmarks/study*/table.md"


@pytest.mark.parametrize("name", ["README.md", "examples/benchmarks/objectives.md"])
def test_intervals_in_tables_of_objectives_are_those_that_studies_printed(name):
    printed = {
        interval for path in ROOT.glob(STUDIES) for interval in INTERVAL.findall(path.read_text("utf-8"))
    }
    rows = [line for line in (ROOT / name).read_text("utf-8").splitlines() if line.startswith("| ")]
    shown = [interval for row in rows for interval in INTERVAL.findall(row)]
    assert len(shown) > 20
    assert [interval for interval in shown if interval not in printed] == []


def test_what_is_wrong_is_found(tmp_path):
    text = (
        "# A `b`: c\n[here](#a-b-c) [gone](gone.md) [no](#nowhere)\n`pytest tests/gone.py`\n"
        "```\nA=1 ppow bench --adaptor x --limit 3\nppow training --x\npython examples/gone.py\n"
        "python examples/benchmarks/serve_within.py --output x --no-such\n```\n"
    )
    path = tmp_path / "it.md"
    path.write_text(text, encoding="utf-8")
    assert dead_links(path, text) == ["gone.md", "#nowhere"]
    assert [word for line in wrong_ppow(text) for word in re.findall(r"\['(.*?)'\]", line)] == [
        "--adaptor",
        "training",
    ]
    assert len(wrong_scripts(text)) == 2
    assert missing_tests(text) == ["tests/gone.py"]
