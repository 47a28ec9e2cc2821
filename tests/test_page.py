"""The page, driven as a person would: in a real Chromium, over HTTP, with a model that is tiny but trains."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
peft = pytest.importorskip("peft")
uvicorn = pytest.importorskip("uvicorn")
api = pytest.importorskip("playwright.sync_api")
transformers = pytest.importorskip("transformers")

from fastapi.testclient import TestClient  # noqa: E402

import loralib as lora  # noqa: E402
from loralib.bases.loading import load_tokenizer  # noqa: E402
from loralib.generation import Generator  # noqa: E402
from loralib.serve.app import create_app  # noqa: E402
from loralib.serve.page.exports import Exports  # noqa: E402
from loralib.serve.server import start  # noqa: E402
from loralib.serve.settings import ServeConfig  # noqa: E402
from loralib.serve.state import RequestError  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")

FILES = Path(__file__).resolve().parent.parent / "loralib" / "serve" / "page" / "files"
EXAMPLES = "".join(f'{{"prompt": "Number {n} is", "completion": " {n * n} when squared"}}\n' for n in range(48))
WORDS = FILES / "words.js"
# A scale as large as this makes the few steps of the tests show in what is written.
STEPS = {"Epochs": "4", "Rank": "4", "Learning rate": "0.05"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 16 dimensions, with a chat template."""
    directory = tmp_path_factory.mktemp("base") / "tiny"
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """Serves an application in a thread, at an address of its own."""
    runner = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=runner.run)
    thread.start()
    while not runner.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"
    runner.should_exit = runner.force_exit = True
    thread.join()


@pytest.fixture(scope="module")
def at_once(warm_command: Callable[..., Any]) -> Iterator[None]:
    """Jobs and exports start immediately, but still in their own processes."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("loralib.serve.process", "loralib.serve.page.exports"):
            patch.setattr(f"{place}.loralib_command", warm_command)
        yield


@pytest.fixture(scope="module")
def site(at_once: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The server, and its address."""
    server = start(ServeConfig(model=str(model), state_dir=str(tmp_path_factory.mktemp("state")), dtype="fp32"))
    with contextlib.closing(server), served(create_app(server)) as address:
        yield SimpleNamespace(server=server, address=address)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, site: SimpleNamespace) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end, checks that its console has no unexpected errors."""
    contexts, said = [], []

    def open_page(at: str = "", expects: str | None = None, **settings: Any) -> Any:
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1100, "height": 800}, **settings})
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "console",
            lambda line: (
                line.type in ("error", "warning") and not (expects and expects in line.text) and said.append(line.text)
            ),
        )
        page.goto(f"{site.address}/{at}")
        page.locator("h1:visible").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def train(page: Any, name: str, settings: dict[str, str]) -> None:
    """Fills in the form and starts a job."""
    page.locator("input[type=file]").set_input_files(
        {"name": f"{name}.jsonl", "mimeType": "application/jsonl", "buffer": EXAMPLES.encode()}
    )
    page.get_by_text("48 of 48 examples are used for training").wait_for()
    for label, value in settings.items():
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_label(label, exact=True).press("Tab")
    page.locator("button:has-text('Start training'):enabled").click()


def tab_to(page: Any, name: str) -> None:
    """Presses Tab until the element with this name has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED).strip() == name:
            return
    raise AssertionError(f"Tab does not reach {name!r}")


FOCUSED = "(one => one.labels?.[0]?.textContent || one.ariaLabel || one.textContent)(document.activeElement)"


