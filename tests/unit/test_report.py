"""The page of `depthpar report`, without a browser: what is gathered, what is written."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_depthpar.cli.main import main
from vllm_depthpar.errors import UserError
from vllm_depthpar.plan import resolve
from vllm_depthpar.plan.model_shape import all_reduces
from vllm_depthpar.report import gather, records
from vllm_depthpar.report.collection import ALL_REDUCES, BLOCKS, kind
from vllm_depthpar.report.data import (
    COMPARED,
    FOUND,
    RECOVERED,
    SKIPPING,
    SPAN,
    UNMODIFIED,
    Measure,
    Page,
    Point,
    Value,
    front,
)
from vllm_depthpar.report.html import html

RESULTS = Path(__file__).parents[2] / "benchmarks"
QUALITY = RESULTS / "quality/results"
SEARCH = QUALITY / "search-smollm2-pairs-report.json"
HALVES = QUALITY / "search-smollm2-tp3-halves-41-report.json"
RECOVERY = QUALITY / "recovery-smollm2-tp3-41.json"
EVALUATED = QUALITY / "eval-smollm2-dropped-attentions.json"
BENCH = RESULTS / "serving/results/dropped-attentions.json"
PIQA = QUALITY / "recovery-piqa.json"
GENERATED = QUALITY / "generation-smollm2.json"
STATIC = files("vllm_depthpar.report") / "static"
MARKUP = "</script><img src=https://example.org/x onerror=alert(1)><script>&'\""


def page_of(*paths: Path) -> Page:
    return gather.page(
        [(path.name, records.read(json.loads(path.read_text()), path.name)) for path in paths]
    )


def point_of(page: Page, spec: dict[str, Any], kind: str | None = None) -> Point:
    (found,) = [point for point in page.points if point.spec == spec and kind in (None, point.kind)]
    return found


def measure_of(page: Page, title: str, source: int) -> str:
    (found,) = [
        one.key
        for one in (*page.speed, *page.quality)
        if one.title == title and source in one.sources
    ]
    return found


class Elements(HTMLParser):
    """The elements of a page, with their attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in.append(tag)

    def handle_data(self, data: str) -> None:
        if self._in and self._in[-1] == "script":
            self.scripts.append(data)
        elif not self._in or self._in[-1] != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._in.append("")


# Front


@pytest.mark.parametrize("more", [True, False])
def test_the_front_is_what_nothing_beats(more: bool) -> None:
    draws = random.Random(0)
    speed = Measure("s", "speed", more_is_better=more)
    quality = Measure("q", "quality")
    for _ in range(50):
        values = [(draws.randrange(6), draws.randrange(6)) for _ in range(12)]
        points = [Point("", FOUND, "", None, "", {"s": Value(s), "q": Value(q)}) for s, q in values]
        points.append(Point("", FOUND, "", None, "", {"s": Value(9)}))
        sign = 1 if more else -1

        def beats(one: tuple[int, int], other: tuple[int, int], sign: int = sign) -> bool:
            return sign * one[0] >= sign * other[0] and one[1] <= other[1] and one != other

        best = {one for one in values if not any(beats(other, one) for other in values)}
        found = [values[at] for at in front(points, speed, quality)]
        assert set(found) == best
        assert len(found) == len(best), "each once"
        assert found == sorted(found, key=lambda one: sign * one[0])


def test_the_front_of_a_search_is_the_search_s() -> None:
    for path, axis in ((SEARCH, BLOCKS), (HALVES, ALL_REDUCES)):
        page, report = page_of(path), json.loads(path.read_text())
        speed = next(one for one in page.speed if one.key == axis.key)
        assert page.speed[0] == speed, "what was searched for is shown first"
        found = front(page.points, speed, page.quality[0])
        digests = [
            resolve(page.points[at].spec or "identity", report["plan"]["plan"]["layers"]).digest
            for at in found
        ]
        assert set(digests) <= {one["digest"] for one in report["front"]}
        kls = [page.points[at].values[page.quality[0].key].value for at in found]
        assert kls == sorted(kls)


