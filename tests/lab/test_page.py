"""The HTML page of a trajectory, in a real browser."""

import dataclasses
import json
import os
import re
import shutil

import pytest

from boe_vllm.lab.pictures import page
from boe_vllm.lab.pictures.trajectory import Recording, Step, Trajectory

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install it")

MASK, EOS, WIDTH, CELLS, STEPS = 90, 91, 6, 36, 9
EVIL = "</script><img src=x onerror=alert(1)>"


def recording(*, width=WIDTH, word=None, influence=True, prompt="S6:0=") -> Recording:
    """Two policies that write 36 positions in nine steps, one of which it masks again once."""
    vocabulary = {n: str(n) for n in range(1, 7)} | {MASK: "<mask>", EOS: "<eos>"}
    if word is not None:
        vocabulary[3] = word
    trajectories = []
    for label, turn in (("confidence", 1), ("boe:preset=paper", 5)):
        order = [turn * n % CELLS for n in range(CELLS)]
        tokens, steps = [MASK] * CELLS, []
        for n in range(STEPS):
            masked = [p for p in range(CELLS) if tokens[p] == MASK]
            entropy = [round(1.5 * (p + 1) / CELLS, 4) for p in masked]
            changes = [[0.0 if i == j else (j - i) / 100 for j in masked] for i in masked]
            committed = order[4 * n : 4 * n + 4]
            steps.append(
                Step(
                    tokens=list(tokens),
                    positions=masked,
                    entropy=entropy,
                    confidence=[0.75] * len(masked),
                    top_tokens=[[1 + p % 6, 1 + (p + 1) % 6] for p in masked],
                    top_probabilities=[[0.75, 0.125]] * len(masked),
                    scores=[None if p == 35 else p / 8 for p in masked] if turn == 5 else None,
                    committed=committed,
                    remasked=[],
                    forwards=n + 1,
                    backwards=n if turn == 5 else 0,
                    influence=changes if influence else None,
                )
            )
            for position in committed:
                tokens[position] = 1 + position % 6
        trajectories.append(
            Trajectory(label=label, steps=steps, tokens=tokens, text="x", valid=turn == 5)
        )
    return Recording(
        model="tiny",
        task="sudoku6",
        item=3,
        seed=0,
        prompt=prompt,
        width=width,
        mask_token=MASK,
        eos_token=EOS,
        vocabulary=vocabulary,
        trajectories=trajectories,
    )


def test_a_page_is_one_file_that_loads_nothing():
    text = page.render(recording()).replace("http://www.w3.org/2000/svg", "")  # a name, no address
    assert not re.search(r"(src|href)=(?!\"data:,\")|@import|url\(|https?:|eval\(|innerHTML", text)
    assert "default-src 'none'" in text