@pytest.fixture(scope="module")
def trained(browser: Any, site: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """From a file to an adapter and its comparison, by keyboard alone: what was seen, and the adapter's name."""
    file = tmp_path_factory.mktemp("mine") / "squares.jsonl"
    file.write_text(EXAMPLES, encoding="utf-8")
    page = browser.new_page(locale="en-US")
    page.set_default_timeout(60_000)
    page.goto(site.address)
    page.get_by_role("heading", name="Compare answers").wait_for()
    tab_to(page, "Train")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Train an adapter").wait_for()
    with page.expect_file_chooser() as chooser:  # so that the browser knows before Space that it is asked
        page.keyboard.press("Tab")
        page.locator("input[type=file]:focus").wait_for()
        page.keyboard.press("Space")
    chooser.value.set_files(file)
    page.get_by_text("48 of 48 examples are used for training").wait_for()
    for label, value in STEPS.items():
        tab_to(page, label)
        page.keyboard.press("Control+a")
        page.keyboard.type(value)
    page.keyboard.press("Tab")
    page.locator("button:has-text('Start training'):enabled").wait_for()
    tab_to(page, "Start training")
    page.keyboard.press("Enter")
    page.locator("a:focus", has_text="Compare it with its base").wait_for()  # where the focus is once it is done
    chart = page.get_by_role("img", name=re.compile("Loss by step"))
    result = SimpleNamespace(
        told=page.locator(".run").inner_text(),
        chart=chart.get_attribute("aria-label"),
        said=page.get_by_role("status").all_inner_texts(),
        name=site.server.bank.names[0],
        job=page.url.rpartition("/")[2],
    )
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Compare answers").wait_for()
    page.locator(".panel").nth(1).wait_for()
    result.panels = page.locator(".panel select").evaluate_all("all => all.map(one => one.value)")
    tab_to(page, "Prompt")
    page.keyboard.type("Number 7 is")
    page.keyboard.press("Control+Enter")
    result.answers = answers(page)
    tab_to(page, "Scale")
    with page.expect_response("**/v1/completions"):
        page.keyboard.press("Home")
    result.without = answers(page)
    page.close()
    return result


def ask(page: Any, prompt: str, tokens: int = 6) -> list[str]:
    """Generates, and returns what each panel shows once all are done."""
    page.get_by_role("textbox", name=re.compile("^(Prompt|Message)$")).fill(prompt)
    if not page.get_by_label("Maximum tokens").is_visible():
        page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Maximum tokens").fill(str(tokens))
    page.get_by_role("button", name="Generate").click()
    return answers(page)


def answers(page: Any) -> list[str]:
    """Waits until all panels are done; returns what they show."""
    done = page.locator(".panel:has(.output[aria-busy=false]):has(.status:has-text(' per second'))")
    api.expect(done).to_have_count(page.locator(".panel").count(), timeout=30_000)
    return page.locator(".output").all_inner_texts()


def test_the_keyboard_alone_makes_an_adapter_of_a_file_and_compares_it(trained: SimpleNamespace) -> None:
    assert "done" in trained.told
    assert "step 24 of 24" in trained.told
    assert re.search(r"training: from [\d.]+ at step 1 to [\d.]+ at step 24", trained.chart)
    assert trained.name.startswith("ft:")
    assert "Training has finished" in trained.said  # what a screen reader says
    assert trained.panels == ["", trained.name]  # the base, and the new adapter beside it
    assert trained.answers[0] != trained.answers[1]
    assert trained.without == [trained.answers[0]] * 2


def drop(page: Any, place: str, *, name: str, content: str) -> None:
    """Drags a file onto an element and drops it there, with a browser's events."""
    data = page.evaluate_handle(
        "([name, text]) => { const data = new DataTransfer(); data.items.add(new File([text], name)); return data; }",
        [name, content],
    )
    page.locator(place).dispatch_event("dragover", {"dataTransfer": data})
    assert "over" in page.locator(".drop").get_attribute("class")
    page.locator(place).dispatch_event("drop", {"dataTransfer": data})
    assert "over" not in page.locator(".drop").get_attribute("class")


@pytest.mark.parametrize("place", [".drop", "h1:visible"], ids=["into the box", "beside it"])
def test_a_file_can_be_dropped(visit: Callable[..., Any], place: str) -> None:
    page = visit("#train")
    drop(page, place, name="dropped.jsonl", content=EXAMPLES)
    page.get_by_text("dropped.jsonl: 48 examples, read as").wait_for()
    page.get_by_text("48 of 48 examples are used for training").wait_for()
    pieces = page.locator(".tokens").first
    assert pieces.inner_text().replace("\u23ce", "").startswith("Number 0 is 0 when squared")
    assert "".join(pieces.locator(".trained").all_inner_texts()).startswith(" 0 when squared")
    assert page.get_by_label("Name", exact=True).input_value() == "dropped"


def test_a_file_of_preferences_is_for_dpo(visit: Callable[..., Any]) -> None:
    page = visit("#train")
    row = '{"prompt": "Number 7 is", "chosen": " 49.", "rejected": " one of many."}\n'
    drop(page, ".drop", name="preferred.jsonl", content=row)
    page.get_by_text("1 of 1 examples are used for training").wait_for()
    assert page.get_by_label("What to train").input_value() == "dpo"
    pieces = page.locator(".tokens").first
    shown = "".join(pieces.locator(".trained").all_inner_texts())
    assert " 49." in shown
    assert " one of many." in shown
    drop(page, ".drop", name="dropped.jsonl", content=EXAMPLES)
    page.get_by_text("48 of 48 examples are used for training").wait_for()
    assert page.get_by_label("What to train").input_value() == "clm"


def test_panels_write_what_the_model_does(
    visit: Callable[..., Any], trained: SimpleNamespace, site: SimpleNamespace
) -> None:
    page = visit(f"#compare/{trained.name.replace('/', '%2F')}")
    shown = ask(page, "Number 7 is")
    expected = [
        "Number 7 is" + "".join(piece.text for piece in site.server.service.stream("Number 7 is", settings, adapter))
        for settings in [_greedy(6)]
        for adapter in (None, trained.name)
    ]
    assert shown == expected
    assert shown[0] != shown[1]


def _greedy(tokens: int) -> Any:
    from loralib.generation import Sampling

    return Sampling(max_new_tokens=tokens)


def test_the_slider_changes_the_text_and_nobody_elses(
    visit: Callable[..., Any], trained: SimpleNamespace, site: SimpleNamespace
) -> None:
    page = visit()
    base, adapted = ask(page, "Number 7 is")
    slider = page.get_by_role("slider")  # the base has none
    slider.focus()
    with page.expect_response("**/v1/completions"):
        slider.press("Home")
    assert answers(page) == [base, base]
    with page.expect_response("**/v1/completions"):
        slider.press("End")
    assert page.locator(".panel output:visible").inner_text() == "2.00"
    assert answers(page)[1] not in (base,)
    assert (
        "".join(piece.text for piece in site.server.service.stream("Number 7 is", _greedy(6), trained.name)) in adapted
    )


def test_a_chat_keeps_its_turns_and_a_stop_stops(
    visit: Callable[..., Any], trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit()
    page.get_by_text("Chat", exact=True).click()
    ask(page, "Hello")
    ask(page, "And then?")
    first = page.locator(".output").first
    assert first.locator(".turn").count() == 4
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("textbox", name="Message", exact=True).fill("Go on")
    page.get_by_label("Maximum tokens").fill("200")
    # A model so small writes 200 tokens while a browser looks for a button.
    step = Generator.step
    monkeypatch.setattr(Generator, "step", lambda generator: time.sleep(0.02) or step(generator))
    page.get_by_role("button", name="Generate").click()
    page.get_by_text(re.compile(r"^\d+ tokens")).first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped").first.wait_for()
    page.get_by_role("button", name="Stop").and_(page.locator(":disabled")).wait_for()


def test_an_error_stands_in_full_where_it_arose(visit: Callable[..., Any], trained: SimpleNamespace) -> None:
    page = visit(expects="400 (Bad Request)")
    page.get_by_label("Prompt", exact=True).fill("word " * 400)
    page.get_by_role("button", name="Generate").click()
    errors = page.locator(".panel [role=alert]")
    errors.nth(1).wait_for()
    assert "256" in errors.nth(0).inner_text()

    page.goto(page.url.partition("#")[0] + "#train")
    page.locator("input[type=file]").set_input_files(
        {
            "name": "broken.jsonl",
            "mimeType": "application/jsonl",
            "buffer": b'{"prompt": "a", "completion": "b"}\n{"pro\n',
        }
    )
    told = page.get_by_role("alert").inner_text()
    assert "broken.jsonl:2" in told or "line 2" in told, told


def test_faults_of_settings_are_told_before_the_start(visit: Callable[..., Any], trained: SimpleNamespace) -> None:
    page = visit("#train", expects="400 (Bad Request)")
    page.get_by_label("Or a file uploaded earlier").select_option(label="squares.jsonl")
    page.get_by_text("48 of 48 examples are used for training").wait_for()
    page.get_by_label("Learning rate", exact=True).fill("fast")
    page.get_by_label("Learning rate", exact=True).press("Tab")
    page.get_by_role("alert").get_by_text("'fast'").wait_for()
    assert page.get_by_role("button", name="Start training").is_disabled()


@pytest.fixture(scope="module")
def stopped(browser: Any, site: SimpleNamespace, trained: SimpleNamespace) -> SimpleNamespace:
    """A job that is paused, resumed and cancelled by clicks: the step that each started at."""
    page = browser.new_page(locale="en-US")
    page.set_default_timeout(60_000)
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(f"{site.address}/#train")
    train(page, "long", {"Epochs": "5000"})

    def step(after: int = 0) -> int:
        page.wait_for_function(
            "after => Number(/step ([\\d,]+) of 30,000/.exec(document.querySelector('.run')?.innerText)?.[1]"
            ".replace(',', '')) > after",
            arg=after,
        )
        found = re.search(r"step ([\d,]+) of", page.locator(".run").inner_text())
        assert found is not None
        return int(found[1].replace(",", ""))

    result = SimpleNamespace(started=step())
    page.get_by_role("button", name="Pause, to resume later").click()
    page.locator(".badge.paused").wait_for()
    result.paused = step()
    page.get_by_role("button", name="Resume").click()
    page.locator(".badge.queued, .badge.running, .badge.validating_files").first.wait_for()
    result.further = step(after=result.paused)
    page.get_by_role("button", name="Cancel for good").click()
    page.locator(".badge.cancelled").wait_for()
    result.can_go_on = page.get_by_role("button", name="Resume").is_visible()
    result.job = page.url.rpartition("/")[2]
    page.close()
    return result


def test_a_job_can_be_stopped_continued_and_cancelled(stopped: SimpleNamespace) -> None:
    assert 0 < stopped.started <= stopped.paused < stopped.further
    assert not stopped.can_go_on


def test_runs_are_laid_over_one_another(
    visit: Callable[..., Any], trained: SimpleNamespace, stopped: SimpleNamespace
) -> None:
    page = visit("#runs")
    chart = page.get_by_role("img", name=re.compile(r"squares · \w+, training: .*at step 24"))
    chart.wait_for()
    page.get_by_role("img", name=re.compile(r"long · \w+, training: ")).wait_for()  # the same chart
    assert page.locator(".chart polyline").count() >= 2
    colours = page.locator(".chart polyline").evaluate_all("all => all.map(one => getComputedStyle(one).stroke)")
    assert len(set(colours)) == 2
    differing = page.get_by_role("row", name=re.compile("num_epochs ≠"))
    assert differing.get_by_role("cell").all_inner_texts() == ["5000", "4"]
    box = page.get_by_role("checkbox", name=re.compile("^Show long"))
    box.uncheck()
    assert box.evaluate("box => box === document.activeElement")
    page.get_by_role("img", name=re.compile("long")).wait_for(state="detached")
    page.get_by_text("The curve as a table").click()
    page.get_by_role("row", name=re.compile("^24 ")).wait_for()


def test_a_run_that_fails_says_why_in_full(visit: Callable[..., Any], trained: SimpleNamespace) -> None:
    page = visit("#train")
    train(page, "wild", {**STEPS, "Learning rate": "1e30"})
    page.locator(".badge.failed").wait_for()
    assert "lr" in page.locator(".run [role=alert]").inner_text()


def test_a_server_that_is_gone_is_told_in_the_person_s_language(visit: Callable[..., Any]) -> None:
    page = visit(locale="vi-VN", expects="ERR_CONNECTION_REFUSED")
    page.route("**/page-api/adapters", lambda route: route.abort("connectionrefused"))
    page.goto(page.url.partition("#")[0] + "#adapters")
    assert "Không kết nối được với máy chủ" in page.get_by_role("alert").inner_text()


def test_adapters_are_described_and_taken_out(
    visit: Callable[..., Any], trained: SimpleNamespace, site: SimpleNamespace
) -> None:
    page = visit("#adapters")
    card = opened(page)
    assert "squares.jsonl" in card.inner_text()
    card.get_by_role("rowheader", name="1", exact=True).wait_for()  # the second layer of the heat map
    card.get_by_role("button", name=re.compile("^Unload")).click()
    card.get_by_text("not loaded", exact=True).wait_for()
    assert trained.name not in site.server.bank
    card.get_by_role("button", name=re.compile("^Load")).click()
    card.get_by_text("loaded", exact=True).wait_for()
    assert trained.name in site.server.bank


def opened(page: Any) -> Any:
    card = page.locator("article", has_text="squares").first
    card.wait_for()
    if not card.locator("details").first.evaluate("one => one.open"):
        card.get_by_text("What it is").click()
    return card


def test_an_adapter_is_exported_with_one_click_in_every_form(
    visit: Callable[..., Any], trained: SimpleNamespace, site: SimpleNamespace, model: Path, tmp_path: Path
) -> None:
    page = visit("#adapters")
    card = opened(page)
    for button in ("PEFT", "GGUF (llama.cpp)", "MLX", "Merged model"):
        card.get_by_role("button", name=button, exact=True).click()
    links = card.get_by_role("link", name="Download")
    api.expect(links).to_have_count(4, timeout=120_000)
    for link in links.all():
        with page.expect_download() as download:
            link.click()
        file = download.value.suggested_filename
        download.value.save_as(tmp_path / file)
        if file.endswith(".zip"):
            shutil.unpack_archive(tmp_path / file, tmp_path / file.rpartition("-")[2].removesuffix(".zip"))
    [gguf] = tmp_path.glob("*.gguf")
    assert len(lora.formats.read_adapter(gguf, model=lora.load_base(str(model))[0]).modules) == 8
    assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text("utf-8"))["fine_tune_type"] == "lora"
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 11, 30]])
    plain = base(ids).logits
    with warnings.catch_warnings():  # PEFT's own, of transformers
        warnings.simplefilter("ignore", FutureWarning)
        with_peft = peft.PeftModel.from_pretrained(base, tmp_path / "peft")(ids).logits
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    assert torch.allclose(with_peft, merged, atol=5e-3)  # which is in bf16
    assert not torch.allclose(with_peft, plain, atol=1e-2)


