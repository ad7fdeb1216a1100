"""How a record becomes a prompt and the completion that is scored after it."""

from typing import Literal

from transformers import PreTrainedTokenizerBase

from palimpsest.data.records import QA, Passage, Preference, Record
from palimpsest.errors import DataError

Template = Literal["plain", "chat", "raw"]
"""`plain`: "Question: …\\nAnswer: …"; `chat`: the tokenizer's own chat template; `raw`: the question as it stands, then
the answer after a space (for sentence completion)."""


def render(record: Record, tokenizer: PreTrainedTokenizerBase, template: Template = "plain") -> tuple[str, str]:
    """The prompt and the completion as text. Their concatenation is what the model reads.

    A passage has no prompt. A preference gives its chosen completion. A multiple choice has no single completion and is
    scored by the metrics that know it.

    Raises:
        DataError: the record has no completion, or the tokenizer has no chat template.
    """
    match record:
        case Passage():
            return "", record.text
        case QA():
            question, answer = record.question, record.answer
        case Preference():
            question, answer = record.prompt, record.chosen
        case _:
            kind = type(record).__name__
            raise DataError(f"record {record.id!r}: a {kind} has no single completion to train or score")
    match template:
        case "plain":
            return f"Question: {question}\nAnswer:", f" {answer}"
        case "raw":
            return question, answer if not question or question[-1].isspace() else f" {answer}"
        case "chat":
            if not tokenizer.chat_template:
                raise DataError("template 'chat': this tokenizer has no chat template; use template 'plain'")
            conversation = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
            return str(prompt), answer
    raise DataError(f"template {template!r} is unknown; choose plain, chat or raw")
