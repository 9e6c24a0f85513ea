"""The report in headless Chromium: its views, traces, groups, policies and runs, whole whatever a model wrote."""

from __future__ import annotations

import shutil
from itertools import pairwise

import pytest
from pages import chosen, complaints, opened, requested, soon, text
from report_runs import RIGHT_TO_LEFT, evaluated
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from jobs import report
from pipeline.overrides import resolve
from pipeline.store.directory import Store

pytestmark = pytest.mark.timeout(600)


def test_it_opens_without_a_complaint_and_asks_the_network_for_nothing(driver, real):
    opened(driver, real)
    for view in ("run", "evidence", "groups", "policies", "traces"):
        driver.find_element(By.CSS_SELECTOR, f"nav a[href='#{view}']").click()
        assert driver.find_element(By.ID, f"view-{view}").is_displayed()
        assert text(driver, "nav a[aria-current]").lower() == view
    assert complaints(driver) == []
    assert requested(driver) == []
    body = driver.find_element(By.TAG_NAME, "body").text
    assert not {"undefined", "NaN", "null", "[object"} & set(body.replace("=", " ").split())


def test_the_first_trace_that_opens_taught_something_and_its_figures_have_names(driver, real):
    """A newcomer's first trace had advantage 0, an axis from -1.0e-6 to 1.0e-6, and `+0.38` without a word in the list."""
    opened(driver, real)
    trace = driver.execute_script("const { advantage, update, pivots } = reader.trace; return [advantage, update, pivots]")
    assert all(trace)
    assert driver.find_element(By.CSS_SELECTOR, ".item[aria-current]").is_displayed()
    facts = text(driver, ".item[aria-current] .facts")
    for name in ("tokens", "advantage", "pivot", "fork", "restored"):
        assert name in facts
    names = driver.find_elements(By.CSS_SELECTOR, "#inspector dt")
    assert [name.get_attribute("title") for name in names if not name.get_attribute("title")] == []
    assert len(driver.find_elements(By.CSS_SELECTOR, ".words dt")) == len(names) == 9
    opened(driver, real, "#view=traces&order=update")
    updates = driver.execute_script("return document.getElementById('view-traces').list.rows.map(t => t.update)")
    assert updates == sorted(updates, reverse=True)
    dull = driver.execute_script("return DATA.traces.find(t => !t.advantage)?.id")
    if dull:
        opened(driver, real, f"#trace={dull}")
        assert "0 everywhere: this trace has no advantage" in text(driver, ".keys")
        assert driver.execute_script("return document.querySelectorAll('.yaxis text').length") == 7


def test_a_trace_is_picked_by_verdict_and_order(driver, real):
    opened(driver, real)
    chosen(driver, verdict="wrong", order="longest")
    items = driver.find_elements(By.CSS_SELECTOR, ".item")
    lengths = [int(item.find_element(By.CLASS_NAME, "facts").text.split(" tokens")[0].split()[-1]) for item in items]
    assert lengths == sorted(lengths, reverse=True)
    items[1].click()
    WebDriverWait(driver, 300).until(lambda _: items[1].get_attribute("aria-current") == "true")
    soon(driver, ".trace .chips", "wrong")
    soon(driver, ".trace .chips", f"{lengths[1]} tokens")
    assert len(driver.find_elements(By.CSS_SELECTOR, "#tokens .tok")) == lengths[1]


def test_a_token_is_told_on_hover_and_linked_on_click(driver, real):
    opened(driver, real)
    token = driver.find_element(By.ID, "tok-3")
    ActionChains(driver).move_to_element(token).perform()
    assert "Token 3 of" in text(driver, "#inspector")
    for name in ("entropy", "lookahead", "log p student", "log p teacher", "gate", "restored", "token weight"):
        assert name in text(driver, "#inspector")
    token.click()
    WebDriverWait(driver, 300).until(lambda _: driver.execute_script("return location.hash").endswith("&token=3"))
    opened(driver, real, driver.execute_script("return location.hash"))
    assert "Token 3 of" in text(driver, "#inspector")
    assert "pinned" in driver.find_element(By.ID, "tok-3").get_attribute("class")


