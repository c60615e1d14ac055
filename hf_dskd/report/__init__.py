"""
A run's report, or one of several runs side by side, made of the files in their folders: neither a model nor its data
is needed.

    OUTPUT_DIR/report/
      report.md     for a repository: pictures are links to files
      report.html   one file with its pictures in it, to be sent around
      curves.png, gradient_shares.png, analysis.png
                    of many runs also curves-2.png, ..., where colours are too few for one
"""

from ..utils.lazy import public


__getattr__, __dir__, __all__ = public(__name__, one="write_report", several="compare_runs")
