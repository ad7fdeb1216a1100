"""Every method by the name that specifications and the command line use."""

from palimpsest.unlearn.gradient_ascent import GradientAscent, GradientDifference
from palimpsest.unlearn.kfade import KFade, KFadePaper
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.npo import NPO
from palimpsest.unlearn.random_labels import RandomLabels
from palimpsest.unlearn.rmu import RMU
from palimpsest.unlearn.simnpo import SimNPO

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (KFade, KFadePaper, GradientAscent, GradientDifference, NPO, SimNPO, RandomLabels, RMU)
}
