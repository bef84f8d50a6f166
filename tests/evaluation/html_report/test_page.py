from __future__ import annotations

import base64
import re
from dataclasses import replace

import numpy as np
import pytest

from evaluation.html_report.page import figure_uri
from evaluation.plots import usage_figure

undrawn = pytest.mark.usefixtures("no_drawing")


def numbers(texts):
    return np.array([float(re.match(r"[-+\d.]+", text).group()) for text in texts])


def columns(table):
    return {name: [row[place] for row in table[1:]] for place, name in enumerate(table[0])}


def test_page_asks_nobody_for_anything(write_page):
    page, _ = write_page()  # with its figures
    assert page.links
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


@undrawn
def test_links_within_the_page_lead_somewhere(page):
    for link in page.links:
        if link.startswith("#"):
            assert f'id="{link[1:]}"' in page.source


@undrawn
def test_text_of_others_is_text(page):
    assert "<script" not in page.source
    assert "<i>" not in page.source
    assert "<b>" not in page.source
    assert "Routing on a<i>b" in page.text
    assert "evaluate <all>" in page.text
    assert "<b> &" in page.text


@undrawn
def test_passage_shows_every_byte_once_and_visibly(page):
    glyphs = "".join(glyph for glyph, _, _ in page.marks[0])
    assert glyphs == "<script>alert(1)</script>&amp;\"'\u00b700\u2192ff\u21b5" + "00" * 11
    windows = [place for place, (_, classes, _) in enumerate(page.marks[0]) if "window" in classes.split()]
    assert windows == [0, 16, 32]


@undrawn
def test_tips_say_what_was_counted(page_and_parts):
    page, parts = page_and_parts
    passage = parts["passage"]
    assert len(page.marks) == len(passage.routings)
    for marks, routing in zip(page.marks, passage.routings, strict=True):
        for row in (0, 17, 47):
            tip = marks[row][2].split("\n")
            assert tip[0].startswith(f"byte {passage.tokens.flat[row]}: ")
            assert tip[1] == f"compute {routing.compute[row]:.3f} of native"
            native, routed = np.exp(-passage.native.loss[row]), np.exp(-routing.loss[row])
            assert tip[2].startswith(f"next byte {passage.targets.flat[row]}: ")
            assert tip[2].endswith(f"probability {native:.3f} natively, {routed:.3f} routed")
            heads, experts = (" ".join(map(str, np.flatnonzero(routing.subsets[site][row]))) for site in (2, 3))
            assert tip[4] == f"layer 1: heads {heads}; experts {experts}"


@undrawn
def test_dearer_bytes_are_no_lighter(page_and_parts):
    page, parts = page_and_parts
    shades = [int(classes.split()[0][1:]) for marks in page.marks for _, classes, _ in marks]
    compute = np.concatenate([routing.compute for routing in parts["passage"].routings])
    order = compute.argsort(kind="stable")
    assert (np.diff(np.array(shades)[order]) >= 0).all()
    assert {min(shades), max(shades)} == {0, 8}


@undrawn
def test_sites_add_up_to_the_compute_of_the_router(page, profile):
    table = columns(page.tables["By site"])
    assert table["site"][-2:] == ["the router itself", "all"]
    for routing in profile.routings:
        cells = numbers(table[routing.label])
        assert cells[:-1].sum() == pytest.approx(cells[-1], abs=0.003)
        assert cells[-1] == pytest.approx(routing.compute.mean(), abs=5e-4)
    assert numbers(table["native at 1.00"])[-1] == 1.0


@undrawn
def test_shares_of_classes_add_up_and_weigh_back_to_the_compute(page, profile):
    for title in ("By class of the byte", "By place in the word", "By entropy of the native prediction, nats"):
        table = columns(page.tables[title])
        shares = numbers(table["share of bytes"])[:-1] / 100
        assert shares.sum() == pytest.approx(1.0, abs=0.003)
        for routing in profile.routings:
            cells = numbers(table[routing.label])
            assert shares @ cells[:-1] == pytest.approx(cells[-1], abs=0.003)


