"""The page at the end of a run."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ltx2_tuner.media.write import write_image, write_video, write_wav
from ltx2_tuner.training import report as reports
from ltx2_tuner.training.charts import Series, chart, thin_out
from ltx2_tuner.training.report import RunFacts, find_samples, write_report
from ltx2_tuner.training.run_log import RunLog

VOID = {"meta", "img", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Tags with attributes, the text, and whether every tag was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def sources(self, tag):
        return [attributes["src"] for name, attributes in self.tags if name == tag]


@pytest.fixture
def run(tmp_path):
    log = RunLog(tmp_path / "fox.log.csv")
    for step in range(1, 11):
        metrics = {"loss/current": 1 / step, "loss/average": 1 / step, "lr/unet": 1e-4, "perf/step_seconds": 0.5}
        metrics["perf/peak_memory_gib"] = 20.0
        log.log(metrics, step)
        if step % 5 == 0:
            log.log({"val_loss": 0.5}, step)
    samples = tmp_path / "sample"
    frames = np.zeros((9, 32, 32, 3), dtype=np.uint8)
    sound = np.zeros((2, 3200), dtype=np.float32)
    for step, now in ((5, "20260101000000"), (10, "20260101000500")):
        stem = f"fox_{step:06d}_00_{now}_1"
        write_video(samples / f"{stem}.mp4", frames, 25.0)
        write_wav(samples / f"{stem}.wav", sound, 16000)
        write_video(samples / f"{stem}_av.mp4", frames, 25.0, audio=(sound, 16000))
        write_image(samples / f"fox_mult-1.0_{step:06d}_01_{now}_1.png", frames[0])
    write_image(samples / "foxtrot_000005_00_20260101000000_1.png", frames[0])
    return tmp_path


def facts(**more):
    command = ["python", "ltx2_train_network.py", "--output_name", "fox <1>"]
    return RunFacts("fox <1>", command, {"torch": "2.13"}, prompts=("a fox & a hen", "snow"), **more)


def test_the_page_stands_alone(run):
    path = run / "fox.report.html"
    write_report(path, run / "fox.log.csv", facts(settings="seed = 7"), find_samples(run / "sample", "fox"))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(source.startswith("data:") for tag in ("video", "img", "audio") for source in page.sources(tag))
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert len(page.sources("video")) == 2, "the film with its sound stands for the silent one"
    assert len(page.sources("img")) == 2 and len(page.sources("audio")) == 2
    words = " ".join(page.words)
    for part in ("fox <1>", "a fox & a hen", "multiplier -1.0", "step 5", "step 10", "2.13", "seed = 7", "20"):
        assert part in words
    assert 'python ltx2_train_network.py --output_name "fox <1>"' in words
    titles = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert titles == ["Loss", "Learning rate", "Time per step (s)", "Peak device memory (GiB)"]


def test_more_samples_than_a_page_holds_are_linked(run, monkeypatch):
    monkeypatch.setattr(reports, "EMBEDDED_BYTES", 1)
    write_report(run / "r.html", run / "fox.log.csv", facts(), find_samples(run / "sample", "fox"))
    sources = Page((run / "r.html").read_text(encoding="utf-8")).sources("video")
    assert sources == [
        f"sample/fox_{step}_00_{now}_1_av.mp4"
        for step, now in (("000005", "20260101000000"), ("000010", "20260101000500"))
    ]


def test_a_run_without_steps_has_a_page(tmp_path):
    write_report(tmp_path / "r.html", tmp_path / "none.csv", facts(), [])
    assert "No step was finished." in " ".join(Page((tmp_path / "r.html").read_text(encoding="utf-8")).words)


def test_lines_stay_inside_their_chart():
    points = [(step, (-1) ** step * 1e-5 * step) for step in range(5000)]
    text = chart("Loss", [Series("a", points), Series("b", [(3, 1e-3)], dots=True), Series("empty", [])])
    (line, dot) = re.findall(r'points="([^"]+)"', text)
    places = [tuple(map(float, pair.split(","))) for pair in f"{line} {dot}".split()]
    assert all(0 <= x <= 720 and 0 <= y <= 260 for x, y in places)
    assert len(line.split()) <= 600 and "empty" not in text


def test_thinning_keeps_the_mean_and_drops_what_is_not_finite():
    points = thin_out([(x, float(x % 2)) for x in range(6000)] + [(6000, float("nan"))])
    assert len(points) == 600 and all(y == 0.5 for _, y in points)
    assert chart("x", [Series("a", [(1, float("nan"))])]) == ""


def test_one_point_is_drawn():
    assert "<circle" in chart("x", [Series("a", [(1, 2.0)])])
