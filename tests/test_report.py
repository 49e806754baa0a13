"""The report: complete, offline, escaped, and refused when its input is damaged."""

import copy
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import conftest
import solpath
from conftest import build, inputs
from solpath.errors import ConfigError, FileError, FingerprintError
from solpath.reporting.charts import entry_shares, spread
from solpath.reporting.family import Family
from solpath.reporting.promise import read_promise
from solpath.reporting.report import duration, heat_maps, overlap, size_table, write_report

SIZES = {"s20": 0.2, "s40": 0.4, "s60": 0.6, "s75": 0.75}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def make_family(path: solpath.SolutionPath) -> dict:
    members = []
    for i, (name, sparsity) in enumerate({"dense": 0.0, **SIZES}.items()):
        plan = path.plan(sparsity=sparsity)
        size = plan.achieved
        members.append(
            {
                "name": name,
                "folder": f"models/{name}" if i else None,
                "sparsity": size.sparsity,
                "params": size.params,
                "params_share": size.params_share,
                "macs": size.macs,
                "macs_share": size.macs_share,
                "bytes": 4 * size.params,
                "cache": size.cache,
                "latency_ms": 10.0 - i,
                "latency_iqr_ms": 0.3,
                "metrics": {"cosine": 1 - 0.07 * i, "retrieval": 0.9 - 0.1 * i},
                "intervals": {"cosine": [0.98 - 0.07 * i, 1.01 - 0.07 * i]},
                "widths": plan.widths,
            }
        )
    methods = [
        {
            "name": name,
            "seconds": 12.0,
            "points": [
                {
                    "sparsity": s,
                    "metrics": {"cosine": 1 - loss * s, "retrieval": 0.9 - loss * s / 2},
                }
                for s in (0.0, *SIZES.values())
            ],
        }
        for name, loss in {"spp": 0.4, "random": 1.0, "magnitude": 0.95, "taylor": 0.94}.items()
    ]
    return {
        "format": "solpath.family",
        "version": 3,
        "model": {"name": "a <b>model</b>", "class": "BertModel", "sha256": None, "units": 224},
        "search": {
            "method": "spp",
            "seconds": 61.0,
            "compensation_seconds": 30.0,
            "steps": 200,
            "seed": 0,
            "text": "",
        },
        "metrics": [
            {"key": "cosine", "title": "Cosine to the dense model", "lower": False},
            {"key": "retrieval", "title": "Retrieval accuracy", "lower": False},
        ],
        "judged": {"text": "held-out pairs", "samples": 64},
        "methods": methods,
        "members": members,
        "measured": {"samples": 8, "tokens": 128, "repeats": 20},
        "provenance": {"command": "solpath demo", "threads": 2, "versions": {"torch": "2"}},
        "stages": [
            {"name": "search", "seconds": 61.0, "cpu_seconds": 110.5, "peak_memory": 1_100_000_000},
            {"name": "compare", "seconds": 20.0, "cpu_seconds": 40.0, "peak_memory": 1_700_000_000},
        ],
    }


@pytest.fixture
def folder(bert, tmp_path: Path) -> Path:
    path = solpath.baselines.random(bert, conftest.batches(bert))
    path.save(tmp_path / "path")
    (tmp_path / "family.json").write_text(json.dumps(make_family(path)))
    return tmp_path


def test_report_has_every_part_and_no_external_address(folder: Path) -> None:
    page = write_report(folder).read_text()
    for part in ("quality", "cost", "units", "entry", "load"):
        assert f'<section id="{part}">' in page
    for name in SIZES:
        assert f'solpath.load("models/{name}")' in page
    assert re.findall(r"(?:https?:)?//[\w.]+|@import|url\((?!#)", page) == []
    assert "<b>model</b>" not in page
    assert "a &lt;b&gt;model" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"#fe[0-9a-f]{2}ef", page), "a stand-in colour was left"


