"""`make book PROFILE=smoke` in a temporary copy, and the resulting book in a browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import browser
import jupytext
import nbformat
import psutil
import pytest
from conftest import ROOT, copy_project

from lorapar_utils.machine import usable_cores


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("project"))


def make(folder, target="book"):
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "OMP_NUM_THREADS")}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # other tests run beside
    return subprocess.Popen(
        ["make", "--no-print-directory", target, "PROFILE=smoke"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop_at(folder, path, sign, limit=600):
    """Signal the whole process group as soon as `path` exists; gives what was printed, and what still runs then."""
    process = make(folder)
    deadline = time.monotonic() + limit
    while not (folder / path).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None and (folder / path).exists(), process.communicate()[0][-3000:]
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, sign)
    output, _ = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(started, timeout=3)
    return output, [one.cmdline() for one in alive if one.is_running()]


# Killed between the stages of a training and while the book is made; stopped by Ctrl-C while votes or scores are made.
KILLS = (
    ("runs/smoke/logs/prepare.log", signal.SIGINT),
    ("runs/smoke/experiments/lorapar-seed0/stage1/manifest.json", signal.SIGKILL),
    ("runs/smoke/logs/book.log", signal.SIGKILL),
)


@pytest.fixture(scope="module")
def built(copy):
    """Stopped and killed on the way, then run to the end; what was finished before is never made again."""
    finished = {}
    for path, sign in KILLS:
        output, alive = stop_at(copy, path, sign)
        if sign == signal.SIGINT:
            assert "Stopped. `make book PROFILE=smoke` goes on from here." in output and "Traceback" not in output
            assert not alive
        for manifest in copy.glob("runs/smoke/**/manifest.json"):
            finished.setdefault(manifest, manifest.stat().st_mtime_ns)
    process = make(copy)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-6000:]
    assert len(finished) >= 6
    repeated = [str(path) for path, made in finished.items() if path.stat().st_mtime_ns != made]
    assert not repeated, f"finished phases were made again: {repeated}"
    (copy / "printed.txt").write_text(output)
    return copy


@pytest.mark.slow
def test_a_build_prints_a_line_a_job_and_where_the_book_is(built):
    *lines, last = (built / "printed.txt").read_text().splitlines()
    assert last.startswith("The book: ") and lines
    assert all(re.match(r" *\d+ of \d+  \w+.* (\d+ s|\d+ min)( +about .* left)?$", line) for line in lines), lines


@pytest.mark.slow
def test_every_phase_left_its_record(built):
    names = {path.stem for path in (built / "runs/smoke/records").glob("*.json")}
    assert {"voting", "importance", "again", "base-seed0", "lorapar-seed0", "random_0.9-seed0"} <= names
    record = json.loads((built / "runs/smoke/records/lorapar-seed0.json").read_text())
    assert record["run"]["publishable"] is False
    assert {"stage1/system1", "stage1/system2", "stage2/system2", "active/stage1"} <= set(record["result"]["metrics"])


@pytest.mark.slow
def test_adapter_of_stage2_differs_from_stage1_in_active_elements_only(built):
    from safetensors.torch import load_file

    from lorapar_utils.partition import Partition

    home = built / "runs/smoke/experiments/lorapar-seed0"
    first, second = (
        load_file(home / stage / "adapter" / "adapter_model.safetensors") for stage in ("stage1", "stage2")
    )
    partition = Partition.load(home / "stage2" / "partition")
    masks = {name.replace(".default", ""): mask for name, mask in partition.stage_mask(2).items()}
    assert masks.keys() == first.keys()
    assert all(bool((first[n] == second[n])[~mask].all()) for n, mask in masks.items())
    assert any(bool((first[n] != second[n])[mask].any()) for n, mask in masks.items())


@pytest.mark.slow
def test_unchanged_rebuild_executes_nothing(built):
    process = make(built)
    output, _ = process.communicate()
    assert process.returncode == 0 and "Nothing to be done" in output


# An edited file -> the rules that run again. What they find kept under other code's or settings' names they read back.
RERUN = {
    "report/figures.py": {"page", "book"},
    "records/from_votes.py": {"prepare", "again", "experiment", "page", "book"},
    "optim.py": {"experiment", "page", "book"},
    "planning/plan.py": {"book"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("file", "rules"), RERUN.items(), ids=RERUN)
def test_an_edited_file_runs_what_rests_on_it(built, file, rules):
    path = built / "lorapar_utils" / file
    text = path.read_text()
    path.write_text(f"{text}\nEDITED = True\n")
    try:
        assert jobs(built) - {"all"} == rules
    finally:
        path.write_text(text)
    assert not jobs(built)


@pytest.mark.slow
def test_the_plan_after_a_changed_setting_tells_what_is_made_anew_and_what_is_read_back(built):
    path = built / "profiles" / "smoke.yaml"
    text = path.read_text()
    path.write_text(text.replace("sft: {epochs: 1,", "sft: {epochs: 2,"))
    try:
        plan = subprocess.run(
            [sys.executable, "-m", "lorapar_utils.build", "smoke", "--dry-run"],
            cwd=built,
            capture_output=True,
            text=True,
        )
    finally:
        path.write_text(text)
    assert plan.returncode == 0, plan.stderr
    rows = {re.split(r"  +", line)[0]: re.split(r"  +", line)[1:] for line in plan.stdout.splitlines() if "  " in line}
    # Votes, scores and the base model do not rest on the epochs.
    kept = {phase: cells[:2] for phase, cells in rows.items() if cells[0] == "–"}
    assert kept == {"voting by local teachers": ["–", "1"], "importance": ["–", "1"], "base model": ["–", "1"]}
    assert [rows[phase][0] for phase in ("sft then grpo, LoRA-PAR", "sft_all", "pages", "book")] == ["1", "1", "8", "1"]
    assert rows["voting by local teachers"][-1] == "changed: profiles/smoke.yaml"
    assert rows["sft_all"][-1] == "what it reads is made anew"
    assert len(plan.stdout.splitlines()) < 20


def jobs(folder):
    """The rules that a build would run now."""
    plan = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", "--nolock", "--config", "profile=smoke"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert plan.returncode == 0, plan.stderr
    return set(re.findall(r"^(\w+) +\d+$", plan.stdout, re.M)) - {"total"}


DARK = ("index.html", "02_importance.html", "06_claims.html", "api.html")
HEAVIEST = 2_000_000
LAYERS = [str(layer) for layer in range(30)]
# Bytes of a page and of all that it loads.
WEIGHT = """() => ["navigation", "resource"].flatMap(kind => performance.getEntriesByType(kind))
  .reduce((sum, entry) => sum + entry.decodedBodySize, 0)"""
# Figures that a phone shows as they were drawn for a page. After a resize the browser fetches the narrow drawings first.
WIDE_FIGURES = """async () => {
  const wide = () => [...document.querySelectorAll('figure img')].filter(image => !image.currentSrc.includes('/narrow/'));
  for (let tries = 0; wide().length && tries < 50; tries++) await new Promise(done => setTimeout(done, 100));
  return wide().map(image => image.alt.slice(0, 40));
}"""
SCROLLING_TABLES = """() => [...document.querySelectorAll('article table')]
  .filter(table => table.scrollWidth > table.clientWidth + 1 || table.getBoundingClientRect().right > innerWidth + 1)
  .map(table => table.innerText.slice(0, 60))"""


def commands():
    """Every shell command that a page, the README or a notebook shows in a block of its own."""
    pages = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]
    texts = [page.read_text() for page in pages]
    for path in sorted((ROOT / "notebooks").glob("*.py")):
        texts += [cell.source for cell in jupytext.read(path).cells if cell.cell_type == "markdown"]
    blocks = [block for text in texts for block in re.findall(r"```bash\n(.*?)```", text, re.S)]
    found = [line.split("#")[0].strip().removeprefix(".venv/bin/") for block in blocks for line in block.splitlines()]
    # The guide's own profile is made, and its commands run, by test_guide.
    return sorted(
        {line for line in found if line.startswith(("make ", "papermill ", "python ")) and "mine" not in line}
    )


@pytest.mark.slow
def test_the_commands_that_are_shown_do_what_they_say(built):
    assert len(commands()) >= 10
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",  # commands run beside each other
    }

    def run(command):
        if command.startswith("make "):
            command = f"make -n {command.removeprefix('make ')}"
        return command, subprocess.run(command, shell=True, cwd=built, env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(usable_cores()) as pool:
        for command, done in pool.map(run, commands()):
            assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.slow
def test_notebooks_print_nothing_that_a_reader_cannot_act_on(built):
    executed = sorted((built / "runs/smoke/notebooks").rglob("*.ipynb"))
    assert len(executed) >= 10
    for path in executed:
        streams = [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
        lines = {line.strip() for stream in streams for line in re.split(r"[\r\n]", stream["text"])}
        assert not [line for line in lines if line and not re.search(r"\d+%\||\d+ ?(it|examples)/s|\?it/s", line)], path


def explore(chromium, address):
    """The theta explorer by keyboard, at a phone's width; whole, and beside its map on a screen; without scripts."""
    wide = chromium.new_page(viewport={"width": 1280, "height": 800})
    wide.goto(address)
    drawn = wide.frame_locator("iframe").locator("svg.marks")
    drawn.wait_for()
    wide.wait_for_function("document.querySelector('iframe').style.height != '800px'")
    frame = wide.locator("iframe").bounding_box()
    chart = drawn.bounding_box()
    assert chart["y"] + chart["height"] <= frame["y"] + frame["height"] and chart["width"] > frame["width"] / 2
    wide.close()
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    page.goto(address)
    chart = page.frame_locator("iframe")
    words = chart.locator("svg text", has_text="active in stage 1")
    words.wait_for()
    assert "theta 0.9" in words.text_content()
    chart.locator("input[type=range]").first.focus()
    page.keyboard.press("ArrowLeft")
    chart.locator("svg text", has_text="theta 0.8").wait_for()
    texts = chart.locator("svg text").all_text_contents()
    assert [text for text in texts if text in LAYERS] == LAYERS
    page.close()
    plain = chromium.new_context(java_script_enabled=False).new_page()
    plain.goto(address)
    assert plain.frame_locator("iframe").locator("noscript img").is_visible()


