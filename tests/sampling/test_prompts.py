from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_tuner.errors import UserError
from ltx2_tuner.sampling.prompts import SamplePrompt, parse_line, read_prompts


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "A cat --w 704 --h 448 --f 33 --d 7 --s 12",
            SamplePrompt("A cat", width=704, height=448, frame_count=33, seed=7, sample_steps=12),
        ),
        (
            "--v ref.png A woman --n blurry, low quality",
            SamplePrompt("A woman", negative_prompt="blurry, low quality", v2v_ref_path="ref.png"),
        ),
        (
            "--ra a.wav A person speaking --n blurry",
            SamplePrompt("A person speaking", "blurry", ref_audio_path="a.wav"),
        ),
        ("A dog --i img with space.png --l 3.0", SamplePrompt("A dog", image_path="img with space.png", cfg_scale=3.0)),
        ("--i my dir/a b.png A dog", SamplePrompt("A dog", image_path="my dir/a b.png")),
        ('--i "no suffix here" A dog', SamplePrompt("A dog", image_path="no suffix here")),
        ("I walk home", SamplePrompt("I walk home")),
        ("n and w are letters", SamplePrompt("n and w are letters")),
        ("half--done --W 64", SamplePrompt("half--done", width=64)),
        ("A dog --cn x.mp4 --fs 3 --fr 24", SamplePrompt("A dog", v2v_ref_path="x.mp4", frame_rate=24.0)),
        ("A dog --s 99999", SamplePrompt("A dog", sample_steps=1000)),
    ],
)
def test_lines(line, expected):
    assert parse_line(line) == expected


@given(st.text(alphabet=st.characters(blacklist_characters="-", blacklist_categories=("Cs", "Cc", "Zl", "Zp"))))
def test_text_without_options_is_the_prompt(text):
    assert parse_line(text) == SamplePrompt(text.strip())


def test_files_of_all_three_kinds_agree(tmp_path):
    lines = tmp_path / "ö prompts.txt"
    lines.write_text("# comment\n\nA cat --w 64 --d 3\nA dog --w 64\n", encoding="utf-8-sig")
    table = tmp_path / "prompts.toml"
    table.write_text(
        '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "A cat"\nseed = 3\n[[prompt.subset]]\nprompt = "A dog"\n'
    )
    objects = tmp_path / "prompts.json"
    objects.write_text('[{"prompt": "A cat", "width": 64, "seed": 3}, "A dog --w 64"]')
    expected = [SamplePrompt("A cat", width=64, seed=3), SamplePrompt("A dog", width=64)]
    assert read_prompts(lines) == read_prompts(table) == read_prompts(objects) == expected


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("p.txt", "A cat --w wide", ["line 1", "width", "'wide'"]),
        ("p.txt", "# nothing\n", ["no prompt"]),
        ("p.toml", "[prompt", ["not valid TOML"]),
        ("p.toml", '[prompt]\nwidht = 3\nprompt="x"', ["widht", "did you mean 'width'"]),
        ("p.json", "{}", ["list"]),
        ("p.json", "[3]", ["entry 0", "string or an object"]),
        ("p.csv", "", [".txt, .toml or .json"]),
    ],
)
def test_mistakes_are_named(tmp_path, name, text, parts):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_prompts(path)
    for part in [*parts, name]:
        assert part in str(raised.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "none.txt")
