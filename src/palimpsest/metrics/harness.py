"""Retained abilities by lm-eval, EleutherAI's evaluation harness (Gao et al. 2024): an optional extra."""

from collections.abc import Sequence

from palimpsest.errors import SpecError
from palimpsest.models.language_model import LanguageModel, evaluating


def harness_scores(model: LanguageModel, tasks: Sequence[str], limit: int | None = None) -> dict[str, float]:
    """lm-eval's numbers for a model that is loaded, as its tasks define them, few-shot examples and seeds included.

    Args:
        model: the model to evaluate.
        tasks: lm-eval's names of tasks or groups, e.g. `mmlu`; their rows come from the hub.
        limit: at most so many rows a task, the first ones.

    Returns:
        `TASK/METRIC` to its value, e.g. `mmlu_anatomy/acc` and `mmlu_anatomy/acc_stderr`. A metric keeps its filter,
        if it has one: `gsm8k/exact_match,strict-match`.

    Raises:
        SpecError: lm-eval is not installed, knows no such task, or cannot get a task's rows.
    """
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-not-found,import-untyped]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,import-untyped]
    except ImportError:
        raise SpecError("lm-eval is not installed; `pip install palimpsest[harness]`") from None
    with evaluating(model) as network:
        try:
            evaluated = simple_evaluate(
                model=HFLM(pretrained=network, tokenizer=model.tokenizer, batch_size=16),
                tasks=list(tasks),
                limit=limit,
                log_samples=False,
            )
        except (KeyError, OSError, ValueError) as error:
            reason = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
            raise SpecError(f"lm-eval cannot evaluate {', '.join(tasks)}: {reason}") from error
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, found in evaluated["results"].items()
        for metric, value in found.items()
        if isinstance(value, int | float)
    }
