"""Parsers of the text8 sources, on tiny hand-made pieces of each format; and the suite's command."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.suites import text8
from benchmarks.suites.build import accuracy_table, build_suite, suite_dir, whole_folder
from epmq.demo.finetune import TrainingSettings


def test_a_post_loses_its_address_line_and_keeps_its_subject() -> None:
    reply = "re bible quiz in article abc host edu jane doe writes the ark was kept once a year"
    assert text8.news_body(reply) == ("bible quiz the ark was kept once a year", "bible quiz the")
    assert text8.news_body("drive wanted i am looking for a drive")[0] == "drive wanted i am looking for a drive"
    assert text8.news_body("re my old car host edu jane wrote it is red")[0] == "my old car it is red"


def test_glosses_lose_their_examples() -> None:
    lines = [
        "  1 This software and database is provided by Princeton",
        '02084071 05 n 01 dog 0 001 @ 02083346 n 0000 | a member of the genus Canis; "the dog barked"  ',
        "00001740 03 n 01 entity 0 000 | that which is perceived",
        "00007846 18 n 01 person 0 000 | human being  ",
    ]
    assert list(text8.read_glosses(lines)) == [("a member of the genus Canis", "animal")]


def test_definitions_end_before_the_next_field_the_quotation_and_the_source() -> None:
    text = (
        'Aback \\A*back"\\ ([.a]*b[a^]k"), adv.\n   1. Toward the back. --Knolles.\n      [1913 Webster]\n\n'
        "   2. (Naut.) Backward against the mast of a\n      {ship}; -- said of the sails. --Totten.\n"
        '      [1913 Webster]\n\nFugue \\Fugue\\, n. (Mus.)\n   A composition on one theme. "A fugue."\n'
        "   [1913 Webster]\n\nGout \\Gout\\, n.\n   (Med.) See {Podagra}, the same illness.\n"
    )
    assert list(text8.read_fields(text)) == [
        ("Backward against the mast of a ship;", "seafaring", "aback"),
        ("A composition on one theme.", "music", "fugue"),
    ]


def test_packages_are_grouped_by_their_source() -> None:
    text = (
        "Package: 0ad-data\nSource: 0ad (1.0)\nSection: games\nDescription: Real-time strategy (data)\n\n"
        "Package: libx\nSection: libs\nDescription: a library of things\n\n"
        "Package: mpv\nSection: contrib/video\nDescription: video player for all\n"
    )
    assert list(text8.read_packages(text)) == [
        ("Real-time strategy (data)", "games", "0ad"),
        ("video player for all", "video", "mpv"),
    ]


def test_a_declaration_is_cut_into_pieces_that_know_their_article() -> None:
    page = (
        '<h2>Preamble</h2><p>a b c d e f g</p><article data-number="1"><h2>Title</h2>'
        "<p>1 2 3 4 5 &amp; 7 8 9 10 11 12 13</p><ol><li>u v w x y z</li></ol></article>"
    )
    assert list(text8.read_declaration(page)) == [
        ("a b c d e f", "0"),
        ("1 2 3 4 5 &", "1"),
        ("7 8 9 10 11 12", "1"),
        ("u v w x y z", "1"),
    ]


def test_a_mail_loses_headers_tags_quotes_and_links(tmp_path: Path) -> None:
    path = tmp_path / "mail.txt"
    path.write_text(
        "From: someone@example.org\nSubject: Re: [ILUG] Old  disk\nContent-Type: text/html\n\n"
        "<html><style>p {}</style><p>It still works,\n> quoted line\nsee www.example.org for <b>more</b>."
    )
    assert text8.read_mail(path) == ("Old disk. It still works, see for more .", "old disk")


def test_the_suite_names_an_unknown_task() -> None:
    with pytest.raises(ValueError, match="no task nonsense; it has newsgroups"):
        build_suite(text8, ["nonsense"])


def test_quick_builds_lie_beside_full_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path))
    assert suite_dir("text8") == tmp_path / "suites" / "text8"
    assert suite_dir("text8", quick=True) == tmp_path / "suites" / "text8-quick"


def test_a_suite_is_built_from_its_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EPMQ_CACHE", str(tmp_path))
    arguments: dict[str, Any] = {}

    def pool(
        root: Path, tasks: list[str], prepare_base: Any, prepare_task: Any, settings: Any, report: Any
    ) -> dict[str, dict[str, Any]]:
        arguments.update(tasks=tasks, settings=settings)
        return records(tasks)

    def records(tasks: list[str]) -> dict[str, dict[str, Any]]:
        sizes = {"train": 3, "validation": 1, "test": 2}
        scores = {"base_validation": 0.5, "validation": 1.0, "base_test": 0.25, "test": 0.75}
        return {task: {"examples": sizes, "seconds": 1.0, **scores} for task in tasks}

    monkeypatch.setattr("benchmarks.suites.build.build_pool", pool)
    suite: Any = SimpleNamespace(
        NAME="toy",
        TASKS={"a": None, "b": None},
        POOLING="cls",
        MAX_LENGTH=None,
        SETTINGS={"epochs": 3},
        QUICK_SETTINGS={"epochs": 1},
        prepare_base=None,
        prepare_task=None,
    )
    assert build_suite(suite, quick=True) == tmp_path / "suites" / "toy-quick"
    assert arguments == {"tasks": ["a", "b"], "settings": TrainingSettings("cls", None, epochs=1)}
    table = accuracy_table("toy", records(["a"]))
    assert list(table.columns[-2].cells) == ["75.0", "75.0"]


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(KeyError), whole_folder(tmp_path / "out") as work:
        assert work is not None
        (work / "half").touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "out") as work:
        assert work is not None
        (work / "all").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "all"]
    with whole_folder(tmp_path / "out") as work:
        assert work is None
