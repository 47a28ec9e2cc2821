"""loralib reproduce: recipes, data found by name, stages that are skipped, resumed and repeated, and the report."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from loralib.bases.loading import load_base
from loralib.cli import main
from loralib.data import tokenize
from loralib.errors import ConfigError, DataError, OutputError
from loralib.formats import read_adapter
from loralib.generation import Sampling, beam_search
from loralib.nlg.published import Row
from loralib.nlg.reproduction import choose_recipe, find_files, load_recipe, pipeline, recipe_names, reproduce
from loralib.nlg.reproduction import decode as decoding
from loralib.nlg.reproduction.decode import decode, end_ids, read_decoded, write_decoded
from loralib.nlg.reproduction.report import markdown, plot_scores
from loralib.nlg.reproduction.sources import as_source, group_inputs, prompt_of, read_split
from loralib.nlg.reproduction.stages import difference

MODEL = "scratch-32x1-seed0"
PUBLISHED = {"e2e": ["BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr"], "dart": ["BLEU", "METEOR", "TER"]}
QUICK = [
    "train.max_steps=3", "train.max_valid_samples=4", "train.max_train_samples=16", "train.batch_size=2",
    "train.warmup_steps=0", "train.save_steps=1", "train.dtype=fp32", "decode.num_beams=2", "decode.max_new_tokens=4",
    "max_inputs=4",
]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def write_data(folder: Path) -> Path:
    folder.mkdir()
    for split, places in (("train", "abcdefgh"), ("valid", "ijk"), ("test", "lmnop")):
        texts = [(f"{p.upper()}{p}", kind) for p in places for kind in ("Thai", "good Thai")]
        rows = [f"name : {name} | food : Thai||{name} serves {kind} food .\n" for name, kind in texts]
        (folder / f"{split}.txt").write_text("".join(rows), encoding="utf-8")
    return folder


def command(data: Path, out: Path, *changes: str) -> list[str]:
    words = ["reproduce", "e2e", "--model", MODEL, "--data", str(data), "--output_dir", str(out)]
    return [*words, "--set", *QUICK, *changes]


Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command and returns what it printed."""

    def run(*changes: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(command(data, tmp_path / "out", *changes)) == code
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(command(write_data(folder / "data"), folder / "out")) == 0
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, which `run` continues."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def made(printed: str) -> dict[str, str]:
    """The outcome of each stage: the first word after its name."""
    stages = ("data", "base", "train", "decode", "perplexity", "scores", "report")
    lines = [line for line in printed.splitlines() if line.startswith(stages)]
    told = {"...": "made", ": already done": "kept", ": running again": "again", ": continuing": "resumed"}
    return {
        stage: next(word for sign, word in told.items() if sign in line)
        for line in lines
        for stage in stages
        if line.startswith((f"{stage} ...", f"{stage}:"))
    }


def all_stages(**others: str) -> dict[str, str]:
    names = ("data", "base", "train", "decode", "perplexity", "scores", "report")
    return {name: others.get(name, "kept") for name in names}


# --- recipes -----------------------------------------------------------------------------------------------------


def test_the_papers_recipes_are_those_of_its_table_11() -> None:
    for dataset in ("e2e", "dart", "webnlg"):
        for size in ("medium", "large"):
            recipe = load_recipe(f"{dataset}-gpt2-{size}")
            train, decode = recipe.train, recipe.decode
            assert train.lora_config().enable_lora == {"c_attn": (True, False, True)}
            assert (train.rank, train.alpha, train.lr, train.batch_size, train.num_epochs) == (4, 32, 2e-4, 8, 5)
            assert (train.warmup_steps, train.schedule, train.loraplus_lr_ratio) == (500, "linear", 1)
            regular = (train.lora_dropout, train.label_smoothing, train.weight_decay)
            assert regular == ((0, 0, 0) if dataset == "dart" else (0.1, 0.1, 0.01))
            assert (decode.num_beams, decode.no_repeat_ngram_size) == (10, 4)
            assert decode.length_penalty == (0.9 if dataset == "e2e" else 0.8)
            # What its code does beside the table.
            assert (train.arithmetic, train.beta2, train.adam_eps, train.max_grad_norm) == ("paper", 0.999, 1e-6, 0)
            assert (train.seq_len, train.max_train_samples, train.share_prompts) == (512, 0, False)
            assert (recipe.form, decode.max_new_tokens) == ("paper", 64)
            assert list(recipe.published["all"]) == PUBLISHED.get(dataset, PUBLISHED["dart"])
            assert recipe.published.keys() == ({"all", "seen", "unseen"} if dataset == "webnlg" else {"all"})
    medium = load_recipe("e2e-gpt2-medium")
    assert list(medium.published["all"].values()) == [0.704, 8.85, 0.468, 0.718, 2.53]
    assert "68.7 to 69.5" in medium.note


def test_a_recipe_is_chosen_by_data_and_model() -> None:
    assert choose_recipe("e2e", "gpt2-medium") == choose_recipe("e2e", "models/gpt2-medium") == "e2e-gpt2-medium"
    assert choose_recipe("webnlg", "smollm2-135m") == choose_recipe("dart", "gpt2") == "smollm2-135m"
    assert choose_recipe("dart", "gpt2", "mine.toml") == "mine.toml"
    assert {load_recipe(name).name for name in recipe_names()} == set(recipe_names())


def test_all_faults_of_a_recipe_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'from = "paper"\nmax_inputs = -1\nnum_beams = 3\n[train]\nlora_dmi = 4\nlr = "fast"\nmodel = "gpt2"\n'
        "[decode]\nnum_beams = true\n[published]\nBLUE = 0.7\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    for words in (
        "from is not a key of a recipe. Did you mean 'form'?",
        "num_beams is not a key of a recipe. Did you mean 'decode.num_beams'?",
        "max_inputs is -1, expected 0 (all) or a number of inputs",
        "train.lora_dmi is not a setting. Did you mean 'lora_dim'",
        "train.lr is 'fast', expected a number",
        "train.model is given by the command",
        "decode.num_beams is True, expected a whole number",
        "published.BLUE is not a metric. Did you mean 'BLEU'?",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("e2e-gpt2-medum", [], "Did you mean 'e2e-gpt2-medium'"),
        ("none.toml", [], "none.toml does not exist"),
        ("smollm2-135m", ["train.lr"], "not of the form key=value"),
        ("smollm2-135m", ["form.x=1"], "form is not a table"),
        ("smollm2-135m", ["form=papr"], "form is 'papr', expected 'lines' or 'paper'. Did you mean 'paper'?"),
        ("smollm2-135m", ["train.lr=-1", "decode.top_p=2"], r"(?s)lr is -1.*top_p is 2"),
        ("smollm2-135m", ["train=3"], "expected a table"),
    ],
)
def test_recipes_that_cannot_be(name: str, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(name, changes)


@pytest.mark.parametrize("name", recipe_names())
def test_a_change_replaces_any_spelling_of_a_setting(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nlora_dim = 16\n", encoding="utf-8")
    for recipe in (name, str(tmp_path / "mine.toml")):
        for change in ("train.rank=5", "train.lora_dim=5"):
            assert load_recipe(recipe, [change]).train.rank == 5


def test_changes_win_over_the_file_and_the_command_over_both() -> None:
    recipe = load_recipe("smollm2-135m", ["train.schedule=cosine", "train.seed=1", "decode.num_beams=4"], seed=2)
    assert (recipe.train.schedule, recipe.train.seed, recipe.decode.num_beams) == ("cosine", 2, 4)


# --- data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("e2e", ["train.txt", "valid.txt", "test.txt", "SOURCE.txt", "train.json"]),
        ("e2e", ["trainset.csv", "devset.csv", "testset_w_refs.csv", "testset.csv"]),
        ("dart", [f"dart-v1.1.1-full-{split}.json" for split in ("train", "dev", "test")]),
        ("webnlg", ["train.json", "dev.json", "test.json"]),
    ],
)
def test_files_are_found_by_their_published_names(tmp_path: Path, dataset: str, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in find_files(dataset, tmp_path)] == names[:3]


