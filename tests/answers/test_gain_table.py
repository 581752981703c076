import math

import numpy as np
import pytest

from kit import files
from kit.answers import gain_table


def test_gains_survive_their_file(tmp_path):
    rows = [
        ("search", 0.51234567, 0.6, ""),
        ('rerank, "tuned"', 0.0, 1.0, "  LEAKY (list all holds 3 images)"),
        ("None", 0.25, 0.125, "NA"),
        ("no public half", math.nan, 0.5, ""),
    ]
    path = gain_table.write(tmp_path / "gains.csv", rows)
    read = gain_table.read(path)
    assert [(row[0], row[3]) for row in read] == [(row[0], row[3]) for row in rows]
    np.testing.assert_allclose(
        [row[1:3] for row in read], [row[1:3] for row in rows], atol=5e-7
    )
    assert path.read_text().splitlines()[:2] == [
        "step,public,private,note",
        "search,0.512346,0.600000,",
    ]


def test_gains_without_a_column_are_refused(tmp_path):
    files.write_text(tmp_path / "gains.csv", "step,public\na,1\n")
    with pytest.raises(ValueError, match="no column private, note"):
        gain_table.read(tmp_path / "gains.csv")
