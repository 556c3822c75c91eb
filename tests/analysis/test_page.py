"""The pages in a browser without network: drawn, answering to their selectors, light and dark, on a phone and on paper.

Needs Chromium (`apt-get install chromium`) and playwright; where they are missing the tests are skipped, but in CI (CI=true) they fail.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from conftest import CALIBRATION, save_tiny
from expertsmith import api
from expertsmith.views.pages.analysis import SERIES, compact, page, write_page
from expertsmith.views.pictures import DASHES, LIGHT, MARKERS, looks_of

pytestmark = pytest.mark.slow

LAYERS, EXPERTS = 5, 16
MANY_LAYERS, MANY_EXPERTS = 26, 64
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def look(data, tmp_path_factory) -> Path:
    """The folder of an analysis of 5 layers of 16 experts."""
    return analysis(tmp_path_factory.mktemp("page"), data, LAYERS, EXPERTS)


@pytest.fixture(scope="module")
def large(data, tmp_path_factory) -> Path:
    """The page of 26 layers of 64 experts: a layer of such a model, 26 times."""
    folder = analysis(tmp_path_factory.mktemp("large"), data, 1, MANY_EXPERTS)
    one = json.loads((folder / "measures.json").read_text())
    one["layers"] = [{**one["layers"][0], "layer": layer} for layer in range(MANY_LAYERS)]
    cut, budget = one["before_cut"], one["suggested_budget"]
    cut["layers"] = list(range(MANY_LAYERS))
    for name in ("mass", "energy", "mass_own", "energy_own"):
        cut[name] = [[[by_layer * MANY_LAYERS for by_layer in by_domain] for by_domain in by_ratio] for by_ratio in cut[name]]
    cut["kept"] = {name: [rows * MANY_LAYERS for rows in held] for name, held in cut["kept"].items()}
    for rows in (budget["by_layer"], one["redundant_layers"]["turn"]):
        rows[:] = [{**rows[0], "layer": layer} for layer in range(MANY_LAYERS)]
    write_page(folder / "large.html", one)
    return folder / "large.html"


def analysis(folder: Path, data: list[str], layers: int, experts: int) -> Path:
    model = save_tiny("qwen2_moe", folder / "model", num_hidden_layers=layers, num_experts=experts, num_experts_per_tok=4)
    api.analyze(model, folder / "out", data=data, all_experts=24, memory="resident", dtype="float32", **CALIBRATION)
    return folder / "out"


@pytest.fixture(scope="module")
def measures(look) -> dict:
    return json.loads((look / "measures.json").read_text())


def missing(what: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI has to look at the page")
    pytest.skip(f"{what} is missing: the page is not looked at in a browser")


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        missing("playwright (pip install playwright)")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        missing("Chromium (apt-get install chromium)")
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=program, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def visit(browser, look):
    """Open the page; at the end nothing may have been said on the console."""
    said: list[str] = []
    contexts = []

    def open_page(width: int = 1280, scheme: str = "light", file: Path = look / "report.html"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on(
            "request",
            lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None,
        )
        tab.goto(file.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def scroll(tab) -> None:
    """Through the whole page, so that every figure comes into sight."""
    place = 0
    while place < tab.evaluate("document.documentElement.scrollHeight"):
        tab.evaluate(f"window.scrollTo(0, {place})")
        tab.wait_for_timeout(50)
        place += 800
    tab.wait_for_function("present.every((figure) => drawn.has(figure.id))")


def see(tab, *figures: str) -> None:
    for figure in figures:
        tab.locator(f"#figure-{figure}").scroll_into_view_if_needed()
        tab.wait_for_function(f"drawn.has('{figure}')")


def shown(tab, figure: str) -> list:
    return tab.evaluate(f"document.getElementById('plot-{figure}').data.map((trace) => trace.z ?? trace.y)")


def choose(tab, name: str, label: str, inside: str = "#bar") -> None:
    tab.locator(f"{inside} select[data-choice={name}]").select_option(label=label)


WIDE = "document.querySelector('#plot-usage .main-svg').getBoundingClientRect().width"


def first_screen(tab, title: str) -> None:
    """A figure within the first screen of a laptop, and a list of contents whose entries lead somewhere."""
    figure = tab.locator("header .plot, header figure, #figure-size").first
    assert figure.bounding_box()["y"] < 500, "the figure is in sight"
    links = tab.locator("nav.contents a")
    assert title in links.all_text_contents()
    assert tab.evaluate(
        "[...document.querySelectorAll('nav.contents a')].every((a) => document.querySelector(a.getAttribute('href')))"
    )


def test_size(large):
    """Under 10 MB for 26 layers of 64 experts, and nothing in it points elsewhere."""
    text = large.read_text(encoding="utf-8")
    assert 4e6 < len(text.encode()) < 10e6
    own = text[: text.index('<script type="application/json"')]
    assert not re.search(r"(src|href)=[\"'](?!data:)", own)


def test_a_large_page_is_drawn_too(large, visit):
    tab = visit(file=large)
    tab.locator("#plot-usage .main-svg").first.wait_for()
    assert len(shown(tab, "usage")[0]) == MANY_LAYERS
    see(tab, "flows", "matrix", "lostmap")
    choose(tab, "layer", "17")
    assert len(shown(tab, "matrix")[0]) == MANY_EXPERTS + 1
    assert len(shown(tab, "lostmap")[0]) == MANY_LAYERS


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_every_figure_is_drawn(width, scheme, visit):
    tab = visit(width, scheme)
    scroll(tab)
    figures = tab.evaluate("present.map((figure) => figure.id)")
    if width > 1000:
        tab.evaluate("scrollTo(0, 0)")
        first_screen(tab, "What experts are used for")
    assert {"usage", "flows", "special", "stability", "super", "tokens", "matrix", "depth", "pca", "match", "r2", "scatter", "ranks", "rho", "health", "saliency", "lost", "lostmap", "budget", "turn"} == set(figures)  # fmt: skip
    for name in figures:
        if name != "tokens":
            assert tab.locator(f"#plot-{name} .main-svg").count() > 0
            assert tab.locator(f"#plot-{name}").bounding_box()["height"] > 150
    assert tab.locator("#plot-tokens tr").count() == EXPERTS + 1
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 150) == (scheme == "dark")
    assert tab.evaluate("document.getElementById('plot-usage').layout.paper_bgcolor") == (
        "#181e2a" if scheme == "dark" else "#ffffff"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_figure_is_printed_without_scrolling(scheme, visit, tmp_path):
    """In light colours, not wider than the paper; then the page is as it was."""
    tab = visit(1280, scheme)
    tab.locator("#plot-usage .main-svg").first.wait_for()
    before = tab.evaluate(WIDE)
    tab.evaluate("""() => {
        globalThis.seen = null;
        const widths = () => [...document.querySelectorAll(".plot")].map((plot) => plot.querySelector(".main-svg, table")?.getBoundingClientRect().width ?? 0);
        addEventListener("beforeprint", () => { globalThis.seen = { drawn: drawn.size, dark: dark(), widths: widths() }; });
    }""")
    assert tab.evaluate("drawn.size < present.length")
    tab.pdf(path=tmp_path / "page.pdf", format="A4")
    seen = tab.evaluate("seen")
    assert seen["drawn"] == tab.evaluate("present.length") == len(seen["widths"])
    assert not seen["dark"]
    assert all(0 < width <= 1280 for width in seen["widths"])
    assert tab.evaluate(WIDE) == before != 660
    assert tab.evaluate("dark()") == (scheme == "dark")


def test_a_browser_that_tells_of_paper_by_the_medium_only(visit):
    tab = visit()
    tab.locator("#plot-usage .main-svg").first.wait_for()
    before = tab.evaluate(WIDE)
    tab.emulate_media(media="print")
    tab.wait_for_function("drawn.size === present.length")
    assert set(
        tab.evaluate("present.filter((f) => !f.html).map((f) => document.getElementById('plot-' + f.id).layout.width)")
    ) == {660}
    tab.emulate_media(media="screen")
    tab.wait_for_function(f"{WIDE} === {before}")
    assert tab.evaluate("document.getElementById('plot-usage').layout.width ?? 1000") != 660


SHEET = 1123 - 76  # pixels of A4 without its margins
BOXES = """() => [...document.querySelectorAll("article.card, figure.card")].map((card) => {
    const box = card.getBoundingClientRect(), inside = [...card.querySelectorAll(".main-svg, svg.drawing, table")].map((part) => part.getBoundingClientRect().bottom);
    return { top: box.top, bottom: box.bottom, left: box.left, inside: Math.max(0, ...inside), long: !!card.querySelector(".tall") };
})"""


def check_sheets(tab) -> list[dict]:
    """Nothing leaves its card or covers the next one; no heading, and no sentence below it, is left alone at the end of a sheet; what only answers
    to a mouse is not there. Returns the cards."""
    cards = tab.evaluate(BOXES)
    assert all(card["inside"] <= card["bottom"] for card in cards)
    below = [(one, two) for one, two in pairwise(cards) if one["left"] == two["left"]]
    assert all(one["bottom"] <= two["top"] for one, two in below)
    rules = """(name, key, wanted) => [...document.querySelectorAll(name)].every((part) => getComputedStyle(part)[key] === wanted)"""
    for name in ("h2", "h2 + p", ".head", ".head + p", ".legend"):
        assert tab.evaluate(f"({rules})({name!r}, 'breakAfter', 'avoid')"), name
    for name in ("p", ".card:not(:has(.tall))", ".verdict", "tr"):
        assert tab.evaluate(f"({rules})({name!r}, 'breakInside', 'avoid')"), name
    assert tab.evaluate(f"({rules})('details:not([open])', 'display', 'none')")
    assert tab.evaluate(f"({rules})('select', 'appearance', 'none')")
    return cards


def test_figures_on_paper_have_their_place(visit):
    tab = visit(718)
    tab.emulate_media(media="print")
    tab.wait_for_function("drawn.size === present.length")
    cards = check_sheets(tab)
    assert len(cards) == tab.evaluate("present.length")
    assert all(card["bottom"] - card["top"] < SHEET / 2 + 30 for card in cards if not card["long"]), (
        "two of them fit on a sheet"
    )


def test_a_comparison_on_paper_has_its_place(visit, compared):
    tab = visit(718, "light", compared / "comparison.html")
    tab.emulate_media(media="print")
    tab.wait_for_function("document.getElementById(plot).layout.height === LOW")
    assert tab.evaluate(
        "document.querySelector('#plot-size .main-svg').clientHeight === document.getElementById('plot-size').clientHeight"
    )
    check_sheets(tab)
    tab.emulate_media(media="screen")
    tab.wait_for_function("document.querySelector('#plot-size .main-svg').clientHeight > LOW")


HEAT = ("usage", "matrix", "ranks", "saliency", "lostmap")


def drawn_as(tab, figure: str) -> dict[str, list]:
    """Name of a line → its colour, marker and dash."""
    found = tab.evaluate(
        f"document.getElementById('plot-{figure}').data.map((t) => [t.name, t.line.color, t.marker.symbol, t.line.dash])"
    )
    return {name: look for name, *look in found if name}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_name_looks_the_same_in_every_figure(scheme, visit, measures, tmp_path):
    """Whatever the order of the domains; and no two domains or methods look alike without colours."""
    turned = copy.deepcopy(measures)
    turned["data"]["tokens"] = dict(reversed(turned["data"]["tokens"].items()))
    turned["redundant_layers"]["turn"] = [dict(reversed(row.items())) for row in turned["redundant_layers"]["turn"]]
    write_page(tmp_path / "page.html", turned)
    seen = []
    for tab in (visit(scheme=scheme), visit(scheme=scheme, file=tmp_path / "page.html")):
        see(tab, "stability", "turn", "lost", "depth", "flows")
        stability, turn = drawn_as(tab, "stability"), drawn_as(tab, "turn")
        assert {name: stability[name] for name in "ab"} == turn
        ribbons = tab.evaluate("document.getElementById('plot-flows').data.map((t) => [t.text[0], t.line.color])")
        assert dict(ribbons) == {name: turn[name][0] for name in "ab"}
        seen.append((turn, drawn_as(tab, "lost")))
    assert seen[0] == seen[1]
    for group in seen[0]:
        assert len({tuple(look[1:]) for look in group.values()}) == len(group)
    gate = drawn_as(tab, "depth")
    assert gate["mean gate neurons"][0] == gate["gate matrices"][0] != gate["mean up neurons"][0]
    see(tab, "r2")
    bars = tab.evaluate("document.getElementById('plot-r2').data.filter((t) => t.type === 'bar').map((t) => [t.name, t.marker.color])")  # fmt: skip
    assert dict(bars)["gate"] == gate["mean gate neurons"][0]


def test_looks_follow_from_names():
    names = ["code", "math", "spanish", "story", "wiki", "law", "chemistry", "news", "poems"]
    found = looks_of(names)
    assert looks_of(reversed(names)) == found
    assert len({(look["marker"], look["dash"]) for look in found.values()}) == len(names)
    assert len({look["colour"] for look in found.values()}) == len(LIGHT)
    assert len(set(SERIES.values())) == len(SERIES)
    assert all(0 <= c < len(LIGHT) and m in MARKERS and 0 <= d < len(DASHES) for c, m, d in SERIES.values())
    many = looks_of(map(str, range(len(MARKERS) * len(DASHES) + 3)))
    assert all(look["marker"] in MARKERS for look in many.values())


@pytest.mark.parametrize("width", [1280, 390])
def test_a_heat_map_states_its_scale(width, visit):
    """From, to, unit and what its zero or middle means, below it and in its colour bar; it begins at 0 or lies around what is unrelated."""
    tab = visit(width)
    see(tab, *HEAT)
    for name in HEAT:
        low, high, unit = tab.evaluate(
            f"(() => {{ const t = document.getElementById('plot-{name}').data[0]; return [t.zmin, t.zmax, t.colorbar.title.text]; }})()"
        )
        said = tab.locator(f"#figure-{name} .scale").text_content()
        assert said.startswith("Colours: ")
        assert unit
        assert unit in said
        assert low == 0 or low + high == pytest.approx(1)
        assert all(low <= v <= high + 1e-9 for row in shown(tab, name)[0] for v in row if v is not None)
    assert "1 is an even share" in tab.locator("#figure-usage .scale").text_content()
    for label in tab.locator("#figure-matrix select option").all_text_contents():
        choose(tab, "matrix", label, "#figure-matrix")
        low, high = tab.evaluate("(({ zmin, zmax }) => [zmin, zmax])(document.getElementById('plot-matrix').data[0])")
        said = tab.locator("#figure-matrix .scale").text_content()
        kind = label.rpartition(", ")[2]
        middle, words = {"angular": (0.5, "0.5 is unrelated"), "cosine": (0, "0 is unrelated"), "times chance": (None, "1 is chance")}[kind]  # fmt: skip
        assert words in said
        assert (low == 0) if middle is None else (low + high == pytest.approx(2 * middle))


def test_the_scale_of_a_matrix_is_that_of_all_layers(visit):
    tab = visit()
    see(tab, "matrix")
    scales = set()
    for layer in range(LAYERS):
        choose(tab, "layer", str(layer))
        scales.add(tab.evaluate("document.getElementById('plot-matrix').data[0].zmax"))
    assert len(scales) == 1


def test_similarities_of_different_scales_have_an_axis_each(visit):
    tab = visit()
    see(tab, "depth")
    axes = tab.evaluate("Object.fromEntries(document.getElementById('plot-depth').data.map((t) => [t.name, t.yaxis ?? 'y']))")
    assert {name for name, axis in axes.items() if axis == "y2"} == {"outputs (angular)"}
    assert len(axes) == 8
    titles = tab.evaluate("['yaxis', 'yaxis2'].map((a) => document.getElementById('plot-depth').layout[a].title.text)")
    assert titles == ["cosine, −1 to 1", "angular, 0 to 1"]
    low, high = tab.evaluate("document.getElementById('plot-depth').layout.yaxis2.range")
    assert low < 0.5 < high


def test_super_experts_stand_above_the_bar(visit, measures, tmp_path):
    """One point an expert, at its largest output over the median's; the one that is blown up here is drawn apart."""
    blown = copy.deepcopy(measures)
    blown["layers"][1]["usage"]["all"]["max_norm"][2] = 1000 * blown["super_experts"]["median"]
    blown["super_experts"] |= {
        "bar": 100 * blown["super_experts"]["median"],
        "experts": [{"layer": blown["layers"][1]["layer"], "expert": 2}],
    }
    write_page(tmp_path / "page.html", blown)
    tab = visit(file=tmp_path / "page.html")
    see(tab, "super")
    ordinary, far, bar = shown(tab, "super")
    assert far == pytest.approx([1000], rel=1e-3)  # the page has three decimals
    assert len(ordinary) + 1 == sum(v > 0 for entry in blown["layers"] for v in entry["usage"]["all"]["max_norm"])
    assert max(ordinary) < bar[0] == pytest.approx(100, rel=1e-3)


