"""K-FADE: unlearning by a few uphill Gauss-Newton steps, whose curvature is that of the retain set's KL."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from torch import Tensor

from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel
from palimpsest.unlearn.method import Method
from palimpsest.unlearn.request import Request
from palimpsest.unlearn.stopping import Stop
from palimpsest.unlearn.update import Update

Curvature = Literal["ekfac", "kfac", "diagonal", "identity"]
"""`identity`: no curvature, the plain gradient."""
ForgetLoss = Literal["unlikelihood", "nll"]


@dataclass(frozen=True, kw_only=True)
class KFade(Method):
    """Uphill on the forget set along (F + damping)^-1 g, with F the Gauss-Newton matrix of the KL on retain rows.

    A step d costs about d' F d / 2 nats on the retain set, so this direction forgets most for what it costs. There is
    no learning rate: each step is as long as brings the forget set to its share of the way, by a measured line search.
    Ours, beyond the paper: a forget loss that lets go of a token once it is forgotten (`forget_loss`); the forget rows
    in the curvature too, so that what they have in common, and share with their neighbours, is not what moves most
    (`forget_copies`); lengths of the matrices' directions from one system that couples them (`coupled`); steps back
    towards the start model's predictions on retain rows before each step uphill (`pull_backs`); damping, and how flat
    the spectrum of a step is (`spectral_power`), chosen on held-out retain rows.
    """

    name: ClassVar[str] = "kfade"
    source: ClassVar[str] = "K-FADE, arXiv 2602.10568; unlikelihood, forget rows' curvature, coupling, pull-back: ours"

    curvature: Curvature = "kfac"
    modules: tuple[str, ...] = ("*",)
    """Patterns of the names of the linear maps that may change."""
    steps: int = 32
    """Into how many steps the way to the forget level is parted, evenly in log-odds."""
    refit_every: int = 8
    """Steps between two measurements of the curvature."""
    damping: float | None = None
    """In units of the mean eigenvalue; None: whenever the curvature is measured, the largest that does held-out retain
    rows no harm, or else the one that harms them least."""
    absolute_damping: bool = False
    """Take `damping` as it is."""
    forget_loss: ForgetLoss = "unlikelihood"
    forget_copies: int = 1
    """How often each forget row stands beside the retain rows when curvature is measured; 0: the paper's curvature."""
    pull_backs: int = 1
    """Steps back before each step uphill, each on retain rows of its own."""
    spectral_power: float | None = None
    """Below 1, less of a step goes into what its gradient has most of: singular values of the whitened gradient are
    raised to it. None: 1, and where that harms held-out retain rows a second run at 1/2, the better one being taken."""
    coupled: bool = True
    draws: int = 1
    """Labels sampled at every target when curvature is measured."""
    tokens_per_step: int = 4096
    """Retain tokens on which a step is coupled and pulled back; the curvature is measured on all."""
    keep_curvature: bool = False
    """Keep the start model's curvature in the user's cache folder, for another run on the same rows; without
    `forget_copies`, for every request with the same retain rows."""
    batch_size: int = 32
    """Rows at a time; it never changes what is computed, only its memory."""

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):
            raise SpecError(f"{self.name}: modules is {self.modules!r}; it is a list of patterns")
        object.__setattr__(self, "modules", tuple(self.modules))  # JSON gives a list back
        self._refuse_unless_positive("steps", "refit_every", "tokens_per_step", "draws", "batch_size")
        if self.curvature not in get_args(Curvature):
            raise SpecError(
                f"{self.name}: curvature {self.curvature!r} is unknown; choose {', '.join(get_args(Curvature))}"
            )
        if self.forget_loss not in get_args(ForgetLoss):
            raise SpecError(f"{self.name}: forget_loss {self.forget_loss!r} is unknown; choose unlikelihood or nll")
        for setting in ("forget_copies", "pull_backs"):
            if getattr(self, setting) < 0:
                raise SpecError(f"{self.name}: {setting} is {getattr(self, setting)}; it cannot be below 0")
        if self.spectral_power is not None and not 0 < self.spectral_power <= 1:
            raise SpecError(f"{self.name}: spectral_power is {self.spectral_power}; it must be above 0 and at most 1")
        if self.damping is None and self.absolute_damping:
            raise SpecError(f"{self.name}: absolute_damping needs a damping")
        if self.damping is not None:
            self._refuse_unless_positive("damping")

    def run(
        self, model: LanguageModel, request: Request, stop: Stop | None = None, *, folder: str | Path | None = None
    ) -> Update:
        """Climb until `stop`; see `Method.run`. One of `stop`'s levels must be given: they are what sets the step."""
        from palimpsest.unlearn.climb import climb, climb_by_either_power

        run = climb_by_either_power if self.spectral_power is None else climb
        return run(self, model, request, stop or Stop(), folder)

    def loss(self, logprobs: Tensor) -> Tensor:
        """[N] what goes down while the forget set is forgotten, for log-probabilities [N] of its tokens.

        `nll`: log p, as in the paper. `unlikelihood`: -log(1 - p) (Welleck et al. 2020, arXiv 1908.04319), whose slope
        in the token's logit is p. NLL pulls hardest at what is forgotten already and hardly at what is known by heart,
        its slope being 1 - p; unlikelihood does the reverse.
        """
        if self.forget_loss == "nll":
            return logprobs
        # expm1 keeps the digits of 1 - p near p = 1, where it must not reach 0.
        return -(-logprobs.clamp(max=-1e-7).expm1()).log()


@dataclass(frozen=True, kw_only=True)
class KFadePaper(KFade):
    """K-FADE as far as the paper's own settings are known: one step up the NLL, damping 1e-8, each matrix by itself.

    What is not known of them (which layers, how many steps on WMDP) is as in `KFade`; the step's length is still found
    by measuring, since the paper's depends on its units.
    """

    name: ClassVar[str] = "kfade_paper"
    source: ClassVar[str] = "K-FADE, arXiv 2602.10568, TOFU setting"

    steps: int = 1
    refit_every: int = 1
    damping: float | None = 1e-8
    absolute_damping: bool = True
    forget_loss: ForgetLoss = "nll"
    forget_copies: int = 0
    pull_backs: int = 0
    spectral_power: float | None = 1.0
    coupled: bool = False
