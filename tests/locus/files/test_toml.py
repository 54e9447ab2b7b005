from pathlib import Path

import pytest

from locus.errors import InputError
from locus.files.toml import read_toml


def test_reads_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[figures."forget.prob"]\nmax = 0.02\n')
    assert read_toml(path, "") == {"figures": {"forget.prob": {"max": 0.02}}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a = ", "not TOML"),
        (b"a = " + b"9" * 5000, "not TOML: Exceeds the limit"),
        (b"a = " + b"[" * 5000, "not TOML"),
        (b"\xff\xfe", "not text in UTF-8"),
    ],
)
def test_what_is_no_toml_is_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as refused:
        read_toml(path, "")
    assert "\n" not in str(refused.value)


def test_a_missing_file_points_to_an_example(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no such file; demo\.toml is an example"):
        read_toml(tmp_path / "none.toml", "demo.toml is an example")
