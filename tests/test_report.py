import base64
import io
import json
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import test_em
from PIL import Image

from diffem.errors import DiffemError
from diffem.report import drawing
from diffem.report import page as report


def row(iteration, score, *, accepted=True, start=0.208, ratio=0.91, **more):
    first = iteration == 0
    values = {
        "iteration": iteration,
        "accepted": accepted,
        "best": accepted,
        "seconds": 40.0,
        "examples": 0 if first else 1000,
        "network_evaluations": 0 if first else 60000,
        "loss": None if first else 0.5 / iteration,
        "score_name": "crps",
        "score": score,
        "score_se": 0.003,
        "criterion_delta": None if first else -0.01,
        "criterion_delta_se": None if first else 0.002,
        "start_delta": None if first else score - start,
        "start_delta_se": None if first else 0.004,
        "ratio": ratio,
        "width": 1.4,
    }
    return {**values, **more}


def make(folder, rows, **pictures):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if pictures:
        np.savez(folder / "pictures.npz", **pictures)
    return folder


def arrays(shape, n=3, m=4, clean=True, samples=10):
    rng = np.random.default_rng(0)
    draws = rng.random((n, m, *shape))
    data = {"y": rng.random((n, *shape)), "draws": draws, "mean": draws.mean(1), "std": draws.std(1)}
    data |= {"start": rng.random((n, *shape)), "samples": rng.random((samples, *shape)), "range": np.array([0.0, 1.0])}
    return data | ({"clean": rng.random((n, *shape))} if clean else {})


def uris(page):
    """(kind, bytes) of all data URIs."""
    found = re.findall(r'(?:src|srcset)="data:([a-z/+]+);base64,([A-Za-z0-9+/=]+)"', page)
    return [(kind, base64.b64decode(content, validate=True)) for kind, content in found]


def png(file):
    return Image.open(io.BytesIO(file.read_bytes()))


def pngs(page):
    return [Image.open(io.BytesIO(content)) for kind, content in uris(page) if kind == "image/png"]


def check(page):
    """The page is whole, and stands alone."""
    assert not re.search(r'(?:src|srcset|href)\s*=\s*"(?!data:)', page)
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)
    assert not re.search(r"\b(nan|NaN|None|inf|undefined)\b", page)
    assert page.count("<h1>") == 1
    assert all(re.search(r' alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]*>", page))
    assert not re.search(r"<th(?! scope=)[ >]", page)
    for kind, content in uris(page):
        if kind == "image/svg+xml":
            assert ElementTree.fromstring(content).tag.endswith("svg")
            assert b"NaN" not in content
        else:
            Image.open(io.BytesIO(content)).load()


def verdict(page):
    return re.search(r'<div class="verdict[^"]*">\s*<p>(.*?)</p>', page).group(1)


ROWS = [row(0, 0.208, ratio=0.6), row(1, 0.18), row(2, 0.19, accepted=False), row(3, 0.171)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [row(0, 0.208), row(11, 0.2), row(12, 0.171), row(13, 0.18, accepted=False)],
            "Iteration 12 is better than the start on held-out observations: CRPS 0.171 against 0.208 "
            "(difference -0.037 ± 0.004). Calibration ratio 0.91: honest uncertainty.",
        ),
        (
            [row(0, 0.208), row(1, 0.205)],
            "Iteration 1 is not clearly better than the start on held-out observations: CRPS 0.205 against 0.208 "
            "(difference -0.003 ± 0.004). Calibration ratio 0.91: honest uncertainty.",
        ),
        (
            [row(0, 0.208), row(1, 0.21, start_delta_se=None, ratio=None)],
            "Iteration 1 is no better than the start on held-out observations: CRPS 0.210 against 0.208 "
            "(difference 0.002).",
        ),
        (
            [row(0, 0.208, ratio=None), row(1, 0.3, accepted=False)],
            "Nothing beat the start; the start is saved.",
        ),
        (
            [row(0, 0.208, ratio=0.74), row(1, 0.3, accepted=False)],
            "Nothing beat the start; the start is saved. "
            "Calibration ratio 0.74: over-confident, the draws vary too little.",
        ),
        (
            [row(0, 0.208, ratio=1.3)],
            "Only the start has been scored so far; the start is saved. "
            "Calibration ratio 1.30: under-confident, the draws vary too much.",
        ),
        (
            [
                row(0, 12.5, score_name="energy_distance", score_se=None),
                row(
                    1,
                    11.0,
                    score_name="energy_distance",
                    start=12.5,
                    score_se=None,
                    start_delta_se=0.04,
                    ratio=float("nan"),
                ),
            ],
            "Iteration 1 is better than the start on held-out observations: energy distance 11.00 against 12.50 "
            "(difference -1.50 ± 0.04).",
        ),
    ],
)
def test_verdict(tmp_path, rows, words):
    assert report._verdict(report._load(make(tmp_path / "run", rows))) == words


