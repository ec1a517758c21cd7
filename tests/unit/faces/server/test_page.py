"""The page of the server: its files, what they may do, and its words in both languages."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from luthier.faces.server import page
from luthier.faces.server.app import make_app
from luthier.faces.server.keys import Key
from luthier.faces.server.server import make_server
from luthier.faces.server.settings import Serve

FOLDER = Path(page.__file__).parent / "page"
SCRIPTS = sorted(FOLDER.glob("*.js"))
HTML = (FOLDER / "index.html").read_text(encoding="utf-8")


@pytest.fixture
def client():
    settings = Serve()
    return TestClient(make_app(make_server(settings, print), None), base_url="http://127.0.0.1:8000")


def table(language):
    text = (FOLDER / f"words_{language}.js").read_text(encoding="utf-8")
    return json.loads(text.partition("export default ")[2].rstrip().removesuffix(";"))


def test_page_and_its_files_are_there_and_are_asked_for_again_each_time(client):
    for name, found in page.page_files().items():
        answer = client.get("/" if name == "index.html" else f"/page/{name}")
        assert answer.status_code == 200 and answer.content == (FOLDER / name).read_bytes()
        assert answer.headers["content-type"] == found.kind
        assert answer.headers["cache-control"] == "no-cache"
        again = client.get(f"/page/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content
    assert client.head("/").status_code == 200


def test_page_may_run_its_own_scripts_alone(client):
    for address in ("/", "/page/main.js"):
        headers = client.get(address).headers
        rules = dict(one.strip().split(" ", 1) for one in headers["content-security-policy"].split(";"))
        assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "name", ["page.py", "..%2Fpage.py", "..%2fkeys.py", "%2e%2e/app.py", "nothing.js", "main.js%00"]
)
def test_file_that_is_not_of_the_page_is_not_found(client, name):
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 404 and "error" in answer.json()


def test_page_is_open_and_its_questions_are_not():
    settings = Serve()
    keys = [Key(name="one", sha256="0" * 64)]
    client = TestClient(make_app(make_server(settings, print), keys))
    assert client.get("/").status_code == client.get("/page/main.js").status_code == 200
    assert client.get("/v1/models").status_code == 401


def test_page_is_not_in_the_schema(client):
    assert not [path for path in client.get("/openapi.json").json()["paths"] if path == "/" or path.startswith("/page")]


def test_what_the_page_refers_to_is_a_file_of_it():
    for one in re.findall(r'(?:href|src)="([^"]+)"', HTML):
        assert one.removeprefix("/page/") in page.page_files(), one
    for script in SCRIPTS:
        for one in re.findall(r'from "([^"]+)"', script.read_text(encoding="utf-8")):
            assert one.removeprefix("./") in page.page_files(), f"{script.name}: {one}"


def test_page_names_no_other_host_and_reads_no_html():
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"https?://|//cdn|@import|\burl\(", text), file.name
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            file.name
        )
    assert not re.findall(r"\son\w+=|style=", HTML)


def test_every_word_is_there_in_both_languages_and_used():
    english, chinese = table("en"), table("zh")
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", chinese[key])), key
        assert text and chinese[key]
    code = "".join(one.read_text(encoding="utf-8") for one in SCRIPTS if not one.name.startswith("words_"))
    asked = set(re.findall(r'data-word(?:-label|-placeholder)?="(\w+)"', HTML)) | set(re.findall(r'say\("(\w+)"', code))
    assert asked <= set(english), asked - set(english)
    quoted = set(re.findall(r'"(\w+)"', code)) | {f"wrong_{name}" for name in ("schema", "tools")}
    assert set(english) <= asked | quoted, set(english) - asked - quoted


def test_text_stands_out_from_its_ground_in_light_and_in_dark():
    """WCAG 2.2 AA: 4.5 to 1 for text, 3 to 1 for the edges of fields."""
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6});", one)) for one in css.split("prefers-color-scheme: dark")[:2]]
    for scheme, one in zip(schemes, re.findall(r"--tint: ([\d ]+);", css), strict=True):
        scheme["tint"] = one
    assert set(schemes[0]) == set(schemes[1]) and len(schemes[0]) >= 12
    for scheme in schemes:
        for ground in ("paper", "raised", "sunk", "accent-soft", "chosen"):
            assert contrast(scheme["ink"], scheme[ground]) >= 4.5, ground
        for ground in ("paper", "raised", "sunk"):
            assert contrast(scheme["soft"], scheme[ground]) >= 4.5, ground
        assert contrast(scheme["on-accent"], scheme["accent"]) >= 4.5
        assert contrast(scheme["accent"], scheme["raised"]) >= 4.5
        assert (
            contrast(scheme["wrong"], scheme["wrong-soft"]) >= 4.5 and contrast(scheme["wrong"], scheme["paper"]) >= 4.5
        )
        assert contrast(scheme["edge"], scheme["raised"]) >= 3
        assert contrast(scheme["ink"], tinted(scheme["paper"], scheme["tint"])) >= 4.5


def tinted(ground, tint, share=0.5):
    """The ground of a token that was very unlikely."""
    assert f"var(--doubt) * {share:g}".replace("0.", ".") in (FOLDER / "answers.css").read_text(encoding="utf-8")
    mixed = zip(bytes.fromhex(ground[1:]), tint.split(), strict=True)
    return "#" + bytes(round(share * int(over) + (1 - share) * under) for under, over in mixed).hex()


def contrast(one, other):
    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


def light(color):
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    parts = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_wheel_takes_the_files_of_the_page():
    # hatchling packs every file below the package that git does not ignore.
    root = Path(__file__).parents[4]
    wheel = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    assert wheel == {"packages": ["src/luthier"]}
    assert FOLDER.is_relative_to(root / "src" / "luthier")