def test_exports_are_cleaned_up(
    site: SimpleNamespace, trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "exports" / "export-of-a-killed-server" / "merged"
    left.mkdir(parents=True)
    write = "import sys, pathlib; made = pathlib.Path(sys.argv[-1]); made.mkdir(); (made / 'weights').write_text('1')"
    command = [sys.executable, "-I", "-S", "-c", write]
    monkeypatch.setattr("loralib.serve.page.exports.loralib_command", lambda *words: ([*command, *words], {}))
    exports = Exports(_Elsewhere(site.server, tmp_path))
    assert not left.exists()
    made = []
    for number in range(6):
        made.append(exports.create(trained.name, "peft"))
        while made[-1].status in ("waiting", "running"):
            time.sleep(0.02)
        assert made[-1].status == "succeeded", made[-1].lines
        kept = sorted(path.name for path in (tmp_path / "exports").iterdir())
        assert kept == sorted(export.id for export in made[-4:]), number
        assert [path.name for path in (tmp_path / "exports" / made[-1].id).iterdir()] == ["peft.zip"]
    with pytest.raises(RequestError, match="the last 4 are kept"):
        exports.get(made[0].id)
    exports.close()
    assert not (tmp_path / "exports").exists()


class _Elsewhere:
    """A server whose state is in another directory."""

    def __init__(self, server: Any, state_dir: Path) -> None:
        self._server, self.state_dir = server, state_dir

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)