def test_images_with_mask(tmp_path):
    rng = np.random.default_rng(1)
    data = arrays((1, 8, 8))
    data["mask"] = rng.random((3, 1, 8, 8)) > 0.5
    data["y"][~data["mask"]] = np.nan
    clean = {"psnr": 17.25, "energy_distance": 0.0123}
    run = make(tmp_path / "my <run>", [*ROWS[:3], {**ROWS[3], "clean": clean}], **data)
    (run / "config.yaml").write_text("network: <unet>\nwidth: 64\n")
    (run / "start.json").write_text('{"kind": "gaussian_mixture", "components": 32, "rank": 8}')
    file = report.write(run)
    page = file.read_text()
    assert file == run / "report.html"
    check(page)
    assert verdict(page).startswith("Iteration 3 is better than the start on held-out observations: CRPS 0.171")
    for words in ("my &lt;run&gt;", "&lt;unet&gt;", "gaussian mixture, 32 components, rank 8", "not used in training"):
        assert words in page
    assert "17.25" in page
    assert "2 min 40 s" in page
    assert "180,000" in page
    assert "1 of them refused" in page
    assert sum(kind == "image/svg+xml" for kind, _ in uris(page)) == 6  # three curves, light and dark

    # 8 columns of 88 pixels (8 pixels, 11 times) and gaps of 4; a heading of 24
    grid = png(run / "reconstructions.png")
    assert grid.size == (4 + 8 * 92, 28 + 3 * 92)
    assert [image.size for image in pngs(page)] == [grid.size, grid.size, (4 + 10 * 60, 64), (4 + 10 * 60, 64)]
    pixels = np.asarray(grid)[28:, 4:]
    sharp = pixels[:88, :88].reshape(8, 11, 8, 11, 3)
    assert (sharp == sharp[:, :1, :, :1]).all()
    hidden = (sharp[:, 0, :, 0] == drawing.UNOBSERVED).all(axis=-1)
    np.testing.assert_array_equal(hidden, ~data["mask"][0, 0])
    draw = pixels[:88:11, 2 * 92 : 2 * 92 + 88 : 11, 0]
    np.testing.assert_array_equal(draw, np.rint(255 * data["draws"][0, 0, 0]))


def test_rgb_without_clean(tmp_path):
    data = arrays((3, 40, 20), n=9, m=2, clean=False)
    data["mask"] = np.ones((9, 1, 1, 1), dtype=bool)
    data["y"] = data["y"][:, :, ::2, ::2]  # fewer pixels than the item
    page = report.write(make(tmp_path / "run", ROWS, **data)).read_text()
    check(page)
    assert "clean reference" not in page
    assert "Pale blue" not in page
    grid = np.asarray(png(tmp_path / "run" / "reconstructions.png"))
    assert grid.shape[0] == 28 + 8 * (120 + 4)  # 8 of 9 items, 40 pixels 3 times
    colour = grid[28:148].astype(int)
    assert (np.ptp(colour, axis=-1) > 50).any()


@pytest.mark.parametrize("features", [1, 5])
def test_vectors(tmp_path, features):
    data = arrays((features,), n=20)
    data["y"] = np.zeros((20, 2))
    page = report.write(make(tmp_path / "run", ROWS[:2], **data)).read_text()
    check(page)
    assert len(pngs(page)) == 4
    assert pngs(page)[1].size == png(tmp_path / "run" / "reconstructions.png").size
    assert (pngs(page)[0].width > 700) == (features == 5)


def test_signals(tmp_path):
    data = arrays((2, 30), samples=4)
    data["mask"] = np.arange(30) % 2 == 0
    page = report.write(make(tmp_path / "run", ROWS[:2], **data)).read_text()
    check(page)
    assert len(pngs(page)) == 4
    assert (tmp_path / "run" / "samples.png").exists()


