import os
import stat
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmq.files import check_output, parse_yaml, read_json, whole_directory


def test_a_directory_appears_whole(tmp_path):
    with whole_directory(tmp_path / "deep" / "out") as work:
        (work / "heads").mkdir()
        (work / "a").write_text("x")
        (work / "heads" / "b").write_text("y")
        (work / "a").chmod(0o600)
        assert not (tmp_path / "deep" / "out").exists()
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"]
    out = tmp_path / "deep" / "out"
    assert (out / "heads" / "b").read_text() == "y"
    for path, mode in ((out, 0o755), (out / "a", 0o644), (out / "heads" / "b", 0o644)):
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    with pytest.raises(error), whole_directory(tmp_path / "out") as work:
        (work / "a").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists already"), whole_directory(tmp_path / name):
            pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(FileExistsError), whole_directory(tmp_path / "out") as work:
        (work / "a").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("theirs")
    assert (tmp_path / "out" / "a").read_text() == "theirs" and os.listdir(tmp_path) == ["out"]


def test_an_output_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=f"{tmp_path} cannot be written to"):
        check_output(tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": "\\ud800"}', "\x00", ""]
)
def test_json_that_no_reader_takes_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")


@given(content=st.binary(max_size=200) | st.text(alphabet='{}[]":,0a\\u', max_size=200).map(str.encode))
def test_json_is_an_object_or_an_error_that_names_the_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        assert isinstance(read_json(path), dict)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")


@given(text=st.text(max_size=100) | st.text(alphabet="&*a:-{}[]!<? \n\"'0", max_size=100))
def test_yaml_is_a_value_or_an_error(text):
    with suppress(ValueError):
        parse_yaml(text)