@pytest.mark.slow
def test_no_link_of_the_book_is_dead(built):
    """Of every page: pages, records, images, styles, scripts."""
    html = built / "book/_build/html"
    dead = {}
    for page in html.glob("*.html"):
        links = re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8"))
        # The explorer's own script holds templates of addresses.
        local = {link for link in links if not re.match(r"[a-z]+:|//", link) and "${" not in link}
        dead[page.name] = sorted(link for link in local if not (html / unquote(link)).exists())
    assert sum(len(links) for links in dead.values()) == 0, dead
    assert any("_static/records/study/" in page.read_text() for page in html.glob("*.html"))


@pytest.mark.slow
@pytest.mark.skipif(browser.chromium() is None, reason="no Chromium on this machine")
def test_the_book_in_a_browser(built):
    html = built / "book/_build/html"
    pages = sorted(path.name for path in html.glob("*.html"))
    assert {
        "index.html",
        "00_tour.html",
        "api.html",
        "01_voting.html",
        "experiment.html",
        "06_claims.html",
        "status.html",
        "lab_log.html",
    } <= set(pages)
    assert "injected-parameters" not in (html / "02_importance.html").read_text()
    with browser.served(html) as address, browser.browser() as chromium:
        found, weight = {}, {}
        for name in pages:
            page = chromium.new_page()
            found[name] = browser.problems_of(page, f"{address}/{name}")
            weight[name] = page.evaluate(WEIGHT)
            page.set_viewport_size({"width": 390, "height": 800})
            if page.evaluate("document.documentElement.scrollWidth") > 390:
                found[name].append("wider than a phone")
            found[name] += [f"scrolls on a phone: {head}" for head in page.evaluate(SCROLLING_TABLES)]
            found[name] += [f"drawn for a page, on a phone: {alt}" for alt in page.evaluate(WIDE_FIGURES)]
            page.close()
        for name in DARK:
            page = chromium.new_page(color_scheme="dark")
            found[f"{name}, dark"] = browser.problems_of(page, f"{address}/{name}")
            assert page.evaluate("document.documentElement.dataset.theme") == "dark"
            page.close()
        assert not {name: problems for name, problems in found.items() if problems}
        assert not {name: size for name, size in weight.items() if size > HEAVIEST}
        page = chromium.new_page()
        page.goto(f"{address}/index.html")
        numbers = page.eval_on_selector_all("a.result", "links => links.map(link => [link.href, link.title])")
        # Effects and records are cited once the study has a block.
        judged = ["06_claims"] if any((ROOT / "results" / "study").glob("importance_0.9-seed*.json")) else []
        assert len(numbers) >= len(judged) and all("commit" in title for _, title in numbers)
        for name in ("03_theta_ablation", "04_two_stage", "05_benchmarks", *judged):
            page.goto(f"{address}/{name}.html")
            links = page.eval_on_selector_all("td a.result", "links => links.map(link => [link.href, link.title])")
            assert links, name
            numbers += links
        assert all(page.request.get(link).ok for link, _ in numbers)
        explore(chromium, f"{address}/02_importance.html")
        page.keyboard.press("Control+k")
        page.keyboard.type("importance")
        page.keyboard.press("Enter")
        page.wait_for_selector("#search-results li a")
        hits = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.href)")
        assert any("02_importance" in hit for hit in hits)


def test_read_only_runs_and_missing_profile_stop_before_anything_starts(copy, monkeypatch, tmp_path):
    from lorapar_utils import build
    from lorapar_utils.errors import InputError

    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="runs: .* cannot be written"):
        build.build("smoke", 1)
    (tmp_path / "runs").unlink()
    monkeypatch.setattr(build, "FREE_BYTES", 10**18)
    with pytest.raises(InputError, match="make room"):
        build.build("smoke", 1)
    assert build.main(["nonsense"]) == 2


def test_snakemake_lint_is_clean():
    done = subprocess.run([sys.executable, "-m", "snakemake", "--lint"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
