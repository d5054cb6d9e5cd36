"""The config of text: where the files are, what a record is, and how documents are packed."""

from __future__ import annotations

from typing import Literal

from gptj_train.data.chat_template import is_jinja
from gptj_train.errors import UserError
from gptj_train.launch.datasets_by_name import DatasetKeys
from gptj_train.schema import schema


@schema
class DataConfig(DatasetKeys):
    """Text to train on and to hold out. Paths may be files, folders or globs, one or a list."""

    train: str | list[str] | None
    validation: str | list[str] | None
    forgetting: str | list[str] | None
    kind: Literal["auto", "text", "completion", "chat"]
    text_field: str
    prompt_field: str | list[str]
    response_field: str
    messages_field: str
    chat_template: str | None
    special_tokens: Literal["text", "tokens"]
    component_field: str
    weights: dict[str, float] | None
    packing: Literal["contiguous", "best_fit"]
    isolate: bool
    bad_records: Literal["error", "skip"]
    max_bad_share: float
    cache_dir: str

    @property
    def has_examples(self) -> bool:
        """Records are prompts or chats, of which a part is predicted; "auto" is text until a format is recognised."""
        return self.kind in ("completion", "chat")

    def __post_init__(self) -> None:
        template = self.chat_template
        if template is not None and not is_jinja(template) and template.count("{content}") != 1:
            raise UserError("data.chat_template must contain {content} exactly once ({role} is optional), or be Jinja")
        if not self.prompt_field:
            raise UserError("data.prompt_field is empty; give a field, a list of fields or a template")
        if not 0 <= self.max_bad_share < 1:
            raise UserError(f"data.max_bad_share must be at least 0 and below 1, got {self.max_bad_share}")
        if self.weights is not None and (not self.weights or min(self.weights.values()) <= 0):
            raise UserError(f"data.weights must be above 0, got {self.weights}; leave out what is not wanted")
