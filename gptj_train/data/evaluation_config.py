"""The config of held-out data for a checkpoint of any task."""

from __future__ import annotations

from gptj_train.data.labelled_files import LabelledFields
from gptj_train.data.text_config import DataConfig
from gptj_train.schema import schema


@schema
class EvaluationDataConfig(DataConfig):
    """Held-out data for the checkpoint's task: text, labelled texts or questions."""

    validation: str | list[str]
    second_text_field: str | None
    label_field: str | list[str]

    @property
    def splits_by_key(self) -> dict[str, str | None]:
        """Evaluation has one split, ``data.split``; in the config of a training run it is validation_split."""
        return {"validation": self.split or self.validation_split}

    @property
    def labelled(self) -> LabelledFields:
        """The fields of labelled texts."""
        return LabelledFields(
            text_field=self.text_field,
            second_text_field=self.second_text_field,
            label_field=self.label_field,
            bad_records=self.bad_records,
            max_bad_share=self.max_bad_share,
        )
