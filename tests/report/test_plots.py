"""The pictures that a report draws itself."""

from run_folders import ANALYSES, folder

from hf_dskd.report.files import read_run
from hf_dskd.report.plots import plot_gradient_shares


def test_gradient_shares_are_stacked(tmp_path, figures):
    norms = read_run(folder(tmp_path / "run", analyses=[*ANALYSES, {"step": 120, "mmd": 0.5}])).gradient_norms
    assert norms == {0: {"ce": 3.0, "t2s_kd": 0.75, "kq": 0.25}, 100: {"ce": 1.0, "t2s_kd": 0.5, "kq": 0.5}}
    plot_gradient_shares({**norms, 120: {"ce": 0.0, "kq": 0.0}}, tmp_path / "new" / "shares.png")
    [axes] = figures[0].axes
    heights = [[(bar.get_y(), bar.get_height()) for bar in container] for container in axes.containers]
    assert heights == [
        [(0, 0.75), (0, 0.5), (0, 0)],
        [(0.75, 0.1875), (0.5, 0.25), (0, 0)],
        [(0.9375, 0.0625), (0.75, 0.25), (0, 0)],
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "100", "120"]
