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
def test_tables_of_the_terminal_are_tables_of_the_page(page):
    assert page.tables["Gains & losses"] == [
        ["router", "gain\n(nats)"],
        ["plain", "+.020 [.010, .030]"],
        ["learned", "-"],
    ]
    assert page.source.count('<tr class="strong">\n<th scope="row">learned') == 2  # there, and in the balance
    assert "A/A: <equal>\nsecond line" in page.text


@undrawn
def test_balance_of_every_router_and_native(page_and_parts, evaluator):
    page, parts = page_and_parts
    table = columns(page.tables["Balance of every router, at its setting nearest to compute 0.5"])
    assert table["router"] == ["native", "plain", "learned"]
    assert float(table["MaxVio"][0]) == pytest.approx(evaluator.native.balance.max_vio, abs=5e-4)
    plain = [point for point in parts["evaluation"]["points"] if point["router"] == "plain"]
    assert float(table["compute"][1]) in [pytest.approx(point["compute"], abs=5e-4) for point in plain]


@undrawn
def test_figures_that_stand_first(write_page, evaluator):
    row = {"quantity": "log_likelihood", "compute": 0.5, "rival": "<x>", "best_other": True}
    row["difference"] = {"mean": 0.0625, "low": 0.0, "high": 0.1}
    others = [row | {"best_other": False, "rival": "no"}, row | {"compute": 0.6, "rival": "no"}]
    page, _ = write_page(evaluation={"comparisons": [*others, row, row | {"quantity": "accuracy", "rival": "no"}]})
    assert page.facts == [
        f"{evaluator.native.loss:.4f}",
        f"{100 * evaluator.native.accuracy:.2f} %",
        "0.625",
        "+0.0625",
    ]
    assert "gained over <x>, the best other router, at compute 0.5" in page.text
    assert "gained over no" not in page.text


@undrawn
def test_selection_text_is_named_if_there_is_one(write_page, page_and_parts):
    assert "Settings were chosen on" not in page_and_parts[0].text
    selection = {"split": "validation", "tokens": 1234, "documents": 3}
    page, _ = write_page(evaluation={"corpus": page_and_parts[1]["evaluation"]["corpus"] | {"selection": selection}})
    assert "Settings were chosen on 1,234 other tokens (part: validation)" in page.text


@undrawn
def test_a_run_without_a_learned_router(write_page):
    page, parts = write_page(learned=False)
    assert len(page.facts) == 2
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