# What is gathered


@pytest.mark.parametrize("path", sorted(QUALITY.glob("search-*-report.json")), ids=lambda p: p.stem)
def test_a_search_is_all_there(path: Path) -> None:
    report, page = json.loads(path.read_text()), page_of(path)
    entries = {one["digest"]: one for one in (*report["measured"], *report["front"])}
    assert len(page.points) == len(entries) + (
        UNMODIFIED not in {one["kind"] for one in entries.values()}
    )
    kl = page.quality[0]
    for one in entries.values():
        if one["kind"] == UNMODIFIED:
            continue
        point, plan = point_of(page, one["plan"]), resolve(one["plan"], one["plan"]["layers"])
        assert (point.label, point.kind) == (one["name"], one["kind"])
        assert point.values[kl.key].value == one["kl"]
        assert point.values[BLOCKS.key].value == one["depth"]
        assert point.values[ALL_REDUCES.key].value == all_reduces(plan)
        for name, quality in one.get("quality", {}).items():
            key = measure_of(page, f"perplexity, {name}", 0)
            assert point.values[key].value == quality["perplexity"]
            ratio = measure_of(page, f"perplexity, {name}, times the unmodified's", 0)
            expected = quality["perplexity"] / report["unmodified"][name]["perplexity"]
            assert point.values[ratio].value == pytest.approx(expected)
    assert page.chosen is not None
    assert page.points[page.chosen].spec == report["plan"]["plan"]


def test_a_predicted_speed_is_plotted_first() -> None:
    report = json.loads(SEARCH.read_text())
    for number, one in enumerate([report["plan"], *report["front"], *report["measured"]]):
        one["predicted_speedup"] = 1 + number / 100
    page = gather.page([("a.json", records.read(report, "a.json"))])
    assert page.speed[0].title.startswith("predicted speed-up (")
    assert page.points[0].kind == UNMODIFIED
    assert page.points[0].values[page.speed[0].key].value == 1


def test_files_meet_in_a_plan() -> None:
    """One that was searched, evaluated and benchmarked is one point."""
    page = page_of(SEARCH, EVALUATED, BENCH)
    bench = json.loads(BENCH.read_text())
    (spec,) = [one["spec"] for one in bench["variants"] if one["label"] == "pairs4.json"]
    point = point_of(page, spec)
    assert point.kind == FOUND
    assert point.names == ("pairs4.json",)
    searched = next(one for one in json.loads(SEARCH.read_text())["front"] if one["plan"] == spec)
    assert point.values[page.quality[0].key].value == searched["kl"]
    evaluated = json.loads(EVALUATED.read_text())["text"]
    (row,) = [one for one in evaluated["plans"] if one["spec"] == spec]
    for name, quality in row["results"].items():
        assert (
            point.values[measure_of(page, f"perplexity, {name}", 1)].value
            == (quality["perplexity"])
        )
        kl = point.values[measure_of(page, f"KL, {name}, nats/token", 1)]
        assert (kl.value, kl.error) == (quality["kl"], quality["kl_standard_error"])
    title = "measured speed-up: decode, 2048 tokens, batch 8 (throughput)"
    load = bench["summary"]["loads"]["throughput, 2048 tokens, batch 8"]
    speed = load["pairs4.json"]["decode_tokens_per_second"]["speedup"]
    value = point.values[measure_of(page, title, 2)]
    assert (value.value, value.low, value.high) == (speed["median"], speed["min"], speed["max"])
    assert [point.kind for point in page.points].count(UNMODIFIED) == 1
    # Each value knows who measured it.
    sources = {point.values[key].source for key in point.values}
    assert sources == {None, 0, 1, 2}, "None: what the plan itself says"
    assert value.source == 2


