"""Settings of the objective: what training maximizes, and what it needs for that."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from buffer.custom import check_trusted, custom_class, custom_options
from buffer.settings import CustomSettings, LocalPath, Settings

DIVERGENCES_WITH_DOMAIN = ("kl", "js", "hellinger")
"""Those whose phi is not defined for every number."""

FDivergence = Literal["kl", "reverse_kl", "tv", "js", "chi2", "reverse_chi2"]

INFINITE_WHERE_FORBIDDEN = ("reverse_kl", "reverse_chi2")
"""Divergences that are infinite where the policy does what the target never does."""


class BaseObjectiveSettings(Settings):
    """What every objective says of itself before anything starts.

    needs_experts: whether it learns from expert trajectories. needs_rollouts_as_sampled: whether its loss is an
    expectation over all rollouts, each with its probability under the policy that made it. needs_base_model: whether
    rollouts are compared with the policy as it was at the start of the stage. needs_reward: whether `scoring.reward`
    has to be set.
    """

    name: str = "custom"
    needs_experts: ClassVar[bool] = True
    needs_rollouts_as_sampled: ClassVar[bool] = False
    needs_base_model: ClassVar[bool] = False
    needs_reward: ClassVar[bool] = False

    @property
    def needs_rollouts(self) -> bool:
        """Whether it learns from rollouts."""
        return False

    @property
    def needs_features(self) -> tuple[str, ...]:
        """Names of the features that `scoring.features` has to have."""
        return ()

    @property
    def uses_noise(self) -> bool:
        """Whether expert trajectories demonstrate backspace."""
        return False


class CustomObjectiveSettings(CustomSettings):
    """An objective of the user's own.

    Its class says what it needs; that is recorded here, so that a run's settings can be read without running its code.
    The class is asked (which runs its code, where its module is trusted) only where a recipe leaves one of these out.
    """

    needs_experts: bool = True
    needs_rollouts: bool = False
    needs_rollouts_as_sampled: bool = False
    needs_base_model: bool = False
    needs_reward: bool = False
    needs_features: tuple[str, ...] = ()
    uses_noise: bool = False

    @model_validator(mode="before")
    @classmethod
    def _ask_class(cls, given: object) -> object:
        needs = cls.model_fields.keys() - CustomSettings.model_fields.keys()
        if not isinstance(given, dict) or given.keys() >= needs:
            return given
        try:
            settings = CustomSettings.model_validate({key: value for key, value in given.items() if key not in needs})
        except ValidationError:  # the fields report it
            return given
        check_trusted(settings, "objective")
        options = custom_objective_options(settings)
        return {name: getattr(options, name) for name in needs} | given


def custom_objective_options(settings: CustomSettings) -> BaseObjectiveSettings:
    """The options of an objective of the user's own, which say what it needs. ValueError: see `buffer.custom`."""
    options = custom_options(settings, custom_class(settings, object))
    if not isinstance(options, BaseObjectiveSettings):
        raise ValueError(
            f"{settings.path} is no objective: derive it from learner.objectives.base.Objective, and its class "
            "`Options`, if it has one, from learner.settings.objectives.BaseObjectiveSettings"
        )
    return options


class LikelihoodSettings(BaseObjectiveSettings):
    """Cross-entropy on expert trajectories. `mle` is for clean data, `behavior_cloning` for noise and backspace."""

    name: Literal["mle", "behavior_cloning"]

    @property
    def uses_noise(self) -> bool:
        """Maximum likelihood is the method without."""
        return self.name == "behavior_cloning"


class UnlikelihoodSettings(BaseObjectiveSettings):
    """Likelihood, and the unlikelihood of tokens that the context holds already (arXiv 1908.04319)."""

    name: Literal["unlikelihood"]
    weight: float = Field(1.0, gt=0.0, description="of -log(1 - q(c)) over context tokens c")


class EmoSettings(BaseObjectiveSettings):
    """Earth mover distance to the label, between token embeddings (arXiv 2310.04691)."""

    name: Literal["emo"]
    mode: Literal[1, 2] = Field(
        1, description="1: half likelihood, half distance scaled to it; 2: the distance, and likelihood scaled to it"
    )
    ratio_cap: PositiveFloat | None = Field(
        None,
        description="bound on the ratio that scales one loss to the other; null = none, as the paper prints it",
    )
    cost_model: LocalPath | None = Field(
        None,
        min_length=1,
        description="Hugging Face name or folder of a model with the same vocabulary whose output embedding gives the "
        "costs; null = the trained model's own, as it is at the start of the stage",
    )


