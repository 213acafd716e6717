"""What is said about captions that are probably not meant as they are."""

from __future__ import annotations

import pytest

from ltx2_tuner.caching.captions import note_captions, note_truncated
from ltx2_tuner.text_encoding.tokenizer import MAX_TOKENS
from tests.caching.text_world import World, make_models

GOOD = [(f"{index}.mp4", f"Clip {index}: a woman walks along a quiet river.") for index in range(3)]


def test_sentences_of_usual_length_are_not_commented(caplog):
    note_captions("Dataset 0", [*GOOD, ("empty.mp4", "")])
    assert not caplog.text


def test_short_and_long_captions_are_named(caplog):
    note_captions("Dataset 0", [*GOOD, ("s.mp4", "sks dog"), ("l.mp4", "word " * 201)])
    assert "Dataset 0: 1 captions have fewer than 5 words: s.mp4" in caplog.text
    assert "Dataset 0: 1 captions have more than 200 words: l.mp4" in caplog.text


def test_equal_captions_are_pointed_out_from_half_on(caplog):
    same = [(f"s{index}.mp4", "the same few words again and again") for index in range(3)]
    note_captions("Dataset 0", [*GOOD, *same])
    assert not caplog.text
    note_captions("Dataset 0", [*GOOD[:2], *same])
    assert "3 of 5 captions are the same" in caplog.text


def test_only_long_captions_are_counted_in_tokens(caplog):
    counted = []

    def count(caption):
        counted.append(caption)
        return len(caption)

    note_truncated("Dataset 0", [("a", "x" * 9), ("b", "x" * 10), ("c", "x" * 11)], count, 10)
    assert [len(caption) for caption in counted] == [10, 11]
    assert "1 captions have more than 10 tokens, the rest of them is cut off: c;" in caplog.text


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def test_the_script_says_it(models, tmp_path, caplog):
    world = World(tmp_path, models).create(["one two three", "a b c d e f " * MAX_TOKENS])
    assert world.run() == 0
    assert "fewer than 5 words: p0.png" in caplog.text
    assert f"more than {MAX_TOKENS} tokens, the rest of them is cut off: p1.png" in caplog.text


def test_sources_without_captions_say_what_is_expected(models, tmp_path, capsys):
    world = World(tmp_path, models).create()
    for caption in world.sources.glob("*.txt"):
        caption.unlink()
    assert world.run() == 1
    out = capsys.readouterr().out
    assert "[Dataset 0] none of the 6 sources has a caption file; write one beside each of them" in out