def test_data_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"--data DIR was not given.*no data/e2e or examples.*`loralib data e2e data/e2e`"
    ):
        find_files("e2e")
    with pytest.raises(DataError, match=r"nope is not a directory.*Yale-LILY"):
        find_files("dart", "nope")
    for name in ("train.txt", "train2.txt", "test.txt"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"(?s)train: several, train.txt, train2.txt.*valid: none with valid or dev"):
        find_files("e2e", tmp_path)
    (tmp_path / "data" / "e2e").mkdir(parents=True)
    for name in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / "data" / "e2e" / name).touch()
    assert find_files("e2e").test == Path("data/e2e/test.txt")


def test_the_papers_form_is_what_its_code_feeds_the_model(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    [example] = as_source([Row("name : A", "A is a pub .")], Path("x"), "paper", tokenizer).examples
    tokens = tokenize(example, tokenizer)
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("name : A", " A is a pub .")]
    end = tokenizer.eos_token_id
    assert list(tokens.ids) == [*parts[0], end, *parts[1], end]
    assert sum(tokens.trained) == len(parts[1]) + 1
    assert tokens.trained[len(parts[0]) + 1]
    assert prompt_of(" name : A ", "lines", "") == "name : A\n"


@pytest.mark.golden
@pytest.mark.parametrize(("dataset", "file"), [("e2e", "test.txt"), ("dart", "dev.json"), ("webnlg", "dev.json")])
def test_prompts_are_encoded_as_by_the_papers_encoder(golden_dir: Path, dataset: str, file: str) -> None:
    from transformers import GPT2Tokenizer

    bpe = golden_dir / "gpt2_bpe"
    tokenizer = GPT2Tokenizer(vocab=str(bpe / "vocab.json"), merges=str(bpe / "merges.txt"))
    path = golden_dir / "data" / dataset / file
    encoded = (golden_dir / "convert" / f"{dataset}_encoded.jsonl").read_text(encoding="utf-8").splitlines()
    source = as_source(read_split(path, dataset)[: len(encoded)], path, "paper", tokenizer)
    for example, line in zip(source.examples, encoded, strict=True):
        wanted = json.loads(line)
        assert list(tokenize(example, tokenizer).ids) == wanted["context"] + wanted["completion"]