def test_searches_on_the_same_texts_have_one_front() -> None:
    """Of all methods; on texts cut otherwise they have one each."""
    pairs = QUALITY / "search-smollm2-tp3-pairs-49-report.json"
    page = page_of(HALVES, pairs)
    title = "KL from the unmodified model, nats/token"
    (kl,) = [one for one in page.quality if one.title == title]
    assert kl.sources == (0, 1)
    reports = [json.loads(path.read_text()) for path in (HALVES, pairs)]
    known = {one["digest"] for report in reports for one in report["measured"]}
    assert sum(kl.key in point.values for point in page.points) == len(known) + 1
    page = page_of(HALVES, QUALITY / "search-smollm2-tp3-sync-41-report.json")
    assert [one.sources for one in page.quality if one.title == title] == [(0,), (1,)]


def test_predictions_for_the_same_machine_are_one_measure() -> None:
    def search(name: str, options: str) -> tuple[str, records.Record]:
        report = json.loads(SEARCH.read_text())
        report["plan"]["predicted_speedup"] = 1.2
        report["command"] += f" {options}"
        return name, records.read(report, name)

    h100 = "--device h100 --tp 2 --link p2p-off"
    page = gather.page([search("a", h100), search("b", f"--seed 1 {h100}"), search("c", "--tp 2")])
    predicted = {one.title: one.sources for one in page.speed if one.title.startswith("predicted")}
    assert predicted == {
        "predicted speed-up (device h100, tp 2, link p2p-off)": (0, 1),
        "predicted speed-up (tp 2)": (2,),
    }


def test_what_was_recovered_stands_beside_its_plan() -> None:
    record = json.loads(RECOVERY.read_text())
    page = page_of(RECOVERY)
    after = point_of(page, record["plan"], RECOVERED)
    assert after.before is not None
    before = page.points[after.before]
    assert before.spec == record["plan"]
    assert after.serve == "vllm serve rec41 --tensor-parallel-size 3"
    for name in record["quality"]["end"]:
        key = measure_of(page, f"perplexity, {name}", 0)
        for point, stage in ((before, "plan"), (after, "end")):
            assert point.values[key].value == record["quality"][stage][name]["perplexity"]
    # New weights in the same plan are as fast.
    assert after.values[ALL_REDUCES.key] == before.values[ALL_REDUCES.key]
    (recovery,) = page.recoveries
    assert list(recovery.stages) == ["unmodified", "plan", "refit", "end"]


def test_an_adapter_is_served_as_one_and_not_taken_to_be_as_fast() -> None:
    record = json.loads(RECOVERY.read_text())
    record["settings"] |= {"train": "lora", "rank": 32}
    search = json.loads(SEARCH.read_text())
    entry = search["plan"]
    search["front"].append(entry | {"plan": record["plan"], "predicted_speedup": 1.5})
    page = gather.page(
        [(name, records.read(one, name)) for name, one in (("s", search), ("r", record))]
    )
    after = point_of(page, record["plan"], RECOVERED)
    assert "--enable-lora --max-lora-rank 32" in after.serve
    before = page.points[after.before or 0]
    (predicted,) = [one.key for one in page.speed if one.title.startswith("predicted")]
    assert before.values[predicted].value == 1.5
    assert predicted not in after.values


def test_tasks_say_which_way_is_better() -> None:
    (plain, pairs, *_) = [one["tasks"] for one in json.loads(PIQA.read_text()).values()]
    page = gather.page(
        [(name, records.read({"tasks": one}, name)) for name, one in (("a", plain), ("b", pairs))]
    )
    key = measure_of(page, "piqa_local, acc", 0)
    (measure,) = [one for one in page.quality if one.key == key]
    assert measure.more_is_better
    assert measure.sources == (0, 1)
    assert [key in point.values for point in page.points] == [True, True]
    # The first file does not say how deep the model is.
    assert page.points[0].values[BLOCKS.key].value == 30
    assert page.points[0].values[key].written(measure.form) == "0.654 ± 0.015"


