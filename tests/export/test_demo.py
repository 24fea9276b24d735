"""The demo page in a headless Chromium: right answers, no console errors, usable by keyboard."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browsing import need_browser
from PIL import Image
from tiny import tiny_clip, tiny_data

from compress.clip import Clip
from export import _goldens, web
from export._chromium import Chromium
from export._serve import Server

TAB, ENTER, RIGHT = ("Tab", 9), ("Enter", 13, "\r"), ("ArrowRight", 39)
SETTLED = """new Promise(done => {
  const look = () => pocketclip.state.busy ? setTimeout(look, 20) : done();
  look();
})"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page over the 8 tiny pictures, in float32, so that the order of results is torch's."""
    need_browser()
    folder = tmp_path_factory.mktemp("demo")
    tiny_data(folder)
    cfg = web.Config(precision="fp32", emoji=False, pictures=folder / "pictures")
    web.write(tiny_clip(), cfg, folder / "web")
    return folder / "web"


@pytest.fixture(scope="module")
def browser(bundle: Path) -> Iterator[Chromium]:
    with Server({"": bundle}) as server, Chromium() as chromium:
        chromium.open(server.url)
        chromium.evaluate("ready")
        yield chromium
        assert chromium.problems == []


def ranking(clip: Clip, pictures: Path, embedding: torch.Tensor) -> list[str]:
    """File names' stems as the page names them, the nearest first."""
    files = sorted(pictures.glob("*.png"))
    pixels = torch.stack([clip.preprocess(Image.open(file)) for file in files])
    names = [json.loads(file.with_suffix(".json").read_text())["name"] for file in files]
    with torch.no_grad():
        scores = F.normalize(clip.model.encode_image(pixels), dim=-1) @ embedding
    return [names[index] for index in scores.argsort(descending=True)]


def results(browser: Chromium) -> list[str]:
    browser.evaluate(SETTLED)
    return browser.evaluate("[...document.querySelectorAll('#results b')].map(b => b.textContent)")


def focused(browser: Chromium) -> str:
    return browser.evaluate("document.activeElement.id || document.activeElement.title")


def test_typing_searches_in_torchs_order(browser: Chromium, clip: Clip, bundle: Path) -> None:
    assert focused(browser) == "query"
    browser.insert("a red  Square")
    with torch.no_grad():
        text = F.normalize(clip.model.encode_text(clip.tokenizer(["a red square"])), dim=-1)[0]
    assert results(browser) == ranking(clip, bundle.parent / "pictures", text)
    status = browser.evaluate("document.querySelector('#status').textContent")
    assert "ms for this text" in status and "8 pictures" in status


def test_the_page_tests_itself_against_the_goldens(browser: Chromium) -> None:
    said = browser.evaluate("document.querySelector('#runtime').textContent")
    assert "Self-test against the original model: passed" in said
    assert "WebAssembly" in said and "thread" in said


def test_a_result_is_reached_and_chosen_by_keyboard(browser: Chromium) -> None:
    browser.evaluate("document.querySelector('#query').focus()")
    first = results(browser)[0]
    for _ in range(12):
        browser.press(*TAB)
        if focused(browser) == "Find similar pictures":
            break
    assert focused(browser) == "Find similar pictures"
    browser.press(*ENTER)
    assert results(browser)[0] == first
    assert browser.evaluate("document.querySelector('#results small').textContent") == "1.000"


def test_a_folder_of_pictures_can_be_searched(browser: Chromium, clip: Clip) -> None:
    """Files as the folder chooser hands them over, one of them no picture at all."""
    browser.evaluate(
        """(async () => {
          const files = [];
          for (const name of ["wide", "tall", "alpha"]) {
            const blob = await (await fetch(`golden/${name}.png`)).blob();
            files.push(new File([blob], `${name}.png`, { type: "image/png" }));
          }
          files.push(new File(["no picture"], "broken.png", { type: "image/png" }));
          await pocketclip.chooseFolder(files);
        })()"""
    )
    assert "Read 3 pictures" in browser.evaluate("document.querySelector('#status').textContent")
    assert "1 unreadable" in browser.evaluate("document.querySelector('#status').textContent")
    browser.evaluate("document.querySelector('#query').value = ''")
    browser.insert("green")
    pictures = _goldens.pictures(clip.preprocess.size)
    pixels = torch.stack([clip.preprocess(pictures[f"{n}.png"]) for n in ("wide", "tall", "alpha")])
    with torch.no_grad():
        text = F.normalize(clip.model.encode_text(clip.tokenizer(["green"])), dim=-1)[0]
        order = (F.normalize(clip.model.encode_image(pixels), dim=-1) @ text).argsort(
            descending=True
        )
    assert results(browser) == [["wide.png", "tall.png", "alpha.png"][index] for index in order]


def test_labels_have_torchs_probabilities(browser: Chromium, clip: Clip) -> None:
    browser.evaluate("document.querySelector('#tab-search').focus()")
    browser.press(*RIGHT)
    assert focused(browser) == "tab-labels"
    browser.evaluate(
        "fetch('golden/wide.png').then(a => a.blob()).then(b => pocketclip.takePicture(b))"
    )
    browser.evaluate("document.querySelector('#label-list').value = 'a dog\\n\\n red apple'")
    browser.evaluate("document.querySelector('#label-list').dispatchEvent(new Event('input'))")
    browser.evaluate(SETTLED)
    found = browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#bars li')].map(li =>"
        " [li.children[0].textContent, parseFloat(li.children[2].textContent)]))"
    )
    picture = _goldens.pictures(clip.preprocess.size)["wide.png"]
    with torch.no_grad():
        image = F.normalize(clip.model.encode_image(clip.preprocess(picture)[None]), dim=-1)[0]
        texts = F.normalize(clip.model.encode_text(clip.tokenizer(["a dog", "red apple"])), dim=-1)
        wanted = (clip.model.logit_scale.exp() * texts @ image).softmax(0) * 100
    assert found == pytest.approx(dict(zip(["a dog", "red apple"], wanted.tolist())), abs=0.06)


def test_light_and_dark_are_readable(browser: Chromium, tmp_path: Path) -> None:
    """The page's ground follows the scheme, and text stands out from it (WCAG's 4.5 to 1)."""
    for dark in (False, True):
        browser.screenshot(tmp_path / f"{dark}.png", 1000, 800, dark)
        browser.evaluate("new Promise(done => setTimeout(done, 300))")
        colors = browser.evaluate(
            "['background-color', 'color'].map(p => getComputedStyle(document.body)[p]"
            ".match(/\\d+/g).map(Number))"
        )
        ground, ink = (luminance(color) for color in colors)
        assert (ground < ink) == dark
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 4.5


def luminance(color: list[int]) -> float:
    """Relative luminance of sRGB, as WCAG defines it."""
    linear = [
        v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(color) / 255
    ]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_every_control_has_a_name(browser: Chromium) -> None:
    nameless = browser.evaluate(
        """[...document.querySelectorAll("button, input, textarea, progress")].filter(e =>
          !(e.textContent.trim() || e.ariaLabel || e.labels?.[0]?.textContent.trim())
        ).map(e => e.id || e.outerHTML)"""
    )
    assert nameless == []