class ScheduledSamplingSettings(BaseObjectiveSettings):
    """Texts that are partly the model's own, with the true labels (arXiv 1506.03099).

    The share of true tokens at step i: max(least_truth_fraction, k - slope i), k^i, or k / (k + exp(i / k)).
    """

    name: Literal["scheduled_sampling"]
    schedule: Literal["linear", "exponential", "inverse_sigmoid"] = "inverse_sigmoid"
    k: float = Field(100.0, gt=0.0, description="constant of the schedule: at most 1, below 1, at least 1")
    slope: float = Field(0.0, ge=0.0, description="decrease of the share per step; linear only")
    least_truth_fraction: float = Field(0.0, ge=0.0, le=1.0, description="where the decrease ends; linear only")
    seed: int = Field(0, description="of what is replaced, and by what")

    @model_validator(mode="after")
    def _check(self) -> ScheduledSamplingSettings:
        bounds = {"linear": "at most 1", "exponential": "below 1", "inverse_sigmoid": "at least 1"}
        is_met = {"linear": self.k <= 1, "exponential": self.k < 1, "inverse_sigmoid": self.k >= 1}
        if not is_met[self.schedule]:
            raise ValueError(f"k={self.k} must be {bounds[self.schedule]} with schedule={self.schedule}")
        if self.schedule != "linear":
            self._refuse_without_effect(f"schedule={self.schedule}", "slope", "least_truth_fraction")
        return self


class DiscriminatorSettings(Settings):
    """What tells texts of the data from texts of the policy."""

    body: Literal["policy", "own"] = Field(
        "policy",
        description="what reads the texts under its head. `policy`: the policy, which gets no gradient from that; "
        "`own`: a copy of the policy's body as it is at the start of the stage, trained with the head",
    )
    learning_rate: float = Field(1e-3, gt=0.0, description="of Adam, the same at every step")
    prior: float | None = Field(
        None, gt=0.0, lt=1.0, description="share of real examples in its loss; null = pi (1/2 where pi is 1)"
    )
    warmup_steps: NonNegativeInt = Field(50, description="first steps, in which the discriminator alone learns")
    seed: int = Field(0, description="of the head's first weights")


class AdversarialJsSettings(BaseObjectiveSettings):
    """Generalized Jensen-Shannon divergence of whole texts, by a discriminator (arXiv 1511.05101)."""

    needs_rollouts: ClassVar[bool] = True
    needs_rollouts_as_sampled: ClassVar[bool] = True
    name: Literal["adversarial_js"]
    pi: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="share of the data in the mixture that data and policy are compared with: near 0 the method is "
        "maximum likelihood, at 1 it minimizes KL(policy || data)",
    )
    discriminator: DiscriminatorSettings = DiscriminatorSettings()

    @property
    def discriminator_prior(self) -> float:
        """Share of real examples in the discriminator's loss."""
        if self.discriminator.prior is not None:
            return self.discriminator.prior
        return self.pi if self.pi < 1.0 else 0.5

    @field_validator("pi")
    @classmethod
    def _refuse_likelihood(cls, pi: float) -> float:
        if pi == 0.0:
            raise ValueError(
                "pi=0 is maximum likelihood, by rollouts that it does not need: choose objective mle, or a small pi"
            )
        return pi


class SequenceMatchSettings(BaseObjectiveSettings):
    """Occupancy matching with backspace (arXiv 2306.05426)."""

    uses_noise: ClassVar[bool] = True
    name: Literal["sequencematch"] = "sequencematch"
    divergence: Literal["chi2_mixture", "chi2", "kl", "reverse_kl", "js", "hellinger", "mle"] = Field(
        "chi2_mixture",
        description="between the occupancy measures of data and model; `chi2_mixture`: of data and the half-half "
        "mixture, the method of the paper; `mle`: no penalty, the control",
    )
    estimator: Literal["collapsed", "paper", "uniform"] = Field(
        "collapsed",
        description="`collapsed`: value terms telescoped (least variance); `paper`: the sums of the paper; "
        "`uniform`: those sums with every discount gamma^t put to 1, as in IQ-Learn (denser signal, biased)",
    )
    alpha: float = Field(0.03, gt=0.0, description="weight of the penalty, a squared soft-Bellman residual")
    gamma: float = Field(0.998, gt=0.0, lt=1.0, description="discount per action")
    mixture_scale: PositiveFloat | Literal["paper"] = Field(
        1.0,
        description="scale of the coefficient of E_model[(alpha r)^2]: 1 gives 1/(4 alpha), which balances data and "
        "rollouts; `paper`: the coefficient is 1, as the paper reads literally",
    )
    domain_policy: Literal["project", "stop"] = Field(
        "project",
        description="where alpha r leaves the domain of kl, js or hellinger: `project` goes on by the tangent, `stop` "
        "ends training",
    )
    domain_margin: float = Field(0.1, gt=0.0, lt=0.5, description="the domain counts as left this far above its end")
    bc_weight_start: float = Field(1.0, ge=0.0, le=1.0, description="weight of behavior cloning at step 0")
    bc_weight_end: float = Field(0.2, ge=0.0, le=1.0, description="weight of behavior cloning from bc_weight_steps on")
    bc_weight_steps: PositiveInt = Field(
        150, description="steps of the linear change from bc_weight_start to bc_weight_end"
    )

    @property
    def needs_rollouts(self) -> bool:
        """The mixture penalizes rollouts; all estimators but the collapsed one sample value terms from them."""
        return self.divergence == "chi2_mixture" or self.estimator != "collapsed"

    @field_validator("divergence", mode="before")
    @classmethod
    def _refuse_total_variation(cls, divergence: object) -> object:
        if divergence == "tv":
            raise ValueError(
                "divergence=tv is not offered: while its bound on |alpha r| is inactive the loss is exactly maximum "
                "likelihood (choose divergence=mle), and clipping alpha r on the data alone makes training collapse. "
                "For another bounded divergence choose hellinger or js"
            )
        return divergence

    @model_validator(mode="after")
    def _check(self) -> SequenceMatchSettings:
        if self.divergence != "chi2_mixture":
            self._refuse_without_effect(f"divergence={self.divergence}", "mixture_scale")
        if self.divergence not in DIVERGENCES_WITH_DOMAIN:
            self._refuse_without_effect(f"divergence={self.divergence}", "domain_policy", "domain_margin")
        if self.divergence == "mle" and self.estimator == "uniform":
            raise ValueError(
                "divergence=mle has no penalty that bounds V, and the value terms of estimator=uniform do not "
                "telescope, so V would grow without end; choose another divergence or estimator"
            )
        return self