def test_what_plans_write_is_theirs() -> None:
    """Figures of points, and a table with a row for each kind and plan."""
    report = json.loads(GENERATED.read_text())["generate"]
    page = page_of(SEARCH, GENERATED)
    for row in report["plans"]:
        point = page.points[0] if row["spec"] is None else point_of(page, row["spec"])
        for asked in ("prose", "answers"):
            kl = row["writing"][asked]["lengths"]["1024"]["sampled"]["kl"]
            value = point.values[measure_of(page, f"KL of drawn {asked}, nats/token", 1)]
            assert (value.value, value.error) == (kl["value"], kl["stderr"])
        right = row["tasks"]["retrieval"]
        value = point.values[measure_of(page, "right answers, retrieval", 1)]
        assert (value.value, value.low, value.high) == (right["value"], right["low"], right["high"])
    retrieval = next(one for one in page.quality if one.title == "right answers, retrieval")
    assert retrieval.more_is_better
    assert not retrieval.plotted
    (generation,) = page.generations
    assert [label for label, _ in generation.plans] == [row["label"] for row in report["plans"]]
    text = html(page)
    rows = re.findall(r'<tr><th scope="row">(prose|answers): (.*?)</th>(.*?)</tr>', text)
    assert len(rows) == 2 * len(report["plans"])
    # As in docs/results.md.
    cells = {(asked, label): re.findall("<td>(.*?)</td>", row) for asked, label, row in rows}
    assert cells["prose", "auto"] == [
        *("-4.38 ± 0.18", "0.151 ± 0.011", "-0.09 ± 0.04", "63 %", "50 %", "50 %", "38 %", "3")
    ]
    assert cells["answers", "plain"][-1] == "", "the unmodified model is not like itself"
    assert "<td>48 % (34 to 62)</td>" in text.replace(" %)", ")").replace(" % to", " to")


def test_what_a_recovered_checkpoint_writes_is_told_by_the_model_it_was_made_from() -> None:
    """Each of the two rows is of its own checkpoint."""
    recovery = json.loads(RECOVERY.read_text())
    report = json.loads(GENERATED.read_text())["generate"]
    plain, carried = report["plans"][:2]
    plain["label"], carried["label"], carried["spec"] = "unmodified", "carried", recovery["plan"]
    report |= {"model": "rec41", "unmodified": "SmolLM2-135M-Instruct", "plans": [plain, carried]}
    page = gather.page(
        [
            ("r", records.read(recovery, "r")),
            ("g", records.read({"generate": report}, "g")),
        ]
    )
    key = measure_of(page, "KL of drawn prose, nats/token", 1)
    have = [point for point in page.points if key in point.values]
    assert {point.kind for point in have} == {UNMODIFIED, RECOVERED}
    assert len(page.points) == 3, "and the plan before recovery"
    (generation,) = page.generations
    labels = [label for label, _ in generation.plans]
    assert labels == ["unmodified; SmolLM2-135M-Instruct", "carried; rec41"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row["tasks"].pop("copying"), "plans were asked different things"),
        (lambda row: row["writing"].pop("prose"), "plans were asked different things"),
        (lambda row: row["writing"]["prose"]["lengths"].pop("1024"), "1024 tokens are missing"),
    ],
)
def test_writing_that_cannot_be_compared_is_refused(
    change: Callable[[dict[str, Any]], object], words: str
) -> None:
    report = json.loads(GENERATED.read_text())
    change(report["generate"]["plans"][1])
    with pytest.raises(UserError, match=words):
        records.read(report, "x.json")


def test_kinds() -> None:
    layers = 12
    for spec, expected in (
        ("identity", UNMODIFIED),
        ({"pair": [2, 8]}, SPAN),
        ({"pair": [2, 4]}, SPAN),
        ({"pair": [0, 12]}, SPAN),
        ({"blocks": [[0], [1, 2], [3], [4, 5], *([layer] for layer in range(6, 12))]}, COMPARED),
        ({"blocks": [[0], [2, 1], *([layer] for layer in range(3, 12))]}, COMPARED),
        ({"pair": [3, 9], "group": 3}, COMPARED),
        ({"pair": [2, 8], "ladder": "all"}, COMPARED),
        ({"skip": {"speedup": 1.5}}, SKIPPING),
        ({"ladder": 4}, COMPARED),
        ({"drop_attention": [3]}, COMPARED),
    ):
        assert kind(resolve(spec, layers)) == expected, spec