def test_the_report_says_what_the_stages_took(folder: Path) -> None:
    page = write_report(folder).read_text()
    assert "search 61\u202fs, compare 20\u202fs; memory at most 1.7&#8239;GB" in page
    family = json.loads((folder / "family.json").read_text())
    del family["stages"]  # written before stages were recorded
    (folder / "family.json").write_text(json.dumps(family))
    assert Family.read(folder).stages is None
    assert "<dt>Took</dt>" not in write_report(folder).read_text()


def test_a_first_report_needs_no_other_method(folder: Path) -> None:
    family = json.loads((folder / "family.json").read_text())
    family["methods"] = family["methods"][:1]
    (folder / "family.json").write_text(json.dumps(family))
    page = write_report(folder).read_text()
    assert "magnitude" not in page
    assert '<section id="quality">' in page


def test_report_is_deterministic(folder: Path) -> None:
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("version",), 99, "version 99"),
        (("methods",), [], "methods"),
        (
            ("methods", 1, "points", 0, "metrics", "cosine"),
            "x",
            "methods[1].points[0].metrics.cosine",
        ),
        (("members", 1, "metrics"), {}, "members[1].metrics.cosine"),
        (("members", 1, "intervals", "cosine"), [1], "members[1].intervals.cosine"),
        (("members", 2, "params"), None, "members[2].params"),
        (("members", 1, "widths"), {}, "members[1].widths"),
        (("model",), 3, "model"),
        (("model", "sha256"), 3, "model.sha256"),
        (("search", "text"), None, "search.text"),
        (("provenance", "threads"), None, "provenance.threads"),
        (("members", 1, "folder"), 3, "members[1].folder"),
        (("members", 0, "latency_ms"), 0, "members[0].latency_ms must be positive"),
        (("members", 0, "latency_ms"), 1e-320, "members[0].latency_ms must be positive"),
        (("members", 0, "macs"), 0, "members[0].macs must be positive"),
        (("members", 1, "sparsity"), 1e308, "members[1].sparsity"),
        (("members", 1, "intervals", "cosine"), [-1e308, 1e308], "members[1].intervals.cosine"),
        (("methods", 1, "points", 0, "sparsity"), -1, "methods[1].points[0].sparsity"),
        (("metrics", 0, "title"), "", "metrics[0].title is empty"),
    ],
)
def test_damaged_family_names_file_and_field(folder: Path, keys, value, named: str) -> None:
    family = json.loads((folder / "family.json").read_text())
    place = family
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "family.json").write_text(json.dumps(family))
    with pytest.raises(FileError, match=r"family.json") as error:
        write_report(folder)
    assert named in str(error.value)


def test_continuations_stand_side_by_side_and_are_escaped(folder: Path) -> None:
    assert 'id="continuations"' not in write_report(folder).read_text()
    family = json.loads((folder / "family.json").read_text())
    said = "<script>alert(1)</script>\n  & so on"
    lines = [{"name": n, "text": said, "tokens": 9, "agreed": i} for i, n in enumerate(SIZES)]
    family["continuations"] = [{"prompt": "Once <i>upon", "lines": lines}]
    (folder / "family.json").write_text(json.dumps(family))
    page = write_report(folder).read_text()
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;\n  &amp; so on</td>") == len(SIZES)
    assert "<script>alert" not in page
    assert '<code class="text">Once &lt;i&gt;upon</code>' in page
    assert "3 of 9" in page
    family["continuations"][0]["lines"][1]["text"] = 5
    (folder / "family.json").write_text(json.dumps(family))
    with pytest.raises(FileError, match=r"continuations\[0\]\.lines\[1\]\.text is"):
        write_report(folder)


def test_missing_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"family\.json"):
        Family.read(tmp_path)


