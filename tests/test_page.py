"""The page, driven as a person would: in a real Chromium, over HTTP, with a model that is tiny but trains."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
api = pytest.importorskip("playwright.sync_api")
transformers = pytest.importorskip("transformers")

from fastapi.testclient import TestClient  # noqa: E402

from loralib.bases.loading import load_tokenizer  # noqa: E402
from loralib.serve.app import create_app  # noqa: E402
from loralib.serve.server import start  # noqa: E402
from loralib.serve.settings import ServeConfig  # noqa: E402

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
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
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
    """Opens the page; in the end, nothing that it said to the console was an error that the test did not expect."""
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
    """Fills the form in and starts a job."""
    page.locator("input[type=file]").set_input_files(
        {"name": f"{name}.jsonl", "mimeType": "application/jsonl", "buffer": EXAMPLES.encode()}
    )
    page.get_by_text("48 of 48 examples are trained on").wait_for()
    for label, value in settings.items():
        page.get_by_label(label, exact=True).fill(value)
        page.get_by_label(label, exact=True).press("Tab")
    page.locator("button:has-text('Start training'):enabled").click()


@pytest.fixture(scope="module")
def trained(browser: Any, site: SimpleNamespace) -> SimpleNamespace:
    """From a file to an adapter, by clicks alone: the name that it has in the end."""
    page = browser.new_page(locale="en-US")
    page.set_default_timeout(60_000)
    page.goto(f"{site.address}/#train")
    train(page, "squares", STEPS)
    page.get_by_role("link", name="Compare it with its base").wait_for()
    told = page.locator(".run").inner_text()
    chart = page.get_by_role("img", name=re.compile("Loss by step"))
    result = SimpleNamespace(
        told=told,
        chart=chart.get_attribute("aria-label"),
        name=site.server.bank.names[0],
        job=page.url.rpartition("/")[2],
    )
    page.get_by_role("link", name="Compare it with its base").click()
    page.get_by_role("heading", name="Compare answers").wait_for()
    result.panels = page.locator(".panel select").evaluate_all("all => all.map(one => one.value)")
    page.close()
    return result


def ask(page: Any, prompt: str, tokens: int = 6) -> list[str]:
    """Generates, and returns what each panel shows once all are done."""
    page.get_by_role("textbox", name=re.compile("^(Prompt|Message)$")).fill(prompt)
    if not page.get_by_label("Tokens at most").is_visible():
        page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Tokens at most").fill(str(tokens))
    page.get_by_role("button", name="Generate").click()
    return answers(page)


def answers(page: Any) -> list[str]:
    """Waits until all panels are done; returns what they show."""
    done = page.locator(".panel:has(.output[aria-busy=false]):has(.status:has-text(' a second'))")
    api.expect(done).to_have_count(page.locator(".panel").count(), timeout=30_000)
    return page.locator(".output").all_inner_texts()


def test_a_file_becomes_an_adapter_that_is_compared_next(trained: SimpleNamespace, site: SimpleNamespace) -> None:
    assert "done" in trained.told
    assert "step 24 of 24" in trained.told
    assert re.search(r"training: from [\d.]+ at step 1 to [\d.]+ at step 24", trained.chart)
    assert trained.name.startswith("ft:")
    assert trained.panels == ["", trained.name]  # the base, and the new adapter beside it


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
    slider = page.get_by_role("slider").nth(1)
    slider.focus()
    with page.expect_response("**/v1/completions"):
        slider.press("Home")
    assert answers(page) == [base, base]
    with page.expect_response("**/v1/completions"):
        slider.press("End")
    assert page.locator(".panel output").nth(1).inner_text() == "2.00"
    assert answers(page)[1] not in (base,)
    assert (
        "".join(piece.text for piece in site.server.service.stream("Number 7 is", _greedy(6), trained.name)) in adapted
    )


def test_a_chat_keeps_its_turns_and_a_stop_stops(visit: Callable[..., Any], trained: SimpleNamespace) -> None:
    page = visit()
    page.get_by_text("Chat", exact=True).click()
    ask(page, "Hello")
    ask(page, "And then?")
    first = page.locator(".output").first
    assert first.locator(".turn").count() == 4
    page.get_by_role("button", name="New conversation").click()
    page.get_by_role("textbox", name="Message", exact=True).fill("Go on")
    page.get_by_label("Tokens at most").fill("200")
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
    page.get_by_label("Or a file from before").select_option(label="squares.jsonl")
    page.get_by_text("48 of 48 examples are trained on").wait_for()
    page.get_by_label("Learning rate", exact=True).fill("fast")
    page.get_by_label("Learning rate", exact=True).press("Tab")
    page.get_by_role("alert").get_by_text("'fast'").wait_for()
    assert page.get_by_role("button", name="Start training").is_disabled()


def test_a_job_can_be_stopped_continued_and_cancelled(visit: Callable[..., Any], trained: SimpleNamespace) -> None:
    page = visit("#train")
    page.on("dialog", lambda dialog: dialog.accept())
    train(page, "long", {"Epochs": "5000"})
    page.get_by_text(re.compile(r"step [\d,]+ of 30,000")).wait_for()
    page.get_by_role("button", name="Stop, to go on later").click()
    page.locator(".badge.paused").wait_for()
    page.get_by_role("button", name="Go on").click()
    page.locator(".badge.queued, .badge.running, .badge.validating_files").first.wait_for()
    page.get_by_role("button", name="Cancel for good").click()
    page.locator(".badge.cancelled").wait_for()
    assert page.get_by_role("button", name="Go on").is_hidden()


def test_runs_are_laid_over_one_another(visit: Callable[..., Any], trained: SimpleNamespace) -> None:
    page = visit("#runs")
    page.get_by_role("img", name=re.compile("at step 24")).wait_for()
    page.get_by_role("row", name=re.compile("num_epochs")).wait_for()
    box = page.get_by_role("checkbox").last
    box.uncheck()
    assert box.evaluate("box => box === document.activeElement")
    page.get_by_role("checkbox").last.check()
    page.get_by_text("The curve as a table").click()
    page.get_by_role("row", name=re.compile("^24 ")).wait_for()


def test_adapters_are_described_exported_and_taken_out(
    visit: Callable[..., Any], trained: SimpleNamespace, site: SimpleNamespace, tmp_path: Path
) -> None:
    page = visit("#adapters", expects="404")
    card = page.locator("article").first
    if not card.locator("details").first.evaluate("one => one.open"):
        card.get_by_text("What it is").click()
    assert "squares.jsonl" in card.inner_text()
    card.get_by_role("rowheader", name="1", exact=True).wait_for()  # the second layer of the heat map
    card.get_by_role("button", name="PEFT").click()
    with page.expect_download() as download:
        card.get_by_role("link", name="Download").click(timeout=120_000)
    download.value.save_as(tmp_path / "adapter.zip")
    shutil.unpack_archive(tmp_path / "adapter.zip", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 4
    card.get_by_role("button", name=re.compile("^Unload")).click()
    card.get_by_text("not loaded", exact=True).wait_for()
    assert trained.name not in site.server.bank
    card.get_by_role("button", name=re.compile("^Load")).click()
    card.get_by_text("loaded", exact=True).wait_for()
    assert trained.name in site.server.bank


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
        order.append(
            page.evaluate(
                "(one => one.labels?.[0]?.textContent || one.ariaLabel || one.textContent)(document.activeElement)"
            )
        )
        assert (
            page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            or order[-1] == "Plain text"
        )
    assert order == [
        "Skip to content", "loralib", "Compare", "Train", "Runs", "Adapters", "Language", "Theme", "Plain text",
        "Prompt", "Prompts from its data", "Generate", "Settings", "Model", "Remove panel 1",
        "Answer of panel 1", "Model", "Remove panel 2", "Scale", "Answer of panel 2",
    ]  # fmt: skip
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type("Number 7 is")
    page.keyboard.press("Control+Enter")
    answers(page)


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
    page.goto(page.url.partition("#")[0] + "#compare")
    live = page.locator(".output").first
    assert (live.get_attribute("aria-live"), live.get_attribute("aria-busy")) == ("polite", "false")


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
    for key, english, vietnamese in words:
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", vietnamese)), key
    used = {"adapters", "compare", "runs", "train"}  # the views' own names
    for path in FILES.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        used |= set(re.findall(r'"(\w+)"', text)) | set(re.findall(r"`(\w+_)\$", text))
    for key in lines:
        prefix = key.partition("_")[0] + "_"
        assert key in used or prefix in used, f"{key} is never said"