# --- decoding ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch() -> tuple[Any, Any]:
    return load_base(MODEL, dtype="fp32", device="cpu")


PROMPTS = [f"name : {name}\n" for name in "ABCDEFG"]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(num_beams=3, max_new_tokens=5, no_repeat_ngram_size=2), Sampling(temperature=1.0, max_new_tokens=5)],
    ids=["beams", "drawn"],
)
def test_a_killed_decoding_goes_on_without_a_line_lost_or_doubled(
    scratch: tuple[Any, Any], tmp_path: Path, sampling: Sampling
) -> None:
    whole = tmp_path / "whole.jsonl"
    write_decoded(whole, *scratch, PROMPTS, sampling, "lines")
    expected = read_decoded(whole, PROMPTS)
    assert sorted(expected) == list(range(len(PROMPTS)))
    content = whole.read_bytes()
    for cut in (0, 1, len(content) // 3, len(content) - 1, len(content)):
        part = tmp_path / "part.jsonl"
        part.write_bytes(content[:cut])
        write_decoded(part, *scratch, PROMPTS, sampling, "lines")
        assert read_decoded(part, PROMPTS) == {
            number: {**line, "score": pytest.approx(line["score"], rel=1e-4)} if line["score"] else line
            for number, line in expected.items()
        }
        assert part.read_bytes().count(b"\n") == len(PROMPTS)


def test_decoding_is_the_beam_search(scratch: tuple[Any, Any]) -> None:
    model, tokenizer = scratch
    sampling = Sampling(num_beams=3, max_new_tokens=5, length_penalty=0.9, no_repeat_ngram_size=2)
    found = dict(decode(model, tokenizer, PROMPTS, sampling, "lines"))
    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    wanted = beam_search(model, rows, num_beams=3, max_new_tokens=5, length_penalty=0.9, no_repeat_ngram_size=2)
    assert [found[number].ids for number in range(len(PROMPTS))] == [
        best.ids[: len(best.ids) - best.ended] for best in wanted
    ]


def test_a_blank_line_ends_a_text_of_the_papers_form(scratch: tuple[Any, Any]) -> None:
    model, tokenizer = scratch
    ends, more = end_ids(model, tokenizer, "lines"), end_ids(model, tokenizer, "paper")
    assert tokenizer.eos_token_id in ends
    assert [tokenizer.decode([token]) for token in more - ends] == ["\n\n"]


@pytest.mark.parametrize(
    "content",
    ["mine\n", '{"id": 0, "prompt": "other", "text": "x"}\n', '{"id": 99, "prompt": "x", "text": "x"}\n', "[1]\n"],
)
def test_files_of_something_else_are_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(OutputError, match="choose another --output_dir"):
        read_decoded(path, PROMPTS)
    assert path.read_text(encoding="utf-8") == content


# --- stages ------------------------------------------------------------------------------------------------------


def test_everything_is_made_once(run: Run, out: Path) -> None:
    lines = (out / "texts.txt").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 4 + 1
    facts = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert facts["data"] == {
        "texts": {"train": 16, "valid": 6, "test": 10},
        "inputs": 4,
        "references": 8,
        "files": ["train.txt", "valid.txt", "test.txt"],
    }
    assert facts["training"]["updates"] == 3
    assert facts["scores"] == json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert facts["scores"]["hypotheses"] == 4
    assert {"BLEU", "NIST", "ROUGE_L", "CIDEr", "TER", "chrF", "SER"} <= facts["scores"].keys()
    assert facts["perplexity"]["adapted"]["PPL"] != facts["perplexity"]["base"]["PPL"]
    assert facts["seconds"].keys() == all_stages().keys() - {"report"}
    report = (out / "report.md").read_text(encoding="utf-8")
    for words in ("## Scores", "![Scores](scores.png)", "![Loss", "`name : Ll | food : Thai`", "| base |", "Ll serves"):
        assert words in report
    for row in ("| `max_inputs` | 4 |", "| `train.max_steps` | 3 |", "| `decode.num_beams` | 2 |"):
        assert row in report
    assert f"Signature: `{facts['perplexity']['adapted']['signature']}`" in report
    assert "| metric | signature |" in report
    for picture in ("loss.png", "scores.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert made(run()) == all_stages()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == times


def test_the_report_s_scores_are_those_of_loralib_evaluate(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(finished / "test.jsonl"), str(finished / "texts.txt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((finished / "scores.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("out")
def test_only_what_depends_on_a_change_is_made_again(run: Run, data: Path) -> None:
    printed = run("decode.num_beams=3")
    assert "decode: running again, since decode.num_beams was 2 and is 3" in printed
    again = made(printed)
    assert {name: again[name] for name in ("data", "base", "train", "decode", "perplexity")} == {
        "data": "kept",
        "base": "again",
        "train": "kept",
        "decode": "again",
        "perplexity": "kept",
    }
    # What is only kept and shown does not count.
    printed = run("train.lr=1e-3", "decode.num_beams=3", "train.save_steps=2")
    assert "train: running again, since train.lr was 0.0001 and is 0.001" in printed
    again = made(printed)
    assert (again["base"], again["train"], again["decode"], again["perplexity"]) == ("kept", *["again"] * 3)
    assert "save_steps" not in printed
    with (data / "valid.txt").open("a", encoding="utf-8") as file:
        file.write("name : Zz | food : Thai||Zz serves Thai food .\n")
    printed = run("train.lr=1e-3", "decode.num_beams=3")
    assert "train: running again, since files.valid changed" in printed
    assert made(printed)["base"] == "kept"


def test_a_result_that_was_changed_or_went_is_made_again(run: Run, out: Path) -> None:
    (out / "texts.txt").write_text("mine\n" * 4, encoding="utf-8")
    (out / "stages" / "perplexity.json").write_text("{", encoding="utf-8")
    printed = run()
    assert "decode: running again, since texts.txt changed or went missing" in printed
    assert made(printed)["perplexity"] == "made"
    (out / "adapter" / "adapter_model.safetensors").unlink()
    assert made(run())["train"] == "again"


class Killed(BaseException):
    """An exception that no handler catches, like a kill."""


def test_a_run_that_was_killed_goes_on(
    run: Run, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loralib.training.run_directory import RunDirectory

    saved, appended = RunDirectory.save, decoding.append_lines

    def save_and_die(*args: Any, **kwargs: Any) -> Any:
        saved(*args, **kwargs)
        raise Killed

    def write_and_die(path: Path, lines: Iterable[Any], written: Any) -> None:
        appended(path, itertools.islice(lines, 2), written)
        with path.open("ab") as file:
            file.write(b'{"id": 3, "pro')
        raise Killed

    with monkeypatch.context() as patch:  # in training, when the first of three updates was saved
        patch.setattr(RunDirectory, "save", save_and_die)
        with pytest.raises(Killed):
            run()
    with monkeypatch.context() as patch:  # in decoding, within the third text
        patch.setattr(decoding, "append_lines", write_and_die)
        with pytest.raises(Killed):
            run()
    printed = capsys.readouterr().out
    assert made(printed)["train"] == "resumed"
    assert "Resuming from step-00000001" in printed
    printed = run()
    assert (made(printed)["train"], made(printed)["decode"]) == ("kept", "resumed")
    # To the bit it is where the same kernels run at the same addresses: tests/test_train.py.
    torch.testing.assert_close(*(read_adapter(folder / "adapter").tensors for folder in (tmp_path / "out", finished)))
    lines, wanted = (
        [json.loads(line) for line in (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in (tmp_path / "out", finished)
    )
    assert {line["id"]: line["text"] for line in lines} == {line["id"]: line["text"] for line in wanted}
    assert len(lines) == 4


def test_a_model_that_is_made_here_is_another_one_with_another_seed(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(pipeline._Reproduction, "_train", killed)
    words = command(data, tmp_path / "out", "train.hidden_dim=32", "train.num_layers=1")
    words[words.index(MODEL)] = "scratch"
    for seed in ("0", "1"):
        with pytest.raises(Killed):
            main([*words, "--seed", seed])
    assert "base: running again, since model.seed was 0 and is 1" in capsys.readouterr().out


def test_an_interrupted_training_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from loralib.training.trainer import Trainer

    def stopped(self: Any) -> bool:
        self.stop.signal_number = 2
        return False

    monkeypatch.setattr(Trainer, "_is_over", stopped)
    printed = run(code=130)
    assert "Run the same command again to continue." in printed
    assert "--resume" not in printed


# --- what is refused ---------------------------------------------------------------------------------------------


def test_nothing_of_others_is_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    assert "contains other files (notes.txt), which are not overwritten" in run(code=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_mistakes_give_one_message(run: Run, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "e2f", "--data", str(data)]) == 2
    assert "there is no data set 'e2f'. Did you mean 'e2e'?" in capsys.readouterr().err
    assert main(["reproduce", "dart", "--data", str(data)]) == 2
    assert "lacks one file for each part of dart" in capsys.readouterr().err
    assert "Did you mean 'max_steps' or" in run("train.max_stesp=3", code=2)
    (data / "test.txt").write_text("no bars\n", encoding="utf-8")
    assert "test.txt:1: no `||`" in run(code=2)
    assert not (tmp_path / "out" / "test.jsonl").exists()


def test_a_prompt_longer_than_the_context(run: Run, data: Path) -> None:
    (data / "test.txt").write_text(f"name : {'x ' * 1100}||text\n", encoding="utf-8")
    assert "the model's context has 1,024" in run(code=2)


@pytest.mark.usefixtures("out")
def test_a_model_that_writes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "one_line", lambda text, form: "")
    assert "generated no text for any of 4 inputs: it stops immediately" in run("decode.num_beams=3", code=2)


def test_print_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["reproduce", "e2e", "--model", "gpt2-large", "--print_recipe"]) == 0
    path = tmp_path / "mine.toml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    mine, theirs = load_recipe(str(path)), load_recipe("e2e-gpt2-large")
    assert (mine.train, mine.decode, mine.published) == (theirs.train, theirs.decode, theirs.published)


def test_print_recipe_applies_and_checks_changes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["reproduce", "webnlg", "--model", "gpt2-large", "--print_recipe", "--seed", "7", "--dtype", "bf16"]
    assert main([*words, "--set", "train.rank=5", "max_inputs=50"]) == 0
    path = tmp_path / "mine.toml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    mine, theirs = load_recipe(str(path)), load_recipe("webnlg-gpt2-large")
    assert (mine.train, mine.max_inputs) == (theirs.train.replace(rank=5, seed=7, dtype="bf16"), 50)
    assert (mine.decode, mine.published) == (theirs.decode, theirs.published)
    assert main([*words, "--set", "train.rnk=5"]) == 2
    assert "train.rnk is not a setting. Did you mean 'rank'" in capsys.readouterr().err


# --- the other data sets, and the report -------------------------------------------------------------------------


def webnlg(categories: list[str]) -> str:
    entries = []
    for number, category in enumerate(categories, 1):
        triple = {"subject": f"S{number}", "property": "is", "object": "O"}
        texts = [{"lex": f"S{number} is {word} O.", "comment": "good"} for word in ("an", "the")]
        entries.append({str(number): {"category": category, "modifiedtripleset": [triple], "lexicalisations": texts}})
    return json.dumps({"entries": entries})


def test_webnlg_with_seen_and_unseen_in_the_papers_form(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        text = webnlg(["Airport", "Artist", "Food", "Airport", "Astronaut"])
        (tmp_path / f"{split}.json").write_text(text, encoding="utf-8")
    figures = ["published.BLEU=0.5", "published.seen.BLEU=0.6", "published.unseen.TER=40.0", "published.source=A paper"]
    recipe = load_recipe("smollm2-135m", [*QUICK, *figures, "form=paper", "decode.min_new_tokens=2"], model=MODEL)
    report = reproduce("webnlg", recipe, find_files("webnlg", tmp_path), tmp_path / "out").read_text(encoding="utf-8")
    header = "| metric | all, ours | all, published | seen, ours | seen, published | unseen, ours | unseen, published |"
    assert header in report
    row = next(line for line in report.splitlines() if line.startswith("| BLEU |"))
    assert [cell.strip() for cell in row.split("|")][3:9:2][:2] == ["50.0", "60.0"]
    assert "Published: A paper." in report


def test_dart(tmp_path: Path) -> None:
    entries = [
        {"tripleset": [[f"S{number}", "IS", "O"]], "annotations": [{"text": f"S{number} is O."}]} for number in range(5)
    ]
    for split in ("train", "dev", "test"):
        (tmp_path / f"dart-{split}.json").write_text(json.dumps(entries), encoding="utf-8")
    recipe = load_recipe("smollm2-135m", QUICK, model=MODEL)
    report = reproduce("dart", recipe, find_files("dart", tmp_path), tmp_path / "out")
    assert "`S0 : is : O`" in report.read_text(encoding="utf-8")


def test_the_report_puts_the_papers_figures_beside_ours(finished: Path, tmp_path: Path) -> None:
    facts = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    paper = load_recipe("e2e-gpt2-medium")
    facts["recipe"] |= {"published": paper.published, "source": paper.source, "note": paper.note}
    facts["scores"] |= {"BLEU": 0.69, "METEOR": None, "skipped": {"METEOR": "no Java"}}
    text = markdown(facts, pictures=True)
    for words in (
        "| BLEU | 69.0 | 70.4 | higher |",
        "| METEOR | - | 46.8 | higher |",
        "METEOR was left out: no Java",
        "table 3. Independent runs of the paper's own script land at 68.7 to 69.5 BLEU.",
    ):
        assert words in text
    assert plot_scores(facts["scores"], paper.published, tmp_path / "scores.png", "E2E")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_differences_are_told_by_name() -> None:
    assert difference({"a": {"b": 1}, "f": "0" * 64}, {"a": {"b": 2, "c": 3}, "f": "1" * 64}) == [
        "a.b was 1 and is 2", "f changed", "a.c was None and is 3",
    ]  # fmt: skip


def test_inputs_keep_their_order_and_all_their_texts() -> None:
    rows = [Row("a", "1", True), Row("b", "2", False), Row("a", "3", True)]
    assert [(each.row.seen, each.references) for each in group_inputs(rows)] == [(True, ("1", "3")), (False, ("2",))]
