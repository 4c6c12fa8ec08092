"""What a run leaves behind, and what can be done with it: judge it, let it answer, write its model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoestring.config.run import RunConfig
from shoestring.errors import ConfigError
from shoestring.model.policy import Policy
from shoestring.rewards.base import RewardFunction
from shoestring.types import Problem, StepReport

if TYPE_CHECKING:
    from shoestring.evaluation.evaluate import Evaluation, RewardEvaluation


@dataclass(frozen=True)
class Run:
    """A finished (or stopped) run: its folder, its settled config, its reports so far, and the policy as the last step
    left it (with `evaluation.keep = "best"` the weights in the folder may be earlier ones)."""

    folder: Path
    config: RunConfig
    reports: Sequence[StepReport]
    policy: Policy
    stopped_by: int = 0
    """The signal that ended it early, or 0."""
    best_step: int = -1
    """Steps done at the best of its evaluations; -1 without any."""

    @property
    def result(self) -> Path:
        """The folder of what was trained: the adapter, or the whole model."""
        return self.folder / self.policy.result

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def evaluate(
        self,
        split: str | None = None,
        *,
        rewards: Iterable[RewardFunction | str] | RewardFunction | str = (),
        num: int | None = None,
        ks: Sequence[int] = (1,),
        samples: int | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> Evaluation | RewardEvaluation:
        """What `policy` makes of a split of the run's task (default: that of its own evaluations), all of it or the
        first `num` problems.

        Judged by answers, with pass@k and maj@k for the `ks`; or, where `rewards` are given, functions as in `train`,
        by the mean of these over one greedy completion of each problem, weighted as in the run if they are as many.
        Raises `ConfigError` for a run that is judged by its rewards, which were Python functions and are not given
        again.
        """
        from shoestring.evaluation.evaluate import EvalSettings
        from shoestring.evaluation.evaluator import Judge

        config = self.config
        settings = EvalSettings(
            config.evaluation.split if split is None else split,
            num,
            tuple(ks),
            samples,
            temperature,
            config.sampling.max_new_tokens if max_new_tokens is None else max_new_tokens,
            seed=seed,
            allow_truncated_prompts=config.allow_truncated_prompts,
        )
        given = (rewards,) if isinstance(rewards, str) or callable(rewards) else tuple(rewards)
        judge = Judge.of(config, given)
        judge.check(settings, "run.evaluate(rewards=[...])")
        return judge.judged(self.policy, config.sampler.open(self.policy), settings)

    def sample(
        self,
        prompts: Iterable[str] | str,
        *,
        num: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> list[list[str]]:
        """`num` answers of `policy` to each prompt, which is put as the run's task puts its questions."""
        from shoestring.config.settings import build
        from shoestring.model.sampling import Sampling
        from shoestring.rollout.rollout import encode, roll_out

        if num < 1:
            raise ConfigError(f"num is {num}", "it counts the answers to each prompt", "use 1 or more")
        config = self.config
        limit = config.sampling.max_new_tokens if max_new_tokens is None else max_new_tokens
        sampling = build(Sampling, {"max_new_tokens": limit, "temperature": temperature}, "sampling")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        asked = [Problem(f"prompt-{i}", text, "") for i, text in enumerate(texts)]
        allowed = config.allow_truncated_prompts
        encoded, _ = encode(self.policy, config.task, asked, limit, allow_truncated=allowed)
        engine = config.sampler.open(self.policy)
        found = roll_out(self.policy, engine, encoded, num=num, sampling=sampling, seed=seed)
        return [list(rollout.texts) for rollout in found]

    def merge(self, out: str | Path) -> Path:
        """Writes the run's model with its adapter added into the weights, as `shoestring merge` does: what lies in the
        folder, which with `evaluation.keep = "best"` need not be `policy`."""
        from shoestring.run.sft import merge

        return merge(str(self.folder), str(out))