def test_layer_and_domain_selectors(visit, measures):
    tab = visit()
    see(tab, "usage", "pca", "ranks", "saliency")
    for label in ("0", "3"):
        choose(tab, "layer", label)
        counts = measures["layers"][int(label)]["sample"]["rank_counts"]
        assert tab.evaluate("document.getElementById('plot-ranks').data[0].customdata") == counts
        pca = measures["layers"][int(label)]["static"]["projections"]["gate"]["pca"]
        assert tab.evaluate("document.getElementById('plot-pca').data[0].x") == pytest.approx([row[0] for row in pca], abs=6e-3)
    tab.locator("#bar button[aria-label=next]").click()
    assert (
        tab.evaluate("document.getElementById('plot-ranks').data[0].customdata")
        == measures["layers"][4]["sample"]["rank_counts"]
    )
    for domain, entry in measures["layers"][3]["usage"]["domains"].items():
        choose(tab, "domain", domain)
        assert shown(tab, "usage")[0][3] == pytest.approx([EXPERTS * value for value in entry["usage"]], abs=0.05)
    choose(tab, "keep", "25 %")
    kept = measures["before_cut"]["kept"]["for b"][measures["before_cut"]["ratios"].index(0.25)]
    assert tab.evaluate("document.getElementById('plot-saliency').data[1].x.length") == sum(map(len, kept))


