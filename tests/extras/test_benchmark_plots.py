"""Sections as plots: only where matplotlib is."""

from __future__ import annotations

import struct

import pytest
from measuring import plots
from measuring.rows import row

pytestmark = pytest.mark.extras


def png_size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_a_plot_has_a_panel_a_unit_and_nothing_is_drawn_of_nothing(tmp_path):
    bars = [row("one", "s", [1.0, 2.0]), row("two", "s", [3.0])]
    lines = [row(f"{n}", "MB/s", [n, 2.0 * n], series="star", x=n) for n in (1, 2, 4)]
    assert plots.plot_section({"title": "t", "rows": bars, "notes": []}, tmp_path / "bars.png")
    assert plots.plot_section({"title": "t", "rows": bars + lines, "notes": []}, tmp_path / "both.png")
    (width, height), (width_both, height_both) = png_size(tmp_path / "bars.png"), png_size(tmp_path / "both.png")
    assert width_both == width
    assert height_both - height == pytest.approx(3.6 * 110, abs=2)
    assert not plots.plot_section({"title": "t", "rows": [], "notes": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
