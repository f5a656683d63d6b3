"""The page of `depthpar report` in a real browser: what it shows, what a click does, what it asks
for."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, chromium

from vllm_depthpar.cli.main import main

RESULTS = Path(__file__).parents[2] / "benchmarks"
SEARCH = RESULTS / "quality/results/search-smollm2-pairs-report.json"
FILES = (
    SEARCH,
    RESULTS / "quality/results/recovery-smollm2-tp3-41.json",
    RESULTS / "serving/results/dropped-attentions.json",
)
GENERATED = RESULTS / "quality/results/generation-smollm2.json"
PIQA = RESULTS / "quality/results/recovery-piqa.json"
PHONE = 360


class Tempting:
    """A server that a page could ask, and how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def markup(url: str) -> str:
    """Text that would do harm as markup: ends a script, loads an image, runs code."""
    return (
        f"</script><img src={url}image onerror=fetch('{url}code')><script>fetch('{url}')</script>"
    )


@pytest.fixture(scope="module")
def tempting() -> Iterator[Tempting]:
    server = Tempting()
    yield server
    server.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tempting: Tempting) -> Path:
    """Real reports, and answers by a model of a bad name."""
    folder = tmp_path_factory.mktemp("page")
    bad = markup(tempting.url)
    spec = json.loads(SEARCH.read_text())["plan"]["plan"]
    answers = {
        "command": f"depthpar eval {bad}",
        "date": "2026-01-01",
        "model": bad,
        "prompts": ["Say something.", bad],
        "plans": [
            {"label": "plain", "spec": None, "answers": ["The sky is blue.", bad]},
            {"label": bad, "spec": spec, "answers": ["The sky is green.", bad]},
        ],
    }
    written = folder / "answers.json"
    written.write_text(json.dumps({"answers": answers}))
    out = folder / "report.html"
    files = [*FILES, GENERATED, written]
    assert main(["report", *map(str, files), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def middle(browser: Browser, selector: str) -> list[float]:
    """Where an element is, on the screen."""
    script = f"""(() => {{
        const element = document.querySelector({json.dumps(selector)});
        element.scrollIntoView({{block: "center"}});
        const box = element.getClientRects()[0];
        return [box.x + box.width / 2, box.y + box.height / 2];
    }})()"""
    found: list[float] = browser.run(script)
    return found


def selected(browser: Browser) -> str:
    return str(browser.run("document.getElementById('selected').textContent"))


def measured() -> list[dict[str, Any]]:
    """The plans of the search that are not the unmodified model, each once, the slowest first."""
    found = {one["digest"]: one for one in json.loads(SEARCH.read_text())["measured"]}
    return [one for one in found.values() if one["kind"] != "unmodified"]


def test_it_draws_every_point(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    assert browser.errors == []
    assert browser.run("document.querySelectorAll('.dot').length") == len(measured()) + 1
    assert browser.run("document.querySelector('.front-path').getAttribute('d').length") > 10
    # First what was searched for.
    plan = json.loads(SEARCH.read_text())["plan"]
    assert plan["name"] in selected(browser)
    assert json.dumps(plan["plan"]) in selected(browser)


def test_a_click_on_a_point_shows_its_plan(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    best = min((one for one in measured() if one["depth"] == 27), key=lambda one: one["kl"])
    assert json.dumps(best["plan"]) not in selected(browser)
    browser.click(*middle(browser, f'.dot.best[aria-label^="{best["name"]},"]'))
    shown = selected(browser)
    assert json.dumps(best["plan"]) in shown
    assert "vllm serve SmolLM2-135M-Instruct --model-impl depthpar" in shown
    assert f"{best['kl']:.3f}" in shown
    assert "║" in shown, "its picture"
    tip = browser.run("document.querySelector('.tip').textContent")
    assert best["name"] in tip
    assert f"{best['kl']:.3f}" in tip


def test_points_are_reached_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    before = selected(browser)
    browser.run("document.getElementById('quality').focus()")
    browser.press("Tab")
    focus = "document.activeElement.getAttribute('aria-label')"
    assert browser.run(focus).startswith(json.loads(SEARCH.read_text())["plan"]["name"])
    browser.press("Home")
    assert browser.run(focus).startswith("plain vLLM")
    browser.press("ArrowRight")
    name = browser.run(focus).partition(",")[0]
    assert name == "30 layers as 29 blocks (1 of 2)"
    assert name in browser.run("document.querySelector('.tip').textContent")
    assert selected(browser) == before
    browser.press("Enter")
    assert name in selected(browser)


def test_a_row_of_the_table_shows_its_plan(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri())
    link = "#numbers tr.kind-recovered a"
    browser.click(*middle(browser, link))
    assert browser.run(f"document.querySelector('{link}').textContent").strip("◆ ") in selected(
        browser
    )
    assert "Recovered from" in selected(browser)
    assert browser.run("document.querySelectorAll('tr[aria-current]').length") == 1


def test_another_axis(browser: Browser, page: Path) -> None:
    """Measured speeds with their spread; what has none is not drawn."""
    browser.open(page.as_uri())
    choose = """(name, words) => {
        const axis = document.getElementById(name);
        axis.value = [...axis.options].find(one => one.text.includes(words)).value;
        axis.dispatchEvent(new Event("change"));
    }"""
    browser.run(f"({choose})('speed', 'measured speed-up: decode, 2048 tokens, batch 8')")
    labels = browser.run("[...document.querySelectorAll('.dot')].map(one => one.ariaLabel)")
    assert [label.partition(",")[0] for label in labels] != []
    bench = json.loads(FILES[2].read_text())
    figures = bench["summary"]["loads"]["throughput, 2048 tokens, batch 8"]["pairs4.json"]
    speed = figures["decode_tokens_per_second"]["speedup"]
    written = "{median:.2f} ({min:.2f} to {max:.2f})".format(**speed)
    assert any(written in label for label in labels)
    assert browser.run("document.querySelectorAll('.spread').length") >= 1
    browser.run(f"({choose})('quality', 'own-prose, nats/token ↓ [2]')")
    assert browser.run("document.getElementById('canvas').textContent") != ""
    browser.run(f"({choose})('speed', 'all-reduces')")
    assert browser.run("document.querySelectorAll('.won-back').length") == 1


def test_down_is_better_whatever_is_measured(browser: Browser, tmp_path: Path) -> None:
    """A task's accuracy, of which more is better."""
    tasks = [one["tasks"] for one in json.loads(PIQA.read_text()).values()]
    found: list[tuple[float, str]] = []
    for number, one in enumerate(tasks[:2]):
        (tmp_path / f"{number}.json").write_text(json.dumps({"tasks": one}))
        (plan,) = one["plans"]
        found.append((plan["results"]["piqa_local"]["acc"]["value"], plan["label"]))
    out = tmp_path / "report.html"
    files = [str(tmp_path / f"{number}.json") for number in range(2)]
    assert main(["report", *files, "--out", str(out)]) == 0
    browser.open(out.as_uri())
    assert browser.errors == []
    places = browser.run("""[...document.querySelectorAll(".dot")].map(
        one => [one.transform.baseVal[0].matrix.f, one.ariaLabel])""")
    (_, worse), (_, better) = sorted(places)
    assert f"acc {min(found)[0]:.3f}" in worse
    assert f"acc {max(found)[0]:.3f}" in better


def test_it_asks_nobody_for_anything(
    browser: Browser, page: Path, tempting: Tempting, tmp_path: Path
) -> None:
    browser.open(page.as_uri())
    browser.click(*middle(browser, "#numbers tr:last-child a"))
    assert browser.requests == [page.as_uri()]
    assert browser.errors == [], "a blocked request would be an error, too"
    assert tempting.asked == []
    # As text it is there.
    assert markup(tempting.url) in browser.run("document.querySelector('#answers').textContent")

    # What is asked for is seen; and what the policy is for: markup that was let through.
    text = page.read_text().replace("<header>", f"<header>{markup(tempting.url)}", 1)
    let_through = tmp_path / "let-through.html"
    let_through.write_text(text)
    browser.open(let_through.as_uri())
    assert browser.errors != []
    assert tempting.asked == []
    free = tmp_path / "free.html"
    free.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text))
    browser.open(free.as_uri())
    browser.run("new Promise(done => setTimeout(done, 300))")
    assert any(path in tempting.asked for path in ("/image", "/"))
    assert len(browser.requests) > 1


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, 768, 1200])
def test_it_fits_and_can_be_read(
    browser: Browser, page: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    browser.open(page.as_uri(), width=width, dark=dark, height=1600)
    assert browser.run("document.documentElement.scrollWidth") <= width
    background, ink = (
        browser.run(f"getComputedStyle(document.body).{name}")
        for name in ("backgroundColor", "color")
    )
    assert (luminance(background) < 0.1) == dark
    assert contrast(background, ink) >= 7
    quiet = browser.run("getComputedStyle(document.querySelector('.lead')).color")
    assert contrast(background, quiet) >= 4.5
    marks = browser.run(
        "[...document.querySelectorAll('.legend .mark')].map(one => getComputedStyle(one).color)"
    )
    assert min(contrast(background, mark) for mark in marks) >= 3
    shot = tmp_path / "page.png"
    browser.screenshot(shot)
    assert shot.read_bytes().startswith(b"\x89PNG")


def luminance(colour: str) -> float:
    """Of 'rgb(r, g, b)', as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Between two colours, as WCAG 2 defines it."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_without_scripts_the_numbers_and_plans_are_there(browser: Browser, page: Path) -> None:
    browser.open(page.as_uri(), scripts=False)
    assert browser.run("document.querySelectorAll('.dot').length") == 0
    assert browser.run("document.querySelector('noscript').checkVisibility()")
    assert browser.run("document.querySelectorAll('tr[data-point]').length") > len(measured())
    assert browser.run("document.getElementById('plans').checkVisibility()")
    assert browser.run("document.querySelectorAll('.plan .code').length") > 2 * len(measured())
    rows = [len(one["plans"]) for one in json.loads(GENERATED.read_text()).values()]
    written = "document.querySelectorAll('#generation tbody tr').length"
    assert [browser.run(written)] == [3 * count for count in rows], "prose, answers, tasks"