def test_kinds_are_the_search_s() -> None:
    for path in QUALITY.glob("search-*-report.json"):
        for one in json.loads(path.read_text())["measured"]:
            found = kind(resolve(one["plan"], one["plan"]["layers"]))
            assert (FOUND if found == COMPARED else found) == one["kind"]


def test_what_is_no_number_is_left_out() -> None:
    report = json.loads(SEARCH.read_text())
    report["front"][0]["kl"] = float("nan")
    report["front"][0]["quality"]["wiki-first"]["perplexity"] = float("inf")
    report["plan"] = report["front"][1]
    report["measured"] = []
    page = gather.page([("a.json", records.read(report, "a.json"))])
    point = point_of(page, report["front"][0]["plan"])
    assert measure_of(page, "KL from the unmodified model, nats/token", 0) not in point.values
    assert measure_of(page, "perplexity, wiki-first", 0) not in point.values
    (data,) = [one for one in Elements(html(page)).scripts if one.startswith("{")]
    assert "NaN" not in data
    assert "Infinity" not in data


# What is refused


def changed(*path: str | int, to: object) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(SEARCH.read_text())
    place: Any = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return report


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "x.json is no report of plans; allowed: what search"),
        ({"curve": 1}, "x.json is no report of plans"),
        ({"text": None}, "nothing was measured"),
        (changed("model", to=3), "x.json: model is 3 ("),
        (changed("front", 1, "kl", to="low"), "x.json: front.1.kl is 'low' ("),
        (changed("texts", 0, "windows", to=-1), "x.json: texts.0.windows is -1 ("),
        (changed("plan", "plan", to={}), "x.json: a plan has None layers; allowed: 1 to 10000"),
        (changed("plan", "plan", "layers", to=10**9), "1000000000 layers; allowed: 1 to 10000"),
        (changed("plan", "plan", "blocks", to=[[0, 0]]), "x.json: plan key 'blocks'"),
    ],
)
def test_wrong_files_are_refused_in_one_line(content: Any, words: str) -> None:
    with pytest.raises(UserError) as refused:
        gather.page([("x.json", records.read(content, "x.json"))])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "; allowed: " in str(refused.value)