def test_only_the_start(tmp_path):
    data = {k: v for k, v in arrays((1, 4, 4)).items() if k in ("mean", "std", "draws")}
    data["std"] = np.zeros_like(data["std"])
    run = make(tmp_path / "run", [row(0, 0.2)], **data)
    page = report.write(run).read_text()
    check(page)
    assert verdict(page).startswith("Only the start has been scored so far")
    assert "iteration 1" not in report.summary_table(run)
    assert not (run / "samples.png").exists()
    assert "Configuration" not in page


def test_values_that_are_not_finite(tmp_path):
    data = arrays((1, 4, 4))
    data["draws"][0, 0] = data["mean"][0] = data["std"][0] = np.nan
    rows = [row(0, 0.2, ratio=float("nan")), row(1, float("inf"), accepted=False), row(2, 0.19, loss=float("nan"))]
    check(report.write(make(tmp_path / "run", rows, **data)).read_text())


def test_large_images_are_averaged_down_and_inlined_once(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "HEAVY", 10_000)
    run = make(tmp_path / "run", ROWS[:1], **arrays((1, 300, 600), n=1, m=1, samples=1))
    page = report.write(run).read_text()
    check(page)
    assert [image.size for image in pngs(page)] == [(4 + 6 * 196, 28 + 100), (200, 104)]


def test_the_report_is_the_same_twice(tmp_path):
    run = make(tmp_path / "run", ROWS, **arrays((1, 8, 8)))
    assert report.write(run).read_bytes() == report.write(run).read_bytes()


def test_a_finished_run_shows_the_close_scores_of_both_and_the_iteration_that_is_kept(tmp_path):
    last = row(4, 0.18, loss=None, final=2, start_score=0.21, start_score_se=0.001, start_ratio=0.97, start_delta=-0.03)
    run = make(tmp_path / "kept", [row(0, 0.208), row(1, 0.2), row(2, 0.19), row(3, 0.2, accepted=False), last])
    lines = report.summary_table(run).splitlines()
    assert lines[0].split("  ")[-1] == "iteration 2"
    assert re.split("  +", lines[1]) == ["CRPS, held out", "0.210 ± 0.001", "0.180 ± 0.003"]
    page = report.write(run).read_text()
    assert "Iteration 2 is better than the start on held-out observations: CRPS 0.180 against 0.210" in page
    assert "Curve of the CRPS from 0.208 at iteration 0 to 0.2 at iteration 3; iteration 2 was chosen" in page
    run = make(tmp_path / "start", [row(0, 0.208), row(1, 0.2), {**last, "final": 0}])
    assert "Nothing beat the start; the start is saved." in report.write(run).read_text()
    assert "iteration" not in report.summary_table(run)


def test_summary_table(tmp_path):
    run = make(tmp_path / "run", [{**ROWS[0], "clean": {"psnr": 14}}, {**ROWS[3], "clean": {"psnr": 17.25}}])
    assert report.summary_table(run).splitlines() == [
        "                                    start          iteration 3",
        "CRPS, held out                      0.208 ± 0.003  0.171 ± 0.003",
        "paired difference to the start      –              -0.037 ± 0.004",
        "calibration ratio                   0.60           0.91",
        "width of the draws                  1.40           1.40",
        "PSNR of one draw [dB] (clean data)  14.00          17.25",
    ]


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    run = make(tmp_path / "run", ROWS)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "sco')
    assert "iteration 3" in report.summary_table(run)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", None, "metrics.jsonl: missing"),
        ("metrics.jsonl", "", "metrics.jsonl: holds no rows"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl: line 1 needs"),
        ("metrics.jsonl", "what\n", "metrics.jsonl: line 1 is not JSON"),
        ("pictures.npz", "what", "pictures.npz: cannot be read"),
        ("start.json", "what", "start.json: is not JSON"),
    ],
)
def test_foreign_folders(tmp_path, name, content, words):
    run = make(tmp_path / "run", ROWS[:1])
    (run / name).unlink(missing_ok=True)
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(DiffemError, match=words) as error:
        report.write(run)
    assert str(run) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"std": np.zeros((2, 1, 8, 8))}, "do not fit"),
        ({"mask": np.ones((3, 1, 8, 7))}, "the mask"),
        ({"samples": np.zeros((3, 8))}, "samples has shape"),
        ({"start": np.zeros((2, 1, 8, 8))}, "start has 2 items"),
        ({"y": np.zeros((4, 8))}, "y has 4 items"),
        ({"range": np.zeros(3)}, "range must hold"),
    ],
)
def test_pictures_that_do_not_fit(tmp_path, change, words):
    run = make(tmp_path / "run", ROWS[:1], **(arrays((1, 8, 8)) | change))
    with pytest.raises(DiffemError, match=words):
        report.write(run)