def test_a_family_comes_back_as_it_was_written(folder: Path) -> None:
    written = json.loads((folder / "family.json").read_text())
    family = Family.read(folder)
    unsaid = {
        "model": written["model"] | {"prunable": None},
        "continuations": None,
        "promise": None,
        "target": None,
    }
    assert family.to_dict() == written | unsaid
    family.write(folder)
    assert Family.read(folder) == family


def test_heat_maps_hold_the_shares_of_the_plan(bert, folder: Path) -> None:
    path = solpath.baselines.random(bert, conftest.batches(bert))
    family = Family.read(folder)
    for drawn, sparsity in zip(heat_maps(family, path), SIZES.values(), strict=True):
        widths = path.plan(sparsity=sparsity).widths
        for i, pair in enumerate(path.pairs):
            assert drawn["rows"][i // 3][i % 3] == widths[pair.name] / pair.width
    assert copy.deepcopy(family) == family


def test_entry_shares_follow_the_order(bert) -> None:
    path = solpath.baselines.random(bert, conftest.batches(bert))
    shares = entry_shares(path)
    for name, share in shares.items():
        assert (share.flatten().argsort() == (-path.score[name]).flatten().argsort()).all()
    assert max(float(share.max()) for share in shares.values()) == pytest.approx(1)


def test_spread_keeps_order_gap_and_range() -> None:
    values = [0.1, 0.11, 0.12, 0.5, 0.99, 1.0]
    placed = spread(values, 0.1, 0.0, 1.0)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(placed, placed[1:], strict=False))
    assert placed[0] >= 0
    assert placed[-1] <= 1 + 1e-9
    assert spread([0.2, 0.6], 0.1, 0, 1) == pytest.approx([0.2, 0.6])


def test_duration() -> None:
    assert duration(0.2).startswith("under")
    assert duration(200) == "3\u202fmin 20\u202fs"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_report_opens_in_a_browser(folder: Path, tmp_path: Path) -> None:
    page = write_report(folder)
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=400,900", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count("<section") == 6
    assert done.stdout.count("<svg") == 2 * (2 * 5 + 1)
    assert "CONSOLE" not in done.stderr
    assert not re.search(r"(?:src|href)=\"(?!#)", done.stdout)


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=flags)


def test_a_size_is_chosen_by_the_keyboard_alone(browser, bert, folder: Path) -> None:
    page = browser.new_page()
    page.goto(write_report(folder).as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to choosing a size"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "size"
    page.keyboard.press("Home")
    for _ in range(31):
        page.keyboard.press("ArrowRight")
    path = solpath.SolutionPath.load(folder / "path")
    expected = f"{path.plan(sparsity=0.31).achieved.params / 1e6:.1f} M"
    text = page.locator("#figures").inner_text()
    assert expected in text
    assert "≈ 0.89" in text  # 0.93 at 20 %, 0.86 at 40 %
    assert "--sparsity 0.31" in page.locator("#command").inner_text()
    said = page.locator("#size").get_attribute("aria-valuetext")
    assert said.startswith("31")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the button of the first measured size
    assert "measured" in page.locator("#figures").inner_text()
    page.locator("#by-sparsity").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".by-params").is_visible()
    assert not page.locator(".by-sparsity").is_visible()


