"""Checks of a run once its model and task are loaded, before anything expensive starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pyarrow.compute as pc

from actors.scoring import Scorer
from actors.settings import check_division
from buffer.custom import check_trusted, custom_class, custom_options, make_custom
from buffer.experts.tasks import CustomTask, Task
from buffer.store.sampling import Sampler
from launch.errors import UserError, setting_up
from launch.run.held_out import questions_of
from launch.settings.run import RunSettings, custom_parts
from learner.messages import PreparedRun
from learner.objectives import objective_class
from learner.publication import PROBE_TOKENS
from learner.settings.held_out import HELD_OUT_ACCURACY
from learner.settings.objectives import CustomObjectiveSettings, EmoSettings
from learner.settings.stages import StageSettings


def check_custom_parts(settings: RunSettings) -> None:
    """UserError for a class of the user's own whose module is not trusted, that cannot be loaded, or that does not
    accept its options.
    """
    kinds: dict[str, type] = {"task": CustomTask, "buffer.sampler": Sampler}
    with setting_up():
        for key, part in custom_parts(settings).items():
            check_trusted(part, key)
            if isinstance(part, CustomObjectiveSettings):
                objective_class(part)
            elif key in kinds:
                make_custom(part, kinds[key])
            else:  # do not create a scorer here: it may load a model that only the actors' nodes have
                custom_options(part, custom_class(part, Scorer))  # type: ignore[type-abstract]


def check_prepared(settings: RunSettings, run: PreparedRun, check_task: Callable[[Task], None] | None) -> None:
    """UserError for model, task and settings that do not suit each other. check_task: see `launch.run.driver.train`."""
    rollout = settings.actors.rollout
    prompt: int = pc.max(pc.list_value_length(run.task.example_table()["prompt_ids"])).as_py()
    prompt = max([prompt, *map(len, questions_of(settings, run.task))])
    if prompt + rollout.max_new_tokens > run.max_length:
        raise UserError(
            f"a prompt of {prompt} tokens and actors.rollout.max_new_tokens={rollout.max_new_tokens} exceed "
            f"the model's context of {run.max_length} tokens: lower one of them or choose a longer context"
        )
    if settings.evaluation.stop_metric == HELD_OUT_ACCURACY and run.task.is_correct is None:
        raise UserError("evaluation.stop_metric=held_out_accuracy: the task has no right answers; choose held_out_loss")
    check_cost_models(settings.stages, run.contract.vocab_size)
    with setting_up():
        check_division(settings.actors.tensor_parallel_size, json.loads(run.config_json))
        if check_task is not None:
            check_task(run.task)


def engine_length(settings: RunSettings, run: PreparedRun) -> int:
    """Longest text of the run in tokens, for the engines: often far less than the model's context."""
    examples = run.task.example_table()
    prompts, targets = (pc.list_value_length(examples[name]) for name in ("prompt_ids", "target_ids"))
    answers = pc.max_element_wise(targets, settings.actors.rollout.max_new_tokens)
    longest: int = pc.max(pc.add(prompts, answers)).as_py()
    questions = questions_of(settings, run.task)
    longest = max(longest, max(map(len, questions), default=0) + settings.actors.rollout.max_new_tokens)
    return min(run.max_length, max(longest, PROBE_TOKENS) + 1)


def check_cost_models(stages: Sequence[StageSettings], vocab_size: int) -> None:
    """UserError if the cost model of a stage (`emo`) cannot be loaded or has another vocabulary."""
    for stage in stages:
        if not isinstance(stage.objective, EmoSettings) or stage.objective.cost_model is None:
            continue
        from transformers import AutoConfig

        named = f"stage {stage.name!r}: cost_model {stage.objective.cost_model!r}"
        try:
            config = AutoConfig.from_pretrained(stage.objective.cost_model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{named} cannot be loaded: {error}") from None
        found = config.get_text_config().vocab_size
        if found != vocab_size:
            raise UserError(
                f"{named} has a vocabulary of {found} and the model one of {vocab_size}: name one with the same "
                "tokenizer, or leave it out to use the model's own embedding"
            )