def test_the_language_is_the_browsers_then_the_persons(visit: Callable[..., Any]) -> None:
    page = visit(locale="vi-VN")
    assert page.get_by_role("heading", level=1).inner_text() == "So sánh câu trả lời"
    assert page.locator("html").get_attribute("lang") == "vi"
    page.locator("#language").select_option("en")
    assert page.get_by_role("heading", level=1).inner_text() == "Compare answers"
    page.reload()
    page.get_by_role("heading", name="Compare answers").wait_for()


def test_light_and_dark_follow_the_system_then_the_switch(visit: Callable[..., Any]) -> None:
    page = visit(color_scheme="dark")
    brightness = "sum => getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).slice(0, 3).map(Number)"
    assert max(page.evaluate(brightness)) < 60
    page.locator("#theme").select_option("light")
    assert min(page.evaluate(brightness)) > 200
    page.reload()
    page.get_by_role("heading", name="Compare answers").wait_for()
    assert min(page.evaluate(brightness)) > 200


@pytest.mark.parametrize("language", ["en-US", "vi-VN"])
def test_a_phone_scrolls_down_only(visit: Callable[..., Any], trained: SimpleNamespace, language: str) -> None:
    page = visit(locale=language, viewport={"width": 360, "height": 740})
    for view in ("compare", "train", f"train/{trained.job}", "runs", "adapters"):
        page.goto(page.url.partition("#")[0] + f"#{view}")
        page.locator("h1:visible").wait_for()
        page.wait_for_load_state("networkidle")
        for summary in page.locator("summary:visible").all():
            summary.click()
        width, wide = page.evaluate("[document.documentElement.scrollWidth, [...document.querySelectorAll('main *')]"
                                    ".filter(one => one.getBoundingClientRect().right > 361 && !one.closest('.scroll'))"
                                    ".map(one => one.outerHTML.slice(0, 200))]")  # fmt: skip
        assert width <= 360, (view, wide)