def test_what_is_told_of_a_token_is_what_is_stored(driver, real, stored_run):
    trace = stored_run.read(next(iter(stored_run.entries("rounds/0000", "label").values()))).to_pylist()[0]
    opened(driver, real, f"#trace={trace['trace_id']}&token=5")
    shown = text(driver, "#inspector").replace("−", "-").splitlines()
    values = dict(pairwise(shown))
    assert float(values["gate"]) == pytest.approx(trace["gate"][5], abs=1e-3)
    assert float(values["token weight"]) == pytest.approx(trace["token_weight"][5], rel=2e-3, abs=1e-3)
    names = ("lock", "mid", "pivot", "fork")
    marked = [driver.find_element(By.ID, f"tok-{i}").find_element(By.XPATH, "..") for i in range(len(trace["regime"]))]
    assert [m.get_attribute("class").split()[1] for m in marked] == [names[code] for code in trace["regime"]]


def test_the_teachers_likeliest_tokens_are_told_on_hover_where_they_were_kept(driver, hostile, real):
    path, _ = hostile
    opened(driver, path)
    seen = []
    for place in (0, 2):
        ActionChains(driver).move_to_element(driver.find_elements(By.CSS_SELECTOR, ".tok")[place]).perform()
        rows = [row.text.split() for row in driver.find_elements(By.CSS_SELECTOR, "#inspector .alternatives li")]
        shares = [float(row[-1]) for row in rows]
        assert len(rows) == 3
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1.01
        assert len(driver.find_elements(By.CSS_SELECTOR, "#inspector .alternatives .own")) == 1
        seen.append(rows)
    assert seen[0] != seen[1]
    assert complaints(driver) == []
    opened(driver, real)
    assert "Token" in text(driver, "#inspector")
    assert not driver.find_elements(By.CSS_SELECTOR, ".alternatives")


def test_the_keyboard_reaches_everything(driver, real):
    opened(driver, real, "#view=traces&order=pivots")
    tokens = driver.find_element(By.ID, "tokens")
    driver.execute_script("arguments[0].focus()", tokens)
    tokens.send_keys(Keys.HOME)
    tokens.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert tokens.get_attribute("aria-activedescendant") == "tok-2"
    assert driver.find_element(By.ID, "tok-2").get_attribute("aria-selected") == "true"
    tokens.send_keys(Keys.HOME, "p")
    assert "pivot" in text(driver, "#inspector .regime")
    tokens.send_keys(Keys.ENTER)
    WebDriverWait(driver, 300).until(lambda _: "token=" in driver.execute_script("return location.hash"))
    first = driver.find_element(By.CSS_SELECTOR, ".item")
    driver.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ARROW_DOWN)
    ActionChains(driver).send_keys(Keys.ENTER).perform()
    second = driver.find_elements(By.CSS_SELECTOR, ".item")[1]
    WebDriverWait(driver, 300).until(lambda _: second.get_attribute("aria-current") == "true")
    opened(driver, real, "#run")
    plot = driver.find_element(By.CSS_SELECTOR, ".plot")
    plot.send_keys(Keys.HOME)
    assert "round 0" in text(driver, ".readout")


