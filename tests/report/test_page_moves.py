"""The report in headless Chromium: addresses, keys, small screens and paper, and a page that follows its run."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from pages import chosen, complaints, opened, soon, text
from report_runs import add_round, byte_tokenizer, new_run
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from jobs import report, serving

pytestmark = pytest.mark.timeout(600)

# ---- addresses, keys, screens and paper ---------------------------------------------------------------------------


def test_filters_order_and_colour_are_in_the_address(driver, real):
    opened(driver, real)
    chosen(driver, verdict="wrong", order="longest", colour="gate")
    driver.find_element(By.CSS_SELECTOR, "#view-traces input[type=search]").send_keys("=")
    WebDriverWait(driver, 300).until(lambda d: d.execute_script("return DATA.searched"))
    address = driver.execute_script("return location.hash")
    seen = "return [document.querySelector('#view-traces .found').textContent, reader.trace.id]"
    before = driver.execute_script(seen)
    opened(driver, real, address)
    WebDriverWait(driver, 300).until(lambda d: d.execute_script(seen) == before)
    for name, value in (("verdict", "wrong"), ("order", "longest"), ("colour", "gate")):
        assert driver.find_element(By.CSS_SELECTOR, f"#view-traces [data-name={name}]").get_attribute("value") == value
    driver.find_element(By.CSS_SELECTOR, "nav a[href='#groups']").click()
    order = driver.find_element(By.CSS_SELECTOR, "#view-traces [data-name=order]")
    WebDriverWait(driver, 300).until(lambda _: not order.is_displayed())
    driver.back()
    WebDriverWait(driver, 300).until(lambda d: d.execute_script("return location.hash") == address and order.is_displayed())
    assert order.get_attribute("value") == "longest"


def test_keys_move_search_and_help(driver, real):
    opened(driver, real)
    press = lambda *keys: ActionChains(driver).send_keys(*keys).perform()  # noqa: E731
    rows = driver.execute_script("return document.getElementById('view-traces').list.rows.map(t => t.id)")
    first = rows.index(driver.execute_script("return reader.trace.id"))
    for keys, place in (("j", first + 1), ("j", first + 2), ("k", first + 1)):
        press(keys)
        WebDriverWait(driver, 300).until(lambda d, p=place: d.execute_script("return reader.trace.id") == rows[p])
    press("?")
    assert "next and previous trace" in text(driver, "dialog")
    press(Keys.ESCAPE)
    WebDriverWait(driver, 300).until(lambda d: not d.find_elements(By.TAG_NAME, "dialog"))
    press("/", "j")
    assert driver.execute_script("return document.activeElement.value") == "j"
    press(Keys.ESCAPE, "2")
    soon(driver, "nav a[aria-current]", "Groups")


def test_a_point_of_a_round_opens_its_traces(driver, real):
    opened(driver, real, "#run")
    plot = driver.find_element(By.CSS_SELECTOR, ".plot")
    plot.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ENTER)
    soon(driver, "#reader .eyebrow", "Round 1")
    assert {
        t.split()[1] for t in driver.execute_script("return [...document.querySelectorAll('.facts')].map(f => f.textContent)")
    } == {"1"}


def test_the_page_ends_where_its_content_ends_and_tab_reaches_the_text_soon(driver, real):
    opened(driver, real)
    bottom = (
        "return [document.documentElement.scrollHeight, document.getElementById('foot').getBoundingClientRect().bottom + scrollY]"
    )
    height, foot = driver.execute_script(bottom)
    assert height <= max(foot, 1000) + 2
    stops = """const all = [...document.querySelectorAll('a[href], button, select, input, [tabindex]')]
        .filter(e => e.offsetParent && e.tabIndex >= 0 && !e.disabled);
        return all.findIndex(e => e.id === 'tokens')"""
    assert driver.execute_script(stops) <= 16
    table = "document.querySelectorAll('.below').forEach(d => { d.open = true; })"
    driver.execute_script(table)
    WebDriverWait(driver, 300).until(lambda d: d.find_elements(By.CSS_SELECTOR, ".below .scroll table"))
    room = "return [...document.querySelectorAll('#reader .below .scroll')].map(e => e.scrollWidth - e.clientWidth)"
    assert max(driver.execute_script(room)) <= 0  # the token table is not cut at the right


def test_a_trace_that_is_tapped_on_a_phone_comes_into_view(driver, real):
    opened(driver, real, "#traces", 390, 844)
    driver.find_elements(By.CSS_SELECTOR, ".item")[2].click()
    top = "return document.getElementById('reader').getBoundingClientRect().top"
    WebDriverWait(driver, 300).until(lambda d: -5 < d.execute_script(top) < 300)


def test_a_sheet_on_a_phone_covers_nothing_before_a_tap_and_can_be_put_away(driver, real):
    """A newcomer's first sheet covered a quarter of the screen, said `Point`, and had no button to close it."""
    opened(driver, real, "#traces", 390, 844)
    sheet = driver.find_element(By.ID, "inspector")
    assert not sheet.is_displayed()
    driver.execute_script("document.getElementById('tok-2').click()")
    WebDriverWait(driver, 300).until(lambda _: sheet.is_displayed())
    assert "Token 2 of" in text(driver, "#inspector")
    sheet.find_element(By.CSS_SELECTOR, ".close").click()
    assert not sheet.is_displayed()


