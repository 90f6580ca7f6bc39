"""report.html: what it holds, and how it behaves in a browser."""

import json
import re
import shlex
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from stage_runs import ROOT

from agrpo.reporting.dynamics import families, over_seeds
from agrpo.reporting.metrics import RunLog
from agrpo.reporting.report.command import main
from agrpo.reporting.report.gather import gather, thinned
from agrpo.reporting.report.page import MOST_BYTES, embedded, render, report, write_report
from agrpo.reporting.report.serve import server

HOSTILE = [
    "<script>document.title='owned'; window.owned = 1</script>",
    "</script><script>window.owned = 2</script>",
    "<img src=x onerror='window.owned = 3'><svg onload='window.owned = 4'>",
    "<!--<script>{{DATA}} \u2028 \ud800 \x1b[31m `${1}` &lt;b&gt;",
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


def sample(step, n, completion):
    return {
        "prompt": f"prompt {step} {completion[:200]}",
        "completion": completion,
        "rewards": {completion[:20]: 1.0},
        "reward": float(step),
        "advantage": n - 0.5,
        "tokens": 3,
        "pieces": [completion[:5], completion[5:9], ""],
        "logp": [-0.1, -2.0, None],
        "log_ratio": [0.5, -1.0, 0.0],
    }


def make_run(root, steps=30, samples=2, text=None, stage="agrpo", seed=0):
    """A run as a stage leaves it, with hostile text wherever a model or a file could put it."""
    (root / stage).mkdir(parents=True)
    (root / stage / "config.yaml").write_text(
        f"# agrpo {HOSTILE[1]}\nseed: {seed}\ntraining: {{max_steps: {steps}}}\n", encoding="utf-8"
    )
    with RunLog(root / stage, stage, steps, console=False) as log:
        for step in range(steps):
            named = {"rewards/<b>bold</b>/mean": 0.5, "loss": 0.1}  # constant: no curve but for rounding
            metrics = {"reward": step / steps, "entropy": 0.5 + 0.001 * seed, **named}
            log.step(step, metrics | ({"evaluation/pass1": 0.5 + step / 100} if step % 10 == 9 else {}))
            own = [text or HOSTILE[(step + n) % len(HOSTILE)] for n in range(samples)]
            log.samples(step, [sample(step, n, completion) for n, completion in enumerate(own)])
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "hostile<script>window.owned=5<")


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.close()


def test_the_same_run_gives_the_same_bytes(run):
    assert report([run]) == report([run])


def test_nothing_a_model_wrote_is_markup_and_nothing_is_fetched(run):
    page = report([run])
    assert page.count("<script") == 2 and page.count("</script") == 2 and "<img" not in page
    assert not re.search(r"(?:src|href)=[\"']?https?:", page)
    assert "default-src 'none'" in page and "unsafe" not in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert {row["completion"] for row in data["runs"][0]["samples"]} == set(HOSTILE)