def test_a_phone_shows_all_of_the_page(browser, folder: Path) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(write_report(folder).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("#choose").is_visible()


def test_another_path_is_compared_unit_by_unit(bert, folder: Path) -> None:
    beside = solpath.baselines.random(bert, conftest.batches(bert), seed=7)
    beside.save(folder / "other")
    assert 'id="overlap"' not in write_report(folder).read_text()
    page = write_report(folder, beside=folder / "other").read_text()
    assert 'id="overlap"' in page
    path, family = solpath.SolutionPath.load(folder / "path"), Family.read(folder)
    for row, sparsity in zip(overlap(family, path, path), SIZES.values(), strict=True):
        assert set(row["shares"].values()) == {1.0}
        assert row["chance"] < 1 - sparsity / 2
    for row in overlap(family, path, beside):
        assert row["shares"]["all"] == pytest.approx(row["chance"], abs=0.15)
    small = build("bert", num_hidden_layers=1)
    solpath.baselines.magnitude(small, [inputs(small)]).save(folder / "small")
    with pytest.raises(ConfigError, match="other pairs"):
        write_report(folder, beside=folder / "small")
    other = build("bert", seed=1)
    solpath.baselines.magnitude(other, [inputs(other)]).save(folder / "weights")
    with pytest.raises(ConfigError, match="the weights differ in 6 of 6 pairs"):
        write_report(folder, beside=folder / "weights")


def test_the_promise_is_shown_and_the_page_begins_there(folder: Path) -> None:
    family = json.loads((folder / "family.json").read_text())
    family["promise"] = {
        "sparsity": 0.2, "metric": "divergence", "max_loss": 0.05, "confidence": 0.95,
        "samples": 1500, "mean": 0.031, "bound": 0.042,
    }  # fmt: skip
    (folder / "family.json").write_text(json.dumps(family))
    page = write_report(folder).read_text()
    assert "<strong>Chosen: 20\u202f% removed.</strong>" in page
    assert "at most 0.05" in page
    assert 'value="20"' in page


def test_a_choice_of_the_command_line_becomes_the_promise(tmp_path: Path) -> None:
    model, file = build("bert"), tmp_path / "choice.json"
    data = conftest.batches(model)
    path = solpath.baselines.magnitude(model, [conftest.inputs(model, seed=9)])
    choice = solpath.choose(model, path, data, 0.9, confidence=0.6, sizes=[0.05, 0.1])
    file.write_text(json.dumps(choice.to_dict()))
    promise, last = read_promise(file, path), choice.tests[-1]
    assert (promise.sparsity, promise.bound) == (last.sparsity, last.bound)
    value = choice.to_dict()
    value["tests"][0]["passed"] = value["tests"][1]["passed"] = False
    file.write_text(json.dumps(value))
    with pytest.raises(ConfigError, match="no size passed"):
        read_promise(file, path)
    other = solpath.baselines.random(model, data)
    file.write_text(json.dumps(choice.to_dict()))
    with pytest.raises(ConfigError, match="of another path"):
        read_promise(file, other)
    file.write_text("{}")
    with pytest.raises(FileError, match=r"choice\.json is not what"):
        read_promise(file, path)


def test_costs_of_every_size_are_those_of_plans(folder: Path) -> None:
    path, family = solpath.SolutionPath.load(folder / "path"), Family.read(folder)
    sizes = size_table(family, path)["sizes"]
    assert [round(100 * one["sparsity"]) for one in sizes] == list(range(len(sizes)))
    for one in sizes[::13]:
        achieved = path.plan(sparsity=one["sparsity"]).achieved
        assert (one["params"], one["macs"]) == (achieved.params, achieved.macs)


def test_a_family_of_any_model_is_made_judged_and_reported(tmp_path: Path) -> None:
    model = build("llama")
    data = conftest.batches(model)
    path = solpath.baselines.magnitude(model, data)
    family = solpath.make_family(
        model, path, data, tmp_path / "out", sizes=[0.3, 0.6], compensate_on=2 * data,
        repeats=1, progress=False,
    )  # fmt: skip
    assert [one.key for one in family.metrics] == ["kl", "agreement", "cosine", "relative_error"]
    for member in family.members[1:]:
        small = solpath.load(tmp_path / "out" / member.folder)
        found = solpath.evaluate(small, model, data)
        assert member.metrics["kl"] == pytest.approx(found.metrics["kl"], rel=1e-5)
        assert member.intervals["kl"] == pytest.approx(found.intervals["kl"], rel=1e-4)
        assert (
            member.cache
            == solpath.SolutionPath.load(tmp_path / "out" / "path")
            .plan(sparsity=member.sparsity)
            .achieved.cache
        )
    assert family.members[2].cache < family.members[0].cache
    assert Family.read(tmp_path / "out") == family
    assert (tmp_path / "out" / "report.html").exists()
    for sizes in ([], [0.5, 0.5], [0.0, 0.5], [0.5, 1.0]):
        with pytest.raises(ConfigError, match="sizes must ascend"):
            solpath.make_family(model, path, data, tmp_path / "no", sizes=sizes)


def test_a_family_for_a_runtime_shows_and_says_its_plans(tmp_path: Path) -> None:
    """A size of the slider, and the command that makes it, are cut as the members are."""
    model = build("bert")
    data = conftest.batches(model)
    path = solpath.baselines.magnitude(model, data)
    name = "a'; rm -rf ~; echo </script>"
    family = solpath.make_family(
        model, path, data, tmp_path / "out", sizes=[0.125, 0.3], for_="onnx", name=name,
        repeats=1, progress=False,
    )  # fmt: skip
    assert family.target == Family.read(tmp_path / "out").target == "onnx"
    assert path.plan(sparsity=0.3).achieved != path.plan(sparsity=0.3, for_="onnx").achieved
    one = size_table(family, path)["sizes"][30]
    assert one["params"] == family.members[2].params
    assert one["removed"] == family.members[2].sparsity
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'target = " --for onnx"' in page
    assert 'for_="onnx"))' in page
    [said] = re.findall(r"const model = (\".*?\"), target", page)
    assert shlex.split(json.loads(said)) == [name]
    assert "s12_5 = solpath.load(" in page
    assert "12.5\u202f%</th>" in page


def test_the_cache_of_a_family_is_in_the_dtype_of_its_model(tmp_path: Path) -> None:
    model = build("qwen3").bfloat16().float()
    data = conftest.batches(model)
    path = solpath.baselines.magnitude(model, data)
    family = solpath.make_family(
        model.bfloat16(), path, data, tmp_path / "out", sizes=[0.5], repeats=1, progress=False
    )
    half = path.costs.dense["cache"] / 2
    assert family.members[0].cache == size_table(family, path)["sizes"][0]["cache"] == half


def test_nothing_is_written_for_a_path_of_another_model(bert, tmp_path: Path) -> None:
    data = conftest.batches(bert)
    path = solpath.baselines.magnitude(build("bert", seed=1), data)
    with pytest.raises(FingerprintError):
        solpath.make_family(bert, path, data, tmp_path / "out", progress=False)
    for sizes in (0.5, ["a"], [0.1234567, 0.12345671]):
        with pytest.raises(ConfigError, match="size"):
            solpath.make_family(bert, path, data, tmp_path / "out", sizes=sizes)
    with pytest.raises(ConfigError, match="for_ must be"):
        solpath.make_family(bert, path, data, tmp_path / "out", for_="paper")
    assert not list(tmp_path.rglob("*.json"))


def test_names_of_methods_are_text_in_charts(folder: Path) -> None:
    """Dollars would be mathematics to matplotlib, and broken ones raise."""
    family = json.loads((folder / "family.json").read_text())
    family["methods"][1]["name"] = r"$\frac$ <b>"
    (folder / "family.json").write_text(json.dumps(family))
    assert r"$\frac$ &lt;b" in write_report(folder).read_text()


def test_a_confidence_is_not_rounded_up(folder: Path) -> None:
    family = json.loads((folder / "family.json").read_text())
    family["promise"] = {
        "sparsity": 0.125, "metric": "divergence", "max_loss": 0.05, "confidence": 0.999,
        "samples": 1500, "mean": 0.031, "bound": 0.042, "compensated": True,
    }  # fmt: skip
    (folder / "family.json").write_text(json.dumps(family))
    page = write_report(folder).read_text()
    assert "Chosen: 12.5\u202f% removed.</strong> With 99.9\u202f% confidence" in page
