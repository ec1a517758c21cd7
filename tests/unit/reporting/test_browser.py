"""The page of a run in a real browser: no errors, nothing wider than the window, everything visible."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from luthier.verbs.tune import tune
from tiny import tiny_model

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
)
HOSTILE = "<script>alert(1)</script>"
LONG = "antidisestablishmentarianism" * 6
# What is measured: the widest thing that is not inside a scrolling box, and the width of the window.
PROBE = """<script>
const wide = [...document.body.querySelectorAll("*")].filter(one =>
  !one.closest(".scroll, svg") && one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.tagName);
document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth, wide]);
parent.postMessage(document.title, "*");
</script>"""


def look(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open `page` as somebody would who has just installed the browser."""
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), *FLAGS, profile, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    shutil.rmtree(folder / "profile", ignore_errors=True)
    return done


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a run with long words, Chinese, markup, and many labels."""
    root = tmp_path_factory.mktemp("browser")
    rows = [
        {
            "text": f"{HOSTILE} {LONG if at == 70 else 'win a prize'} {at} 房间很干净",
            "label": f"label {at % 9} {HOSTILE}",
        }
        for at in range(90)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUNS", str(root))
        tune(
            model=str(tiny_model("bert")),
            data={"train": rows[:50], "validation": rows[50:63], "test": rows[63:]},
            objective="classify",
            name="one",
            steps=6,
            batch_size=8,
            validate_every=2,
        )
    return root / "one" / "report.html"


def test_the_page_opens_without_an_error_and_its_text_is_there(page, tmp_path):
    done = look(page, tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    assert "<title>one · Luthier</title>" in done.stdout
    for heading in ("Results on the test part", "Confusion", "Examples", "Curves", "The data", "Where it comes from"):
        assert f"<h2>{heading}</h2>" in done.stdout
    assert "房间很干净" in done.stdout and "<script" not in done.stdout


def test_a_console_error_would_be_seen(page, tmp_path):
    copy = tmp_path / "broken.html"
    copy.write_text(page.read_text(encoding="utf-8") + "<script>nowhere()</script>", encoding="utf-8")
    assert "CONSOLE" in look(copy, tmp_path, "--dump-dom").stderr


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(page, tmp_path, width):
    copy = tmp_path / "probed.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    # Chromium makes no window narrower than 500: the page stands in a frame.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<title>none</title><iframe src="probed.html" style="border:0;width:{width}px;height:2000px"></iframe>'
        "<script>onmessage = event => { document.title = event.data }</script>",
        encoding="utf-8",
    )
    done = look(frame, tmp_path, "--dump-dom", "--virtual-time-budget=3000", f"--window-size={width + 200},2000")
    found = re.search(r"<title>\[(\d+),(\d+),(\[.*?\])\]</title>", done.stdout)
    assert found, done.stdout[:300]
    assert int(found[1]) == width and int(found[2]) <= width and found[3] == "[]"


def test_the_page_is_painted(page, tmp_path):
    picture = tmp_path / "page.png"
    look(page, tmp_path, f"--screenshot={picture}", "--window-size=1280,1600")
    (tmp_path / "blank.html").write_text("<!doctype html>", encoding="utf-8")
    blank = tmp_path / "blank.png"
    look(tmp_path / "blank.html", tmp_path, f"--screenshot={blank}", "--window-size=1280,1600")
    assert picture.stat().st_size > 8 * blank.stat().st_size, "text and curves, not one empty sheet"