def test_matrix_selector_and_its_order(visit, measures):
    tab = visit()
    see(tab, "matrix")
    choose(tab, "matrix", "mean gate neurons, cosine", "#figure-matrix")
    names, z = tab.evaluate("(() => { const t = document.getElementById('plot-matrix').data[0]; return [t.x, t.z]; })()")
    middle = measures["layers"][(LAYERS - 1) // 2]["static"]["projections"]["gate"]
    at = [middle["neuron_members"].index(name) for name in names]
    assert sorted(at) == list(range(EXPERTS + 1))
    for i, j in ((0, 1), (5, 12), (16, 3)):
        assert z[i][j] == pytest.approx(middle["neuron_cosine"][at[i]][at[j]], abs=6e-4)


def test_hover_shows_values(visit):
    tab = visit()
    tab.locator("#plot-usage .main-svg").first.wait_for()
    tab.locator("#figure-usage").scroll_into_view_if_needed()
    box = tab.locator("#plot-usage").bounding_box()
    tab.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5)
    tab.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    text = tab.locator("#plot-usage .hoverlayer .hovertext")
    text.wait_for()
    assert re.search(r"layer \d+, expert \d+", text.text_content())


def test_theme_button(visit):
    tab = visit()
    tab.locator("#plot-usage .main-svg").first.wait_for()
    tab.locator("#theme").click()
    assert tab.evaluate("document.documentElement.classList.contains('dark')")
    assert tab.evaluate("document.getElementById('plot-usage').layout.paper_bgcolor") == "#181e2a"


