from __future__ import annotations

from pathlib import Path

import pytest

from megatron_crnet.atomic import replace_text


def test_a_text_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    replace_text(path, "older\n")
    replace_text(path, "old\n")
    assert path.read_text() == "old\n"
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "begun \ud800")
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]