def test_the_keyboard_alone_gets_everywhere_in_order(visit: Callable[..., Any], trained: SimpleNamespace) -> None:
    page = visit()
    page.locator(".panel").nth(1).wait_for()
    order = []
    for _ in range(20):
        page.keyboard.press("Tab")
        order.append(page.evaluate(FOCUSED))
        assert (
            page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            or order[-1] == "Plain text"
        )
    assert order == [
        "Skip to content", "loralib", "Compare", "Train", "Runs", "Adapters", "Language", "Theme", "Plain text",
        "Prompt", "Prompts from its training data", "Generate", "Settings", "Model", "Remove panel 1",
        "Answer of panel 1", "Model", "Remove panel 2", "Scale", "Answer of panel 2",
    ]  # fmt: skip


def test_a_screen_reader_finds_landmarks_names_and_what_changes(
    visit: Callable[..., Any], trained: SimpleNamespace
) -> None:
    page = visit()
    for view in ("compare", "train", f"train/{trained.job}", "runs", "adapters"):
        page.goto(page.url.partition("#")[0] + f"#{view}")
        page.locator("h1:visible").wait_for()
        page.wait_for_load_state("networkidle")
        assert page.get_by_role("main").count() == page.get_by_role("navigation").count() == 1
        assert page.get_by_role("heading", level=1).count() == 1
        unnamed = page.evaluate(
            """[...document.querySelectorAll("button, a, input, select, textarea, [role=region], [role=img], summary")]
            .filter(one => one.checkVisibility() && !one.labels?.length && !one.ariaLabel
                    && !one.getAttribute("aria-labelledby") && !one.textContent.trim())
            .map(one => one.outerHTML)"""
        )
        assert unnamed == []
        tree = page.locator("body").aria_snapshot()
        nameless = re.compile(
            r"^ *- (button|link|textbox|combobox|slider|checkbox|radio|img|progressbar|dialog)(:| *$)"
        )
        assert [line for line in tree.splitlines() if nameless.match(line)] == []
    page.goto(page.url.partition("#")[0] + "#compare")
    tree = page.locator("body").aria_snapshot()
    for role, name in [
        ("link", "Skip to content"), ("navigation", "Views"), ("heading", "Compare answers"),
        ("group", "Kind of prompt"), ("textbox", "Prompt"), ("combobox", "Model"), ("slider", "Scale"),
    ]:  # fmt: skip
        assert f'- {role} "{name}"' in tree, tree
    live = page.locator(".output").first
    assert (live.get_attribute("aria-live"), live.get_attribute("aria-busy")) == ("polite", "false")