def small(path: Path) -> dict[str, Any]:
    """A real file, with few plans of each list."""
    report: dict[str, Any] = json.loads(path.read_text())
    for key in ("front", "measured"):
        if key in report:
            report[key] = report[key][:2]
    return report


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in JSON."""
    if not isinstance(node, dict | list):
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key)
        yield from places(value, (*path, key))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    # Half a character; a number that is no float; a plan's own words.
    | st.sampled_from(["\ud800", "\0", 10**400, -1, 0, "auto", "plain", MARKUP]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)  # fmt: skip
SMALL = [small(path) for path in (SEARCH, HALVES, RECOVERY, EVALUATED, BENCH, GENERATED)]


@settings(max_examples=150)
@given(data=st.data(), report=st.sampled_from(SMALL), value=ANYTHING)
def test_anything_in_a_file_is_a_page_or_one_line(
    data: st.DataObject, report: dict[str, Any], value: Any
) -> None:
    report = deepcopy(report)
    *path, last = data.draw(st.sampled_from(list(places(report))))
    node = report
    for key in path:
        node = node[key]
    node[last] = value
    try:
        text = html(gather.page([("x.json", records.read(report, "x.json"))]))
    except UserError as error:
        assert "allowed" in str(error) or "plan key" in str(error)
        assert len(str(error).splitlines()) == 1
        return
    found = Elements(text.encode(errors="replace").decode())
    assert [tag for tag, _ in found.tags].count("script") in (0, 3)
    assert not [attributes for _, attributes in found.tags if "onerror" in attributes]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no.json", "--out", "x.html"], "no.json can't be read (No such file or directory)"),
        (["x.txt", "--out", "x.html"], "x.txt can't be read (line 1 column 1: "),
        ([str(SEARCH), "--out", "x.json"], "--out x.json: its name must end in .html"),
        ([str(QUALITY / "study-smollm2.json"), "--out", "x.html"], "is no report of plans"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("text")
    assert main(["report", *arguments]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not Path("x.html").exists()


def test_files_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
        (folder / "recovery.json").write_text(RECOVERY.read_text())
    out = tmp_path / "new" / "report.html"
    paths = [str(folder / "recovery.json") for folder in folders]
    assert main(["report", str(SEARCH), *paths, "--out", str(out)]) == 0
    text = out.read_text()
    assert "one/recovery.json; " in text
    assert "other/recovery.json; " in text
    assert str(tmp_path) not in text
    assert str(out) in capsys.readouterr().out


def test_a_missing_answer_is_refused() -> None:
    answers = {
        **{"command": "depthpar eval", "date": "2026-01-01", "model": "m"},
        "prompts": ["a", "b"],
        "plans": [{"label": "plain", "spec": None, "answers": ["c"]}],
    }
    with pytest.raises(UserError, match="x: 'plain' has 1 answers; allowed: one to each of 2"):
        gather.page([("x", records.read({"answers": answers}, "x"))])


# What is written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The sky is blue.", "word for word the same"),
        ("The sky is black, & so on.", "The sky is <mark>black,</mark> &amp; so on."),
        ("A sky", "<mark>A</mark> sky"),
        ("The sky", "The <mark>sky</mark>"),
        ("The sky is blue. It is", "The sky is <mark>blue.</mark> It is"),
        ("", "<blockquote><mark></mark></blockquote>"),
    ],
)
def test_the_first_difference_of_an_answer_is_marked(text: str, expected: str) -> None:
    answers = {
        **{"command": "depthpar eval", "date": "2026-01-01", "model": "m"},
        "prompts": ["Why?"],
        "plans": [
            {"label": label, "spec": None, "answers": [answer]}
            for label, answer in (("plain", "The sky is blue."), ("other", text))
        ],
    }
    page = gather.page([("x", records.read({"answers": answers}, "x"))])
    assert expected in html(page)


def with_markup() -> Iterator[dict[str, Any]]:
    """Reports with markup wherever people or models choose the words."""
    search = json.loads(SEARCH.read_text())
    search["model"] = search["command"] = search["methods"] = search["cpu"] = MARKUP
    search["texts"][0]["text"] = MARKUP
    for one in (search["plan"], *search["front"]):
        one["quality"][MARKUP] = one["quality"].pop("wiki-first")
    search["unmodified"][MARKUP] = search["unmodified"].pop("wiki-first")
    search["versions"] = {MARKUP: MARKUP}
    yield search
    answers = {
        **{"command": MARKUP, "date": MARKUP, "model": MARKUP, "settings": [MARKUP]},
        "prompts": [MARKUP],
        "plans": [
            {"label": MARKUP, "spec": spec, "answers": [f"{number} {MARKUP}"]}
            for number, spec in enumerate([None, search["plan"]["plan"]])
        ],
    }
    yield {"answers": answers}
    generation = json.loads(GENERATED.read_text())["generate"]
    generation["model"] = generation["command"] = MARKUP
    for one in generation["plans"]:
        one["label"] += MARKUP
        one["writing"][MARKUP] = one["writing"].pop("prose")
        one["tasks"][MARKUP] = one["tasks"].pop("copying")
    yield {"generate": generation}
    recovery = json.loads(RECOVERY.read_text())
    recovery["command"] = f"depthpar recover '{MARKUP}' --out {MARKUP}"
    recovery["quality"][MARKUP] = recovery["quality"]["end"]
    yield recovery


def test_everything_is_escaped() -> None:
    plain = Elements(html(page_of(SEARCH, RECOVERY)))
    page = gather.page([(MARKUP, records.read(one, MARKUP)) for one in with_markup()])
    found = Elements(html(page))
    assert {tag for tag, _ in found.tags} - {tag for tag, _ in plain.tags} == {
        *("blockquote", "figcaption", "figure", "mark")
    }
    assert not [attributes for _, attributes in found.tags if "onerror" in attributes]
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert found.text.count(MARKUP) > 20
    (data,) = [one for one in found.scripts if one.startswith("{")]
    assert any(MARKUP in one["title"] for one in json.loads(data)["quality"])


def test_a_page_loads_nothing_and_runs_nothing_else() -> None:
    text = html(page_of(SEARCH, RECOVERY, EVALUATED, BENCH, GENERATED))
    found = Elements(text)
    loading = {"src", "srcset", "data", "poster", "action", "formaction", "background", "ping"}
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert not loading & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
    style = (STATIC / "page.css").read_text()
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [
        attributes["content"] or ""
        for tag, attributes in found.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'; ")
    *scripts, last = [one for one in found.scripts if not one.startswith("{")]
    hashes = [
        base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in (*scripts, last)
    ]
    assert re.findall(r"'sha256-([^']*)'", policy) == hashes
    # Before anything that could ask for something.
    assert text.index("Content-Security-Policy") < min(
        text.index("<style>"), text.index("<script>")
    )


def test_the_table_has_the_numbers() -> None:
    text = html(page_of(SEARCH))
    report = json.loads(SEARCH.read_text())
    rows = re.findall(r'<tr class="[^"]*" data-point="\d+">.*?</tr>', text, re.DOTALL)
    assert len(rows) == len({one["digest"] for one in report["measured"]}) + 1
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    for one in report["front"]:
        assert [str(one["depth"]), f"{one['kl']:.3f}"] in [row[:2] for row in cells]


def test_without_an_unmodified_model_perplexities_are_plotted() -> None:
    page = page_of(QUALITY / "eval-smollm2-tp3-recovered-41.json")
    assert [one.figure for one in page.quality] == ["perplexity", "perplexity"]
    assert '<option value="1">' in html(page)


def test_without_qualities_there_is_no_plot() -> None:
    found = Elements(html(page_of(BENCH)))
    assert "script" not in [tag for tag, _ in found.tags]
    assert "1.31 (1.20 to 1.43)" in found.text
    assert "Answers" not in found.text


def test_the_best_published_plans_are_not_folded_away() -> None:
    shown, _, folded = html(page_of(SEARCH)).partition("more that were measured")
    report = json.loads(SEARCH.read_text())
    spans = [one for one in report["measured"] if one["kind"] == SPAN]
    for depth in {one["depth"] for one in spans}:
        kls = sorted(one["kl"] for one in spans if one["depth"] == depth)
        assert f"<td>{depth}</td><td>{kls[0]:.3f}</td>" in shown
        assert f"<td>{depth}</td><td>{kls[-1]:.3f}</td>" in folded


def test_links_lead_somewhere() -> None:
    found = Elements(html(page_of(SEARCH, RECOVERY, EVALUATED, BENCH, GENERATED)))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {
        (attributes["href"] or "").removeprefix("#") for tag, attributes in found.tags if tag == "a"
    }
    assert links <= set(ids)


def test_every_figure_names_its_command() -> None:
    files = (SEARCH, RECOVERY, EVALUATED, BENCH, GENERATED)
    page = page_of(*files)
    for one in (*page.quality, *page.speed):
        if one.key not in (BLOCKS.key, ALL_REDUCES.key):
            assert one.sources
            assert all(page.sources[at].command for at in one.sources)
    for source, path in itertools.zip_longest(page.sources, files):
        assert source.name == path.name


def test_what_is_vendored_is_what_its_note_says() -> None:
    note = (STATIC / "VENDORED.md").read_text()
    script = (STATIC / "d3.min.js").read_bytes()
    assert f"sha256 {hashlib.sha256(script).hexdigest()}" in note
    version = re.search(rb"v(\d+\.\d+\.\d+)", script.splitlines()[0])
    assert version
    assert f"D3](https://d3js.org) {version[1].decode()}," in note
    assert b"</script" not in script
    assert "permission notice" in (STATIC / "d3.LICENSE").read_text()