def test_texts_of_the_model_stay_texts():
    made = recording(word=EVIL, prompt=EVIL)
    text = page.render(dataclasses.replace(made, model=EVIL))
    assert EVIL not in text and text.count("</script>") == 2
    data = re.search(r'id="recording">(.*?)</script>', text, re.S)
    assert data is not None and json.loads(data[1])["glyphs"]["3"].startswith("</script>")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=FLAGS, env=dict(os.environ)
        )
        yield opened
        opened.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page of a recording; whatever it says or asks for must be nothing."""
    noise, asked, contexts = [], [], []

    def opened(made, width=1280, height=800):
        path = tmp_path / "page.html"
        page.write(made, path)
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("dialog", lambda dialog: noise.append(dialog.message))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not noise
    assert all(re.match(r"file:|data:,$", url) for url in asked) and len(asked) >= len(contexts)


def texts(tab, panel):
    return tab.locator(".policy").nth(panel).locator(".cell .token").all_inner_texts()


@needs_browser
def test_the_slider_moves_canvases_and_numbers(show):
    made = recording()
    tab = show(made)
    slider, where = tab.get_by_label("Step", exact=True), tab.locator("#where")
    assert where.inner_text() == "step 0 of 9" and slider.get_attribute("max") == str(STEPS)
    seen = []
    for frame in range(STEPS + 1):
        slider.fill(str(frame))
        for panel, trajectory in enumerate(made.trajectories):
            cells = tab.locator(".policy").nth(panel).locator(".cell")
            classes = cells.evaluate_all("all => all.map(e => e.classList.contains('written'))")
            assert classes == [token != MASK for token in trajectory.state(frame)]
            facts = tab.locator(".facts").nth(panel).inner_text()
            done = trajectory.steps[frame - 1] if frame else None
            assert f"forwards {done.forwards if done else 0} " in facts
            left = trajectory.steps[frame].remaining if frame < STEPS else 0
            assert f"remaining entropy {left:.2f} nats" in facts
            numbers = cells.locator(".order:visible").all_inner_texts()
            first = 4 * frame
            assert sorted(map(int, numbers)) == [first + n for n in (1, 2, 3, 4)][: len(numbers)]
            assert len(numbers) == (4 if frame < STEPS else 0)
        seen.append((where.inner_text(), tuple(texts(tab, 1))))
    assert len({text for text, _ in seen}) == STEPS + 1 and seen[-1][0] == "the end"
    assert "answer not valid" in tab.locator(".facts").nth(0).inner_text()
    assert "answer valid" in tab.locator(".facts").nth(1).inner_text()


@needs_browser
def test_keys_and_buttons_move_the_step(show):
    tab = show(recording())
    where = tab.locator("#where")
    tab.get_by_label("Step", exact=True).focus()
    tab.keyboard.press("ArrowRight")
    assert where.inner_text() == "step 1 of 9"
    tab.get_by_label("Next step").click()
    tab.locator("h1").click()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowLeft")
    assert where.inner_text() == "step 2 of 9"
    tab.get_by_label("Previous step").click()
    assert where.inner_text() == "step 1 of 9"
    tab.get_by_role("button", name="Play").click()
    tab.get_by_role("button", name="Pause").click()
    assert tab.get_by_role("button", name="Play").get_attribute("aria-pressed") == "false"


@needs_browser
def test_pointing_and_focus_show_predictions_score_and_influence(show):
    made = recording()
    tab = show(made)
    tab.get_by_label("Step", exact=True).fill("2")
    panel = tab.locator(".policy").nth(1)
    step, position = made.trajectories[1].steps[2], 17
    row = step.positions.index(position)
    panel.locator(f".cell[data-position='{position}']").hover()
    details = panel.locator(".details").inner_text()
    assert f"Position {position}, masked" in details
    assert f"{step.entropy[row]:.3f} nats" in details and f"{step.scores[row]:.3f}" in details
    assert "0.750" in details and "0.125" in details
    changes = panel.locator(".cell .change").all_inner_texts()
    expected = dict(zip(step.positions, step.influence[row], strict=True))
    for place, text in enumerate(changes):
        change = expected.get(place, 0)
        assert text == ("▼" if change < 0 else "▲") * bool(change) + f"{abs(change):.2f}" * bool(
            change
        )
    # The same by keyboard: the arrow keys move over the canvas and leave the step alone.
    panel.locator(f".cell[data-position='{position}']").focus()
    tab.keyboard.press("ArrowDown")
    assert f"Position {position + WIDTH}, " in panel.locator(".details").inner_text()
    assert tab.locator("#where").inner_text() == "step 2 of 9"
    tab.get_by_label("Step", exact=True).fill("9")
    assert "Written by step" in panel.locator(".details").inner_text()
    tab.get_by_label("Step", exact=True).fill("0")
    panel.locator(".cell[data-position='35']").hover()
    assert "not a candidate" in panel.locator(".details").inner_text()


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("kind", ["grid", "words"])
def test_nothing_overlaps_or_runs_out_of_the_window(show, width, kind):
    made = recording() if kind == "grid" else recording(width=None, word="antidisestablishment" * 2)
    tab = show(made, width=width)
    tab.locator("#next").click()
    tab.locator(".policy").nth(1).locator(".cell[data-position='20']").hover()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    boxes = tab.evaluate(
        """() => [...document.querySelectorAll('.cell')].map((e) => {
          const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; })"""
    )
    assert len(boxes) == 2 * CELLS
    for n, a in enumerate(boxes):
        assert a[2] - a[0] >= 24 and a[3] - a[1] >= 24  # WCAG 2.5.8
        for b in boxes[n + 1 :]:
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, (a, b)
    cut = tab.evaluate(
        """() => [...document.querySelectorAll('h1, h2, p, output, dd, li, .change')].filter(
          (e) => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"""
    )
    assert not cut
    small = tab.evaluate(
        """() => [...document.querySelectorAll('body *')].filter((e) => e.textContent.trim() &&
          parseFloat(getComputedStyle(e).fontSize) < 11).length"""
    )
    assert small == 0


@needs_browser
def test_every_cell_can_be_read(show):
    tab = show(recording())
    contrasts = tab.evaluate(
        """() => {
          const light = (text) => {
            const [r, g, b] = text.match(/[0-9.]+/g).map((x) => {
              const c = x / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          return [...document.querySelectorAll('.cell')].map((e) => {
            const s = getComputedStyle(e), x = [light(s.color), light(s.backgroundColor)];
            return (Math.max(...x) + 0.05) / (Math.min(...x) + 0.05); }); }"""
    )
    assert min(contrasts) >= 4.5  # WCAG 1.4.3
    names = tab.locator(".cell").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert all(name.startswith("position ") for name in names)


@needs_browser
def test_a_page_shows_whatever_a_token_says(show):
    tab = show(recording(word=EVIL, influence=False, prompt=EVIL))
    assert tab.locator("img").count() == 0
    tab.get_by_label("Step", exact=True).fill("9")
    assert "</script>" in "".join(texts(tab, 0)) and EVIL in tab.locator(".prompt").inner_text()