VIEWS = ("compare", "train", "train/{job}", "runs", "adapters")


def each_view(page: Any, trained: SimpleNamespace) -> Iterator[str]:
    """Opens one view after another, with all details expanded."""
    for view in VIEWS:
        page.goto(page.url.partition("#")[0] + f"#{view.format(job=trained.job)}")
        page.locator("h1:visible").wait_for()
        if view == "train":
            page.locator(".drop + .field select").select_option(label="squares.jsonl")
            page.locator(".example").first.wait_for()
        page.wait_for_load_state("networkidle")
        for summary in page.locator("summary:visible").all():
            if not summary.evaluate("one => one.parentElement.open"):
                summary.click()
        page.wait_for_load_state("networkidle")
        yield view


# Each visible text's colour against what lies behind it, as a browser paints them; what is disabled needs no contrast.
# WCAG 2.2: 4.5 for text, 3 for large text and for the borders of controls.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((value, i) => value * a + under[i] * (1 - a));
  const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const behind = (one) => {
    const below = one.parentElement ? behind(one.parentElement) : [255, 255, 255];
    return over(rgba(getComputedStyle(one).backgroundColor), below);
  };
  const opacity = (one) => one ? Number(getComputedStyle(one).opacity) * opacity(one.parentElement) : 1;
  const found = [];
  const check = (one, colour, least, what) => {
    const back = behind(one.parentElement && what === "border" ? one.parentElement : one);
    const [r, g, b, a] = rgba(colour);
    const got = ratio(over([r, g, b, a * opacity(one)], back), back);
    if (got < least) found.push([what, one.outerHTML.slice(0, 90), Number(got.toFixed(2))]);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const [text, one] = [walker.currentNode.data.trim(), walker.currentNode.parentElement];
    if (!text || !one.checkVisibility() || one.closest(":disabled, .hidden, option")) continue;
    const style = getComputedStyle(one), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    check(one, one instanceof SVGElement ? style.fill : style.color, large ? 3 : 4.5, text.slice(0, 40));
  }
  for (const one of document.querySelectorAll("input, select, textarea, button:not(.primary, .icon)")) {
    const drawn = !["range", "checkbox", "radio", "file"].includes(one.type);
    if (drawn && one.checkVisibility() && !one.disabled) check(one, getComputedStyle(one).borderTopColor, 3, "border");
  }
  return found;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(
    visit: Callable[..., Any], trained: SimpleNamespace, theme: str
) -> None:
    page = visit(color_scheme=theme)
    for view in each_view(page, trained):
        assert page.evaluate(CONTRASTS) == [], view