def test_no_such_folder(tmp_path):
    for function in (report.write, report.summary_table):
        with pytest.raises(DiffemError, match="no such run folder"):
            function(tmp_path / "nowhere")


def test_pictures_libraries_are_imported_late():
    code = "import sys, diffem.report.page; print([m for m in ('matplotlib', 'PIL', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cost_counts_the_prior_but_not_as_an_iteration(tmp_path):
    last = {**ROWS[3], "iteration": 4, "loss": None, "seconds": 1.0, "examples": 0, "network_evaluations": 7}
    run = report._load(make(tmp_path / "run", [*ROWS, last]))
    before = dict(report._cost(run))
    (tmp_path / "run" / "prior.json").write_text('{"seconds": 60, "examples": 100, "steps": 10, "loss": 1}')
    after = dict(report._cost(run))
    trained = sum(row["loss"] is not None for row in ROWS)
    assert before["iterations"].startswith(f"{trained},") or before["iterations"] == str(trained)
    assert after["iterations"] == before["iterations"]
    count = lambda cost, name: int(cost[name].replace(",", ""))  # noqa: E731
    assert count(after, "training examples") - count(before, "training examples") == 100
    assert count(after, "network evaluations") - count(before, "network evaluations") == 300
    assert after["time"] != before["time"]


def test_cost_says_what_the_scores_took(tmp_path):
    run = report._load(make(tmp_path / "run", [{**row, "score_seconds": 2.5} for row in ROWS]))
    assert dict(report._cost(run))["of it, scores of the iterations"] == f"{2.5 * len(ROWS):.1f} s"


def diagnostics(**more):
    """What `diffem diagnose` writes, of models that are over-confident."""
    numbers = {"value": 0.84, "healthy": 1.0, "error": 0.03, "meaning": "how much draws vary", "warning": None}
    tests = ("energy_distance", "entries", "pairs")
    divergence = {k: v for name in tests for k, v in ((name, 0.5), (f"{name}_p_value", 0.25))}
    coverage = {"levels": [0.5, 0.8, 0.95], "shares": [0.4, 0.61, 0.8], "errors": [0.02, 0.02, 0.01]}
    return {
        "iteration": 3,
        "items": 180,
        "coverage": {**coverage, "ranks": [9, 3, 2, 1] + [1] * 32 + [1, 2, 3, 9], "observations": 64},
        "divergence": {"reconstructions": {**divergence, "p_value": 1.0}, "prior": {**divergence, "p_value": 1e-6}},
        "collapse": {"spread": {**numbers, "warning": "too narrow"}, "prior_diversity": numbers},
        "seconds": 12.5,
        "warnings": ["over-confident: 80% intervals hold <61%", "too narrow"],
        **more,
    }


def scored(rows):
    return [{**r, "criterion": 10 * r["score"] - 3, "ratio_se": 0.04} for r in rows]


def test_diagnostics(tmp_path):
    run = make(tmp_path / "run", scored(ROWS))
    (run / "diagnostics.json").write_text(json.dumps(diagnostics()))
    page = report.write(run).read_text()
    check(page)
    assert re.search(r'<div class="verdict[^"]*">\s*<p>(.*?)</p>', page).group(1).endswith(", with 2 warnings:")
    assert 'class="verdict"' in page  # not good
    assert "<li>over-confident: 80% intervals hold &lt;61%</li>" in page
    for words in ("0.5 (p = 0.25)", "p &lt; 0.001", "0.84 ± 0.03 (warning)", "prior diversity", "12.5 s"):
        assert words in page
    assert 'alt="Calibration: 50% intervals hold 40%, 80% intervals hold 61%, 95% intervals hold 80%' in page
    assert sum(kind == "image/svg+xml" for kind, _ in uris(page)) == 10  # four curves and calibration, light and dark
    assert len(re.findall("; iteration 3 was chosen", page)) == 4

    (run / "diagnostics.json").write_text(json.dumps(diagnostics(warnings=[])))
    page = report.write(run).read_text()
    assert verdict(page).endswith("(difference -0.037 ± 0.004), and held-out observations show nothing wrong.")
    assert 'class="verdict good"' in page

    (run / "diagnostics.json").write_text(json.dumps(diagnostics(iteration=2)))  # of models that are no longer there
    assert "Calibration ratio 0.91" in verdict(report.write(run).read_text())