@undrawn
def test_routers_stand_with_loss_and_accuracy_kept(page_and_parts, evaluator):
    page, parts = page_and_parts
    table = columns(page.tables["Every router at equal compute"])
    at_70 = table["loss at 0.70"][table["router"].index("plain")]
    dearest = max(parts["curves"]["plain"], key=lambda point: point.log_likelihood)
    cheapest = min(parts["curves"]["plain"], key=lambda point: point.compute)
    losses = sorted((dearest.loss, cheapest.loss))
    assert losses[0] - 1e-4 <= numbers([at_70])[0] <= losses[1] + 1e-4
    assert at_70.endswith(" %")
    assert f"{evaluator.native.loss:.4f}" in page.text


@undrawn
def test_best_hypervolume_stands_first(write_page, page_and_parts):
    evaluation = page_and_parts[1]["evaluation"]
    for best in ("plain", "learned"):
        summary = {name: entry | {"hypervolume": float(name == best)} for name, entry in evaluation["summary"].items()}
        table = write_page(evaluation=evaluation | {"summary": summary})[0].tables["Every router at equal compute"]
        assert table[1][0] == best


@undrawn
def test_balance_of_every_router_and_native(page_and_parts):
    page, parts = page_and_parts
    table = columns(page.tables["Balance of every router, at its setting nearest to compute 0.5"])
    assert set(table["router"]) == {"native", "plain", "learned"}
    shown = float(table["MaxVio"][table["router"].index("native")])
    assert shown == pytest.approx(parts["native"].balance.max_vio, abs=5e-4)


@undrawn
def test_comparisons_and_what_else_the_evaluation_holds(write_page, page_and_parts):
    evaluation = page_and_parts[1]["evaluation"]
    row = evaluation["comparisons"][0]
    table = page_and_parts[0].tables["Learned against the best other router"]
    gain = row["difference"]
    assert f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]" in table[1]
    more = {"seeds": [0, 1, 2], "same_against_same": [{"router": "<x>", "difference": gain, "passed": True}]}
    page = write_page(evaluation=evaluation | more)[0]
    assert [row[0] for row in page.tables["Seeds"][1:]] == ["0", "1", "2"]
    assert page.tables["Same against same"][1][0] == "<x>"
    assert page.tables["Same against same"][1][2] == "yes"


@undrawn
def test_a_run_without_a_learned_router(write_page):
    page, parts = write_page(learned=False)
    assert "No comparison" in page.text
    assert {routing.router for routing in parts["profile"].routings} == {"plain"}
    assert page.marks


@undrawn
def test_a_backbone_without_head_sites(write_page, page_and_parts):
    def experts_only(routing):
        return replace(routing, site_compute=routing.site_compute[1::2], subsets=routing.subsets[1::2])

    few = {
        name: replace(
            page_and_parts[1][name],
            sites=page_and_parts[1][name].sites[1::2],
            native=experts_only(page_and_parts[1][name].native),
            routings=tuple(map(experts_only, page_and_parts[1][name].routings)),
        )
        for name in ("profile", "passage")
    }
    page = write_page(**few)[0]
    assert [row[0] for row in page.tables["By site"][1:3]] == ["layer0.experts of 4", "layer1.experts of 4"]
    assert re.fullmatch(r"layer 1: experts [\d ]+", page.marks[0][0][2].split("\n")[4])


@undrawn
def test_nothing_but_native_still_makes_a_page(write_page, page_and_parts):
    parts = page_and_parts[1]
    few = {name: replace(parts[name], routings=()) for name in ("profile", "passage")}
    page = write_page(learned=False, **few)[0]
    assert page.marks == []
    assert columns(page.tables["By site"])["native at 1.00"][-1] == "1.000"


def test_figures_are_images_and_equal_ones_are_equal_text():
    usage = np.array([[0.5, np.nan], [0.1, 0.2]])
    first, second = (figure_uri(usage_figure(usage, ["one", "two"])) for _ in range(2))
    assert first == second
    assert base64.b64decode(first.split(",")[1]).lstrip().startswith(b"<?xml")