def test_every_word_on_the_page_is_in_its_list_of_words(visit: Callable[..., Any], trained: SimpleNamespace) -> None:
    """Marks each text of the list; an unmarked text is data, a number, or missing from the list."""
    page = visit()
    marked = re.sub(r'"((?:[^"\\]|\\.)*)"(?=,$|\],$)', r'"⟦\1⟧"', WORDS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    marked = re.sub(r'\["((?:[^"⟦\\]|\\.)*)", "⟦', r'["⟦\1⟧", "⟦', marked)
    page.route("**/page/words.js", lambda route: route.fulfill(body=marked, content_type="text/javascript"))
    page.reload()
    page.locator("h1:visible").wait_for()
    data = re.compile(
        r"squares|long|wild|tiny|loralib|English|Tiếng Việt|^r = |r, alpha|GPT|c_attn|c_proj|c_fc|num_epochs"
        r"|^[\w.]+$|^[\d.,]+ [kM]B$|^[\d/, :]+\s[AP]M$"
    )
    for view in each_view(page, trained):
        said = page.evaluate(
            """() => [...document.querySelectorAll("body *")].flatMap((one) => one.checkVisibility()
              && !one.closest("pre, code, .tokens, ul:has(li) li, .example figcaption, option")
              ? [...one.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim())
                .concat([one.ariaLabel, one.title, one.placeholder].filter((each) => typeof each === "string")) : [])
              .filter((each) => /\\p{L}{2}/u.test(each))"""
        )
        assert len(said) > 10
        assert [each for each in said if "⟦" not in each and not data.search(each)] == [], view


def test_a_server_with_keys_is_asked_with_one(visit: Callable[..., Any], site: SimpleNamespace) -> None:
    page = visit()

    def guard(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "no key"}})

    context = page.context
    context.route(re.compile("/(page-api|v1)/"), guard)
    fresh = context.new_page()
    fresh.goto(site.address)
    fresh.get_by_label("API key").fill("wrong")
    fresh.get_by_role("button", name="Use this key").click()
    fresh.get_by_text("did not accept").wait_for()
    fresh.get_by_label("API key").fill("secret")
    fresh.get_by_role("button", name="Use this key").click()
    fresh.get_by_role("heading", name="Compare answers").wait_for()
    assert "secret" not in json.dumps(fresh.evaluate("({...localStorage})"))