def test_calibration_curve_is_the_coverage_of_the_ranks():
    found = diagnostics()["coverage"]
    assert drawing.calibration({}) is None
    levels, shares = drawing.coverage_curve(np.array(found["ranks"]))
    assert levels[:3] == pytest.approx([1, 0.95, 0.9])
    assert shares[:3] == pytest.approx([1, 1 - 18 / 62, 1 - 24 / 62])
    assert levels[-1] == pytest.approx(0.05)


LOOK = """<script>
const images = [...document.images], regions = [...document.querySelectorAll('.scroll')];
document.title = JSON.stringify({
  images: images.length, shown: images.filter(i => i.complete && i.naturalWidth > 1).length,
  dark: images.filter(i => i.currentSrc != i.src).length,
  ground: getComputedStyle(document.body).backgroundColor, verdict: document.querySelector('.verdict').offsetHeight,
  overflow: document.documentElement.scrollWidth - innerWidth,
  keyboard: regions.every(r => (r.focus(), document.activeElement == r)),
});
</script>"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize(("dark", "width", "ground"), [(False, 1100, "246, 248, 250"), (True, 500, "13, 17, 23")])
def test_in_a_browser(dark, width, ground, tmp_path):
    run = make(tmp_path / "run", scored(ROWS), **arrays((1, 8, 8)))
    (run / "diagnostics.json").write_text(json.dumps(diagnostics()))
    page = tmp_path / "page.html"
    page.write_text(report.write(run).read_text().replace("</body>", f"{LOOK}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr
    seen = json.loads(re.search("<title>(.*?)</title>", done.stdout).group(1))
    assert seen["images"] == seen["shown"] == 7
    assert seen["dark"] == (7 if dark else 0)
    assert seen["ground"] == f"rgb({ground})"
    assert seen["verdict"] > 40
    assert seen["overflow"] <= 0
    assert seen["keyboard"]


@pytest.mark.parametrize(
    ("shape", "size", "said"),
    [
        ((3, 6, 6), (6, 6), ""),
        ((2, 6, 5), (6, 10), "All 2 channels side by side."),
        ((4, 6, 5), (12, 10), "All 4 channels side by side."),
        ((7, 6, 5), (12, 10), "The first 4 of 7 channels side by side."),
        ((1, 4, 6, 5), (6, 5), "The middle slice of each volume."),
        ((2, 4, 6, 5), (6, 10), "The middle slice of each volume. All 2 channels side by side."),
    ],
)
def test_what_is_shown_of_an_item(shape, size, said):
    item = np.random.default_rng(0).random(shape)
    plane = drawing._plane(item)
    assert plane.shape[1:] == size
    assert drawing.shown(shape) == said
    middle = item[:, 2] if len(shape) > 3 else item
    np.testing.assert_array_equal(plane[0, :6, :5], middle[0, :, :5])
    if shape[0] in (2, 4, 7):
        np.testing.assert_array_equal(plane[0, :6, 5:], middle[1])
    if shape[0] in (4, 7):
        np.testing.assert_array_equal(plane[0, 6:, 5:], middle[3])


def test_the_report_of_an_unfinished_run_says_so(tmp_path):
    em = test_em.make(tmp_path)
    texts = []
    for row in em.iterate():
        page = report.write(tmp_path).read_text()
        check(page)
        texts.append(re.search(r"<p>(This run is not finished: .*?)</p>", page))
        assert ("Start and final model" in page) == (texts[-1] is None)
        assert page.count("<h2") >= 3
        last = row["iteration"]
    assert last == 4
    # after the row of the final model its prior is still to be trained
    assert [text.group(1).partition(", about")[0] for text in texts] == [
        "This run is not finished: 0 of 3 iterations are done.",
        "This run is not finished: 1 of 3 iterations are done",
        "This run is not finished: 2 of 3 iterations are done",
        "This run is not finished: 3 of 3 iterations are done",
        "This run is not finished: 3 of 3 iterations are done",
    ]
    assert texts[1].group(1).endswith(" left.")
    assert "not finished" not in report.write(tmp_path).read_text()
    assert not list(tmp_path.glob("*.tmp"))