def test_a_tap_in_a_group_reads_the_update_and_a_second_one_opens_the_trace(driver, real):
    opened(driver, real, "#groups", 390, 844)
    WebDriverWait(driver, 300).until(lambda d: d.find_elements(By.CSS_SELECTOR, ".beside .tok"))
    assert not driver.find_element(By.CSS_SELECTOR, ".told").is_displayed()
    assert not driver.find_element(By.CSS_SELECTOR, "#group .scroll").is_displayed()  # each trace has its facts beside it
    assert "advantage" in text(driver, ".sibling-head")
    assert "tokens" in text(driver, ".sibling-head")
    tap = """document.querySelectorAll('.beside .tok')[2].dispatchEvent(
        new PointerEvent('click', { bubbles: true, pointerType: 'touch' }))"""
    driver.execute_script(tap)
    soon(driver, ".told", "weight ")
    assert text(driver, "nav a[aria-current]") == "Groups"
    driver.execute_script("document.querySelector('.told .close').click()")
    assert not driver.find_element(By.CSS_SELECTOR, ".told").is_displayed()
    driver.execute_script(tap)
    soon(driver, "#inspector", "Token 2 of")


def test_the_page_of_a_run_is_short_on_a_phone_and_whole_on_a_desk(driver, real):
    """It had 7 771 px on a phone, and 18 charts of one size on a desk."""
    seen = "return [...document.querySelectorAll('.chart')].filter(c => c.checkVisibility()).length"
    opened(driver, real, "#run", 390, 844)
    assert driver.execute_script("return document.documentElement.scrollHeight") < 4600
    assert driver.execute_script(seen) == 3
    driver.execute_script("document.querySelector('.chapter summary').click()")
    assert driver.execute_script(seen) == 6
    opened(driver, real, "#run")
    assert driver.execute_script(seen) == 12
    driver.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert driver.execute_script(seen) == len(driver.find_elements(By.CSS_SELECTOR, ".chart")) == 16
    driver.execute_script("dispatchEvent(new Event('afterprint'))")
    assert driver.execute_script(seen) == 12
    driver.execute_script("document.querySelectorAll('.chapter > summary')[1].click()")
    assert driver.execute_script(seen) == 9
    WebDriverWait(driver, 300).until(lambda d: d.execute_script("return folded.get('Entropy and regimes') === false"))
    driver.execute_script("renew()")  # as a page does that follows its run
    assert driver.execute_script(seen) == 9
    assert "No measure of progress" in driver.execute_script(
        "return [...document.querySelectorAll('.chart')].find(c => c.querySelector('h3').textContent === 'Loss').textContent"
    )


def test_all_views_of_two_runs_have_their_link_on_a_phone(driver, two_runs):
    opened(driver, two_runs, "", 390, 844)
    nav = driver.find_element(By.TAG_NAME, "nav")
    assert driver.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", nav) <= 0
    assert len(nav.find_elements(By.TAG_NAME, "a")) == 6
    assert driver.execute_script("return document.documentElement.scrollHeight") < 3400


def test_no_word_of_a_field_runs_under_its_arrow(driver, real):
    for view in ("#groups", "#traces", "#policies"):
        opened(driver, real, view, 390, 844)
        room = """const ctx = document.createElement('canvas').getContext('2d');
            return [...document.querySelectorAll('main > section:not([hidden]) select')].map(s => {
                const style = getComputedStyle(s);
                ctx.font = style.font;
                return [s.clientWidth - 30 - ctx.measureText(s.selectedOptions[0].text).width, s.selectedOptions[0].text]; })"""
        for left, name in driver.execute_script(room):
            assert left > 0, name