def test_saved_numbers_and_pictures(visit, measures, tmp_path):
    tab = visit()
    tab.locator("#plot-usage .main-svg").first.wait_for()
    files = {}
    for kind in ("CSV", "SVG", "PNG"):
        with tab.expect_download() as held:
            tab.locator("#figure-usage .tools button", has_text=kind).click()
        files[kind] = tmp_path / held.value.suggested_filename
        held.value.save_as(files[kind])
    rows = list(csv.DictReader(files["CSV"].open()))
    assert len(rows) == LAYERS * EXPERTS
    first = measures["layers"][0]["usage"]["all"]["usage"]
    assert [float(row["usage"]) for row in rows[:EXPERTS]] == pytest.approx([EXPERTS * value for value in first], abs=0.05)
    assert "<svg" in files["SVG"].read_text()[:200]
    assert files["PNG"].read_bytes()[:4] == b"\x89PNG"


def test_text_of_users_cannot_leave_its_place(measures):
    """Names and tokens with markup stay text."""
    changed = {**measures, "model": {**measures["model"], "source": "x/<img src=y>"}, "notes": ["</script><b>"]}
    changed["layers"] = [{**entry} for entry in measures["layers"]]
    changed["layers"][0] = {**changed["layers"][0], "sample": {**changed["layers"][0]["sample"], "loved_tokens": [[{"token": 1, "text": "</script>{{DATA}}", "seen": 9, "routed": 1, "lift": 2}]]}}  # fmt: skip
    text = page(changed)
    assert "<img src=y>" not in text
    assert text.count("</script>") == 3
    assert text.count("\\u003c/script>{{DATA}}") == 1