class ScoreFunctionSettings(BaseObjectiveSettings):
    """Objectives that learn from scored rollouts alone, by the score function."""

    needs_experts: ClassVar[bool] = False
    needs_rollouts: ClassVar[bool] = True
    needs_rollouts_as_sampled: ClassVar[bool] = True


class ReinforceSettings(ScoreFunctionSettings):
    """Raise the mean reward of rollouts."""

    needs_reward: ClassVar[bool] = True
    name: Literal["reinforce"]


class KlControlSettings(ScoreFunctionSettings):
    """Raise the mean reward, and stay near the policy that the stage started with."""

    needs_base_model: ClassVar[bool] = True
    needs_reward: ClassVar[bool] = True
    name: Literal["kl_control"]
    beta: float = Field(0.1, gt=0.0, description="price of a nat of KL(policy || start), in units of reward")


class ConstraintSettings(Settings):
    """What is asked of a feature."""

    feature: str = Field(description="its name in scoring.features")
    target: float | None = Field(
        None, description="its mean over rollouts; null = it is 1 in every rollout (a pointwise constraint)"
    )


class TargetSettings(ScoreFunctionSettings):
    """Objectives whose target is the policy that the stage started with, changed no more than the constraints ask."""

    needs_base_model: ClassVar[bool] = True
    constraints: tuple[ConstraintSettings, ...] = Field(min_length=1)
    fit_samples: PositiveInt = Field(
        1024, description="distinct rollouts on which the weights of constraints with a target are fitted first"
    )

    @property
    def needs_features(self) -> tuple[str, ...]:
        """Those that are constrained."""
        return tuple(each.feature for each in self.constraints)

    @model_validator(mode="after")
    def _check_names(self) -> TargetSettings:
        names = self.needs_features
        if len(set(names)) < len(names):
            raise ValueError(f"constraints name a feature twice: {', '.join(names)}")
        return self


class DpgSettings(TargetSettings):
    """Distributional policy gradient (arXiv 1912.08517)."""

    name: Literal["dpg"]


class GdcSettings(TargetSettings):
    """Generation with distributional control (arXiv 2012.11635); `gdc_pp` with a baseline (arXiv 2206.00761)."""

    name: Literal["gdc", "gdc_pp"]
    proposal: Literal["kl_adaptive", "latest"] = Field(
        "kl_adaptive",
        description="who makes the rollouts. `kl_adaptive`: the policy of now takes over only when it is nearer to the "
        "target, in KL(target || policy); `latest`: whenever it is published",
    )


class FDpgSettings(TargetSettings):
    """Any f-divergence from the target (arXiv 2302.08215)."""

    name: Literal["f_dpg"]
    divergence: FDivergence = Field(
        description="`kl`: KL(target || policy); `reverse_kl`: KL(policy || target); `tv`: total variation; `js`: "
        "Jensen-Shannon; `chi2`: chi2(target || policy); `reverse_chi2`: chi2(policy || target)"
    )

    @model_validator(mode="after")
    def _check_divergence(self) -> FDpgSettings:
        has_pointwise = any(each.target is None for each in self.constraints)
        if has_pointwise and self.divergence in INFINITE_WHERE_FORBIDDEN:
            raise ValueError(
                f"divergence={self.divergence} is infinite while the policy breaks a pointwise constraint at all: "
                "choose kl, tv, js or chi2, or give the constraint a target below 1"
            )
        return self


ObjectiveSettings = Annotated[
    LikelihoodSettings
    | UnlikelihoodSettings
    | EmoSettings
    | ScheduledSamplingSettings
    | AdversarialJsSettings
    | ReinforceSettings
    | KlControlSettings
    | DpgSettings
    | GdcSettings
    | FDpgSettings
    | SequenceMatchSettings
    | CustomObjectiveSettings,
    Field(discriminator="name"),
]