def test_data_cannot_end_its_element():
    text = embedded({"a": "</script><!-- & \u2028", "b": float("nan")})
    assert not re.search("[<>&\u2028]", text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028", "b": None}
    page = render({"runs": [{"name": "{{STYLE}}{{DATA}}"}]})
    assert page.count("{{STYLE}}") == 2, "a name is never taken for a place to fill: in the title and in the data"


def test_a_long_run_stays_small(tmp_path):
    root = make_run(tmp_path / "long", steps=600, samples=1, text="<&>" * 5000)
    page = report([root])
    assert len(page.encode()) < MOST_BYTES
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["runs"][0]
    kept = [row["step"] for row in data["samples"]]
    assert 20 < len(kept) < 600 and max(kept) > 550 and min(kept) < 50, "spread over the whole run"
    assert all(len(curve[0]) <= 320 for curve in data["stages"]["agrpo"]["series"].values())
    assert data["samples"][0]["completion"].endswith("… (15,000 characters)")


def test_the_command_that_runs_it_again_names_its_own_file(tmp_path):
    root = make_run(tmp_path / "a run", steps=3)
    with (root / "agrpo" / "config.yaml").open("a") as file:
        file.write(f"run: {{dir: '{tmp_path}', name: a run}}\n")
    words = shlex.split(gather([root], 0)["runs"][0]["stages"]["agrpo"]["reproduce"])
    script, config, name = words[1], words[3], words[4]
    assert (
        (ROOT / script).is_file() and Path(config) == root / "agrpo" / "config.yaml" and name == "run.name=a run-again"
    )


def test_thinning_keeps_the_mean_and_the_last_step():
    series = (list(range(1, 1001)), [float(i % 7) for i in range(1000)])
    steps, values = thinned(series, 100)
    assert len(steps) == len(values) == 100 and steps[-1] == 1000
    assert sum(values) / 100 == pytest.approx(sum(series[1]) / 1000, rel=1e-4)
    assert thinned(([3], [0.1234567]), 100) == [[3], [0.12346]]


def test_seeds_make_a_family_with_a_band(tmp_path):
    runs = [tmp_path / name for name in ("mine-seed0", "mine-seed12", "mine-seed0-learned", "seed3")]
    assert {name: len(of) for name, of in families(runs).items()} == {"mine": 2, "mine-learned": 1, "seed3": 1}
    band = over_seeds([([1, 2, 3], [0.0, 1.0, 2.0]), ([2, 3, 4], [3.0, 6.0, 9.0])])
    assert (band.steps, band.mean, band.low, band.high) == ([2, 3], [2.0, 4.0], [1.0, 2.0], [3.0, 6.0])


def test_the_command_writes_one_run_and_several(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        make_run(tmp_path / f"a-seed{seed}", seed=seed)
    assert main(["a-seed0/agrpo"]) == 0 and (tmp_path / "a-seed0" / "report.html").exists()
    assert main(["a-seed0", "a-seed1"]) == 0 and "2 runs compared" in (tmp_path / "report.html").read_text()
    assert main(["a-seed0", "nowhere"]) == 2
    assert "nowhere: no run" in capsys.readouterr().err


def test_a_run_writes_its_report_while_it_goes_on_and_survives_one_that_fails(tmp_path):
    with RunLog(tmp_path / "x" / "sft", "sft", 3, console=False, report_every_s=1e-9) as log:
        log.step(0, {"loss": 1.0})
        assert "SFT is at step 1" in (tmp_path / "x" / "report.html").read_text()
        (tmp_path / "x" / "report.html").unlink()
        (tmp_path / "x" / "report.html").mkdir()  # cannot be replaced by a file
    assert "report.html was not written" in (tmp_path / "x" / "sft" / "log.txt").read_text()


def get(address, host=None):
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


@pytest.fixture
def served(run):
    found, address = server([run], 0)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield address
    found.shutdown()
    found.server_close()


def test_the_server_answers_its_token_and_its_own_name_alone(served):
    assert served.startswith("http://127.0.0.1:")
    base, query = served.split("?")
    assert get(served)[0] == 200
    assert json.loads(get(f"{base}data.json?{query}")[1])["runs"][0]["samples"]
    for wrong in (base, f"{base}?token=", f"{base}?token=x", f"{base}data.json"):
        assert get(wrong)[0] == 403
    assert get(served, host="evil.example")[0] == 403
    assert get(f"{base}../../etc/passwd?{query}")[0] == 404


@needs_chromium
@pytest.mark.parametrize("width", [1400, 390])
def test_a_hostile_run_in_a_browser(browser, run, tmp_path, width):
    browser.console.clear()
    browser.open(write_report([run], tmp_path / "report.html").as_uri(), width=width)
    assert browser.run("document.documentElement.scrollWidth") == width, "nothing overflows"
    assert browser.run("document.querySelectorAll('.chart path').length") > 3
    assert browser.run("document.querySelectorAll('.samples tbody tr').length") == 25
    # By keyboard: the third row, opened, one to the right, closed; the focus is back in the table.
    browser.run("document.querySelector('.samples tbody tr').focus()")
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        browser.press(key)
    assert browser.run("document.getElementById('sample').open")
    text = browser.run("document.querySelector('.tokens-text').textContent")
    assert text in {own[:9] for own in HOSTILE}
    shades = browser.run("[...document.querySelectorAll('.token')].map((t) => getComputedStyle(t).backgroundColor)")
    assert len(set(shades)) == 3, "each log-ratio has a colour of its own"
    browser.press("ArrowRight")
    assert "sample 4 of 60" in browser.run("document.getElementById('sample-title').textContent")
    browser.press("Escape")
    browser.until("!document.getElementById('sample').open")
    browser.until("document.activeElement.tagName === 'TR'")
    assert browser.run("window.owned === undefined && !document.title.includes('owned;')")
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('img, main b b, iframe').length") == 0
    assert browser.console == []


@needs_chromium
def test_samples_are_sorted_and_filtered(browser, run, tmp_path):
    browser.open(write_report([run], tmp_path / "report.html").as_uri())
    first = "document.querySelector('.samples tbody tr .score').textContent"
    head = "[...document.querySelectorAll('.samples th button')].find((b) => b.textContent === 'Reward')"
    browser.run(f"{head}.click()")
    assert browser.run(first) == "29.0"
    browser.run(f"{head}.click()")
    assert browser.run(first) == "0" and browser.run(f"{head}.parentElement.ariaSort") == "ascending"

    def fill(selector, value):
        browser.run(f"(() => {{ const i = document.querySelector({selector!r}); i.value = {value!r};"
                    " i.dispatchEvent(new Event('input')); i.dispatchEvent(new Event('change')); })()")  # fmt: skip
        return browser.run("document.querySelector('.count').textContent")

    assert fill(".filters input[type=number]", "20") == "20 of 60 samples"
    assert fill(".filters select", "up") == "10 of 60 samples"
    assert fill(".filters input[type=search]", "PROMPT 25 ") == "1 of 60 samples"


@needs_chromium
def test_runs_beside_each_other_on_a_phone(browser, tmp_path):
    runs = [make_run(tmp_path / f"a-seed{seed}", seed=seed, text="<answer>7</answer>") for seed in range(2)]
    browser.console.clear()
    browser.open(write_report(runs, tmp_path / "report.html").as_uri(), width=390)
    assert browser.run("document.documentElement.scrollWidth") == 390
    heights = "[...document.querySelectorAll('.samples td')].map((cell) => cell.getBoundingClientRect().height)"
    assert max(browser.run(heights)) < 30, "no name or prompt is broken into lines"
    browser.run(
        "(() => { const list = document.querySelector('.narrow select'); list.value = 'reward up';"
        " list.dispatchEvent(new Event('change')); })()"
    )
    assert browser.run("document.querySelector('.samples tbody tr .score').textContent") == "0"
    assert browser.console == []


@needs_chromium
def test_a_cursor_tells_the_values_and_the_theme_turns(browser, run, tmp_path):
    browser.open(write_report([run], tmp_path / "report.html").as_uri(), dark=True)
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = browser.run(paper)
    browser.run("document.getElementById('theme').click()")
    assert browser.run(paper) != dark
    browser.run("document.querySelectorAll('.chart svg')[1].focus()")
    browser.press("Home")
    told = browser.run("document.querySelectorAll('.chart')[1].querySelector('.at').textContent")
    assert told == "step 1"


@needs_chromium
def test_the_page_follows_a_run(browser, tmp_path, monkeypatch):
    root = make_run(tmp_path / "going", steps=12, samples=0)
    found, address = server([root], 0)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    try:
        browser.console.clear()
        browser.open(address)
        browser.until("document.getElementById('live').textContent === 'live'")
        with (root / "agrpo" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 12, "time_s": 9.0, "reward": 0.5}) + "\n")
        browser.until("document.getElementById('verdict').textContent.includes('step 13 of 12')")
        assert browser.console == []
    finally:
        found.shutdown()
        found.server_close()
