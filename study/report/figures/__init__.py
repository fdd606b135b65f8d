"""What each figure shows, as numbers: pure functions from `Results` to frozen values; `study.report.drawing` draws them."""

from study.report.figures.search import Curves, History, Importance, Parallel
from study.report.figures.sensitivity import Sensitivity
from study.report.figures.tradeoffs import Tradeoff

Figure = Sensitivity | Importance | History | Curves | Parallel | Tradeoff

__all__ = ["Curves", "Figure", "History", "Importance", "Parallel", "Sensitivity", "Tradeoff"]