@pytest.mark.parametrize("paper", [760, 1400])
def test_print_has_the_whole_width_and_no_fields(driver, real, paper):
    """On wide paper the rules of small screens do not help: the list went, and its column stayed."""
    opened(driver, real, "#traces", paper, 1100)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    width = "return document.querySelector('.card.trace').getBoundingClientRect().width / document.body.clientWidth"
    assert driver.execute_script(width) > 0.9
    assert not driver.find_element(By.CSS_SELECTOR, ".side").is_displayed()
    assert not driver.find_element(By.TAG_NAME, "nav").is_displayed()
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_grey_tells_right_from_wrong_and_mid_from_pivot(driver, real):
    """Lightness of neighbours in a stack of bars, as WCAG measures contrast; and a deep log-prob and its axis are marked."""
    for scheme in ("light", "dark"):
        opened(driver, real, "#run", scheme=scheme)
        script = """const light = c => { const x = document.createElement('canvas').getContext('2d');
            x.fillStyle = c; x.fillRect(0, 0, 1, 1);
            return [...x.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
                .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0); };
            const of = n => light(getComputedStyle(document.documentElement).getPropertyValue('--f-' + n).trim());
            return Object.fromEntries(arguments[0].map(n => [n, of(n)]))"""
        names = ["correct", "wrong", "truncated", "lock", "mid", "pivot", "fork"]
        shade = driver.execute_script(script, names)
        for one, other in (("correct", "wrong"), ("wrong", "truncated"), ("lock", "mid"), ("mid", "pivot"), ("pivot", "fork")):
            dark, bright = sorted([shade[one], shade[other]])
            assert (bright + 0.05) / (dark + 0.05) > 1.25, (scheme, one, other)


def test_a_deep_log_prob_is_marked_and_the_axis_has_values(driver, real):
    opened(driver, real)
    driver.execute_script("reader.signals.teacher[1] = -13; drawReader(reader.trace, 0)")
    assert "−13" in driver.execute_script("return document.querySelector('.strip text.beyond').textContent")
    assert driver.execute_script("return document.querySelectorAll('.yaxis text').length") == 9


def test_the_page_rounds_as_the_terminal_does(driver, rejected):
    """288 of 512 were 56.2 % in the terminal and 56.3 % on the page."""
    opened(driver, rejected)
    for digits in (0, 1, 3):
        values = [0.5625, 0.9375, 0.0625, 0.15, 0.45, 12.5, 13.5, -2.5, 0.0005, 1e-9, 1234.5, 1 / 3, 562.5, 0.28125]
        shown = driver.execute_script(
            "return arguments[0].map(v => [fixed(v, arguments[1]), percent(v, arguments[1])])", values, digits
        )
        for value, (plain, share) in zip(values, shown, strict=True):
            assert float(plain.replace("−", "-")) == float(f"{value:.{digits}f}")
            assert share == f"{100 * value:.{digits}f} %"
    # JavaScript writes such a number with an exponent, whatever digits are asked for
    assert driver.execute_script("return [fixed(1e22, 3), percent(-1e22, 1)]") == ["1e+22", "-1e+24 %"]


def test_why_there_are_no_traces_is_told(driver, rejected):
    opened(driver, rejected)
    assert "Every trace was rejected" in text(driver, "#view-traces")
    assert "verifier error 8" in text(driver, "#view-traces")


@pytest.fixture(scope="module")
def rejected(tmp_path_factory):
    """The report of a run whose rows were all rejected."""
    folder = tmp_path_factory.mktemp("rejected")
    byte_tokenizer(folder / "model")
    store, run = new_run(folder / "run", f"model.path={folder / 'model'}")
    responses = [np.arange(4) for _ in range(8)]
    add_round(store, run, 0, responses, ["a"] * 8, ["one", "two"], dict.fromkeys(range(8), "died"))
    report.report_run([store.uri], None, None, True)
    return f"{store.uri}/report.html"


# ---- a page that follows its run -------------------------------------------------------------------------------------------


def test_a_served_page_follows_its_run_in_place(driver, tmp_path):
    byte_tokenizer(tmp_path / "model")
    store, run = new_run(tmp_path / "run", f"model.path={tmp_path / 'model'}", "rounds=2")
    grow = lambda number: add_round(  # noqa: E731
        store, run, number, [np.full(5, 65 + number) for _ in range(4)], ["x"] * 4, [f"problem {number}"]
    )
    with serving.serve(serving.Watched([(store, run)], None), 0) as served:
        ended = threading.Event()
        watcher = threading.Thread(target=served.watch, args=(lambda _: None, ended))
        watcher.start()
        try:
            driver.get(served.address)
            soon(driver, "main", "Waiting for the first round")
            grow(0)
            soon(driver, "#view-run", "1 round of recipe demo")
            driver.get(f"{served.address}#traces")
            soon(driver, "#tokens", "bbbbb")  # id 65 of the byte-level alphabet
            trace = driver.execute_script("return reader.trace.id")
            grow(1)
            soon(driver, "#view-traces .found", "8 traces")
            assert driver.execute_script("return reader.trace.id") == trace  # what is read stays open
            assert "Live" in text(driver, "#live")
            assert [c for c in complaints(driver) if "favicon" not in c] == []
        finally:
            ended.set()
            watcher.join()
