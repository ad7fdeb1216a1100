"""Every method by the name that specifications and the command line use."""

from palimpsest.unlearn.altpo import AltPO
from palimpsest.unlearn.distillation import CEU, UNDIAL
from palimpsest.unlearn.gradient_ascent import GradientAscent, GradientDifference, KLMinimization
from palimpsest.unlearn.idk import IDK
from palimpsest.unlearn.kfade import KFade, KFadePaper
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.needle import Needle
from palimpsest.unlearn.npo import NPO, NPOTokenMean
from palimpsest.unlearn.npo_sam import NPOSAM
from palimpsest.unlearn.pdu import PDU
from palimpsest.unlearn.preference import DPO
from palimpsest.unlearn.random_labels import RandomLabels
from palimpsest.unlearn.rmu import RMU
from palimpsest.unlearn.simnpo import SimNPO
from palimpsest.unlearn.task_vector import TaskVector
from palimpsest.unlearn.weighted_ascent import WGA, SatImp
from palimpsest.unlearn.whp import WHP

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(KFade, KFadePaper),
        *(GradientAscent, GradientDifference, KLMinimization, WGA, SatImp),
        *(NPO, NPOTokenMean, NPOSAM, SimNPO, DPO, AltPO),
        *(RandomLabels, IDK, UNDIAL, CEU, WHP),
        *(RMU, PDU, TaskVector, Needle),
    )
}