def test_only_the_page_itself_needs_no_key(model: Path, tmp_path: Path) -> None:
    with contextlib.closing(
        start(ServeConfig(model=str(model), state_dir=str(tmp_path), api_key=("secret",)))
    ) as server:
        client = TestClient(create_app(server), base_url="http://127.0.0.1")
        for path in ("/", "/page/main.js", "/page/style.css"):
            assert client.get(path).status_code == 200
        for path in ("/page-api/about", "/page-api/adapters", "/v1/models"):
            answer = client.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"  # no dialog of the browser's own
            assert client.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
        elsewhere = {"Authorization": "Bearer secret", "Origin": "https://example.com"}
        export = client.post("/page-api/exports", json={"name": "x", "target": "peft"}, headers=elsewhere)
        assert export.json()["error"]["code"] == "foreign_origin"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/page-api/exports", {"name": "../../etc", "target": "peft"}, 404),
        ("POST", "/page-api/exports", {"name": "x", "target": "exe"}, 400),
        ("POST", "/page-api/exports", {"name": 1, "target": "peft"}, 400),
        ("GET", "/page-api/exports/nothing", None, 404),
        ("GET", "/page-api/exports/..%2F..%2Fjobs/content", None, 404),
        ("GET", "/page-api/adapters/learned?name=/etc", None, 404),
        ("POST", "/page-api/adapters/load", {"name": "nobody"}, 404),
        ("POST", "/page-api/preview", {"training_file": "file-nothing"}, 404),
        ("GET", "/page/..%2Fapi.py", None, 404),
        ("GET", "/page/../api.py", None, 404),
    ],
)
def test_what_cannot_be_done_is_an_error_in_the_api_s_shape(
    site: SimpleNamespace, method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    client = TestClient(create_app(site.server), base_url="http://127.0.0.1")
    answer = client.request(method, path, json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_the_page_fetches_nothing_from_elsewhere_and_cannot_be_framed(
    visit: Callable[..., Any], site: SimpleNamespace
) -> None:
    page = visit()
    hosts = page.evaluate("performance.getEntriesByType('resource').map(one => new URL(one.name).origin)")
    assert set(hosts) == {site.address}
    policy = page.request.get(site.address).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy


def test_both_languages_have_every_word() -> None:
    words = re.findall(
        r'^  (\w+): \[\s*"((?:[^"\\]|\\.)*)",\s*"((?:[^"\\]|\\.)*)"\],$',
        WORDS.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    lines = re.findall(r"^  (\w+): \[", WORDS.read_text(encoding="utf-8"), re.MULTILINE)
    assert [key for key, *_ in words] == lines
    assert len(set(lines)) == len(lines)
    same = {"adapter", "chat", "shortcut", "top_p", "dropout", "export_peft", "export_gguf", "export_mlx"}
    assert {key for key, english, vietnamese in words if english.lower() == vietnamese.lower()} <= same
    for key, english, vietnamese in words:
        assert english.strip(), key
        assert vietnamese.strip(), key
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", vietnamese)), key
    used = {"adapters", "compare", "runs", "train"}  # the views' own names
    for path in FILES.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r'"(\w+)"', text)) | set(re.findall(r"`(\w+_)\$", text))
    for key in lines:
        prefix = key.partition("_")[0] + "_"
        assert key in used or prefix in used, f"{key} is never said"