def test_who_turns_by_keyboard_stays_where_they_are(driver, hostile, real):
    opened(driver, hostile[0])
    chosen(driver, order="longest")
    driver.find_element(By.CSS_SELECTOR, ".item").click()
    soon(driver, ".overview", "page 1 of 167")
    driver.execute_script("document.querySelector('[data-turn=later]').focus()")
    for page in (2, 3):
        ActionChains(driver).send_keys(Keys.ENTER).perform()
        soon(driver, ".overview", f"page {page} of 167")
    for page in (2, 1):
        ActionChains(driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform() if page == 2 else None
        ActionChains(driver).send_keys(Keys.ENTER).perform()
        soon(driver, ".overview", f"page {page} of 167")
    assert driver.execute_script("return document.activeElement.id") == "tokens"  # "Earlier" is gone on the first page
    opened(driver, real)
    list_ = "document.getElementById('view-traces').list"
    before = driver.execute_script(f"return [{list_}.shown, {list_}.rows.length]")
    if before[1] > before[0]:
        driver.execute_script("const more = document.querySelector('.more'); more.focus(); more.click()")
        place = "return [...document.querySelectorAll('.items li')].indexOf(document.activeElement.parentElement)"
        assert driver.execute_script(place) == before[0]
    driver.execute_script("document.querySelector('[data-turn=next]').focus()")
    first = driver.execute_script("return reader.trace.id")
    ActionChains(driver).send_keys(Keys.ENTER).perform()
    WebDriverWait(driver, 300).until(lambda _: driver.execute_script("return reader.trace.id") != first)
    assert driver.execute_script("return document.activeElement.dataset.turn") == "next"


def test_the_skip_links_address_opens_like_any(driver, real):
    opened(driver, real, "#main")
    assert "What happened" in text(driver, "#view-run")


def test_regimes_are_told_by_line_and_letter_not_by_colour_alone(driver, real):
    opened(driver, real)
    script = """return [...document.querySelectorAll('.marks .run')].map(
        r => [getComputedStyle(r).textDecorationStyle, r.firstChild.dataset.letter])"""
    assert driver.execute_script(script) == [["solid", "L"], ["dotted", "M"], ["double", "P"], ["wavy", "F"]]


def test_a_screen_reader_finds_names_and_tables(driver, real):
    for view in ("#traces", "#run", "#evidence", "#groups", "#policies"):
        opened(driver, real, view)
        script = """return [...document.querySelectorAll('button, select, input, summary, [role]')]
            .filter(e => e.offsetParent && ['BUTTON', 'SELECT', 'INPUT', 'SUMMARY', 'DIV'].includes(e.tagName))
            .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.closest('label'))).length"""
        assert driver.execute_script(script) == 0
        headings = "return [...document.querySelectorAll('h1, h2, h3')].filter(e => e.offsetParent).map(e => +e.tagName[1])"
        levels = driver.execute_script(headings)
        assert levels[0] == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
    opened(driver, real, "#run")
    charts = driver.find_elements(By.CSS_SELECTOR, ".chart .plot")
    assert len(charts) >= 10
    assert len(driver.find_elements(By.CSS_SELECTOR, ".chart table tbody tr")) >= 2 * len(charts)


# the least contrast of a text with all that lies behind it, painted one over the other; and where
CONTRAST = """const ctx = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const light = colours => {
        colours.forEach(c => { ctx.fillStyle = c; ctx.fillRect(0, 0, 1, 1); });
        return [...ctx.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
            .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    };
    const behind = e => e ? [...behind(e.parentElement), getComputedStyle(e).backgroundColor] : ['white'];
    const words = '.card p, .card th, .card td, .card dt, .card dd, .card summary, .chip, .facts, .tok, .cell, .badge';
    let least = [99, ''];
    for (const e of [...document.querySelectorAll(words)].filter(e => e.offsetParent)) {
        const marks = e.dataset.letter ? [[getComputedStyle(e, '::after').color, e.parentElement]] : [];
        for (const [colour, on] of [[getComputedStyle(e).color, e], ...marks]) {
            const [a, b] = [light([...behind(on), colour]), light(behind(on))];
            const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
            if (ratio < least[0]) least = [ratio, `${e.tagName}.${e.className} ${e.textContent.slice(0, 40)} ${colour}`];
        }
    }
    return least"""


@pytest.mark.parametrize("view", ["#traces", "#run", "#evidence", "#groups", "#policies"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_either_scheme_with_enough_contrast(driver, real, view, scheme):
    opened(driver, real, view, 390, 844, scheme)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
    for heat in range(11) if view == "#traces" else ():  # every tint there is, also on tokens that are no text
        script = f"const t = document.querySelectorAll('.tok')[{heat}]; if (t) t.className = 'tok special h{heat}'"
        driver.execute_script(script)
    if view == "#traces":  # a stripe counts as if it filled its token
        cold = "document.querySelectorAll('.tok').forEach((t, i) => { if (i > 11) t.style.backgroundColor = 'var(--cold)'; })"
        driver.execute_script(cold)
    ratio, where = driver.execute_script(CONTRAST)
    assert ratio >= 4.5, where  # WCAG 2.1, AA
    assert complaints(driver) == []


def test_markup_marks_of_direction_and_broken_letters_stay_text(driver, hostile):
    path, _ = hostile
    opened(driver, path)
    assert driver.title == "run: egrsd report"
    for item in range(len(driver.find_elements(By.CSS_SELECTOR, ".item"))):
        driver.find_elements(By.CSS_SELECTOR, ".item")[item].click()
    opened(driver, path, "#view=groups&group=0")
    soon(driver, "#group", "<script>document.title")
    opened(driver, path)
    assert driver.title == "run: egrsd report"
    assert driver.execute_script("return document.querySelectorAll('main script, main img, main [onerror]').length") == 0
    search = driver.find_element(By.CSS_SELECTOR, "input[type=search]")
    for query, expected in (
        ("owned", "<script>document.title"),
        ("onerror", "</script><img src=x"),
        ("left", "⟨U+202E⟩abc⟨U+2066⟩"),
    ):
        search.clear()
        search.send_keys(query)
        WebDriverWait(driver, 300).until(lambda d: d.execute_script("return DATA.searched"))
        driver.find_elements(By.CSS_SELECTOR, ".item")[0].click()
        soon(driver, ".trace", expected)
    search.clear()
    search.send_keys("日本")
    driver.find_element(By.CSS_SELECTOR, ".item").click()
    soon(driver, "#tokens", "‹C3›‹A9›")
    assert not any(mark in driver.find_element(By.TAG_NAME, "body").text for mark in RIGHT_TO_LEFT[::4])
    isolation = "return getComputedStyle(document.querySelector('.tok')).unicodeBidi"
    assert driver.execute_script(isolation) == "isolate"
    for view in ("#evidence", "#policies", "#run"):
        opened(driver, path, view)
    soon(driver, "main", "warning: rounds/0000, 1 of 1 shards: entropies are bounds and not exact (not so <script>")
    assert driver.title == "run: egrsd report"
    assert complaints(driver) == []
    assert requested(driver) == []


def test_a_trace_of_a_hundred_thousand_tokens_has_pages(driver, hostile):
    opened(driver, hostile[0])
    chosen(driver, order="longest")
    driver.find_element(By.CSS_SELECTOR, ".item").click()
    soon(driver, ".trace .chips", "100,000 tokens")
    assert len(driver.find_elements(By.CSS_SELECTOR, "#tokens .tok")) == 600
    assert "page 1 of 167" in text(driver, ".overview")
    driver.find_elements(By.CSS_SELECTOR, ".overview button")[1].click()
    soon(driver, ".overview", "page 2 of 167")
    tokens = driver.find_element(By.ID, "tokens")
    driver.execute_script("arguments[0].focus()", tokens)
    tokens.send_keys(Keys.END)
    driver.find_element(By.ID, "tokens").send_keys(Keys.ARROW_RIGHT)
    assert "page 3 of 167" in text(driver, ".overview")
    assert "Token 1200 of 100000" in text(driver, "#inspector")
    address = f"#trace={driver.execute_script('return reader.trace.id')}&token=99999"
    opened(driver, hostile[0], address)
    assert "Token 99999 of 100000" in text(driver, "#inspector")
    assert complaints(driver) == []


# ---- groups, policies, runs -----------------------------------------------------------------------------------------------


def test_a_group_stands_side_by_side_with_its_verdicts_and_partings(driver, real, stored_run):
    [entry, *_] = stored_run.entries("rounds/0000", "grade").values()
    graded = stored_run.read(entry).to_pylist()[:8]
    opened(driver, real, "#view=groups&grouped=round")
    rows = driver.find_elements(By.CSS_SELECTOR, "#group table tbody tr")
    assert [row.text.split()[3] for row in rows] == [row["verdict"] for row in graded]
    assert [f"{row['reward']:.3f}" in shown.text for row, shown in zip(graded, rows, strict=True)] == [True] * 8
    tokens = driver.execute_script(
        "return [...document.querySelectorAll('.beside')].map(l => [...l.querySelectorAll('.tok')].map(t => t.textContent))"
    )
    marks = driver.execute_script(
        """return [...document.querySelectorAll('.beside')].map(l => {
            const all = [...l.children].filter(c => c.matches('.tok, .fork-mark'));
            return all.findIndex(c => c.matches('.fork-mark')); })"""
    )
    for i, (mine, at) in enumerate(zip(tokens, marks, strict=True)):
        others = [other for j, other in enumerate(tokens) if j != i]
        if at >= 0:
            assert all(other[: at + 1] != mine[: at + 1] for other in others)
            assert any(other[:at] == mine[:at] for other in others)
        else:
            assert any(other[: len(mine)] == mine for other in others)
    ActionChains(driver).move_to_element(driver.find_elements(By.CSS_SELECTOR, ".beside .tok")[2]).perform()
    label = stored_run.read(next(iter(stored_run.entries("rounds/0000", "label").values()))).to_pylist()[0]
    said = text(driver, ".told").split("weight ")[1].split()[0].replace("\u2212", "-")
    assert float(said) == pytest.approx(label["token_weight"][2], rel=2e-3, abs=1e-3)
    driver.find_element(By.CSS_SELECTOR, "#group table .link").click()
    soon(driver, "#reader .eyebrow", "sample 0")


def test_a_group_says_where_labels_are_not_what_training_uses(driver, stored_run, tmp_path):
    """After `stage label` with other settings the tab Traces said so, and Groups and Run did not."""
    store = Store(str(shutil.copytree(stored_run.uri, tmp_path / "run")))
    store.save_run(resolve(store.load_run(), ["label.gamma=1"]), {})
    report.report_run([store.uri], None, None, True)
    for view, place in (("#groups", "#group header"), ("#run", ".story")):
        opened(driver, f"{store.uri}/report.html", view)
        soon(driver, place, "label.gamma 1 (training: ")


def test_what_a_trace_without_advantage_teaches_is_said_of_the_runs_own_objective(driver, stored_run, tmp_path):
    """Of `opd`, which reads no advantage, the page said that such traces weigh 0 and that nothing is learned from them."""
    store = Store(str(shutil.copytree(stored_run.uri, tmp_path / "run")))
    for objective, said in (("opd", "teaches like any other"), ("reward_opd", "by the other terms"), ("grpo", "teaches nothing")):
        store.save_run(resolve(store.load_run(), [f"objective.name={objective}"]), {})
        report.report_run([store.uri], None, None, True)
        opened(driver, f"{store.uri}/report.html", "#run")
        soon(driver, ".ledger .account", said)
        soon(driver, ".story", f"(training: objective {objective})")


def test_rejected_rows_are_listed_with_their_problem(driver, hostile):
    opened(driver, hostile[0], "#run")
    driver.execute_script("[...document.querySelectorAll('details.card')].forEach(d => { d.open = true; })")
    said = driver.find_element(By.CSS_SELECTOR, "[aria-label='Rejected rows']").text
    assert "two" in said
    assert "verifier error" in said


def test_a_truncated_answer_has_a_sign_of_its_own_and_only_whole_words_are_alike(driver, stored_run, tmp_path):
    """The list had a cross for a truncated answer, and the `T` of `The` and `To` was grey."""
    store = Store(str(shutil.copytree(stored_run.uri, tmp_path / "run")))
    store.save_run(resolve(store.load_run(), ["evaluation.problems=4"]), {})
    evaluated(store, 0, ["correct", "wrong", "wrong", "correct"])
    evaluated(store, 2, ["truncated", "wrong", "correct", "correct"])
    report.report_run([store.uri], None, None, True)
    opened(driver, f"{store.uri}/report.html", "#policies")
    facts = {item.text[:5] for item in driver.find_elements(By.CSS_SELECTOR, "#view-policies .facts")}
    assert facts == {"✓ → …", "✗ → ✗", "✗ → ✓", "✓ → ✓"}
    alike = {part.text.strip() for part in driver.find_elements(By.CSS_SELECTOR, "#pair .alike")}
    assert alike == {"so held 0 is"}  # correct and truncated differ from the first letter on; the words before are the same


def test_a_problem_that_one_policy_did_not_answer_is_neither_won_nor_lost(driver, stored_run, tmp_path):
    """It counted as wrong and 0 tokens long, and stood first. One rejected row also hid that answers were cut off."""
    store = Store(str(shutil.copytree(stored_run.uri, tmp_path / "run")))
    store.save_run(resolve(store.load_run(), ["evaluation.problems=4"]), {})
    evaluated(store, 0, ["correct", "wrong", "correct", None])
    evaluated(store, 2, [None, "truncated", "correct", "correct"])
    report.report_run([store.uri], None, None, True)
    opened(driver, f"{store.uri}/report.html", "#policies")
    assert "0 won, 0 lost" in text(driver, "#view-policies aside")
    signs = [item.text for item in driver.find_elements(By.CSS_SELECTOR, "#view-policies .unseen")]
    assert sum(sign.startswith("not answered") for sign in signs) == 2
    opened(driver, f"{store.uri}/report.html", "#run")
    soon(driver, ".story", "of the held-out answers of policy 2 reached the limit of tokens")


def test_an_axis_that_crosses_zero_has_a_zero(driver, real):
    """Steps that were added up gave the mark -5.6e-17 on a page of two runs."""
    opened(driver, real, "#run")
    assert driver.execute_script("return ticks(-0.62, -0.03)") == [-0.8, -0.6, -0.4, -0.2, 0]
    assert driver.execute_script("return ticks(0.1, 0.7)") == [0, 0.2, 0.4, 0.6, 0.8]
    apart = "return ticks(0.6, 0.6 + Number.EPSILON).length"  # values that rounding alone sets apart froze the tab
    assert driver.execute_script(apart) == driver.execute_script("return ticks(0.6, 0.6).length")
    shown = "return [fixed(-0.0001), fixed(-0.12), fixed(0), signed(-0.0001)]"
    assert driver.execute_script(shown) == ["0.000", "\u22120.120", "0.000", "0.000"]


def test_two_policies_answer_one_problem_sorted_by_what_changed(driver, two_runs):
    opened(driver, two_runs, "#view=policies&a=0.0&b=0.2")
    soon(driver, "#pair", "Held-out problem")
    facts = [item.text for item in driver.find_elements(By.CSS_SELECTOR, "#view-policies .facts")]
    assert facts[0].startswith("✓ → ✗")
    assert [fact[:5] for fact in facts] == sorted((fact[:5] for fact in facts), key=["✓ → ✗", "✗ → ✓", "✓ → ✓", "✗ → ✗"].index)
    assert len(driver.find_elements(By.CSS_SELECTOR, "#pair .policy .answer")) == 2
    chosen(driver, moved="won")
    assert {f.text[:5] for f in driver.find_elements(By.CSS_SELECTOR, "#view-policies .facts")} == {"✗ → ✓"}
    assert complaints(driver) == []


def test_runs_stand_beside_each_other_and_each_can_be_read(driver, two_runs):
    opened(driver, two_runs, "")
    assert text(driver, "nav a[aria-current]") == "Runs"
    assert "rollout.temperature" in text(driver, "#view-runs")
    chosen_run = driver.find_element(By.CSS_SELECTOR, "#pick-run select")
    chosen_run.find_element(By.CSS_SELECTOR, "option[value='1']").click()
    driver.find_element(By.CSS_SELECTOR, "nav a[href='#traces']").click()
    soon(driver, "#tokens", "<eos>")
    assert driver.execute_script("return reader.trace.run.number") == 1
    assert requested(driver) == []
    assert complaints(driver) == []