def test_what_the_page_holds_is_what_the_file_says():
    """Rounded to what a picture shows, matrices as lower triangles."""
    made = compact({"matrix_cosine": [[1.0, 0.12345], [0.12345, 1.0]], "usage": [0.0123456, 3.0], "output_cosine": [[1.0]]})
    assert made == {"matrix_cosine": [1, 0.123, 1], "usage": [0.0123, 3]}


# ---- the page of `compare`


@pytest.fixture(scope="module")
def compared(look, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "out"
    options = {**CALIBRATION, "memory": "resident", "dtype": "float32"}
    api.compare(look.parent / "model", ["reap", "frequency"], [0.75, 0.5], data, data, folder, **options)
    return folder


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_a_comparison_is_drawn(width, scheme, visit, compared):
    tab = visit(width, scheme, compared / "comparison.html")
    tab.locator("#plot-size .main-svg").first.wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    names = tab.evaluate("document.getElementById('plot-size').data.filter((t) => t.showlegend !== false).map((t) => t.name)")
    assert set(names) == {"reap", "frequency", "random, mean of 3"}
    assert tab.locator("table.numbers").count() == 2
    if width > 1000:
        first_screen(tab, "Keep 0.5")
    assert tab.locator("table.numbers tr").count() == 2 * (2 + 3)
    colour = tab.evaluate("document.getElementById('plot-size').layout.paper_bgcolor")
    assert colour == ("#181e2a" if scheme == "dark" else "#ffffff")
    tab.locator("#theme").click()
    assert tab.evaluate("document.getElementById('plot-size').layout.paper_bgcolor") != colour


def test_a_comparison_is_printed(visit, compared, tmp_path):
    tab = visit(1280, "dark", compared / "comparison.html")
    tab.evaluate(
        "addEventListener('beforeprint', () => { globalThis.seen = [dark(), document.getElementById(plot).layout.width]; })"
    )
    tab.pdf(path=tmp_path / "page.pdf", format="A4")
    assert tab.evaluate("seen") == [False, 660]
    assert tab.evaluate("dark() && document.getElementById(plot).layout.width !== 660")


def test_its_measures_and_hover_are_those_of_the_file(visit, compared, tmp_path):
    found = json.loads((compared / "comparison.json").read_text())
    tab = visit(file=compared / "comparison.html")
    tab.locator("#plot-size .main-svg").first.wait_for()
    half = {row["method"]: row for row in found["groups"][1]["rows"]}

    def first(name: str) -> float:
        return tab.evaluate(f"document.getElementById('plot-size').data.find((t) => t.name === '{name}').y[0]")

    assert first("reap") == pytest.approx(half["reap"]["rise"]["mean"][0])
    band = tab.evaluate("document.getElementById('plot-size').data.filter((t) => t.showlegend === false).map((t) => t.y[0])")
    drawn = [half[f"random:seed={seed}"]["rise"]["mean"][0] for seed in (0, 1, 2)]
    assert band == pytest.approx([min(drawn), max(drawn)])
    tab.locator("#measure").select_option("on a")
    assert first("reap") == pytest.approx(half["reap"]["rise"]["domains"]["a"][0], abs=1e-9)
    point = tab.locator("#plot-size .scatterlayer .trace .point").first.bounding_box()
    tab.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    text = tab.locator("#plot-size .hoverlayer .hovertext").first
    text.wait_for()
    assert re.search(r"of \d+ experts", text.text_content())
    for kind, head in (("SVG", b"<svg"), ("CSV", b'"method"')):
        with tab.expect_download() as held:
            tab.locator("#figure-size .tools button", has_text=kind).click()
        held.value.save_as(tmp_path / kind)
        assert head in (tmp_path / kind).read_bytes()[:200]


# ---- the pages of `compress`, `evaluate` and `demo`, which are drawn without a script


@pytest.fixture(scope="module")
def still(look, data, tmp_path_factory) -> dict[str, Path]:
    """The pages by the name of their command. That of the demo is made of made-up numbers."""
    from expertsmith.calibration.stats import load_statistics
    from expertsmith.views.pages.demo import write_report

    folder, model = tmp_path_factory.mktemp("still"), look.parent / "model"
    done = api.compress(model, "reap", 0.5, out=folder / "out", data=data, eval_data=data, **CALIBRATION)
    api.evaluate(folder / "out", data, reference=model, generate=4, report=folder / "evaluate.html", seq_len=24, device="cpu")
    labels = {
        "all (the original)": None,
        "easy_ep for a": "a",
        "reap for a": "a",
        "random (mean of 3)": None,
        "easy_ep for b": "b",
    }
    rows = [
        {"label": label, "domain": domain, "loss": {"a": 2 + i, "b": 3 - i / 9}, "perplexity": {"a": 7.4 + i, "b": 20.0}, "verify": "passed", "routed": 0.5, "plan": None}
        for i, (label, domain) in enumerate(labels.items())
    ]  # fmt: skip
    result = {"summary": "On a, half costs.", "target": "a", "domains": ["a", "b"], "rows": rows, "seconds": 1.0}
    write_report(folder / "demo.html", result, load_statistics(look / "stats"), rows)
    return {"compress": Path(done["report"]), "evaluate": folder / "evaluate.html", "demo": folder / "demo.html"}


@pytest.mark.parametrize("name", ["compress", "evaluate", "demo"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_a_still_page_answers_first_and_fits(name, width, scheme, visit, still):
    tab = visit(width, scheme, still[name])
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    title = {"compress": "Kept experts of each layer", "evaluate": "Text by domain", "demo": "Perplexity on held-out text"}[
        name
    ]
    assert title in tab.locator("nav.contents a").all_text_contents()
    figure = tab.locator("header svg").first.bounding_box()
    assert figure["y"] < 844, "in the first screen of a phone or of a laptop"
    smallest = tab.evaluate(
        "Math.min(...[...document.querySelectorAll('header svg text')].map((t) => t.getBoundingClientRect().height))"
    )
    assert smallest > 9, "the figure can be read"
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 150) == (scheme == "dark")
    tab.locator("#theme").click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != background


@pytest.mark.parametrize("name", ["compress", "evaluate", "demo"])
def test_a_still_page_on_paper(name, visit, still):
    """White, and nothing is cut off at the width of A4."""
    tab = visit(718, "dark", still[name])
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(28, 34, 48)"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 718
    assert tab.evaluate("[...document.querySelectorAll('.wide')].every((box) => box.scrollWidth <= box.clientWidth + 1)")
    assert not tab.locator("#theme").is_visible()
    check_sheets(tab)
